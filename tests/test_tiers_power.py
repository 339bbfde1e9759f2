"""Power cuts under a daemon with a disk: log and index together, on a device that loses and tears
whatever it was not told to flush.

What is promised, and tested: all that `persist` has acknowledged is there, the last one too.
"""

from __future__ import annotations

import ctypes
import os
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from kvd.errors import TierFailed
from tests.forgetful_device import FSYNC, READ, WRITE, Disk, empty_disk, find_obstacle
from tests.tier_judge import PATIENCE_S, TierDaemon, Writers, judge
from tests.tier_writer import keys_of, load, store

DISK_SIZE = 160 << 20

# Of all cuts, those that come while the daemon is still starting, and how long that may take.
START_FRACTION = 0.25
START_S = 0.6

SYNC_FILE_RANGE_WRITE = 2


@pytest.fixture
def blank(tmp_path: Path) -> bytes:
    """The content of an empty disk."""
    if obstacle := find_obstacle(tmp_path):
        pytest.skip(obstacle)
    return empty_disk(tmp_path, DISK_SIZE)


class Outage:
    """A disk through one power cut after the other, and what must be on it."""

    def __init__(self, folder: Path, content: bytes, seed: int, *flags: str, keeps_all: bool):
        self.content = content
        self.num_cuts = self.num_lost_writes = self.num_verified = 0
        self._folder = folder
        self._chance = random.Random(seed)
        self._flags = flags
        self._keeps_all = keeps_all
        # Prompts that must be there.
        self._must: set[int] = set()
        # Prompts that were tried before the last cut: an answer may have been on its way then, and
        # be heard after it.
        self._stale: set[int] = set()
        self.writers = Writers(folder, folder / "kvd.sock", count=2)
        self.writers.freeze()

    def cut(self) -> None:
        """Start, judge, work, and lose power somewhere on the way."""
        with self._running() as (disk, daemon):
            with shaken(daemon.path, self._chance.getrandbits(32)):
                self._work(daemon)
                said = self.writers.said()
                self.content, num_lost = disk.device.power_cut(self._chance)
            self.writers.freeze()
        said = said.without(self._stale)
        self._stale.update(self.writers.said().tried)
        self.num_cuts += 1
        self.num_lost_writes += num_lost
        if self._keeps_all:
            self._must |= set(said.done)

    def judge(self) -> None:
        """Look at everything at last."""
        with self._running() as (_, daemon):
            self._judge(daemon, is_thorough=True)

    @contextmanager
    def _running(self) -> Iterator[tuple[Disk, TierDaemon]]:
        disk = Disk(self._folder / "disk", self.content)
        daemon = TierDaemon(self._folder, disk.folder / "nvme", *self._flags)
        try:
            yield disk, daemon
        finally:
            daemon.kill()
            disk.close()

    def _work(self, daemon: TierDaemon) -> None:
        if self.num_cuts and self._chance.random() < START_FRACTION:
            time.sleep(self._chance.random() * START_S)
            return
        self._judge(daemon)
        self.writers.thaw()
        self.writers.advance(self._chance.randint(1, 600))
        time.sleep(self._chance.random() * 0.01)

    def _judge(self, daemon: TierDaemon, *, is_thorough: bool = False) -> None:
        """Of what the last cut has left, all must stay."""
        with daemon.connect() as client:
            must = sorted(self._must)
            found, verified = judge(
                client, self.writers, must, self._chance, is_thorough=is_thorough
            )
        self.num_verified += verified
        if self._keeps_all:
            self._must = found


@contextmanager
def shaken(folder: Path, seed: int) -> Iterator[None]:
    """Meanwhile the kernel is made to write any part of any file early; nothing is flushed."""
    chance, is_over = random.Random(seed), threading.Event()

    def shake() -> None:
        while not is_over.wait(0.003):
            # Files come and go, and the folder is made by the daemon.
            with suppress(OSError, IndexError):
                write_early(chance.choice([p for p in folder.rglob("*") if p.is_file()]), chance)

    thread = threading.Thread(target=shake, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def write_early(path: Path, chance: random.Random) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        starts = (0, chance.randrange(max(path.stat().st_size, 1)) & ~4095)
        for start in starts:
            place = (ctypes.c_long(start), ctypes.c_long(64 << 10))
            ctypes.CDLL(None).sync_file_range(fd, *place, SYNC_FILE_RANGE_WRITE)
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("nvme_size", "num_cuts", "keeps_all"),
    [
        pytest.param("128MiB", 24, True, id="roomy"),
        # Segments are given back all the time: nothing must be there, but nothing may be wrong.
        pytest.param("4MiB", 8, False, id="tight"),
    ],
)
def test_power_cuts_take_nothing_that_was_acknowledged(
    tmp_path: Path, blank: bytes, nvme_size: str, num_cuts: int, keeps_all: bool
) -> None:
    flags = ("--nvme-size", nvme_size, "--cpu-size", "4MiB")
    outage = Outage(tmp_path, blank, 3, *flags, keeps_all=keeps_all)
    try:
        for _ in range(num_cuts):
            outage.cut()
        outage.judge()
        num_acknowledged = len(outage.writers.said().done)
    finally:
        outage.writers.kill()
    print(
        f"cuts={outage.num_cuts} acknowledged={num_acknowledged} verified={outage.num_verified} "
        f"lost_writes={outage.num_lost_writes}"
    )
    assert num_acknowledged > num_cuts
    assert outage.num_verified > num_cuts
    # Else these were no power cuts.
    assert outage.num_lost_writes > 0


@pytest.fixture
def disk(tmp_path: Path, blank: bytes) -> Iterator[Disk]:
    disk = Disk(tmp_path / "disk", blank)
    yield disk
    disk.close()


FLAGS = ("--nvme-size", "16MiB", "--cpu-size", "8MiB")


def loads_whole(folder: Path, content: bytes, *prompts: int) -> list[bool]:
    """What a daemon finds on a disk of this content."""
    disk = Disk(folder / "after", content)
    daemon = TierDaemon(folder, disk.folder / "nvme", *FLAGS)
    try:
        with daemon.connect() as client:
            return [load(client, prompt) == len(keys_of(prompt)) for prompt in prompts]
    finally:
        daemon.kill()
        disk.close()


def test_a_stop_leaves_nothing_that_a_power_cut_could_take(tmp_path: Path, disk: Disk) -> None:
    daemon = TierDaemon(tmp_path, disk.folder / "nvme", *FLAGS)
    try:
        with daemon.connect() as client:
            for prompt in range(1, 9):
                store(client, prompt)
        assert daemon.stop() == 0
        content = disk.device.content_flushed
    finally:
        daemon.kill()
    assert loads_whole(tmp_path, content, *range(1, 9)) == [True] * 8


def test_a_persist_that_has_returned_is_safe_at_once(tmp_path: Path, disk: Disk) -> None:
    daemon = TierDaemon(tmp_path, disk.folder / "nvme", *FLAGS)
    contents = []
    try:
        with daemon.connect() as client:
            for prompt in range(1, 5):
                store(client, prompt)
                keys = keys_of(prompt)
                assert client.persist(keys, timeout_s=PATIENCE_S) == len(keys)
                contents.append(disk.device.content_flushed)
    finally:
        daemon.kill()
    for prompt, content in enumerate(contents, start=1):
        (tmp_path / f"{prompt}").mkdir()
        assert (
            loads_whole(tmp_path / f"{prompt}", content, *range(1, prompt + 1)) == [True] * prompt
        )


def test_a_device_that_cannot_write_is_told_and_costs_nothing_in_memory(
    tmp_path: Path, disk: Disk
) -> None:
    daemon = TierDaemon(tmp_path, disk.folder / "nvme", *FLAGS)
    try:
        with daemon.connect() as client:
            disk.device.failing = frozenset({WRITE, FSYNC})
            store(client, 1)
            with pytest.raises(TierFailed, match="chunks are durable, not all"):
                client.persist(keys_of(1), timeout_s=PATIENCE_S)
            assert load(client, 1) == len(keys_of(1))
            assert client.status(audit=True).tiers[1].failure
    finally:
        daemon.kill()


def test_a_device_that_cannot_read_costs_misses_and_not_the_daemon(
    tmp_path: Path, disk: Disk
) -> None:
    daemon = TierDaemon(tmp_path, disk.folder / "nvme", *FLAGS)
    try:
        with daemon.connect() as client:
            store(client, 1)
            client.persist(keys_of(1), timeout_s=PATIENCE_S)
        daemon.kill()
        daemon.start()
        with daemon.connect() as client:
            disk.device.failing = frozenset({READ})
            assert load(client, 1) == 0
            assert client.status(audit=True).counters["nvme_read_errors"] > 0
            store(client, 2)
            assert load(client, 2) == len(keys_of(2))
    finally:
        daemon.kill()
