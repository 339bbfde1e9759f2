"""--cpu-persist: a daemon finds its memory again, and nobody from before can spoil it."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import kvd
from kvd.arena import Arena
from kvd.daemon.keeper import drop_kept, keeper_path
from kvd.errors import KvdError, LeaseExpired
from tests.conftest import DaemonProcess
from tests.crash_client import pattern
from tests.test_crash import CrashClient, goes_on
from tests.tier_prompts import LAYOUT, PATIENCE_S, SIZE, keys_of, load, store, until

ROOT = Path(__file__).parent.parent
KILLS = 30


@contextmanager
def forgotten(daemon: DaemonProcess) -> Iterator[DaemonProcess]:
    """A daemon that is killed in the end, and what is kept of it dropped."""
    try:
        with daemon:
            yield daemon
    finally:
        drop_kept(daemon.socket)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    with forgotten(DaemonProcess(tmp_path, "--cpu-persist", "--cpu-persist-s", "60")) as running:
        yield running
    until(lambda: not keeper_path(running.socket).exists(), "the keeper stays")


def hashed(client: kvd.Client, prompt: int) -> None:
    """Wait until the daemon knows the checksums of a prompt: then it can find it again."""

    def is_hashed() -> bool:
        with client.pin(LAYOUT, keys_of(prompt)) as lease:
            return len(lease._checksums) == 8 and all(lease._checksums)

    until(is_hashed, "chunks are not hashed")


@pytest.mark.parametrize("ending", ["kill", "stop"])
def test_memory_survives_the_daemon(daemon: DaemonProcess, ending: str) -> None:
    with daemon.connect() as client:
        for prompt in range(3):
            store(client, prompt)
            hashed(client, prompt)
    if ending == "kill":
        daemon.kill()
    else:
        assert daemon.stop() == 0
    daemon.restart()
    with daemon.connect() as client:
        status = client.status(audit=True)
        assert status.num_chunks == 24
        assert [load(client, prompt) for prompt in range(3)] == [8] * 3
        status = client.status(audit=True)
        # Each was looked at once, when it was first asked for.
        assert status.counters["revive_chunks"] == 24
        assert load(client, 0) == 8
        assert client.status().counters["revive_chunks"] == 24


def test_it_survives_again_and_again_and_serves_what_is_new(daemon: DaemonProcess) -> None:
    for prompt in range(5):
        with daemon.connect() as client:
            assert [load(client, earlier) for earlier in range(prompt)] == [8] * prompt
            store(client, prompt)
            hashed(client, prompt)
            client.status(audit=True)
        daemon.restart()


def test_memory_that_was_changed_is_a_miss(daemon: DaemonProcess) -> None:
    keys = keys_of(0)
    with daemon.connect() as client:
        store(client, 0)
        hashed(client, 0)
        # A client that scribbles over the arena, while no daemon looks.
        with client.pin(LAYOUT, keys) as lease:
            third = lease.raw(3)
            daemon.kill()
            third[SIZE // 2] ^= 1
            with pytest.raises(LeaseExpired):
                lease.check()
            lease.release()
    daemon.restart()
    with daemon.connect() as client:
        assert load(client, 0) == 3
        assert client.status(audit=True).counters["damaged_chunks"] == 1


def test_a_reader_from_before_is_told(daemon: DaemonProcess) -> None:
    with daemon.connect() as client:
        store(client, 0)
        lease = client.pin(LAYOUT, keys_of(0), lease_s=3000)
        out = np.empty(SIZE, dtype=np.uint8)
        lease.load(0, out)
        daemon.restart()
        with pytest.raises(LeaseExpired, match="the session ended"):
            lease.load(0, out)
        lease.release()


def test_a_writer_from_before_keeps_its_bytes_until_it_has_stopped(daemon: DaemonProcess) -> None:
    """It writes on into its extents after the kill; nobody else may have them meanwhile."""
    code = f"""
import sys, numpy as np
import kvd
from tests.tier_prompts import LAYOUT, keys_of
client = kvd.connect({str(daemon.socket)!r})
reservation = client.reserve(LAYOUT, keys_of(99))
views = [reservation.raw(index) for index in reservation]
for line in sys.stdin:
    for view in views:
        view[:] = 0xEE
    print("written", flush=True)
"""
    writer = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert writer.stdin is not None
    assert writer.stdout is not None
    try:
        with daemon.connect() as client:
            until(lambda: client.status().num_reserved == 8, "nothing is reserved")
        daemon.restart()
        with daemon.connect() as client:
            held = client.status(audit=True).tiers[0].used
            assert held == 8 << 20
            # All that is free is filled, and read again after the late writer has written.
            for prompt in range(7):
                store(client, prompt)
            writer.stdin.write("go\n")
            writer.stdin.flush()
            assert writer.stdout.readline() == "written\n"
            assert [load(client, prompt) for prompt in range(7)] == [8] * 7
            writer.stdin.close()
            writer.wait()
            until(lambda: client.status().tiers[0].num_extents == 56, "bytes stay held")
            client.status(audit=True)
    finally:
        writer.kill()
        writer.wait()
        writer.stdout.close()


def test_a_client_that_comes_back_says_what_it_has_stopped(daemon: DaemonProcess) -> None:
    client = daemon.connect()
    reservation = client.reserve(LAYOUT, keys_of(0))
    assert len(reservation) == 8
    daemon.restart()
    with daemon.connect() as monitor:
        assert monitor.status(audit=True).tiers[0].num_extents == 8
        with pytest.raises(KvdError):
            reservation.commit()
        # The next call attaches anew, and tells.
        store(client, 1)
        assert load(client, 1) == 8
        assert monitor.status(audit=True).tiers[0].num_extents == 8
    client.close()


def test_without_the_flag_nothing_is_kept(daemon: DaemonProcess, tmp_path: Path) -> None:
    with daemon.connect() as client:
        store(client, 0)
        hashed(client, 0)
    daemon.kill()
    with DaemonProcess(tmp_path) as plain:
        with plain.connect() as client:
            assert client.status().num_chunks == 0
        until(lambda: not keeper_path(plain.socket).exists(), "the keeper stays")


def test_another_size_begins_anew(daemon: DaemonProcess, tmp_path: Path) -> None:
    with daemon.connect() as client:
        store(client, 0)
        hashed(client, 0)
    daemon.kill()
    with (
        DaemonProcess(tmp_path, "--cpu-persist", cpu_size="32MiB") as other,
        other.connect() as client,
    ):
        assert client.status(audit=True).num_chunks == 0
        store(client, 0)
        assert load(client, 0) == 8


def test_memory_and_disk_are_found_together(tmp_path: Path) -> None:
    with forgotten(DaemonProcess.on_disk(tmp_path, "--cpu-persist", cpu_size="16MiB")) as daemon:
        with daemon.connect() as client:
            for prompt in range(6):
                store(client, prompt)
            client.persist(timeout_s=PATIENCE_S)
            hashed(client, 5)
        daemon.restart()
        with daemon.connect() as client:
            status = client.status(audit=True)
            assert status.num_chunks == 48
            assert status.tiers[0].num_extents >= 8
            assert [load(client, prompt) for prompt in (5, 4, 3, 2, 1, 0)] == [8] * 6
            counters = client.status(audit=True).counters
            assert counters["revive_chunks"] >= 8
            assert counters["promote_chunks"] >= 24


def test_thirty_kills_and_never_a_wrong_byte(tmp_path: Path) -> None:
    chance = random.Random(11)
    with forgotten(DaemonProcess(tmp_path, "--cpu-persist", cpu_size="8MiB")) as daemon:
        clients = [CrashClient(tmp_path, daemon.socket, seed) for seed in (1, 2)]
        revived = 0
        try:
            goes_on(clients)
            for _ in range(KILLS):
                time.sleep(chance.random() * 0.05)
                with daemon.connect(timeout_s=PATIENCE_S) as monitor:
                    revived += monitor.status(audit=True).counters["revive_chunks"]
                daemon.restart()
                goes_on(clients)
            for client in clients:
                client.kill()
                assert client.output.read_text() == ""
            with daemon.connect(timeout_s=PATIENCE_S) as monitor:
                until(lambda: monitor.status(audit=True).num_sessions == 1, "a session stays open")
                assert monitor.status(audit=True).num_reserved == 0
            # Else no kill found anything to find again.
            assert revived > 5
        finally:
            for client in clients:
                client.kill()


def test_an_arena_that_is_kept_has_its_bytes(tmp_path: Path) -> None:
    # The whole idea, in one process: what was written before the adoption is there after it.
    first = Arena.create(2 << 20, huge_pages="never")
    first.populate(huge_pages="never")
    first.bytes[:4096] = pattern(keys_of(0)[0], 4096)
    second = Arena.adopt(os.dup(first.fd))
    second.populate(huge_pages="never")
    assert np.array_equal(second.bytes[:4096], pattern(keys_of(0)[0], 4096))
    first.close()
    second.close()
