"""Fifty SIGKILLs: never a wrong byte, never a leaked extent, and the survivors go on."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import kvd
from tests.conftest import DaemonProcess
from tests.crash_client import pattern
from tests.test_client import chunk_keys

KILLS = 50

# What anything may take on a loaded machine, before the test gives up.
PATIENCE_S = 60

REPOSITORY = Path(__file__).parent.parent


class CrashClient:
    """One crash_client process and what it has done so far."""

    def __init__(self, folder: Path, socket: Path, seed: int) -> None:
        self.output = folder / f"client-{seed}.txt"
        self._progress_file = folder / f"progress-{seed}"
        self._progress_file.write_bytes(bytes(16))
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "tests.crash_client",
                    socket,
                    str(seed),
                    self._progress_file,
                ],
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=REPOSITORY,
            )

    @property
    def done(self) -> tuple[int, int]:
        """Operations and verified chunks."""
        operations, verified = np.fromfile(self._progress_file, dtype=np.uint64)
        return int(operations), int(verified)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def until(condition: Callable[[], bool], what: str) -> None:
    give_up = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < give_up, what
        time.sleep(0.002)


def goes_on(clients: list[CrashClient]) -> None:
    """Every client ends at least two operations more."""
    before = [client.done[0] for client in clients]
    for client, operations in zip(clients, before, strict=True):
        until(
            lambda client=client, operations=operations: client.done[0] >= operations + 2,
            f"client stands still: {client.output.read_text()}",
        )


def only_live_sessions_hold_anything(daemon: DaemonProcess, num_clients: int) -> None:
    """The dead client's session is gone, and the books balance with the survivors at work."""
    with daemon.connect(timeout_s=PATIENCE_S) as monitor:
        until(
            lambda: monitor.status(audit=True).num_sessions <= num_clients + 1,
            "a dead client's session stays open",
        )


def test_fifty_kills_of_clients_and_daemon(tmp_path: Path) -> None:
    chance = random.Random(7)
    daemon = DaemonProcess(tmp_path, cpu_size="8MiB")
    clients = [CrashClient(tmp_path, daemon.socket, seed) for seed in (1, 2)]
    dead: list[CrashClient] = []
    next_seed = 3
    verified = 0
    try:
        goes_on(clients)
        for _ in range(KILLS):
            time.sleep(chance.random() * 0.05)
            victim = chance.choice(["daemon", "client", "client"])
            if victim == "daemon":
                daemon.restart()
            else:
                index = chance.randrange(len(clients))
                dead.append(clients.pop(index))
                dead[-1].kill()
                only_live_sessions_hold_anything(daemon, len(clients))
                goes_on(clients)
                clients.append(CrashClient(tmp_path, daemon.socket, next_seed))
                next_seed += 1
            goes_on(clients)
        with daemon.connect() as monitor:
            until(lambda: monitor.status().counters["evict_chunks"] > 0, "nothing is ever evicted")
            for client in clients:
                client.kill()
            until(lambda: monitor.status(audit=True).num_sessions == 1, "a session stays open")
            status = monitor.status(audit=True)
        assert (status.num_pinned, status.num_reserved) == (0, 0)
        assert status.tiers[0].num_extents == status.num_chunks > 0
        for client in [*dead, *clients]:
            assert client.output.read_text() == ""
            verified += client.done[1]
        assert verified > 1000
    finally:
        for client in clients:
            client.kill()
        daemon.kill()


def test_a_client_killed_while_it_writes_leaves_nothing(
    daemon: DaemonProcess, layout: object
) -> None:
    code = f"""
import os, signal, kvd
from tests.crash_client import LAYOUTS, pattern, prompt_keys
client = kvd.connect({str(daemon.socket)!r})
layout = LAYOUTS[0]
keys = prompt_keys(layout, 1)
reservation = client.reserve(layout, keys)
reservation.write(0, pattern(keys[0], layout.size(layout.chunk_tokens)))
lease = client.pin(layout, keys)
os.kill(os.getpid(), signal.SIGKILL)
"""
    with daemon.connect() as monitor:
        killed = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False)
        assert killed.returncode == -signal.SIGKILL
        until(lambda: monitor.status(audit=True).num_sessions == 1, "the session stays open")
        status = monitor.status(audit=True)
        assert (status.num_reserved, status.num_chunks, status.tiers[0].used) == (0, 0, 0)


def test_the_pattern_tells_chunks_apart() -> None:
    # The crash test is only as good as this: other keys, and shifted bytes, must look different.
    layout = kvd.KVLayout(
        model="m", revision="1", dtype="uint8", num_layers=1, num_kv_heads=1, head_dim=64
    )
    one, other = chunk_keys(layout, 2)
    assert (pattern(one, 10_000) != pattern(other, 10_000)).mean() > 0.9
    assert (pattern(one, 10_000)[4096:] != pattern(one, 10_000)[:-4096]).mean() > 0.9
