"""SegmentLog: records appended to preallocated segments, read back verified, reclaimed by segment.

    append ─► written ── sync ─► durable      a failed write leaves the state as before;
    read   ─► verified or Corrupt             a failed fdatasync takes all that it should have kept
    free   ─► dead bytes ── reclaim ─► the segment's room, for another life of it

Thread-safe and blocking; `nvme.py` is the asynchronous rim. It knows offsets and opaque labels,
never keys. An `Extent` names a record: `offset` is that of its header, in a tier whose address
space is slot * segment size; `size` is the payload's.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvd.chunk import Extent
from kvd.errors import ConfigError, Corrupt, InvalidRequest, KvdError, Unsupported
from kvd.tiers.aligned import Frame, read_all, write_all
from kvd.tiers.file_ops import FILE_OPS, FileOps
from kvd.tiers.log_directory import LogDirectory
from kvd.tiers.segment import (
    BLOCK_SIZE,
    SEGMENT_SIZE_DEFAULT,
    Buffer,
    RecordHeader,
    SegmentHeader,
    belongs,
    check_record,
    checksum,
    pack_header,
    parse_header,
    payload_checksums,
    piece_size,
    record_size,
)
from kvd.tiers.segment_pool import SegmentPool
from kvd.tiers.segment_state import Segment, SegmentInfo

LOGGER = logging.getLogger(__name__)

NAME = "nvme"


class TierFailed(KvdError):
    """The device or the file system refused; what was stored before is as it was."""

    code = "tier_failed"


class FoundRecord(NamedTuple):
    """A record that a scan met: its header is intact, its payload unread."""

    extent: Extent
    header: RecordHeader


class _Place(NamedTuple):
    segment: Segment
    header: SegmentHeader
    offset: int
    sequence: int


class SegmentLog:
    """The log in the folder `path`: at most `size` bytes of segments, each made only if `reserve`
    bytes of the file system stay free then.

    After opening, no extent is known: `adopt` those that an index remembers or `scan` finds.
    Raises `ConfigError` for a folder that is in use, of another format or cannot be written.
    """

    def __init__(
        self,
        path: Path,
        size: int,
        *,
        reserve: int = 0,
        segment_size: int = SEGMENT_SIZE_DEFAULT,
        is_direct: bool = True,
        ops: FileOps = FILE_OPS,
    ) -> None:
        if size < segment_size:
            raise ConfigError(f"the nvme tier needs a segment of {segment_size} bytes, has {size}")
        self.name = NAME
        self.size = size
        self.segment_size = segment_size
        self.payload_bytes = 0
        self._ops = ops
        # Held by whoever gives records their places, opens or reclaims segments, syncs; taken in
        # this order.
        self._placing = threading.Lock()
        self._opening = threading.Lock()
        self._syncing = threading.Lock()
        self._directory = LogDirectory(path, segment_size, ops=ops)
        error = self._directory.direct_error
        if is_direct and error is not None:
            LOGGER.warning("nvme path=%s direct=no reason=%r", path, error.strerror)
        self.is_direct = is_direct and error is None
        self._pool = SegmentPool(
            self._directory, size, reserve=reserve, is_direct=self.is_direct, ops=ops
        )
        self._active: Segment | None = None
        # The segment after the active one, and for which active one it was last asked for.
        self._spare: Segment | None = None
        self._prepared: Segment | None = None
        try:
            self._pool.load()
            self.trim()
            self._active = self._pool.resume()
        except OSError as failure:
            self.close()
            raise ConfigError(f"{path} cannot hold a segment log: {failure}") from failure
        except KvdError:
            self.close()
            raise

    @property
    def used(self) -> int:
        """Bytes of live records, headers and padding included."""
        with self._pool.lock:
            return sum(segment.live_size for segment in self._pool.by_slot.values())

    @property
    def disk_size(self) -> int:
        """Bytes of all segment files."""
        return self._pool.disk_size

    @property
    def device_bytes(self) -> int:
        """Bytes given to the device since opening."""
        return self._pool.device_bytes

    @property
    def num_extents(self) -> int:
        """How many records live."""
        with self._pool.lock:
            return sum(len(segment.live) for segment in self._pool.by_slot.values())

    @property
    def write_amplification(self) -> float:
        """Bytes given to the device for each payload byte that was stored, since opening."""
        return self.device_bytes / self.payload_bytes if self.payload_bytes else 1.0

    def segments(self) -> list[SegmentInfo]:
        """Every segment there is, by slot."""
        with self._pool.lock:
            return [segment.info for _, segment in sorted(self._pool.by_slot.items())]

    def life(self, extent: Extent) -> int:
        """The life of the extent's segment, for an index to keep beside it; 0 where it has none."""
        with self._pool.lock:
            segment = self._pool.by_slot.get(extent.offset // self.segment_size)
            return segment.header.life if segment and segment.header else 0

    def allocated_size(self, extent: Extent) -> int:
        """The bytes that an extent takes, header and padding included."""
        return record_size(extent.size)

    def append(
        self,
        label: bytes,
        payload: NDArray[np.uint8],
        *,
        codec: str = "raw",
        payload_checksum: int | None = None,
    ) -> Extent | None:
        """Write a record: readable when this returns, durable after `sync` of its extent.

        None where no segment has room and none can be added: reclaim one, then try again. `payload`
        is `uint8 [size]`, contiguous; at a page's start it is written from where it is, else it is
        copied. Raises `Corrupt` if it does not have the checksum given (the bytes changed since),
        `InvalidRequest` for a record that cannot be, `TierFailed` where the device or the file
        system refuses: then nothing is stored and the room is free again, at once or with its
        segment.
        """
        check_record(payload.size, label, codec, segment_size=self.segment_size)
        whole, pieces = payload_checksums(payload)
        if payload_checksum is not None and whole != payload_checksum:
            raise Corrupt(f"checksum {payload_checksum:016x} expected, found {whole:016x}")
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
            payload_checksum=whole,
            pieces=pieces,
            label=label,
            codec=codec,
        )
        try:
            frame = Frame(payload)
            frame.load(pack_header(header))
            with self._pool.files.use(segment.slot) as fd:
                write_all(self._ops, fd, frame.vectors, offset)
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
        return Extent(NAME, segment.slot * self.segment_size + offset, payload.size)

    @property
    def wants_spare(self) -> bool:
        """The active segment is half full, and the one after it was not asked for yet."""
        active = self._active
        if active is None or self._spare is not None or self._prepared is active:
            return False
        return 2 * active.end > active.size

    def prepare(self) -> None:
        """Open the next segment before it is needed: no append then waits for an fdatasync of it.

        What fails here fails again when the segment is needed; only then is it told.
        """
        with self._opening:
            if not self.wants_spare:
                return
            self._prepared = self._active
            with suppress(OSError):
                self._spare = self._pool.begin()

    def sync(self, extents: Iterable[Extent] | None = None) -> None:
        """Make records durable: `extents`, or all that are written.

        Calls that wait for one another share an fdatasync. Raises `TierFailed` if one of them is
        lost: it is gone from the log, its segment takes no more records, and what was durable
        before still is.
        """
        wanted = self._unsynced() if extents is None else list(extents)
        if self._has_unsynced(wanted):
            with self._syncing:
                # Whoever held the lock may have done it.
                if self._has_unsynced(wanted):
                    self._sync_written()
        for extent in wanted:
            if self._is_lost(extent):
                raise TierFailed(f"the record at {extent.offset} could not be made durable")

    def read(self, extent: Extent, out: NDArray[np.uint8]) -> RecordHeader:
        """Fill `out`, `uint8 [extent.size]`, and return the record's header, both verified.

        Compare its label with what is wanted: an extent that was freed may be another record's by
        now. Raises `Corrupt` where record and checksums disagree, `TierFailed` where the device
        refuses; `out` is then undefined. `out` at a page's start is filled in place.
        """
        assert out.size == extent.size
        frame = Frame(out)
        slot, life, offset = self._life_of(extent)
        self._fill(slot, frame, offset)
        header = _verified(extent, life, offset, memoryview(frame.header))
        if checksum(out) != header.payload_checksum:
            raise Corrupt(f"the payload of the record at {extent.offset} is damaged")
        return header

    def read_header(self, extent: Extent) -> RecordHeader:
        """The record's header, verified. Raises as `read`."""
        slot, life, offset = self._life_of(extent)
        frame = Frame(np.empty(0, dtype=np.uint8))
        self._fill(slot, frame, offset)
        return _verified(extent, life, offset, memoryview(frame.header))

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
        another or with the payload. `header` saves reading it again. Raises as `read`.
        """
        step = piece_size(extent.size)
        end = offset + out.size
        is_within = 0 <= offset < end <= extent.size
        if not is_within or offset % step or (end % step and end != extent.size):
            raise InvalidRequest(f"a range of whole pieces of {step} wanted, found {offset}-{end}")
        if header is None:
            header = self.read_header(extent)
        slot, _, start = self._life_of(extent)
        self._fill(slot, Frame(out, has_header=False), start + BLOCK_SIZE + offset)
        first = offset // step
        for index in range(-(-out.size // step)):
            piece = out[index * step : (index + 1) * step]
            if checksum(piece) != header.pieces[first + index]:
                raise Corrupt(f"piece {first + index} of the record at {extent.offset} is damaged")
        return header

    def free(self, extent: Extent) -> None:
        """The record is dead; its bytes come back with its segment. One that does not live is a
        programmer's error.
        """
        with self._pool.lock:
            segment = self._pool.by_slot[extent.offset // self.segment_size]
            size = segment.free(extent.offset % self.segment_size)
            assert size == extent.size
        self._pool.let_go(segment)

    def adopt(self, extent: Extent, *, life: int | None = None) -> bool:
        """A record that an index or `scan` knows lives from now on; False if it cannot be there.

        With `life`, only in that life of its segment.
        """
        slot, offset = divmod(extent.offset, self.segment_size)
        with self._pool.lock:
            segment = self._pool.by_slot.get(slot)
            if segment is None or segment.header is None:
                return False
            if life is not None and segment.header.life != life:
                return False
            return segment.adopt(offset, extent.size)

    def reclaim(self, slot: int) -> None:
        """Give a segment's room back, when none of its records lives: its next life may begin.

        A poisoned one is deleted. Raises `InvalidRequest` while something lives in it or is
        written, and `TierFailed` where the file system refuses.
        """
        with self._opening:
            with self._pool.lock:
                segment = self._pool.by_slot.get(slot)
                if segment is None or segment.status == "active" or not segment.is_idle:
                    raise InvalidRequest(f"segment {slot} cannot be reclaimed now")
                if segment.live:
                    raise InvalidRequest(f"{len(segment.live)} records live in segment {slot}")
            try:
                self._pool.empty(segment)
            except OSError as error:
                raise TierFailed(f"segment {slot} cannot be deleted: {error}") from error

    def retire(self) -> None:
        """End the active segment: it can then be reclaimed, the next record goes to another."""
        with self._placing:
            active = self._active
            if active is not None:
                self._active = None
                self._pool.seal(active)

    def trim(self) -> int:
        """Delete void segments while the log is larger than it may be or less than `reserve` is
        free on the file system, and full ones, the oldest first, while it is larger than it may be.
        How many.
        """
        count = 0
        with self._opening:
            while (segment := self._pool.superfluous()) is not None:
                try:
                    self._pool.remove(segment)
                except OSError as error:
                    slot = segment.slot
                    raise TierFailed(f"segment {slot} cannot be deleted: {error}") from error
                count += 1
        return count

    def scan(self, progress: Callable[[int, int], None] | None = None) -> Iterator[FoundRecord]:
        """Every valid record of every segment, the oldest segment first, from headers alone.

        For rebuilding an index, before the first append. Freed records are among them until their
        segment is reclaimed. `progress` hears the bytes of segments done, and of all. What cannot
        be read is skipped.
        """
        living = self._pool.living
        for count, segment in enumerate(living, start=1):
            for record in self._pool.scan(segment, []):
                if not record.is_end and record.offset < segment.end:
                    offset = segment.slot * self.segment_size + record.offset
                    yield FoundRecord(Extent(NAME, offset, record.payload_size), record)
            if progress is not None:
                progress(count * self.segment_size, len(living) * self.segment_size)

    def check(self) -> None:
        """Assert the invariants. O(n log n), for audits and tests."""
        with self._pool.lock:
            for segment in self._pool.by_slot.values():
                segment.check()
            assert self.disk_size <= self.size

    def close(self) -> None:
        """Close the files and let the folder go. What is not synced may be lost in a power cut."""
        self._pool.files.close()
        self._directory.close()

    def _place(self, size: int) -> _Place | None:
        with self._placing:
            while True:
                active = self._active
                if active is not None:
                    with self._pool.lock:
                        offset = active.place(size)
                        if offset is not None:
                            assert active.header is not None
                            sequence = self._pool.next_sequence()
                            return _Place(active, active.header, offset, sequence)
                with self._opening:
                    fresh, self._spare = self._spare, None
                    try:
                        fresh = fresh or self._pool.begin()
                    except OSError as error:
                        raise TierFailed(f"no segment could be opened: {error}") from error
                if fresh is None:
                    return None
                self._active = fresh
                if active is not None:
                    self._pool.seal(active)

    def _abandon(self, segment: Segment, offset: int, size: int) -> None:
        # What was written of it must not be found by a scan: its header goes first. If that fails
        # too, a scan may find it, and reading it gives what was asked to be stored, or Corrupt.
        with suppress(OSError):
            self._pool.write_block(segment, offset, bytes(BLOCK_SIZE))
        with self._pool.lock:
            segment.abandon(offset, size)
        self._pool.let_go(segment)

    def _sync_written(self) -> None:
        with self._pool.lock:
            written = [(s, set(s.unsynced)) for s in self._pool.by_slot.values() if s.unsynced]
        for segment, offsets in written:
            try:
                with self._pool.files.use(segment.slot) as fd:
                    self._ops.fdatasync(fd)
            except OSError as error:
                LOGGER.error("nvme segment=%d poisoned=%r", segment.slot, error.strerror)
                with self._pool.lock:
                    segment.poison()
            else:
                with self._pool.lock:
                    segment.unsynced -= offsets
            self._pool.let_go(segment)

    def _unsynced(self) -> list[Extent]:
        with self._pool.lock:
            return [
                Extent(NAME, segment.slot * self.segment_size + offset, segment.live[offset])
                for segment in self._pool.by_slot.values()
                for offset in segment.unsynced
            ]

    def _has_unsynced(self, extents: Iterable[Extent]) -> bool:
        with self._pool.lock:
            return any(
                extent.offset % self.segment_size in segment.unsynced
                for extent in extents
                if (segment := self._pool.by_slot.get(extent.offset // self.segment_size))
            )

    def _is_lost(self, extent: Extent) -> bool:
        slot, offset = divmod(extent.offset, self.segment_size)
        with self._pool.lock:
            segment = self._pool.by_slot.get(slot)
            return segment is None or segment.live.get(offset) != extent.size

    def _life_of(self, extent: Extent) -> tuple[int, SegmentHeader, int]:
        slot, offset = divmod(extent.offset, self.segment_size)
        with self._pool.lock:
            segment = self._pool.by_slot.get(slot)
            life = segment.header if segment is not None else None
        if life is None or offset < BLOCK_SIZE or offset % BLOCK_SIZE:
            raise Corrupt(f"no record can be at {extent.offset}")
        if offset + record_size(extent.size) > self.segment_size:
            raise Corrupt(f"no record of {extent.size} bytes can be at {extent.offset}")
        return slot, life, offset

    def _fill(self, slot: int, frame: Frame, offset: int) -> None:
        try:
            with self._pool.files.use(slot) as fd:
                is_whole = read_all(self._ops, fd, frame.vectors, offset)
        except OSError as error:
            raise TierFailed(f"segment {slot} cannot be read at {offset}: {error}") from error
        if not is_whole:
            raise Corrupt(f"the file of segment {slot} is cut short")
        frame.unload()


def _verified(extent: Extent, life: SegmentHeader, offset: int, block: Buffer) -> RecordHeader:
    try:
        header = parse_header(block)
    except Unsupported as error:
        raise Corrupt(f"the record at {extent.offset} is of another version") from error
    if not belongs(header, life, offset) or header.payload_size != extent.size:
        raise Corrupt(f"another record is at {extent.offset}")
    return header
