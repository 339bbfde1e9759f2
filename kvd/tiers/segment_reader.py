"""SegmentReader: records out of a segment log, every byte verified before anybody may use it.

A header vouches for itself and for each piece of its payload, so a payload need not be read whole
before its first bytes count. The one idea: read in stripes, a few of one record in flight, and say
after each how far the payload is good.

    device   | header, stripe 0 | stripe 1 | stripe 2 | stripe 3 |
    caller                      | verify 0, progress | verify 1, progress | ...

The pieces cover the payload: whoever has verified them all has verified the whole, and hashes it
no second time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kvd.chunk import Extent
from kvd.errors import Corrupt, InvalidRequest, TierFailed, Unsupported
from kvd.tiers.aligned import Frame, read_all
from kvd.tiers.file_ops import FileOps
from kvd.tiers.read_ahead import ReadAhead
from kvd.tiers.segment import (
    BLOCK_SIZE,
    Buffer,
    RecordHeader,
    SegmentHeader,
    belongs,
    checksum,
    parse_header,
    piece_size,
    record_size,
)
from kvd.tiers.segment_pool import SegmentPool

if TYPE_CHECKING:
    from kvd.tiers.cipher import Cipher

# A MiB is half a millisecond of a fast device: the caller's work on one hides behind the next.
STRIPE_SIZE = 1 << 20

# Stripes of one record that are asked for at a time. How much longer a record of 8 MiB by itself
# takes than a plain read of the same bytes: 1 stripe 20 %, 2 10 %, 3 7 %, 4 5 %. The first of them
# comes the later the more of them share the device: of 4 after up to half of the whole time.
STRIPES_IN_FLIGHT = 3

# Threads that read ahead, for all records together. When all are busy, the device is too: whoever
# waits for a stripe that no thread has begun reads it by itself.
AHEAD_THREADS = 6


class SegmentReader:
    """Reads what stands in the segments of `pool`. Thread-safe; each call blocks."""

    def __init__(self, pool: SegmentPool, *, cipher: Cipher | None, ops: FileOps) -> None:
        self._pool = pool
        self._cipher = cipher
        self._ops = ops
        self._ahead = ThreadPoolExecutor(AHEAD_THREADS, "kvd-nvme-ahead")

    def read_header(self, extent: Extent) -> RecordHeader:
        """The record's header, verified. Raises as `read_stream`."""
        slot, life, offset = self._life_of(extent)
        frame = Frame(np.empty(0, dtype=np.uint8))
        with self._open(slot) as fd:
            self._fill(fd, frame, offset)
        return self._verified(extent, life, offset, memoryview(frame.header))

    def read_stream(
        self,
        extent: Extent,
        out: NDArray[np.uint8],
        *,
        check: Callable[[RecordHeader], None],
        progress: Callable[[int], None],
        stripe_size: int = STRIPE_SIZE,
    ) -> RecordHeader:
        """Fill `out`, `uint8 [extent.size]`, from its start on, telling how far it is good.

        `check` sees the verified header before any byte of the payload counts, and raises what
        shall end the read, `Corrupt` for a label that is not the wanted one. `progress` then hears
        how many bytes of `out` are verified, after each stripe; the last time it is all of them.
        Both are called in the calling thread, and what they raise ends the read. A stripe is whole
        pieces, of `stripe_size` bytes where pieces are smaller. Raises `Corrupt` where record and
        checksums disagree, `TierFailed` where the device refuses. After a failure nothing is read
        into `out` any more, and what is behind the last progress is undefined.
        """
        assert out.size == extent.size
        slot, life, offset = self._life_of(extent)
        step = _stripe_size(extent.size, stripe_size)
        stripes = [out[at : at + step] for at in range(0, out.size, step)]
        with self._open(slot) as fd:
            first = Frame(stripes[0])
            calls = [partial(self._fill, fd, first, offset)]
            for index, stripe in enumerate(stripes[1:], start=1):
                at = offset + BLOCK_SIZE + index * step
                calls.append(partial(self._fill_payload, fd, stripe, at))
            ahead = ReadAhead(self._ahead, calls, depth=STRIPES_IN_FLIGHT)
            try:
                ahead.wait()
                header = self._verified(extent, life, offset, memoryview(first.header))
                check(header)
                self._verify(extent, header, 0, stripes[0])
                progress(stripes[0].size)
                for index, stripe in enumerate(stripes[1:], start=1):
                    ahead.wait()
                    self._verify(extent, header, index * step, stripe)
                    progress(index * step + stripe.size)
            finally:
                ahead.close()
        return header

    def read_range(
        self,
        extent: Extent,
        offset: int,
        out: NDArray[np.uint8],
        *,
        header: RecordHeader | None = None,
    ) -> RecordHeader:
        """Fill `out` from `offset` within the payload, verified by itself; the record's header.

        Whole pieces: `offset` is a multiple of `piece_size(extent.size)`, and the range ends at
        another or with the payload. `header` saves reading it again. Raises as `read_stream`.
        """
        step = piece_size(extent.size)
        end = offset + out.size
        is_within = 0 <= offset < end <= extent.size
        if not is_within or offset % step or (end % step and end != extent.size):
            raise InvalidRequest(f"a range of whole pieces of {step} wanted, found {offset}-{end}")
        if header is None:
            header = self.read_header(extent)
        slot, _, start = self._life_of(extent)
        with self._open(slot) as fd:
            self._fill(fd, Frame(out, has_header=False), start + BLOCK_SIZE + offset)
        self._verify(extent, header, offset, out)
        return header

    def close(self) -> None:
        """Wait for what is under way and end the threads."""
        self._ahead.shutdown()

    @contextmanager
    def _open(self, slot: int) -> Iterator[int]:
        try:
            fd = self._pool.files.pin(slot)
        except OSError as error:
            raise TierFailed(f"segment {slot} cannot be opened: {error}") from error
        try:
            yield fd
        finally:
            self._pool.files.unpin(slot)

    def _fill(self, fd: int, frame: Frame, offset: int) -> None:
        try:
            is_whole = read_all(self._ops, fd, frame.vectors, offset)
        except OSError as error:
            raise TierFailed(f"a segment cannot be read at {offset}: {error}") from error
        if not is_whole:
            raise Corrupt(f"a segment's file is cut short before {offset}")
        frame.unload()

    def _fill_payload(self, fd: int, out: NDArray[np.uint8], offset: int) -> None:
        self._fill(fd, Frame(out, has_header=False), offset)

    def _life_of(self, extent: Extent) -> tuple[int, SegmentHeader, int]:
        slot, offset = divmod(extent.offset, self._pool.segment_size)
        with self._pool.lock:
            segment = self._pool.by_slot.get(slot)
            life = segment.header if segment is not None else None
        if life is None or offset < BLOCK_SIZE or offset % BLOCK_SIZE:
            raise Corrupt(f"no record can be at {extent.offset}")
        if offset + record_size(extent.size) > self._pool.segment_size:
            raise Corrupt(f"no record of {extent.size} bytes can be at {extent.offset}")
        return slot, life, offset

    def authentic(self, header: RecordHeader) -> RecordHeader:
        """The header as it was given to the log. Raises `Corrupt` where the key says otherwise."""
        return header if self._cipher is None else self._cipher.open_header(header)

    def _verified(
        self, extent: Extent, life: SegmentHeader, offset: int, block: Buffer
    ) -> RecordHeader:
        try:
            header = parse_header(block)
        except Unsupported as error:
            raise Corrupt(f"the record at {extent.offset} is of another version") from error
        if not belongs(header, life, offset) or header.payload_size != extent.size:
            raise Corrupt(f"another record is at {extent.offset}")
        return self.authentic(header)

    def _verify(
        self, extent: Extent, header: RecordHeader, offset: int, part: NDArray[np.uint8]
    ) -> None:
        # `part` begins at `offset` of the payload, where a piece begins.
        step = piece_size(extent.size)
        for index in range(-(-part.size // step)):
            number = offset // step + index
            piece = part[index * step : (index + 1) * step]
            if checksum(piece) != header.pieces[number]:
                raise Corrupt(f"piece {number} of the record at {extent.offset} is damaged")
            if self._cipher is not None:
                self._cipher.open_piece(header, number, piece)


def _stripe_size(payload_size: int, wanted: int) -> int:
    step = piece_size(payload_size)
    return max(wanted // step, 1) * step
