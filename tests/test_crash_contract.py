"""What an application has been told, what happens then, and what is there afterwards: one line of
docs/crash-contract.md after the other.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import lmdb
import numpy as np
import pytest
import xxhash

import kvd
from kvd.client.lease import Lease
from kvd.daemon.index_format import HEADER_NAME
from kvd.errors import LeaseExpired, TierFailed, Unavailable
from kvd.tiers.segment import BLOCK_SIZE
from tests.crash_client import pattern
from tests.tier_judge import PATIENCE_S, REPOSITORY, TierDaemon, until
from tests.tier_writer import keys_of, layout_of, load, store


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[TierDaemon]:
    daemon = TierDaemon(tmp_path, tmp_path / "nvme", "--nvme-size", "16MiB", "--cpu-size", "8MiB")
    yield daemon
    if daemon.process.poll() is None:
        daemon.kill()


def store_durably(daemon: TierDaemon, *prompts: int) -> None:
    with daemon.connect() as client:
        for prompt in prompts:
            store(client, prompt)
            keys = keys_of(prompt)
            assert client.persist(keys, timeout_s=PATIENCE_S) == len(keys)


def loads_whole(daemon: TierDaemon, *prompts: int) -> list[bool]:
    with daemon.connect() as client:
        return [load(client, prompt) == len(keys_of(prompt)) for prompt in prompts]


def test_what_is_committed_outlives_its_client(daemon: TierDaemon) -> None:
    code = (
        "import os, signal, sys, kvd\n"
        "from tests.tier_writer import store\n"
        "store(kvd.connect(sys.argv[1]), 1)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    daemon.connect().close()
    command = [sys.executable, "-c", code, str(daemon.socket)]
    killed = subprocess.run(command, cwd=REPOSITORY, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert loads_whole(daemon, 1) == [True]


def test_a_persist_that_its_client_does_not_live_to_hear_is_done_all_the_same(
    daemon: TierDaemon,
) -> None:
    code = (
        "import sys, kvd\n"
        "from kvd.errors import DeadlineExceeded\n"
        "from tests.tier_writer import keys_of, store\n"
        "client = kvd.connect(sys.argv[1])\n"
        "store(client, 1)\n"
        "print('stored', flush=True)\n"
        "client.persist(keys_of(1), timeout_s=60)\n"
    )
    daemon.connect().close()
    command = [sys.executable, "-c", code, str(daemon.socket)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.kill()
    with daemon.connect() as client:
        until(lambda: client.status(audit=True).num_sessions == 1, "the session stays open")
        assert load(client, 1) == len(keys_of(1))


def test_what_is_only_in_memory_ends_with_the_daemon(daemon: TierDaemon) -> None:
    with daemon.connect() as client:
        store(client, 1)
    daemon.kill()
    daemon.start()
    with daemon.connect() as client:
        assert client.lookup(keys_of(1)) == 0
        # A miss, and no more: it can be stored again.
        store(client, 1)
        assert load(client, 1) == len(keys_of(1))


def test_an_index_that_dies_costs_nothing_and_is_begun_anew(daemon: TierDaemon) -> None:
    store_durably(daemon, 1, 2)
    with daemon.connect() as client:
        assert daemon.kill_index()
        assert load(client, 1) == len(keys_of(1))
        store(client, 3)
        assert load(client, 3) == len(keys_of(3))

        # Refused, not promised, as long as there is no index.
        until(lambda: persists(client, 3), "no new index")
        client.status(audit=True)
    daemon.kill()
    daemon.start()
    assert loads_whole(daemon, 1, 2, 3) == [True] * 3


@pytest.mark.parametrize("damage", ["lost", "noise", "cut", "older", "newer"])
def test_an_index_that_cannot_be_used_is_made_from_the_log(daemon: TierDaemon, damage: str) -> None:
    store_durably(daemon, 1, 2, 3)
    daemon.kill()
    data = daemon.path / "index" / "data.mdb"
    if damage == "lost":
        shutil.rmtree(daemon.path / "index")
    elif damage == "noise":
        data.write_bytes(random.Random(1).randbytes(data.stat().st_size))
    elif damage == "cut":
        os.truncate(data, data.stat().st_size // 2)
    else:
        say_index_version(data, 1 if damage == "newer" else -1)
    daemon.start()
    assert loads_whole(daemon, 1, 2, 3) == [True] * 3
    assert "event=index_rebuilding" in daemon.log.read_text()
    # And the new one is one that can be used.
    daemon.kill()
    daemon.log.write_bytes(b"")
    daemon.start()
    assert loads_whole(daemon, 1, 2, 3) == [True] * 3
    assert "event=index_rebuilding" not in daemon.log.read_text()


def say_index_version(data: Path, change: int) -> None:
    with lmdb.open(str(data), subdir=False, lock=False) as env, env.begin(write=True) as txn:
        value = bytearray(txn.get(HEADER_NAME) or b"")
        value[8] += change
        value[-8:] = xxhash.xxh3_64_intdigest(HEADER_NAME + value[:-8]).to_bytes(8, "little")
        txn.put(HEADER_NAME, bytes(value))


@pytest.mark.parametrize("change", [-1, 1], ids=["older", "newer"])
@pytest.mark.parametrize("name", ["log", "segment-00000000"])
def test_a_log_of_another_version_is_refused_and_left_alone(
    daemon: TierDaemon, name: str, change: int
) -> None:
    store_durably(daemon, 1)
    daemon.kill()
    path = daemon.path / name
    before = path.read_bytes()
    block = bytearray(before[:BLOCK_SIZE])
    block[8] += change
    block[-8:] = xxhash.xxh3_64_intdigest(block[:-8]).to_bytes(8, "little")
    path.write_bytes(bytes(block) + before[BLOCK_SIZE:])
    refused = daemon.run()
    assert refused.returncode == 1
    expected = f"segment format {block[8] - change} expected, found {block[8]}"
    assert str(daemon.path) in refused.stderr
    assert expected in refused.stderr
    assert path.read_bytes() == bytes(block) + before[BLOCK_SIZE:]
    path.write_bytes(before)
    daemon.start()
    assert loads_whole(daemon, 1) == [True]


def test_the_second_daemon_on_a_path_hears_who_the_first_is(daemon: TierDaemon) -> None:
    store_durably(daemon, 1)
    refused = daemon.run("--socket", str(daemon.socket.with_name("second.sock")))
    assert refused.returncode == 1
    assert f"{daemon.path} is in use by process {daemon.process.pid}" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert loads_whole(daemon, 1) == [True]


def test_a_flipped_bit_is_a_miss_and_hits_nobody_else(daemon: TierDaemon) -> None:
    store_durably(daemon, 1, 2, 3)
    daemon.kill()
    payload = pattern(keys_of(2)[0], 64).tobytes()
    path = daemon.path / "segment-00000000"
    content = bytearray(path.read_bytes())
    content[content.index(payload) + 7] ^= 1
    path.write_bytes(content)
    daemon.start()
    with daemon.connect() as client:
        assert load(client, 2) == 0
        until(lambda: client.status().counters["quarantine_chunks"] == 1, "not quarantined")
        # It can be stored again, and is good then.
        store(client, 2)
        assert load(client, 2) == len(keys_of(2))
    assert loads_whole(daemon, 1, 3) == [True, True]


def test_a_quarantined_record_stays_away_though_the_index_is_lost(daemon: TierDaemon) -> None:
    test_a_flipped_bit_is_a_miss_and_hits_nobody_else(daemon)
    daemon.kill()
    shutil.rmtree(daemon.path / "index")
    daemon.start()
    with daemon.connect() as client:
        # It was stored again, but never persisted.
        assert client.lookup(keys_of(2)) == 0
        assert client.status(audit=True).counters["quarantine_chunks"] == 0
    assert loads_whole(daemon, 1, 3) == [True, True]


def test_a_stop_writes_what_is_owed_and_says_so(daemon: TierDaemon) -> None:
    with daemon.connect() as client:
        for prompt in range(1, 9):
            store(client, prompt)
    assert daemon.stop() == 0
    assert " left=0 " in daemon.log.read_text()
    daemon.start()
    assert loads_whole(daemon, *range(1, 9)) == [True] * 8


def test_what_was_cleared_stays_away_once_the_index_knows(daemon: TierDaemon) -> None:
    store_durably(daemon, 1, 2)
    with daemon.connect() as client:
        assert client.clear(keys_of(1))[0] == len(keys_of(1))
        # It waits for the index.
        client.persist(keys_of(2), timeout_s=PATIENCE_S)
    daemon.kill()
    daemon.start()
    assert loads_whole(daemon, 1, 2) == [False, True]


def test_what_was_cleared_can_come_back_when_the_index_is_lost(daemon: TierDaemon) -> None:
    store_durably(daemon, 1, 2)
    with daemon.connect() as client:
        client.clear(keys_of(1))
        client.persist(keys_of(2), timeout_s=PATIENCE_S)
    daemon.kill()
    shutil.rmtree(daemon.path / "index")
    daemon.start()
    # Not wanted, and not promised otherwise; but right.
    assert loads_whole(daemon, 1, 2) == [True, True]


def test_a_hold_ends_with_its_daemon(daemon: TierDaemon) -> None:
    store_durably(daemon, 1)
    with daemon.connect() as client:
        assert client.hold(keys_of(1), True) == len(keys_of(1))
        assert all(chunk.is_held for chunk in client.list_chunks().chunks)
    daemon.kill()
    daemon.start()
    with daemon.connect() as client:
        assert not any(chunk.is_held for chunk in client.list_chunks().chunks)


def test_pins_end_with_their_client(daemon: TierDaemon) -> None:
    code = (
        "import os, signal, sys, kvd\n"
        "from tests.tier_writer import keys_of, layout_of\n"
        "lease = kvd.connect(sys.argv[1]).pin(layout_of(1), keys_of(1))\n"
        "assert len(lease)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    store_durably(daemon, 1)
    command = [sys.executable, "-c", code, str(daemon.socket)]
    killed = subprocess.run(command, cwd=REPOSITORY, check=False)
    assert killed.returncode == -signal.SIGKILL
    with daemon.connect() as client:
        until(lambda: client.status(audit=True).num_sessions == 1, "the session stays open")
        assert client.status().num_pinned == 0
        assert client.clear(keys_of(1))[0] == len(keys_of(1))


def test_a_pin_tells_when_its_daemon_is_gone(daemon: TierDaemon) -> None:
    store_durably(daemon, 1)
    layout, keys = layout_of(1), keys_of(1)
    out = np.empty(layout.size(layout.chunk_tokens), dtype=np.uint8)
    with daemon.connect() as client:
        lease = client.pin(layout, keys)
        lease.load(0, out)
        raw = lease.raw(0)
        daemon.kill()
        # The bytes stay where they are, in memory that is the client's too; but nobody answers for
        # them any more.
        assert np.array_equal(raw, pattern(keys[0], out.size))
        until(lambda: not is_good(lease), "the lease does not notice")
        lease.release()
        daemon.start()
        daemon.connect().close()
        until(lambda: client_loads(client, 1), "the client does not come back")


def is_good(lease: Lease) -> bool:
    try:
        lease.check()
    except LeaseExpired:
        return False
    return True


def client_loads(client: kvd.Client, prompt: int) -> bool:
    try:
        return load(client, prompt) == len(keys_of(prompt))
    except Unavailable:
        return False


def test_a_pin_of_what_is_in_memory_needs_neither_index_nor_disk(daemon: TierDaemon) -> None:
    store_durably(daemon, 1)
    layout, keys = layout_of(1), keys_of(1)
    with daemon.connect() as client, client.pin(layout, keys) as lease:
        assert daemon.kill_index()
        for segment in daemon.path.glob("segment-*"):
            os.truncate(segment, BLOCK_SIZE)
        for index, key in enumerate(keys):
            assert np.array_equal(lease.raw(index), pattern(key, lease.raw(index).size))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 12 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "kvd-test", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system needs root and mount")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_told_and_costs_nothing_that_is_there(
    tmp_path: Path, small_disk: Path
) -> None:
    daemon = TierDaemon(tmp_path, small_disk / "nvme", "--nvme-size", "64MiB", "--cpu-size", "8MiB")
    try:
        store_durably(daemon, 1, 2)
        filler = small_disk / "filler"
        with suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        with daemon.connect() as client:
            refused = 0
            for prompt in range(3, 300):
                store(client, prompt)
                # What is stored is in memory, whatever becomes of the disk.
                assert load(client, prompt) == len(keys_of(prompt))
                try:
                    client.persist(keys_of(prompt), timeout_s=PATIENCE_S)
                except TierFailed:
                    refused += 1
                    break
            assert refused
            status = client.status(audit=True)
            assert status.tiers[1].disk_size <= 12 << 20
            filler.unlink()
            until(lambda: persists(client, 3), "it does not go on")
    finally:
        daemon.kill()


def persists(client: kvd.Client, prompt: int) -> bool:
    """Store it and have it persisted."""
    store(client, prompt)
    try:
        return client.persist(keys_of(prompt), timeout_s=PATIENCE_S) == len(keys_of(prompt))
    except TierFailed:
        return False


# The contract's page.


def test_the_contract_names_tests_that_exist() -> None:
    page = (REPOSITORY / "docs" / "crash-contract.md").read_text()
    sources = {path.stem: path.read_text() for path in (REPOSITORY / "tests").glob("test_*.py")}
    rows = [line for line in page.splitlines() if line.startswith("| ") and "---" not in line]
    named = 0
    for row in rows:
        names = re.findall(r"`(test_\w+)::(test_\w+)`", row)
        assert names or row.startswith("| told"), f"a line without a test: {row}"
        for file, test in names:
            assert f"def {test}(" in sources.get(file, ""), f"{file}::{test} does not exist"
            named += 1
    assert named > 20
