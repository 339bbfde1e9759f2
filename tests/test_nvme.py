"""The segment log on real files: what comes back, what a fault leaves, what no disk may exceed."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvd.chunk import Extent
from kvd.errors import ConfigError, Corrupt, InvalidRequest, TierFailed
from kvd.tiers.aligned import aligned_bytes
from kvd.tiers.file_ops import FILE_OPS, FileOps, Vectors
from kvd.tiers.nvme import NvmeTier
from kvd.tiers.segment import BLOCK_SIZE, PIECE_SIZE_MIN, checksum, record_size
from kvd.tiers.segment_log import SegmentLog
from tests.file_faults import FaultyOps, flip, pattern

SEGMENT_SIZE = 1 << 20
SIZE = 4 * SEGMENT_SIZE

# What a thread may take on a loaded machine, before the test gives up.
PATIENCE_S = 60

Opener = Callable[..., SegmentLog]


@pytest.fixture
def ops() -> FaultyOps:
    return FaultyOps()


@pytest.fixture
def open_log(tmp_path: Path, ops: FaultyOps) -> Iterator[Opener]:
    """Opens the log of the test's folder; the one before is closed."""
    opened: list[SegmentLog] = []

    def open_one(
        *, path: Path = tmp_path / "kv", size: int = SIZE, **options: object
    ) -> SegmentLog:
        if opened:
            opened.pop().close()
        options = {"segment_size": SEGMENT_SIZE, "ops": ops, **options}
        opened.append(SegmentLog(path, size, **options))  # type: ignore[arg-type]
        return opened[0]

    yield open_one
    if opened:
        opened.pop().close()


def aligned(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    out = aligned_bytes(max(data.size, 1))[: data.size]
    out[:] = data
    return out


def put(log: SegmentLog, seed: int, size: int = 10_000) -> Extent:
    """A durable record: label and payload follow from the seed."""
    extent = log.append(b"record %d" % seed, aligned(pattern(seed, size)))
    assert extent is not None
    log.sync([extent])
    return extent


def assert_holds(log: SegmentLog, extent: Extent, seed: int) -> None:
    out = aligned_bytes(extent.size)
    header = log.read(extent, out)
    assert header.label == b"record %d" % seed
    assert (out == pattern(seed, extent.size)).all()


def fill(log: SegmentLog, size: int = 100_000) -> dict[Extent, int]:
    """Records until the log has no room."""
    held: dict[Extent, int] = {}
    while (extent := log.append(b"record %d" % len(held), pattern(len(held), size))) is not None:
        held[extent] = len(held)
    log.sync()
    return held


def disk_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("segment-*"))


def num_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


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


# Where a bit may flip, from the record's header on: its fields, a piece's checksum, the label, what
# is reserved, the header's checksum, the payload's first and last byte.
@pytest.mark.parametrize("at", [0, 9, 20, 33, 41, 50, 57, 65, 90, 130, 257, 1281, 3900, 4090])
def test_a_bit_flipped_in_a_header_is_corrupt_and_hides_no_neighbour(
    open_log: Opener, tmp_path: Path, at: int
) -> None:
    log = open_log()
    extents = [put(log, seed) for seed in range(3)]
    flip(tmp_path / "kv" / "segment-00000000", extents[1].offset + at)
    with pytest.raises(Corrupt):
        log.read(extents[1], aligned_bytes(10_000))
    with pytest.raises(Corrupt):
        log.read_header(extents[1])
    log = open_log()
    assert [record.extent for record in log.scan()] == [extents[0], extents[2]]
    assert_holds(log, extents[0], 0)
    assert_holds(log, extents[2], 2)
    new = put(log, 9)
    assert new.offset > extents[2].offset


@pytest.mark.parametrize("at", [0, 1, PIECE_SIZE_MIN, 599_999])
def test_a_bit_flipped_in_a_payload_is_corrupt_where_it_is(
    open_log: Opener, tmp_path: Path, at: int
) -> None:
    log = open_log()
    extent = put(log, 1, 600_000)
    flip(tmp_path / "kv" / "segment-00000000", extent.offset + BLOCK_SIZE + at)
    with pytest.raises(Corrupt, match=f"piece {at // PIECE_SIZE_MIN}"):
        log.read(extent, aligned_bytes(600_000))
    for start in range(0, 600_000, PIECE_SIZE_MIN):
        out = aligned_bytes(min(PIECE_SIZE_MIN, 600_000 - start))
        if start <= at < start + PIECE_SIZE_MIN:
            with pytest.raises(Corrupt, match=f"piece {at // PIECE_SIZE_MIN}"):
                log.read_range(extent, start, out)
        else:
            log.read_range(extent, start, out)
            assert (out == pattern(1, 600_000)[start : start + out.size]).all()


def test_a_bit_flipped_in_the_padding_matters_to_nobody(open_log: Opener, tmp_path: Path) -> None:
    log = open_log()
    extent = put(log, 1, 10_000)
    flip(tmp_path / "kv" / "segment-00000000", extent.offset + BLOCK_SIZE + 10_001)
    assert_holds(log, extent, 1)


def test_a_damaged_segment_header_loses_that_segment_alone(
    open_log: Opener, tmp_path: Path
) -> None:
    log = open_log()
    held = fill(log)
    flip(tmp_path / "kv" / "segment-00000001", 50)
    log = open_log()
    assert {r.extent for r in log.scan()} == {
        extent for extent in held if extent.offset // SEGMENT_SIZE != 1
    }
    assert log.segments()[1].status == "void"


def test_a_segment_copied_to_another_slot_is_not_believed(open_log: Opener, tmp_path: Path) -> None:
    log = open_log()
    fill(log)
    folder = tmp_path / "kv"
    (folder / "segment-00000001").write_bytes((folder / "segment-00000000").read_bytes())
    log = open_log()
    assert not [r for r in log.scan() if r.extent.offset // SEGMENT_SIZE == 1]


def test_a_segment_cut_short_is_corrupt_behind_the_cut(open_log: Opener, tmp_path: Path) -> None:
    log = open_log()
    extents = [put(log, seed, 100_000) for seed in range(4)]
    os.truncate(tmp_path / "kv" / "segment-00000000", extents[2].offset + 50_000)
    assert_holds(log, extents[1], 1)
    for extent in extents[2:]:
        with pytest.raises(Corrupt):
            log.read(extent, aligned_bytes(100_000))
    log = open_log()
    assert extents[:2] == [r.extent for r in log.scan()][:2]
    assert_holds(log, extents[1], 1)
    assert_holds(log, put(log, 9, 100_000), 9)


def test_a_link_in_a_segments_place_is_not_followed(open_log: Opener, tmp_path: Path) -> None:
    log = open_log()
    held = fill(log)
    path, target = tmp_path / "kv" / "segment-00000001", tmp_path / "elsewhere"
    path.rename(target)
    path.symlink_to(target)
    before = target.read_bytes()
    log = open_log()
    assert [segment.slot for segment in log.segments()] == [0, 2, 3]
    assert len(list(log.scan())) == sum(extent.offset // SEGMENT_SIZE != 1 for extent in held)
    # Its slot is used again, and nothing is written where it led to.
    new = put(log, 9, 200_000)
    assert new.offset // SEGMENT_SIZE == 1
    assert_holds(log, new, 9)
    assert target.read_bytes() == before


def test_a_file_that_grew_is_cut_to_its_segment(open_log: Opener, tmp_path: Path) -> None:
    log = open_log()
    extent = put(log, 1)
    os.truncate(tmp_path / "kv" / "segment-00000000", 3 * SEGMENT_SIZE)
    log = open_log()
    assert disk_bytes(tmp_path / "kv") == SEGMENT_SIZE
    assert_holds(log, extent, 1)


@pytest.mark.parametrize("damage", ["lost", "flipped", "short"])
def test_a_lost_log_header_is_taken_from_the_segments(
    open_log: Opener, tmp_path: Path, damage: str
) -> None:
    log = open_log()
    held = {put(log, seed): seed for seed in range(3)}
    path = tmp_path / "kv" / "log"
    if damage == "lost":
        path.unlink()
    elif damage == "flipped":
        flip(path, 100)
    else:
        os.truncate(path, 100)
    log = open_log()
    newest = max(record.header.sequence for record in log.scan())
    assert {record.extent for record in log.scan()} == held.keys()
    for extent, seed in held.items():
        assert log.adopt(extent)
        assert_holds(log, extent, seed)
    assert log.read_header(put(log, 9)).sequence > newest


def test_another_version_or_segment_size_is_refused_and_left_alone(
    open_log: Opener, tmp_path: Path
) -> None:
    log = open_log()
    put(log, 1)
    log.close()
    with pytest.raises(ConfigError, match="segments of 1048576 bytes, 65536 asked for"):
        SegmentLog(tmp_path / "kv", SIZE, segment_size=65536)
    for name in ("log", "segment-00000000"):
        path = tmp_path / "kv" / name
        before = path.read_bytes()
        block = bytearray(before[:BLOCK_SIZE])
        block[8] = 2
        block[-8:] = checksum(block[:-8]).to_bytes(8, "little")
        path.write_bytes(bytes(block) + before[BLOCK_SIZE:])
        with pytest.raises(ConfigError, match="written by another kvd"):
            SegmentLog(tmp_path / "kv", SIZE, segment_size=SEGMENT_SIZE)
        path.write_bytes(before)
    log = open_log()
    assert log.num_extents == 0
    assert len(list(log.scan())) == 1


def test_segments_of_two_logs_without_a_header_are_refused(
    open_log: Opener, tmp_path: Path
) -> None:
    put(open_log(), 1)
    put(open_log(path=tmp_path / "other"), 1)
    folder = tmp_path / "kv"
    (tmp_path / "other" / "segment-00000000").rename(folder / "segment-00000001")
    (folder / "log").unlink()
    with pytest.raises(ConfigError, match="more than one log"):
        SegmentLog(folder, SIZE, segment_size=SEGMENT_SIZE)


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


def test_a_folder_that_cannot_be_written_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot hold a segment log"):
        SegmentLog(tmp_path / "file", SIZE, segment_size=SEGMENT_SIZE)
    with pytest.raises(ConfigError, match="needs a segment"):
        SegmentLog(tmp_path / "kv", SEGMENT_SIZE - 1, segment_size=SEGMENT_SIZE)
    with pytest.raises(ConfigError, match="no segment can have"):
        SegmentLog(tmp_path / "kv", SEGMENT_SIZE, segment_size=5000)


@pytest.mark.parametrize("name", ["open", "pwritev", "fsync", "rename", "sync_directory"])
def test_a_log_that_cannot_be_opened_says_so_and_lets_the_folder_go(
    open_log: Opener, tmp_path: Path, ops: FaultyOps, name: str
) -> None:
    ops.fail(name, errno.EROFS, times=100)
    with pytest.raises(ConfigError, match="cannot hold a segment log"):
        SegmentLog(tmp_path / "kv", SIZE, segment_size=SEGMENT_SIZE, ops=ops)
    ops.heal()
    put(open_log(), 1)


def test_o_direct_refused_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class NoDirect(FileOps):
        def open(self, path: Path, flags: int) -> int:
            if flags & os.O_DIRECT:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return super().open(path, flags)

    log = SegmentLog(tmp_path, SIZE, segment_size=SEGMENT_SIZE, ops=NoDirect())
    with contextlib.closing(log):
        assert not log.is_direct
        assert "direct=no" in caplog.text
        assert_holds(log, put(log, 1), 1)


def test_without_fallocate_a_segment_is_made_all_the_same(tmp_path: Path) -> None:
    class NoFallocate(FileOps):
        def fallocate(self, fd: int, size: int) -> bool:
            return False

    log = SegmentLog(tmp_path, SIZE, segment_size=SEGMENT_SIZE, ops=NoFallocate())
    with contextlib.closing(log):
        assert_holds(log, put(log, 1), 1)
        assert disk_bytes(tmp_path) == SEGMENT_SIZE


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_failed_write_stores_nothing_and_its_room_is_used_again(
    open_log: Opener, ops: FaultyOps, code: int
) -> None:
    log = open_log()
    first = put(log, 1)
    before = log.segments()
    ops.fail("pwritev", code)
    with pytest.raises(TierFailed, match=os.strerror(code)):
        log.append(b"lost", pattern(2, 10_000))
    assert log.segments() == before
    log.check()
    second = put(log, 3)
    assert second.offset == first.offset + record_size(10_000)
    log = open_log()
    assert [r.header.label for r in log.scan()] == [b"record 1", b"record 3"]


def test_a_write_that_failed_after_it_was_done_is_not_found(
    open_log: Opener, ops: FaultyOps
) -> None:
    class Late(FileOps):
        def pwritev(self, fd: int, vectors: Vectors, offset: int) -> int:
            super().pwritev(fd, vectors, offset)
            raise OSError(errno.EIO, "injected")

    log = open_log()
    first = put(log, 1)
    log._writer._ops = Late()
    with pytest.raises(TierFailed):
        log.append(b"told to have failed", pattern(2, 10_000))
    log = open_log()
    assert [r.extent for r in log.scan()] == [first]


def test_what_a_kill_left_in_the_page_cache_is_synced_before_more_is_written(
    open_log: Opener, ops: FaultyOps
) -> None:
    log = open_log()
    extent = put(log, 1)
    before = ops.calls["fdatasync"]
    open_log()
    assert ops.calls["fdatasync"] == before + 1
    # If that fails, the segment rests as it is.
    ops.fail("fdatasync", errno.EIO)
    log = open_log()
    assert [segment.status for segment in log.segments()] == ["full"]
    assert_holds(log, extent, 1)
    assert put(log, 2).offset > SEGMENT_SIZE


def test_padding_holds_nothing_of_anybody(open_log: Opener, tmp_path: Path) -> None:
    log = open_log()
    log.append(b"", np.full(BLOCK_SIZE - 1, 0xEE, dtype=np.uint8))
    extent = put(log, 1, 10)
    content = (tmp_path / "kv" / "segment-00000000").read_bytes()
    start = extent.offset + BLOCK_SIZE
    assert content[start + 10 : start + BLOCK_SIZE] == bytes(BLOCK_SIZE - 10)


def test_a_failed_write_in_the_middle_hides_nothing_behind_it(
    open_log: Opener, ops: FaultyOps
) -> None:
    log = open_log()
    first = put(log, 1)
    barrier = threading.Barrier(2, timeout=PATIENCE_S)

    class Waits(FaultyOps):
        def pwritev(self, fd: int, vectors: Vectors, offset: int) -> int:
            if offset == first.offset + record_size(10_000):
                barrier.wait()
                barrier.wait()
                raise OSError(errno.EIO, "injected")
            return FILE_OPS.pwritev(fd, vectors, offset)

    log._writer._ops = Waits()
    with ThreadPoolExecutor(1) as pool:
        failing = pool.submit(log.append, b"lost", pattern(2, 10_000))
        barrier.wait()
        behind = put(log, 3)
        barrier.wait()
        with pytest.raises(TierFailed):
            failing.result()
    assert log.segments()[0].dead_size == BLOCK_SIZE + record_size(10_000)
    log = open_log()
    assert [r.extent for r in log.scan()] == [first, behind]


@pytest.mark.parametrize("size", [BLOCK_SIZE, BLOCK_SIZE + 100, 2 * BLOCK_SIZE, 3 * BLOCK_SIZE])
def test_a_short_write_is_gone_on_with(open_log: Opener, ops: FaultyOps, size: int) -> None:
    log = open_log(is_direct=False)
    put(log, 0)
    ops.short_size = size
    extent = put(log, 1)
    assert ops.short_size is None
    assert_holds(log, extent, 1)


@pytest.mark.parametrize("size", [0, 1, BLOCK_SIZE - 1])
def test_a_write_that_does_not_move_fails(open_log: Opener, ops: FaultyOps, size: int) -> None:
    log = open_log(is_direct=False)
    put(log, 0)
    ops.short_size = size
    with pytest.raises(TierFailed):
        log.append(b"", pattern(1, 10_000))
    assert log.num_extents == 1
    log = open_log()
    assert len(list(log.scan())) == 1


@pytest.mark.parametrize(
    "name", ["fallocate", "fsync", "rename", "sync_directory", "open", "free_size"]
)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EMFILE])
def test_a_segment_that_cannot_be_made_leaves_no_trace(
    open_log: Opener, tmp_path: Path, ops: FaultyOps, name: str, code: int
) -> None:
    log = open_log()
    ops.fail(name, code)
    with pytest.raises(TierFailed, match=os.strerror(code)):
        log.append(b"", pattern(1, 10_000))
    assert disk_bytes(tmp_path / "kv") == log.disk_size == 0
    assert not list((tmp_path / "kv").glob("*.new"))
    assert_holds(log, put(log, 1), 1)


@pytest.mark.parametrize("name", ["pwritev", "fdatasync"])
def test_a_segment_whose_life_cannot_begin_is_set_aside(
    open_log: Opener, ops: FaultyOps, name: str
) -> None:
    log = open_log(size=SEGMENT_SIZE)
    ops.fail(name, errno.EIO)
    with pytest.raises(TierFailed):
        log.append(b"", pattern(1, 10_000))
    assert log.segments()[0].status == "poisoned"
    assert log.append(b"", pattern(1, 10_000)) is None
    log.reclaim(0)
    assert log.disk_size == 0
    assert_holds(log, put(log, 1), 1)


def test_no_descriptor_left_is_a_failed_read_and_no_more(open_log: Opener, ops: FaultyOps) -> None:
    held = fill(open_log())
    log = open_log()
    extent = next(iter(held))
    ops.fail("open", errno.EMFILE)
    with pytest.raises(TierFailed, match="Too many open files"):
        log.read(extent, aligned_bytes(extent.size))
    assert_holds(log, extent, 0)


def test_a_read_error_is_not_a_wrong_byte(open_log: Opener, ops: FaultyOps) -> None:
    log = open_log()
    extent = put(log, 1)
    for read in (log.read_header, lambda e: log.read(e, aligned_bytes(10_000))):
        ops.fail("preadv", errno.EIO)
        with pytest.raises(TierFailed, match="Input/output error"):
            read(extent)
    assert_holds(log, extent, 1)


def test_descriptors_are_bounded(open_log: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvd.tiers.segment_files.FDS_MAX", 3)
    log = open_log(size=20 * 65536, segment_size=65536)
    held = fill(log, 20_000)
    before = num_descriptors()
    for extent, seed in held.items():
        assert_holds(log, extent, seed)
    assert len(log.segments()) == 20
    assert num_descriptors() <= before + 3


def test_a_failed_sync_takes_what_it_should_have_kept_and_no_more(
    open_log: Opener, ops: FaultyOps
) -> None:
    log = open_log()
    durable = put(log, 1)
    lost = [log.append(b"", pattern(seed, 10_000)) for seed in (2, 3)]
    ops.fail("fdatasync", errno.EIO)
    with pytest.raises(TierFailed, match="durable"):
        log.sync([extent for extent in lost[:1] if extent])
    # The other one was in the same batch: its owner hears of it too, although now nothing fails.
    with pytest.raises(TierFailed, match="durable"):
        log.sync([extent for extent in lost[1:] if extent])
    assert log.segments()[0].status == "poisoned"
    assert log.num_extents == 1
    assert_holds(log, durable, 1)
    again = put(log, 4)
    assert again.offset // SEGMENT_SIZE == 1
    log.free(durable)
    log.reclaim(0)
    assert log.disk_size == SEGMENT_SIZE
    assert_holds(log, again, 4)
    log.check()


def test_a_write_that_ends_after_its_segment_was_poisoned_fails(
    open_log: Opener, ops: FaultyOps
) -> None:
    log = open_log()
    put(log, 1)
    unsynced = log.append(b"", pattern(2, 10_000))
    barrier = threading.Barrier(2, timeout=PATIENCE_S)

    class Waits(FileOps):
        def pwritev(self, fd: int, vectors: Vectors, offset: int) -> int:
            barrier.wait()
            barrier.wait()
            return super().pwritev(fd, vectors, offset)

    log._writer._ops = Waits()
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(log.append, b"late", pattern(3, 10_000))
        barrier.wait()
        log._writer._ops = ops
        ops.fail("fdatasync", errno.EIO)
        with pytest.raises(TierFailed):
            log.sync([unsynced] if unsynced else [])
        with pytest.raises(InvalidRequest):
            log.reclaim(0)
        barrier.wait()
        with pytest.raises(TierFailed, match="segment 0 failed"):
            writing.result()
    assert log.num_extents == 1


def test_appends_that_come_during_a_sync_share_the_next_one(
    open_log: Opener, ops: FaultyOps
) -> None:
    log = open_log()
    put(log, 0)
    first = log.append(b"", pattern(1, 10_000))
    gate = ops.hold_syncs()
    with ThreadPoolExecutor(8) as pool:
        syncing = [pool.submit(log.sync, [first])]
        assert ops.at_gate.acquire(timeout=PATIENCE_S)
        others = [log.append(b"", pattern(seed, 1000)) for seed in range(6)]
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


def test_a_segment_that_cannot_be_opened_ahead_is_told_when_it_is_needed(
    open_log: Opener, ops: FaultyOps
) -> None:
    log = open_log()
    put(log, 1, 600_000)
    ops.fail("fallocate", errno.ENOSPC, times=2)
    log.prepare()
    assert not log.wants_spare
    with pytest.raises(TierFailed, match="No space left"):
        log.append(b"", pattern(2, 600_000))
    assert_holds(log, put(log, 3, 600_000), 3)


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


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a tmpfs needs root")
def test_a_full_file_system_fails_an_append_and_nothing_else(tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=3500k", "kvd-test", str(tmp_path)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:

        class Optimist(FileOps):
            free = 10 * SEGMENT_SIZE

            def free_size(self, path: Path) -> int:
                return self.free or super().free_size(path)

        ops = Optimist()
        log = SegmentLog(tmp_path, 100 * SEGMENT_SIZE, segment_size=SEGMENT_SIZE, ops=ops)
        with contextlib.closing(log):
            held: dict[Extent, int] = {}
            while len(log.segments()) < 3 or log.segments()[2].free_size > 100_000 + 2 * BLOCK_SIZE:
                held[put(log, len(held), 100_000)] = len(held)
            with pytest.raises(TierFailed, match="No space left"):
                log.append(b"", pattern(1, 200_000))
            # Who asks the file system first need not try.
            ops.free = 0
            assert log.append(b"", pattern(1, 200_000)) is None
            assert len(log.segments()) == 3
            for extent, seed in held.items():
                assert_holds(log, extent, seed)
            for extent in [extent for extent in held if extent.offset < SEGMENT_SIZE]:
                log.free(extent)
            log.reclaim(0)
            assert_holds(log, put(log, 500, 100_000), 500)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_many_in_flight_both_ways_from_an_event_loop(open_log: Opener) -> None:
    tier = NvmeTier(open_log(size=16 * SEGMENT_SIZE))

    async def one(seed: int) -> None:
        size = 1000 + 5000 * seed
        data = aligned(pattern(seed, size))
        extent = await tier.append(b"record %d" % seed, data, payload_checksum=checksum(data))
        assert extent is not None
        out = aligned_bytes(size)
        header = await tier.read(extent, out)
        assert header.label == b"record %d" % seed
        assert (out == data).all()
        assert await tier.read_header(extent) == header
        out[:] = 0
        starts = range(0, size, PIECE_SIZE_MIN)
        await asyncio.gather(
            *(
                tier.read_range(extent, at, out[at : at + PIECE_SIZE_MIN], header=header)
                for at in starts
            )
        )
        assert (out == data).all()

    async def story() -> None:
        await asyncio.gather(*(one(seed) for seed in range(60)))

    asyncio.run(story())
    assert tier.log.num_extents == 60
    tier.log.check()
    tier.close()


def test_a_cancelled_append_leaves_nothing_alive(open_log: Opener, ops: FaultyOps) -> None:
    tier = NvmeTier(open_log())
    put(tier.log, 0)
    gate = ops.hold_syncs()

    async def story() -> None:
        task = asyncio.ensure_future(tier.append(b"", pattern(1, 10_000)))
        assert await asyncio.to_thread(ops.at_gate.acquire, timeout=PATIENCE_S)
        task.cancel()
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.sleep(0)
        # Its thread still uses the caller's memory.
        assert not task.done()
        gate.release()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(story())
    assert tier.log.num_extents == 1
    tier.log.check()
    tier.close()


def test_a_cancelled_write_that_could_not_be_made_durable_frees_nothing(
    open_log: Opener, ops: FaultyOps
) -> None:
    tier = NvmeTier(open_log())
    put(tier.log, 0)
    gate = ops.hold_syncs()

    async def story() -> None:
        task = asyncio.ensure_future(tier.append(b"", pattern(1, 10_000)))
        assert await asyncio.to_thread(ops.at_gate.acquire, timeout=PATIENCE_S)
        task.cancel()
        ops.fail("fdatasync", errno.EIO)
        gate.release()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(story())
    assert tier.log.num_extents == 1
    tier.log.check()
    tier.close()


def test_appends_at_a_time_share_their_syncs_and_each_hears_of_its_own(
    open_log: Opener, ops: FaultyOps
) -> None:
    tier = NvmeTier(open_log(size=16 * SEGMENT_SIZE))
    put(tier.log, 0)
    gate = ops.hold_syncs()
    before = ops.calls["fdatasync"]

    async def story() -> list[Extent | BaseException | None]:
        first = asyncio.ensure_future(tier.append(b"first", pattern(1, 1000)))
        assert await asyncio.to_thread(ops.at_gate.acquire, timeout=PATIENCE_S)
        others = [asyncio.ensure_future(tier.append(b"", pattern(seed, 1000))) for seed in range(6)]
        while tier.log.num_extents < 8:
            await asyncio.sleep(0)
        assert not first.done()
        ops.fail("fdatasync", errno.EIO, after=1)
        gate.release(2)
        return await asyncio.gather(first, *others, return_exceptions=True)

    first, *others = asyncio.run(story())
    assert isinstance(first, Extent)
    assert all(isinstance(found, TierFailed) for found in others)
    assert ops.calls["fdatasync"] == before + 2
    assert tier.log.num_extents == 2
    tier.close()


def test_what_fails_in_an_append_is_the_callers_to_hear(
    open_log: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = NvmeTier(open_log())
    data = pattern(1, 10_000)

    async def story() -> None:
        with pytest.raises(Corrupt, match="expected"):
            await tier.append(b"", data, payload_checksum=checksum(data) ^ 1)
        with pytest.raises(InvalidRequest):
            await tier.append(b"", data, codec="")
        monkeypatch.setattr(tier.log, "sync", lambda _: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            await tier.append(b"", data)

    asyncio.run(story())
    tier.close()


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_killed_record_is_gone_for_good_and_hides_no_neighbour(
    open_log: Opener, index: int
) -> None:
    log = open_log()
    extents = [put(log, seed) for seed in range(3)]
    assert log.kill(extents[index])
    assert log.num_extents == 2
    with pytest.raises(Corrupt):
        log.read(extents[index], aligned_bytes(10_000))
    # A second time it is somebody else's business.
    assert not log.kill(extents[index])
    assert not log.kill(Extent("nvme", 9 * SEGMENT_SIZE + BLOCK_SIZE, 10_000))
    log.check()
    del extents[index]
    log = open_log()
    assert [record.extent for record in log.scan()] == extents
    assert all(log.adopt(extent) for extent in extents)
    assert put(log, 9) not in extents
    log.check()


def test_a_killed_record_is_cleared_durably(open_log: Opener, ops: FaultyOps) -> None:
    log = open_log()
    extent = put(log, 1)
    before = ops.calls["fdatasync"]
    assert log.kill(extent)
    assert ops.calls["fdatasync"] == before + 1


@pytest.mark.parametrize("name", ["pwritev", "open", "fdatasync"])
def test_a_kill_that_the_device_refuses_raises_nothing_and_frees(
    open_log: Opener, ops: FaultyOps, name: str
) -> None:
    held = {put(open_log(), seed): seed for seed in range(2)}
    log = open_log()
    log.retire()
    assert all(log.adopt(extent) for extent in held)
    first, second = held
    # Closed when it is killed, as an old segment may be.
    log._pool.files.close()
    ops.fail(name, errno.EIO)
    assert not log.kill(first)
    assert log.num_extents == 1
    assert_holds(log, second, 1)
    log.check()
    log.free(second)
    log.reclaim(0)
    assert log.segments() == [] if name == "fdatasync" else log.segments()[0].status == "void"


def test_a_sync_that_fails_in_a_kill_takes_what_others_had_to_keep(
    open_log: Opener, ops: FaultyOps
) -> None:
    log = open_log()
    bad = put(log, 1)
    unsynced = log.append(b"", pattern(2, 10_000))
    assert unsynced is not None
    ops.fail("fdatasync", errno.EIO)
    assert not log.kill(bad)
    # The kernel tells of a lost write once: who asks later must not hear that all is well.
    with pytest.raises(TierFailed, match="durable"):
        log.sync([unsynced])


def test_a_segment_is_not_reclaimed_while_a_record_of_it_is_killed(open_log: Opener) -> None:
    log = open_log()
    extent = put(log, 1)
    log.retire()
    barrier = threading.Barrier(2, timeout=PATIENCE_S)

    class Waits(FileOps):
        def pwritev(self, fd: int, vectors: Vectors, offset: int) -> int:
            barrier.wait()
            barrier.wait()
            return super().pwritev(fd, vectors, offset)

    log._pool._ops = Waits()
    with ThreadPoolExecutor(1) as pool:
        killing = pool.submit(log.kill, extent)
        barrier.wait()
        with pytest.raises(InvalidRequest, match="cannot be reclaimed now"):
            log.reclaim(0)
        barrier.wait()
        assert killing.result(PATIENCE_S)
    log._pool._ops = FILE_OPS
    log.reclaim(0)


def test_the_tier_kills_too(open_log: Opener) -> None:
    tier = NvmeTier(open_log())
    extent = put(tier.log, 1)
    assert asyncio.run(tier.kill(extent))
    assert tier.log.num_extents == 0
    tier.close()
