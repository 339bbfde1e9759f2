"""SegmentWriter: where the next record goes, and how it gets there.

One segment is active; records are given their places one after the other and written at the same
time. The next segment is opened ahead, so that no record waits for its fdatasync.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvd.chunk import Extent
from kvd.errors import Corrupt, TierFailed
from kvd.tiers.aligned import Frame, scratch_bytes, write_all
from kvd.tiers.file_ops import FileOps
from kvd.tiers.segment import (
    BLOCK_SIZE,
    RecordHeader,
    SegmentHeader,
    check_record,
    checksum,
    num_pieces,
    pack_header,
    payload_checksums,
    piece_checksums,
    record_size,
)
from kvd.tiers.segment_pool import SegmentPool
from kvd.tiers.segment_state import Segment

if TYPE_CHECKING:
    from kvd.tiers.cipher import Cipher


class _Place(NamedTuple):
    segment: Segment
    header: SegmentHeader
    offset: int
    sequence: int


class SegmentWriter:
    """Writes records into the segments of `pool`, going on in `active`. Thread-safe."""

    def __init__(
        self,
        pool: SegmentPool,
        active: Segment | None,
        *,
        cipher: Cipher | None,
        ops: FileOps,
    ) -> None:
        self.payload_bytes = 0
        self._cipher = cipher
        self._pool = pool
        self._ops = ops
        # Held by whoever gives records their places; `pool.opening` is taken after it.
        self._placing = threading.Lock()
        self._active = active
        # The segment after the active one, and for which active one it was last asked for.
        self._spare: Segment | None = None
        self._prepared: Segment | None = None

    @property
    def room(self) -> int:
        """Bytes that records can still take in segments that are open."""
        active, spare = self._active, self._spare
        return sum(s.size - s.end for s in (active, spare) if s is not None)

    @property
    def wants_spare(self) -> bool:
        """The active segment is half full, and the one after it was not asked for yet."""
        active = self._active
        if active is None or self._spare is not None or self._prepared is active:
            return False
        return 2 * active.end > active.size

    def append(
        self, label: bytes, payload: NDArray[np.uint8], *, codec: str, payload_checksum: int
    ) -> Extent | None:
        """`SegmentLog.append`; a `payload_checksum` of 0 is none."""
        check_record(payload.size, label, codec, segment_size=self._pool.segment_size)
        pieces = self._pieces(payload, payload_checksum)
        size = record_size(payload.size)
        place = self._place(size)
        if place is None:
            return None
        segment, life, offset, sequence = place
        header = RecordHeader(
            log_id=self._pool.log_id,
            life=life.life,
            sequence=sequence,
            offset=offset,
            payload_size=payload.size,
            payload_checksum=payload_checksum,
            pieces=pieces,
            label=label,
            codec=codec,
        )
        try:
            self._write(segment, header, payload)
        except BaseException as error:
            self._abandon(segment, offset, size)
            if isinstance(error, OSError):
                raise TierFailed(f"a record could not be written: {error}") from error
            raise
        with self._pool.lock:
            is_kept = segment.commit(offset, payload.size)
            self._pool.device_bytes += size
            self.payload_bytes += payload.size if is_kept else 0
        self._pool.let_go(segment)
        if not is_kept:
            raise TierFailed(f"segment {segment.slot} failed while a record was written to it")
        return self._pool.extent(segment, offset, payload.size)

    def prepare(self) -> None:
        """`SegmentLog.prepare`."""
        with self._pool.opening:
            if not self.wants_spare:
                return
            self._prepared = self._active
            with suppress(OSError):
                self._spare = self._pool.begin()

    def retire(self) -> None:
        """`SegmentLog.retire`."""
        with self._placing:
            active = self._active
            if active is not None:
                self._active = None
                self._pool.seal(active)

    def _pieces(self, payload: NDArray[np.uint8], wanted: int) -> tuple[int, ...]:
        # The storer's checksum is verified, not kept for reading: the pieces have their own. Those
        # of an encrypted record are of what is written, so the cipher makes them.
        if self._cipher is not None:
            found = checksum(payload) if wanted else 0
            pieces = (0,) * num_pieces(payload.size)
        elif wanted:
            found, pieces = payload_checksums(payload)
        else:
            found, pieces = 0, piece_checksums(payload)
        if found != wanted:
            raise Corrupt(f"checksum {wanted:016x} expected, found {found:016x}")
        return pieces

    def _write(self, segment: Segment, header: RecordHeader, payload: NDArray[np.uint8]) -> None:
        if self._cipher is not None:
            sealed = scratch_bytes(payload.size)
            header = self._cipher.seal(header, payload, sealed)
            payload = sealed
        frame = Frame(payload)
        frame.load(pack_header(header))
        with self._pool.files.use(segment.slot) as fd:
            write_all(self._ops, fd, frame.vectors, header.offset)

    def _place(self, size: int) -> _Place | None:
        with self._placing:
            while True:
                active = self._active
                place = self._place_in(active, size) if active is not None else None
                if place is not None:
                    return place
                fresh = self._open_next()
                if fresh is None:
                    return None
                self._active = fresh
                if active is not None:
                    self._pool.seal(active)

    def _place_in(self, segment: Segment, size: int) -> _Place | None:
        with self._pool.lock:
            offset = segment.place(size)
            if offset is None:
                return None
            assert segment.header is not None
            return _Place(segment, segment.header, offset, self._pool.next_sequence())

    def _open_next(self) -> Segment | None:
        with self._pool.opening:
            fresh, self._spare = self._spare, None
            try:
                return fresh or self._pool.begin()
            except OSError as error:
                raise TierFailed(f"no segment could be opened: {error}") from error

    def _abandon(self, segment: Segment, offset: int, size: int) -> None:
        # What was written of it must not be found by a scan: its header goes first. If that fails
        # too, a scan may find it, and reading it gives what was asked to be stored, or Corrupt.
        with suppress(OSError):
            self._pool.write_block(segment, offset, bytes(BLOCK_SIZE))
        with self._pool.lock:
            segment.abandon(offset, size)
        self._pool.let_go(segment)
