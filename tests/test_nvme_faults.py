"""A segment log whose calls to the disk fail: what is told, and what stays as it was."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvd.chunk import Extent
from kvd.errors import ConfigError, InvalidRequest, TierFailed
from kvd.tiers.aligned import aligned_bytes
from kvd.tiers.file_ops import FILE_OPS, FileOps, Vectors
from kvd.tiers.segment import BLOCK_SIZE, record_size
from kvd.tiers.segment_log import SegmentLog
from tests.file_faults import FaultyOps, pattern
from tests.nvme_log import (
    PATIENCE_S,
    SEGMENT_SIZE,
    SIZE,
    Opener,
    assert_holds,
    disk_bytes,
    fill,
    put,
)


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
