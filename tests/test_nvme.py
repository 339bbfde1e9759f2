"""The segment log on real files: what comes back, what is used again, what no disk may exceed."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvd.chunk import Extent
from kvd.errors import ConfigError, Corrupt, InvalidRequest
from kvd.tiers.aligned import aligned_bytes
from kvd.tiers.file_ops import FileOps
from kvd.tiers.segment import BLOCK_SIZE, PIECE_SIZE_MIN, checksum, record_size
from kvd.tiers.segment_log import SegmentLog
from tests.file_faults import FaultyOps, pattern
from tests.nvme_log import (
    PATIENCE_S,
    SEGMENT_SIZE,
    SIZE,
    Opener,
    append,
    assert_holds,
    disk_bytes,
    fill,
    num_descriptors,
    put,
)


@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 300_000, SEGMENT_SIZE - 2 * BLOCK_SIZE])
@pytest.mark.parametrize("shift", [0, 1, 512])
@pytest.mark.parametrize("is_direct", [True, False])
def test_bytes_come_back_as_they_went_in(
    open_log: Opener, size: int, shift: int, is_direct: bool
) -> None:
    log = open_log(is_direct=is_direct)
    memory = aligned_bytes(size + shift)[shift:]
    memory[:] = pattern(1, size)
    given = checksum(memory) if shift else None
    extent = log.append(b"\0label\xff", memory, codec="kvq/1", payload_checksum=given)
    assert extent is not None
    assert log.allocated_size(extent) == record_size(size)
    out = aligned_bytes(size + shift)[shift:]
    header = log.read(extent, out)
    assert out.tobytes() == pattern(1, size).tobytes()
    assert (header.label, header.codec) == (b"\0label\xff", "kvq/1")
    # The storer's own; who gives none finds none.
    assert header.payload_checksum == (given or 0)
    assert log.read_header(extent) == header


@given(
    size=st.integers(1, 900_000),
    first=st.integers(0, 3),
    count=st.integers(1, 4),
)
@settings(max_examples=40, deadline=None)
def test_a_range_of_pieces_is_right_by_itself(
    tmp_path_factory: pytest.TempPathFactory, size: int, first: int, count: int
) -> None:
    log = SegmentLog(tmp_path_factory.mktemp("range"), SEGMENT_SIZE, segment_size=SEGMENT_SIZE)
    with contextlib.closing(log):
        extent = put(log, 1, size)
        start = first * PIECE_SIZE_MIN
        end = min(start + count * PIECE_SIZE_MIN, size)
        out = aligned_bytes(max(end - start, 1))[: max(end - start, 0)]
        if start >= size:
            with pytest.raises(InvalidRequest):
                log.read_range(extent, start, out)
            return
        header = log.read_range(extent, start, out)
        assert (out == pattern(1, size)[start:end]).all()
        assert log.read_range(extent, start, out, header=header) is header


def test_a_range_that_is_not_whole_pieces_is_refused(open_log: Opener) -> None:
    log = open_log()
    extent = put(log, 1, 600_000)
    for offset, size in [(1, 10), (0, 10), (0, 600_001), (-PIECE_SIZE_MIN, 10), (4096, 595_904)]:
        with pytest.raises(InvalidRequest, match="whole pieces"):
            log.read_range(extent, offset, np.empty(size, dtype=np.uint8))


def test_records_survive_a_restart_and_the_log_goes_on(open_log: Opener) -> None:
    log = open_log()
    held = {put(log, seed): seed for seed in range(5)}
    lives = {extent: log.life(extent) for extent in held}
    for _ in range(3):
        log = open_log()
        assert log.num_extents == 0
        found = {record.extent: record.header for record in log.scan()}
        assert found.keys() == held.keys()
        assert [h.sequence for h in found.values()] == sorted(h.sequence for h in found.values())
        assert all(log.adopt(extent, life=lives[extent]) for extent in held)
        assert not any(log.adopt(extent) for extent in held)
        for extent, seed in held.items():
            assert found[extent].label == b"record %d" % seed
            assert_holds(log, extent, seed)
        extra = put(log, len(held))
        held[extra], lives[extra] = len(held), log.life(extra)
        log.check()
    # Every restart went on in the same segment.
    assert len(log.segments()) == 1
    assert log.num_extents == 8
    assert log.used == 8 * record_size(10_000)


def test_an_index_that_is_wrong_adopts_nothing(open_log: Opener) -> None:
    log = open_log()
    extent = put(log, 1)
    life = log.life(extent)
    log = open_log()
    assert not log.adopt(extent, life=life ^ 1)
    assert not log.adopt(Extent("nvme", extent.offset + 1, extent.size))
    assert not log.adopt(Extent("nvme", 0, extent.size))
    assert not log.adopt(Extent("nvme", 9 * SEGMENT_SIZE + BLOCK_SIZE, 1))
    # Behind the last record of the active segment there is nothing.
    assert not log.adopt(Extent("nvme", extent.offset + 3 * BLOCK_SIZE + BLOCK_SIZE, extent.size))
    assert log.adopt(extent, life=life)
    log.check()


def test_the_bound_is_never_exceeded_and_full_is_none(open_log: Opener, tmp_path: Path) -> None:
    log = open_log(size=SIZE + SEGMENT_SIZE - 1)
    held = fill(log)
    assert disk_bytes(tmp_path / "kv") == log.disk_size == SIZE
    assert log.append(b"", pattern(0, 100_000)) is None
    log.check()
    for extent, seed in held.items():
        assert_holds(log, extent, seed)
    # A smaller one may still fit where the large one did not.
    assert log.append(b"small", pattern(0, 1)) is not None


def test_a_smaller_bound_at_the_next_start_holds_too(open_log: Opener, tmp_path: Path) -> None:
    log = open_log()
    held = fill(log)
    log = open_log(size=2 * SEGMENT_SIZE)
    assert disk_bytes(tmp_path / "kv") <= 2 * SEGMENT_SIZE
    kept = {record.extent for record in log.scan()}
    # The oldest went.
    assert kept == {extent for extent in held if extent.offset >= 2 * SEGMENT_SIZE}
    for extent in kept:
        assert log.adopt(extent)
        assert_holds(log, extent, held[extent])
    gone = next(extent for extent in held if extent not in kept)
    assert not log.adopt(gone)
    with pytest.raises(Corrupt):
        log.read(gone, aligned_bytes(gone.size))


def test_the_reserve_of_the_file_system_is_left_alone(tmp_path: Path) -> None:
    class SmallDisk(FileOps):
        free = 10 * SEGMENT_SIZE

        def free_size(self, path: Path) -> int:
            return self.free - disk_bytes(path)

    ops = SmallDisk()
    log = SegmentLog(
        tmp_path, 100 * SEGMENT_SIZE, reserve=7 * SEGMENT_SIZE, segment_size=SEGMENT_SIZE, ops=ops
    )
    with contextlib.closing(log):
        held = fill(log)
        assert log.disk_size == 3 * SEGMENT_SIZE
        # Others fill the disk: void segments are given back, records stay.
        log.retire()
        for extent in [extent for extent in held if extent.offset < SEGMENT_SIZE]:
            log.free(extent)
            del held[extent]
        log.reclaim(0)
        ops.free -= SEGMENT_SIZE // 2
        assert log.trim() == 1
        assert log.disk_size == 2 * SEGMENT_SIZE
        for extent, seed in held.items():
            assert_holds(log, extent, seed)


def test_freed_bytes_come_back_with_their_segment(open_log: Opener) -> None:
    log = open_log()
    held = fill(log)
    first = [extent for extent in held if extent.offset < SEGMENT_SIZE]
    with pytest.raises(InvalidRequest, match="live in segment 0"):
        log.reclaim(0)
    for extent in first:
        log.free(extent)
    info = log.segments()[0]
    assert (info.status, info.live_size, info.num_extents) == ("full", 0, 0)
    assert info.dead_size == SEGMENT_SIZE
    log.reclaim(0)
    assert log.segments()[0].status == "void"
    assert log.segments()[0].free_size == SEGMENT_SIZE
    again = put(log, 77, 100_000)
    assert again.offset < SEGMENT_SIZE
    assert_holds(log, again, 77)
    assert log.disk_size == SIZE
    with pytest.raises(InvalidRequest):
        log.reclaim(9)
    with pytest.raises(InvalidRequest):
        log.reclaim(0)
    log.check()


def test_stale_records_of_a_reused_segment_never_come_back(open_log: Opener) -> None:
    log = open_log()
    held = fill(log, 50_000)
    stale = [extent for extent in held if extent.offset < SEGMENT_SIZE]
    old_life = log.life(stale[0])
    for extent in stale:
        log.free(extent)
    log.reclaim(0)
    assert not [r for r in log.scan() if r.extent.offset < SEGMENT_SIZE]
    # Just as long as the old first one: an old header stands right behind it.
    new = put(log, 1234, 50_000)
    log = open_log()
    found = [record.extent for record in log.scan() if record.extent.offset < SEGMENT_SIZE]
    assert found == [new]
    assert not any(log.adopt(extent, life=old_life) for extent in stale)
    out = aligned_bytes(50_000)
    for extent in stale[1:]:
        with pytest.raises(Corrupt):
            log.read(extent, out)


def test_an_extent_that_became_another_record_says_whose_it_is(open_log: Opener) -> None:
    log = open_log()
    old = put(log, 1)
    log.free(old)
    log.retire()
    log.reclaim(0)
    assert put(log, 2) == old
    header = log.read(old, aligned_bytes(old.size))
    assert header.label == b"record 2"


def test_the_second_opener_hears_who_the_first_is(open_log: Opener, tmp_path: Path) -> None:
    open_log()
    with pytest.raises(ConfigError, match=f"in use by process {os.getpid()}"):
        SegmentLog(tmp_path / "kv", SIZE, segment_size=SEGMENT_SIZE)
    code = (
        "import sys; from pathlib import Path; from kvd.tiers.segment_log import SegmentLog\n"
        f"SegmentLog(Path({str(tmp_path / 'kv')!r}), {SIZE}, segment_size={SEGMENT_SIZE})"
    )
    root = Path(__file__).parent.parent
    other = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False
    )
    assert f"in use by process {os.getpid()}" in other.stderr


def test_padding_holds_nothing_of_anybody(open_log: Opener, tmp_path: Path) -> None:
    log = open_log()
    log.append(b"", np.full(BLOCK_SIZE - 1, 0xEE, dtype=np.uint8))
    extent = put(log, 1, 10)
    content = (tmp_path / "kv" / "segment-00000000").read_bytes()
    start = extent.offset + BLOCK_SIZE
    assert content[start + 10 : start + BLOCK_SIZE] == bytes(BLOCK_SIZE - 10)


def test_descriptors_are_bounded(open_log: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvd.tiers.segment_files.FDS_MAX", 3)
    log = open_log(size=20 * 65536, segment_size=65536)
    held = fill(log, 20_000)
    before = num_descriptors()
    for extent, seed in held.items():
        assert_holds(log, extent, seed)
    assert len(log.segments()) == 20
    assert num_descriptors() <= before + 3


def test_appends_that_come_during_a_sync_share_the_next_one(
    open_log: Opener, ops: FaultyOps
) -> None:
    log = open_log()
    put(log, 0)
    first = append(log, 1)
    gate = ops.hold_syncs()
    with ThreadPoolExecutor(8) as pool:
        syncing = [pool.submit(log.sync, [first])]
        assert ops.at_gate.acquire(timeout=PATIENCE_S)
        others = [append(log, seed, 1000) for seed in range(6)]
        syncing += [pool.submit(log.sync, [extent]) for extent in others]
        before = ops.calls["fdatasync"]
        gate.release(8)
        for done in syncing:
            done.result()
    assert ops.calls["fdatasync"] == before + 2


def test_a_segment_opened_ahead_is_used_next_and_costs_no_room_at_a_restart(
    open_log: Opener, ops: FaultyOps
) -> None:
    log = open_log()
    put(log, 0, 100_000)
    assert not log.wants_spare
    put(log, 1, 500_000)
    assert log.wants_spare
    log.prepare()
    assert [segment.status for segment in log.segments()] == ["active", "active"]
    # The active one is gone on with, now and after a restart.
    assert put(log, 2, 100_000).offset < SEGMENT_SIZE
    log = open_log()
    assert [segment.status for segment in log.segments()] == ["active", "void"]
    assert put(log, 3, 100_000).offset < SEGMENT_SIZE
    log.prepare()
    before = ops.calls["fdatasync"]
    assert log.append(b"", pattern(4, 500_000)) is not None
    assert ops.calls["fdatasync"] == before
    assert [segment.status for segment in log.segments()] == ["full", "active"]


def test_a_payload_that_changed_since_its_checksum_is_not_stored(open_log: Opener) -> None:
    log = open_log()
    data = pattern(1, 10_000)
    good = checksum(data)
    data[77] ^= 1
    with pytest.raises(Corrupt, match="expected"):
        log.append(b"", data, payload_checksum=good)
    assert log.segments() == []


def test_write_amplification_counts_every_byte(open_log: Opener) -> None:
    log = open_log()
    for seed in range(3):
        put(log, seed, 10_000)
    assert log.payload_bytes == 30_000
    assert log.device_bytes == 3 * record_size(10_000) + BLOCK_SIZE
    assert log.write_amplification == log.device_bytes / 30_000


def test_a_scan_says_how_far_it_is(open_log: Opener) -> None:
    log = open_log()
    held = fill(log)
    heard: list[tuple[int, int]] = []
    assert len(list(log.scan(lambda done, whole: heard.append((done, whole))))) == len(held)
    assert heard == [(count * SEGMENT_SIZE, SIZE) for count in range(1, 5)]
