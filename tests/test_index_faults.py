"""The index under kills, damage, full disks and silence: nothing acknowledged is lost, nothing is
ever changed, and whoever waits hears of it.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from kvd.daemon import index as index_module
from kvd.daemon import index_channel, index_database
from kvd.daemon.index import ChunkIndex, FoundIndex, IndexRecord
from kvd.daemon.index_database import Database
from kvd.daemon.index_format import pack_record
from kvd.errors import TierFailed
from tests.index_writer import LOG_ID, NUM_KEYS, record_of
from tests.test_index import LAYOUTS, filled, found_in, records_of, reopened, run

KILLS = 20
FLIPS = 240

# What anything may take on a loaded machine, before a test gives up.
PATIENCE_S = 60

PAGE_SIZE = 4096
REPOSITORY = Path(__file__).parent.parent


def pid_of(folder: Path) -> int:
    """The process that has the index, as its lock says."""
    return int((folder / "index" / "lock").read_text())


async def failed(index: ChunkIndex) -> str:
    """Wait until the index has heard of its process's end; why it failed."""
    async with asyncio.timeout(PATIENCE_S):
        while not index.failure:
            await asyncio.sleep(0.001)
    return index.failure


def test_the_end_of_the_process_is_noticed_and_a_reset_begins_anew(tmp_path: Path) -> None:
    async def story() -> None:
        index = await filled(tmp_path, range(10))
        os.kill(pid_of(tmp_path), signal.SIGKILL)
        assert "SIGKILL" in await failed(index)
        index.put(record_of(11))
        with pytest.raises(TierFailed, match="SIGKILL"):
            await index.commit()
        await index.reset(records_of(range(5)), LAYOUTS)
        assert index.failure == ""
        index.put(record_of(12))
        await index.commit()
        index, found = await reopened(index, tmp_path)
        assert sorted(found.records) == sorted([*records_of(range(5)), record_of(12)])
        assert (found.layouts, found.reason) == (LAYOUTS, "")
        await index.close()

    run(story())


async def put_until_it_fails(index: ChunkIndex, numbers: range, *, label_size: int = 150) -> int:
    """Commit thirty records at a time; how many were committed when that failed."""
    num_committed = 0
    try:
        for at in range(0, len(numbers), 30):
            for number in numbers[at : at + 30]:
                index.put(record_of(number, label_size=label_size))
                index.put_layout(bytes([number % 256]) * 32, bytes(label_size * 20))
            await index.commit()
            num_committed = at + 30
    except TierFailed:
        return num_committed
    raise AssertionError("it did not fail")


def test_a_kill_in_mid_commit_fails_those_who_wait_and_loses_nothing_committed(
    tmp_path: Path,
) -> None:
    chance = random.Random(5)

    async def story() -> None:
        index = await filled(tmp_path, range(0))
        first = num_committed = 0
        for _ in range(10):
            asyncio.get_running_loop().call_later(
                chance.uniform(0, 0.03), os.kill, pid_of(tmp_path), signal.SIGKILL
            )
            num_put = await put_until_it_fails(index, range(first, first + 100_000))
            await index.close()
            index, found = await ChunkIndex.open(tmp_path, LOG_ID)
            assert found.reason == ""
            assert all(record == record_of(record.offset // 4096) for record in found.records)
            there = {record.offset // 4096 for record in found.records}
            # Each key has its last committed record, or a later one.
            for number in range(first, first + num_put):
                assert any(later in there for later in range(number, first + 100_000, NUM_KEYS))
            num_committed += num_put
            first = max(there, default=-1) + 1
        await index.close()
        assert num_committed > 300

    run(story())


def test_a_silent_process_fails_the_commit_and_does_not_hold_the_end_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        index = await filled(tmp_path, range(10))
        monkeypatch.setattr(index_module, "PATIENCE_S", 0.2)
        os.kill(pid_of(tmp_path), signal.SIGSTOP)
        index.put(record_of(11))
        with pytest.raises(TierFailed, match="no answer within"):
            await index.commit()
        # SIGKILL ends a stopped process too.
        monkeypatch.setattr(index_module, "PATIENCE_S", 60.0)
        await index.reset([], {})
        os.kill(pid_of(tmp_path), signal.SIGSTOP)
        monkeypatch.setattr(index_module, "PATIENCE_S", 0.2)
        await index.close()
        monkeypatch.setattr(index_module, "PATIENCE_S", 60.0)
        assert (await found_in(tmp_path)).reason == ""

    run(story())


def test_a_process_that_takes_nothing_does_not_fill_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        index = await filled(tmp_path, range(10))
        monkeypatch.setattr(index_module, "QUEUE_SIZE_MAX", 100_000)
        for number in range(10_000):
            index.put(record_of(number))
            assert index._queue.size <= 100_300
        assert "wait for its process" in index.failure
        with pytest.raises(TierFailed, match="wait for its process"):
            await index.commit()
        await index.close()

    run(story())


def test_a_process_that_is_silent_while_it_opens_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        await (await filled(tmp_path, range(10))).close()
        monkeypatch.setattr(index_module, "PATIENCE_S", 2.0)
        stopped: list[int] = []
        start = index_channel._spawn

        def spawn_stopped(*args: object) -> subprocess.Popen[bytes]:
            process = start(*args)  # type: ignore[arg-type]
            if not stopped:
                os.kill(process.pid, signal.SIGSTOP)
            stopped.append(process.pid)
            return process

        monkeypatch.setattr(index_channel, "_spawn", spawn_stopped)
        index, found = await ChunkIndex.open(tmp_path, LOG_ID)
        assert len(stopped) == 2
        assert found.reason.startswith("damaged: no answer within")
        assert index.failure == ""
        await index.close()

    run(story())


def test_a_kill_while_it_opens_leaves_an_index_that_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []
    spawn = index_channel._spawn

    def watched(folder: Path, log_id: bytes, channel: socket.socket) -> subprocess.Popen[bytes]:
        started.append(spawn(folder, log_id, channel))
        return started[-1]

    monkeypatch.setattr(index_channel, "_spawn", watched)

    async def story() -> None:
        await (await filled(tmp_path, range(400))).close()
        for delay_ms in range(0, 60, 3):
            opening = asyncio.ensure_future(ChunkIndex.open(tmp_path, LOG_ID))
            await asyncio.sleep(delay_ms / 1000)
            opening.cancel()
            try:
                index, _ = await opening
            except asyncio.CancelledError:
                pass
            else:
                await index.close()
            assert all(process.returncode is not None for process in started)
            found = await found_in(tmp_path)
            assert (found.reason, sorted(found.records)) == ("", records_of(range(400)))

    run(story())


def test_a_crash_between_any_two_steps_leaves_the_old_index_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "kv" / "index"
    snapshots: list[Path] = []

    def snapshot() -> None:
        snapshots.append(tmp_path / f"snapshot{len(snapshots)}")
        shutil.copytree(folder, snapshots[-1] / "index")

    def watched(step: Callable[..., object]) -> Callable[..., object]:
        def both(*args: object) -> object:
            snapshot()
            result = step(*args)
            snapshot()
            return result

        return both

    async def story() -> None:
        await (await filled(tmp_path / "kv", range(10))).close()
        # What an earlier crash left.
        (folder / "fresh.mdb").write_bytes(b"half of a database")
        snapshot()
        monkeypatch.setattr(Path, "rename", watched(Path.rename))
        monkeypatch.setattr(Path, "unlink", watched(Path.unlink))
        monkeypatch.setattr(index_database, "_sync_folder", watched(index_database._sync_folder))
        monkeypatch.setattr(Database, "append", watched(Database.append))
        monkeypatch.setattr(Database, "_transact", watched(Database._transact))
        database = Database(folder, LOG_ID)
        database.append([pack_record(record) for record in records_of(range(20, 30))])
        database.place(is_complete=True)
        database.close()
        monkeypatch.undo()
        seen = set()
        for copy in snapshots:
            found = await found_in(copy)
            assert found.reason == ""
            is_new = sorted(found.records) == records_of(range(20, 30))
            assert is_new or sorted(found.records) == records_of(range(10))
            seen.add(is_new)
        assert seen == {True, False}
        assert len(snapshots) > 8

    run(story())


def test_a_folder_that_cannot_be_one_is_unusable(tmp_path: Path) -> None:
    async def story() -> None:
        (tmp_path / "index").write_bytes(b"a file")
        index, found = await ChunkIndex.open(tmp_path, LOG_ID)
        assert found.reason.startswith("unusable")
        assert index.failure
        with pytest.raises(TierFailed):
            await index.commit()
        with pytest.raises(TierFailed):
            await index.reset([], {})
        (tmp_path / "index").unlink()
        await index.reset([record_of(1)], {})
        await index.close()
        assert (await found_in(tmp_path)).records == [record_of(1)]

    run(story())


def test_a_process_that_cannot_be_started_is_a_failure_of_the_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        await (await filled(tmp_path, range(10))).close()
        monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
        index, found = await ChunkIndex.open(tmp_path, LOG_ID)
        assert found.reason.startswith("unusable")
        assert "could not be started" in index.failure
        await index.close()
        monkeypatch.undo()
        assert sorted((await found_in(tmp_path)).records) == records_of(range(10))

    run(story())


# Damage.


def worn_index(folder: Path) -> dict[bytes, set[IndexRecord]]:
    """An index with all kinds of pages: many commits, replaced and deleted records, long values.
    All that was ever put, by key.
    """
    put: dict[bytes, set[IndexRecord]] = {}

    async def story() -> None:
        index = await filled(folder, range(0))
        for fingerprint, encoded in LAYOUTS.items():
            index.put_layout(fingerprint, encoded)
        for number in range(700):
            record = record_of(number, label_size=2500 if number % 50 == 1 else 150)
            index.put(record)
            put.setdefault(record.key, set()).add(record)
            if number % 5 == 0:
                index.delete(record.key, record.offset)
            if number % 70 == 0:
                await index.commit()
        await index.close()

    run(story())
    return put


def page_kind(page: bytes) -> str:
    flags = struct.unpack_from("<H", page, 10)[0]
    kinds = {1: "branch", 2: "leaf", 4: "overflow", 8: "meta"}
    return next((kind for bit, kind in kinds.items() if flags & bit), "other")


def places(data: bytes, chance: random.Random) -> Iterator[tuple[str, int]]:
    """Offsets in a database, of every kind of bytes in it."""
    by_kind: dict[str, list[int]] = {}
    for at in range(0, len(data), PAGE_SIZE):
        by_kind.setdefault(page_kind(data[at : at + PAGE_SIZE]), []).append(at)
    assert {"meta", "branch", "leaf", "overflow"} <= by_kind.keys()
    for number in range(FLIPS // 6):
        meta = by_kind["meta"][number % 2]
        yield "meta", meta + chance.randrange(0, 160)
        yield "branch", chance.choice(by_kind["branch"]) + chance.randrange(0, 80)
        leaf = chance.choice(by_kind["leaf"])
        yield "leaf header and pointers", leaf + chance.randrange(0, 60)
        yield "leaf nodes", leaf + chance.randrange(60, PAGE_SIZE)
        yield "overflow", chance.choice(by_kind["overflow"]) + chance.randrange(0, PAGE_SIZE)
        yield "anywhere", chance.randrange(len(data))


async def assert_nothing_is_wrong(
    folder: Path, data: bytes, put: dict[bytes, set[IndexRecord]]
) -> FoundIndex:
    """Open a database of these bytes: all that it gives was put, and the index works."""
    (folder / "index").mkdir(parents=True)
    (folder / "index" / "data.mdb").write_bytes(data)
    index, found = await ChunkIndex.open(folder, LOG_ID)
    keys = [record.key for record in found.records]
    assert len(keys) == len(set(keys))
    for record in found.records:
        assert record in put[record.key]
    assert found.layouts.items() <= LAYOUTS.items()
    assert index.failure == ""
    index.put(record_of(1))
    await index.commit()
    await index.close()
    shutil.rmtree(folder)
    return found


def test_no_flipped_bit_gives_a_wrong_record_or_stops_the_daemon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A damaged tree may have the walk go on for ever.
    monkeypatch.setattr(index_module, "PATIENCE_S", 10.0)
    chance = random.Random(7)
    put = worn_index(tmp_path / "worn")
    data = (tmp_path / "worn" / "index" / "data.mdb").read_bytes()
    reasons: dict[str, set[bool]] = {}

    async def story() -> None:
        whole = await assert_nothing_is_wrong(tmp_path / "whole", data, put)
        assert whole.reason == ""
        for number, (kind, at) in enumerate(places(data, chance)):
            flipped = bytearray(data)
            flipped[at] ^= chance.choice([1, 2, 4, 8, 16, 32, 64, 128, 255])
            found = await assert_nothing_is_wrong(tmp_path / str(number), bytes(flipped), put)
            reasons.setdefault(kind, set()).add(bool(found.reason))
            if not found.reason and kind != "meta":
                # What says that it is whole, is; a flipped meta page may show the commit before.
                assert sorted(found.records) == sorted(whole.records)

    run(story())
    # Some of each kind matter.
    assert all(True in found for found in reasons.values())


def test_no_truncation_gives_a_wrong_record_or_stops_the_daemon(tmp_path: Path) -> None:
    chance = random.Random(8)
    put = worn_index(tmp_path / "worn")
    data = (tmp_path / "worn" / "index" / "data.mdb").read_bytes()

    async def story() -> None:
        sizes = [0, 1, 16, 4095, 4096, 8191, 8192, len(data) // 2, len(data) - PAGE_SIZE]
        sizes += [chance.randrange(len(data)) for _ in range(15)]
        for size in sizes:
            found = await assert_nothing_is_wrong(tmp_path / str(size), data[:size], put)
            # The file's last pages may be free.
            assert found.reason or size > len(data) // 2

    run(story())


def test_a_walk_that_dies_says_of_what_and_a_reset_heals(tmp_path: Path) -> None:
    async def story() -> None:
        await (await filled(tmp_path, range(400))).close()
        path = tmp_path / "index" / "data.mdb"
        os.truncate(path, path.stat().st_size // 2 // PAGE_SIZE * PAGE_SIZE)
        index, found = await ChunkIndex.open(tmp_path, LOG_ID)
        assert found.reason.startswith("damaged")
        assert "SIGBUS" in found.reason
        await index.reset(records_of(range(400)), LAYOUTS)
        index, found = await reopened(index, tmp_path)
        assert (found.reason, sorted(found.records)) == ("", records_of(range(400)))
        await index.close()

    run(story())


# A daemon that is killed.


def changes_of(lines: list[str]) -> tuple[list[tuple[str, int]], int]:
    """The changes of a journal in order, and how many of them are acknowledged."""
    changes: list[tuple[str, int]] = []
    num_done = 0
    for line in lines:
        if line.endswith("\n"):
            word, number = line.split()
            if word == "done":
                num_done = len(changes)
            else:
                changes.append((word, int(number)))
    return changes, num_done


def states_of(before: dict[int, int], changes: list[tuple[str, int]]) -> Iterator[dict[int, int]]:
    """Number by key, before the first change and after each."""
    state = dict(before)
    yield dict(state)
    for word, number in changes:
        if word == "put":
            state[number % NUM_KEYS] = number
        else:
            state.pop(number % NUM_KEYS)
        yield dict(state)


def kill_after(command: list[str], journal: Path, num_bytes: int, delay_s: float) -> None:
    """Start the writer, kill it when its journal has grown by so much, and a little later."""
    goal = (journal.stat().st_size if journal.exists() else 0) + num_bytes
    with subprocess.Popen(command, cwd=REPOSITORY) as process:
        give_up = time.monotonic() + PATIENCE_S
        while not journal.exists() or journal.stat().st_size < goal:
            assert process.poll() is None, "the writer ended by itself"
            assert time.monotonic() < give_up, "the writer stands still"
            time.sleep(0.001)
        time.sleep(delay_s)
        process.kill()


def test_twenty_kills_of_the_daemon_in_mid_commit(tmp_path: Path) -> None:
    chance = random.Random(12)
    folder, journal = tmp_path / "kv", tmp_path / "journal"
    state: dict[int, int] = {}
    next_number = num_acknowledged = num_read = 0
    for _ in range(KILLS):
        command = [sys.executable, "-m", "tests.index_writer", str(folder), str(journal)]
        kill_after(
            [*command, str(next_number)],
            journal,
            chance.randint(50, 8000),
            chance.uniform(0, 0.01),
        )
        lines = journal.read_text().splitlines(keepends=True)
        changes, num_done = changes_of(lines[num_read:])
        num_read = len(lines)
        found = asyncio.run(found_in(folder))
        assert found.reason == ""
        assert all(record == record_of(record.offset // 4096) for record in found.records)
        there = {r.offset // 4096 % NUM_KEYS: r.offset // 4096 for r in found.records}
        possible = list(states_of(state, changes))[num_done:]
        assert there in possible, "not the state after any change from the last acknowledged on"
        state = there
        next_number += len(changes) + 1
        num_acknowledged += num_done
    assert num_acknowledged > KILLS


def test_the_process_ends_with_the_daemon(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    command = [sys.executable, "-m", "tests.index_writer", str(tmp_path), str(journal), "0"]
    kill_after(command, journal, 100, 0)
    give_up = time.monotonic() + PATIENCE_S
    while Path(f"/proc/{pid_of(tmp_path)}/cmdline").exists():
        assert time.monotonic() < give_up, "it is still there"
        time.sleep(0.01)


# A full disk.


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "kvd-test", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system needs root and mount")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill_up(filler: Path, *, leave: int) -> None:
    """Leave so many bytes of its file system."""
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    os.truncate(filler, filler.stat().st_size - leave)


def test_a_full_disk_fails_the_commit_and_keeps_what_was_there(small_disk: Path) -> None:
    async def story() -> None:
        index = await filled(small_disk, range(100))
        await put_until_it_fails(index, range(100, 500), label_size=2560)
        assert "bytes are free in" in index.failure
        with pytest.raises(TierFailed, match="bytes are free in"):
            await index.commit()
        # Nothing has room now, and the old index stays where it is.
        with pytest.raises(TierFailed, match="bytes are free in"):
            await index.reset(
                [record_of(number, label_size=2560) for number in range(1000)], LAYOUTS
            )
        await index.close()
        index, found = await ChunkIndex.open(small_disk, LOG_ID)
        assert set(records_of(range(100))) <= set(found.records)
        assert found.reason == ""
        # There is room for no copy; what was read counts.
        assert "bytes are free in" in index.failure
        assert not (small_disk / "index" / "fresh.mdb").exists()
        # Once somebody has made room, all is well again.
        subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
        await index.reset(records_of(range(50)), LAYOUTS)
        index, found = await reopened(index, small_disk)
        assert (found.reason, sorted(found.records)) == ("", records_of(range(50)))
        assert index.failure == ""
        await index.close()

    run(story())


@pytest.mark.parametrize("leave", [0, 16384, 40960])
def test_a_full_disk_at_the_start_costs_the_index_and_not_the_daemon(
    small_disk: Path, leave: int
) -> None:
    async def story() -> None:
        await (await filled(small_disk, range(400))).close()
        filler = small_disk / "filler"
        fill_up(filler, leave=leave)
        index, found = await ChunkIndex.open(small_disk, LOG_ID)
        assert (found.reason, sorted(found.records)) == ("", records_of(range(400)))
        assert "bytes are free in" in index.failure
        filler.unlink()
        await index.reset(found.records, found.layouts)
        await index.close()
        found = await found_in(small_disk)
        assert (found.reason, sorted(found.records)) == ("", records_of(range(400)))

    run(story())
