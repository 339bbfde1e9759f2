"""Streamed reads of the segment log: what counts when, and what a failure in the middle leaves."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from kvd.chunk import Extent
from kvd.errors import Corrupt, TierFailed
from kvd.tiers import segment_reader
from kvd.tiers.aligned import aligned_bytes
from kvd.tiers.file_ops import FileOps, Vectors
from kvd.tiers.nvme import NvmeTier
from kvd.tiers.read_ahead import ReadAhead
from kvd.tiers.segment import BLOCK_SIZE, PIECE_SIZE_MIN, RecordHeader
from kvd.tiers.segment_log import SegmentLog
from tests.file_faults import flip, pattern

SEGMENT_SIZE = 8 << 20
SIZE = 5_000_000

# What a thread may take on a loaded machine, before the test gives up.
PATIENCE_S = 60


class GatedOps(FileOps):
    """Reads of the payload behind `first_free` wait at a gate, and one of them may fail."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.first_free = 1 << 20
        self.at_gate = threading.Semaphore(0)
        self.failing: int | None = None
        self.under_way = 0
        self.reads: list[tuple[int, int]] = []
        self._lock = threading.Lock()

    def preadv(self, fd: int, vectors: Vectors, offset: int) -> int:
        at = offset - 2 * BLOCK_SIZE
        with self._lock:
            self.reads.append((offset, sum(vector.size for vector in vectors)))
            self.under_way += 1
        try:
            if at >= self.first_free and not self.gate.is_set():
                self.at_gate.release()
                assert self.gate.wait(PATIENCE_S)
            if at == self.failing:
                raise OSError(errno.EIO, "injected")
            return super().preadv(fd, vectors, offset)
        finally:
            with self._lock:
                self.under_way -= 1


class Stream:
    """One streamed read: what was heard, and that `out` was right each time."""

    def __init__(self, log: SegmentLog, extent: Extent, *, shift: int = 0) -> None:
        self.log, self.extent = log, extent
        self.out = aligned_bytes(extent.size + shift)[shift:]
        self.heard: list[int] = []
        self.labels: list[bytes] = []
        self.wanted = pattern(1, extent.size)

    def check(self, header: RecordHeader) -> None:
        assert not self.heard
        self.labels.append(header.label)

    def progress(self, size: int) -> None:
        self.heard.append(size)
        assert (self.out[:size] == self.wanted[:size]).all()

    def read(self, stripe_size: int = 1 << 20) -> RecordHeader:
        return self.log.read_stream(
            self.extent,
            self.out,
            check=self.check,
            progress=self.progress,
            stripe_size=stripe_size,
        )


@pytest.fixture
def ops() -> GatedOps:
    return GatedOps()


@pytest.fixture
def log(tmp_path: Path, ops: GatedOps) -> Iterator[SegmentLog]:
    log = SegmentLog(tmp_path, 2 * SEGMENT_SIZE, segment_size=SEGMENT_SIZE, ops=ops)
    with contextlib.closing(log):
        yield log


def put(log: SegmentLog, size: int = SIZE) -> Extent:
    extent = log.append(b"what it is", aligned_copy(pattern(1, size)))
    assert extent is not None
    log.sync([extent])
    return extent


def aligned_copy(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    out = aligned_bytes(data.size)
    out[:] = data
    return out


@pytest.mark.parametrize("size", [1, 4097, PIECE_SIZE_MIN, 1 << 20, (1 << 20) + 1, SIZE])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("stripe_size", [1, 1 << 19, 1 << 20, 1 << 30])
def test_every_byte_that_is_told_of_is_right(
    log: SegmentLog, size: int, shift: int, stripe_size: int
) -> None:
    stream = Stream(log, put(log, size), shift=shift)
    header = stream.read(stripe_size)
    assert stream.labels == [header.label] == [b"what it is"]
    step = max(stripe_size, PIECE_SIZE_MIN)
    assert stream.heard == [*range(step, size, step), size]


def test_the_first_stripe_comes_with_the_header_in_one_call(log: SegmentLog, ops: GatedOps) -> None:
    extent = put(log)
    ops.reads.clear()
    Stream(log, extent).read()
    assert (extent.offset, BLOCK_SIZE + (1 << 20)) in ops.reads
    assert len(ops.reads) == 5


def test_no_byte_is_hashed_twice(log: SegmentLog, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def counted(part: NDArray[np.uint8]) -> int:
        sizes.append(part.size)
        return real(part)

    real = segment_reader.checksum
    extent = put(log)
    monkeypatch.setattr(segment_reader, "checksum", counted)
    Stream(log, extent).read()
    assert sum(sizes) == SIZE


@pytest.mark.parametrize("piece", [0, 3, 4, 11, 19])
def test_damage_ends_the_read_before_it_is_told_of(
    log: SegmentLog, tmp_path: Path, piece: int
) -> None:
    extent = put(log)
    at = extent.offset + BLOCK_SIZE + piece * PIECE_SIZE_MIN + 5
    flip(tmp_path / "segment-00000000", at)
    stream = Stream(log, extent)
    with pytest.raises(Corrupt, match=f"piece {piece} "):
        stream.read()
    assert stream.heard == [(n + 1) << 20 for n in range(piece // 4)]


def test_a_label_that_is_not_the_wanted_one_ends_the_read_before_any_byte(
    log: SegmentLog,
) -> None:
    stream = Stream(log, put(log))

    def refuse(header: RecordHeader) -> None:
        raise Corrupt(f"another label: {header.label!r}")

    stream.check = refuse  # type: ignore[method-assign]
    with pytest.raises(Corrupt, match="another label: b'what it is'"):
        stream.read()
    assert stream.heard == []


@pytest.mark.parametrize("who", ["check", "progress", "device", "damage"])
def test_after_a_failure_nothing_is_read_into_the_callers_memory(
    log: SegmentLog, ops: GatedOps, tmp_path: Path, who: str
) -> None:
    extent = put(log)
    stream = Stream(log, extent)

    def fail(_: object) -> None:
        raise InterruptedError("the caller's own")

    if who in ("check", "progress"):
        setattr(stream, who, fail)
    elif who == "device":
        # The header's block, and with it the first stripe.
        ops.failing = -BLOCK_SIZE
    else:
        flip(tmp_path / "segment-00000000", extent.offset + BLOCK_SIZE)
    ops.gate.clear()
    wanted = {"device": TierFailed, "damage": Corrupt}.get(who, InterruptedError)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(stream.read)
        assert ops.at_gate.acquire(timeout=PATIENCE_S)
        # Stripes that are on their way hold the call back.
        assert not reading.done()
        ops.gate.set()
        with pytest.raises(wanted):
            reading.result(PATIENCE_S)
        assert ops.under_way == 0
    ops.failing = None
    log.check()


@pytest.mark.parametrize("stripe", [1, 2, 4])
def test_a_device_that_refuses_a_stripe_is_a_failed_read_and_no_more(
    log: SegmentLog, ops: GatedOps, stripe: int
) -> None:
    extent = put(log)
    ops.failing = stripe << 20
    stream = Stream(log, extent)
    with pytest.raises(TierFailed, match="injected"):
        stream.read()
    assert stream.heard == [(n + 1) << 20 for n in range(stripe)]
    ops.failing = None
    again = Stream(log, extent)
    again.read()
    assert again.heard[-1] == SIZE


def test_a_file_cut_short_is_corrupt(log: SegmentLog, tmp_path: Path) -> None:
    extent = put(log)
    with (tmp_path / "segment-00000000").open("r+b") as file:
        file.truncate(extent.offset + BLOCK_SIZE + (3 << 20))
    stream = Stream(log, extent)
    with pytest.raises(Corrupt, match="cut short"):
        stream.read()
    assert stream.heard == [1 << 20, 2 << 20, 3 << 20]


def test_busy_threads_make_a_read_slower_and_never_stuck(log: SegmentLog) -> None:
    extent = put(log)
    ahead = log._reader._ahead
    held = threading.Event()
    blockers = [ahead.submit(held.wait, PATIENCE_S) for _ in range(segment_reader.AHEAD_THREADS)]
    stream = Stream(log, extent)
    stream.read()
    assert stream.heard[-1] == SIZE
    held.set()
    assert all(blocker.result() for blocker in blockers)


def test_many_streams_at_a_time(log: SegmentLog) -> None:
    tier = NvmeTier(log)

    async def one(stream: Stream) -> None:
        await tier.read_stream(
            stream.extent, stream.out, check=stream.check, progress=stream.progress
        )

    async def story() -> None:
        streams = [Stream(log, extent) for _ in range(10)]
        await asyncio.gather(*(one(stream) for stream in streams))
        assert all(stream.heard[-1] == SIZE for stream in streams)

    extent = put(log)
    asyncio.run(story())
    tier.close()


def test_a_cancelled_stream_returns_when_its_thread_has_let_go(
    log: SegmentLog, ops: GatedOps
) -> None:
    tier = NvmeTier(log)
    stream = Stream(log, put(log))

    async def story() -> None:
        ops.gate.clear()
        task = asyncio.ensure_future(
            tier.read_stream(
                stream.extent, stream.out, check=stream.check, progress=stream.progress
            )
        )
        assert await asyncio.to_thread(ops.at_gate.acquire, timeout=PATIENCE_S)
        for _ in range(2):
            task.cancel()
            await asyncio.sleep(0)
            assert not task.done()
        ops.gate.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ops.under_way == 0

    asyncio.run(story())
    tier.close()


def test_calls_end_in_order_and_few_are_begun() -> None:
    begun: list[int] = []
    ended: list[int] = []
    with ThreadPoolExecutor(8) as pool:
        calls = [lambda n=n: begun.append(n) for n in range(20)]
        ahead = ReadAhead(pool, calls, depth=3)
        for n in range(20):
            ahead.wait()
            assert n in begun
            assert all(later < n + 4 for later in begun)
            ended.append(n)
        ahead.close()
    assert sorted(begun) == ended
