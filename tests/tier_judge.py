"""What the crash tests of a daemon with a disk share: a daemon and a writer to be killed, and the
judge of what is there afterwards.

The judge knows only the writer's journal. What was never tried must not be listed, what was
acknowledged must be there, and every byte that can be loaded must be the right one.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence, Set
from pathlib import Path

import kvd
from kvd.errors import Unavailable
from kvd.keys import ChunkKey
from tests.tier_writer import keys_of, load

# What anything may take on a loaded machine, before a test gives up.
PATIENCE_S = 60.0

# Prompts of which every byte is looked at in a quick judgement: the last ones, and some others.
LAST_PROMPTS = 15
SOME_PROMPTS = 15

REPOSITORY = Path(__file__).parent.parent

# Numbers of one writer's prompts; the next writer's are above.
PROMPTS_A_WRITER = 1_000_000


def until(condition: Callable[[], bool], what: str) -> None:
    give_up = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < give_up, what
        time.sleep(0.002)


class TierDaemon:
    """`kvd start` with a tier on disk, started without waiting for it."""

    def __init__(self, folder: Path, path: Path, *flags: str) -> None:
        self.socket = folder / "kvd.sock"
        self.log = folder / "kvd.log"
        self.path = path
        command = ["start", "--socket", str(self.socket), "--http", "none", "--grpc-socket", "none"]
        disk = ["--tiers", "cpu,nvme", "--nvme-path", str(path), "--nvme-reserve", "0"]
        self._command = [sys.executable, "-m", "kvd", *command, *disk, *flags]
        self.start()

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self._command, stderr=log, cwd=REPOSITORY)

    def run(self, *flags: str) -> subprocess.CompletedProcess[str]:
        """Another one on the same path, that is to end by itself."""
        command = [*self._command, *flags]
        return subprocess.run(
            command, cwd=REPOSITORY, capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )

    def kill(self) -> None:
        """SIGKILL, and wait for the end of it and of its index."""
        index = self.index_pid()
        self.process.kill()
        self.process.wait()
        until(lambda: index is None or not Path(f"/proc/{index}/exe").exists(), "its index lives")

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=PATIENCE_S)

    def connect(self) -> kvd.Client:
        """Wait until it serves. It must not end by itself."""
        give_up = time.monotonic() + PATIENCE_S
        while time.monotonic() < give_up:
            try:
                return kvd.connect(self.socket, timeout_s=PATIENCE_S)
            except Unavailable:
                assert self.process.poll() is None, self.log.read_text()[-2000:]
                time.sleep(0.005)
        raise AssertionError(f"no daemon after {PATIENCE_S} s: {self.log.read_text()[-2000:]}")

    def index_pid(self) -> int | None:
        """The process of its index, once there is one."""
        for children in Path(f"/proc/{self.process.pid}/task").glob("*/children"):
            for pid in _read(children).split():
                if "index_process" in _read(Path(f"/proc/{pid}/cmdline")):
                    return int(pid)
        return None

    def kill_index(self) -> bool:
        """SIGKILL to the process of its index; False if there is none now."""
        index = self.index_pid()
        if index is not None:
            os.kill(index, signal.SIGKILL)
        return index is not None


class Writers:
    """`count` processes that write, with one journal."""

    def __init__(self, folder: Path, socket: Path, count: int = 1) -> None:
        self.journal = folder / "journal"
        self.journal.touch()
        self.output = folder / "writer.txt"
        self._socket = socket
        self._count = count
        self._num_started = 0
        self.start()

    def start(self) -> None:
        self.processes = [self._start_one() for _ in range(self._count)]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def freeze(self) -> None:
        for process in self.processes:
            process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        for process in self.processes:
            process.send_signal(signal.SIGCONT)

    def advance(self, size: int) -> None:
        """Wait until the journal has grown by `size` bytes."""
        goal = self.journal.stat().st_size + size
        until(lambda: self.journal.stat().st_size >= goal, f"it stands: {self.output.read_text()}")

    def said(self) -> Said:
        """What the journal says; a line cut off by a kill was never said."""
        lines = self.journal.read_text().splitlines(keepends=True)
        words = (line.split() for line in lines if line.endswith("\n"))
        return Said([(word, int(prompt)) for word, prompt in words])

    def _start_one(self) -> subprocess.Popen[bytes]:
        self._num_started += 1
        first = str(self._num_started * PROMPTS_A_WRITER)
        command = [sys.executable, "-m", "tests.tier_writer", self._socket, self.journal, first]
        with self.output.open("ab") as output:
            return subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, cwd=REPOSITORY
            )


class Said:
    """What was written into a journal, in order."""

    def __init__(self, lines: Sequence[tuple[str, int]]) -> None:
        self._lines = lines

    @property
    def tried(self) -> list[int]:
        return [prompt for word, prompt in self._lines if word == "try"]

    @property
    def done(self) -> list[int]:
        return [prompt for word, prompt in self._lines if word == "done"]

    def without(self, prompts: Set[int]) -> Said:
        """As if nothing were said of these."""
        return Said([line for line in self._lines if line[1] not in prompts])


def listed_keys(client: kvd.Client) -> set[ChunkKey]:
    found: set[ChunkKey] = set()
    cursor = 0
    while True:
        page = client.list_chunks(cursor=cursor)
        found |= {ChunkKey(chunk.key) for chunk in page.chunks}
        cursor = page.cursor
        if not cursor:
            return found


def judge(
    client: kvd.Client,
    writers: Writers,
    must: Iterable[int],
    chance: random.Random,
    *,
    is_thorough: bool = False,
) -> tuple[set[int], int]:
    """Assert that nothing is missing of the prompts that `must` be there, nothing is listed that
    was never tried, and what is looked at is right: with `is_thorough` all that was ever tried.

    Returns the prompts that are listed whole, and how many chunks were loaded and verified.
    """
    must = list(must)
    listed = listed_keys(client)
    # Read after the list: a writer may be at work.
    tried = writers.said().tried
    assert listed <= {key for prompt in tried for key in keys_of(prompt)}, "a phantom"
    missing = [prompt for prompt in must if not listed.issuperset(keys_of(prompt))]
    assert not missing, f"acknowledged, and gone: {missing}"
    looked_at = tried
    if not is_thorough:
        others = chance.sample(tried, min(SOME_PROMPTS, len(tried)))
        looked_at = sorted({*must[-LAST_PROMPTS:], *tried[-LAST_PROMPTS:], *others})
    wanted = set(must)
    verified = 0
    for prompt in looked_at:
        found = load(client, prompt)
        assert found == len(keys_of(prompt)) or prompt not in wanted, f"{prompt} cannot be loaded"
        verified += found
    client.status(audit=True)
    assert "WRONG" not in writers.output.read_text(), writers.output.read_text()
    return {prompt for prompt in tried if listed.issuperset(keys_of(prompt))}, verified


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        # It has ended.
        return ""
