"""Records that are destroyed on disk: none comes back, and no neighbour goes with it."""

from __future__ import annotations

import errno
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvd.chunk import Extent
from kvd.errors import Corrupt, InvalidRequest, TierFailed
from kvd.tiers.aligned import aligned_bytes
from kvd.tiers.file_ops import FILE_OPS, FileOps, Vectors
from kvd.tiers.segment import BLOCK_SIZE
from tests.file_faults import FaultyOps, pattern
from tests.nvme_log import PATIENCE_S, SEGMENT_SIZE, Opener, assert_holds, put


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
