"""SegmentPool: which segments a log has, and how each begins, ends and is used again.

At most `size` bytes of files, preallocated; a new one only as long as `reserve` bytes of the file
system stay free. Methods that do I/O hold no lock: the log lets one thread in at a time.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
from collections.abc import Iterator
from contextlib import suppress

import numpy as np

from kvd.chunk import Extent
from kvd.errors import InvalidRequest
from kvd.tiers.aligned import aligned_bytes, read_bytes, write_all
from kvd.tiers.file_ops import FileOps
from kvd.tiers.log_directory import LogDirectory, read_segment_header
from kvd.tiers.segment import (
    BLOCK_SIZE,
    RUN_SHIFT,
    Buffer,
    RecordHeader,
    SegmentHeader,
    pack_header,
    pack_segment,
)
from kvd.tiers.segment_files import SegmentFiles, find_segments
from kvd.tiers.segment_scan import scan
from kvd.tiers.segment_state import Segment

LOGGER = logging.getLogger(__name__)

NAME = "nvme"


class SegmentPool:
    """The segments in `directory`. `lock` guards their state and is never held during I/O."""

    def __init__(
        self, directory: LogDirectory, size: int, *, reserve: int, is_direct: bool, ops: FileOps
    ) -> None:
        self.size = size
        self.segment_size = directory.header.segment_size
        self.log_id = directory.header.log_id
        self.key_id = directory.header.key_id
        self.lock = threading.Lock()
        # Held by whoever begins, reclaims or deletes a segment; `lock` is taken after it.
        self.opening = threading.Lock()
        self.by_slot: dict[int, Segment] = {}
        self.device_bytes = 0
        self.files = SegmentFiles(directory.path, self.segment_size, is_direct=is_direct, ops=ops)
        self._folder = directory.path
        self._reserve = reserve
        self._ops = ops
        self._sequence = directory.header.run << RUN_SHIFT

    @property
    def disk_size(self) -> int:
        """Bytes of all segment files."""
        return len(self.by_slot) * self.segment_size

    @property
    def living(self) -> list[Segment]:
        """Segments that hold records, the oldest first."""
        with self.lock:
            living = [segment for segment in self.by_slot.values() if segment.header is not None]
        return sorted(living, key=lambda segment: segment.sequence)

    def extent(self, segment: Segment, offset: int, payload_size: int) -> Extent:
        """The name of the record whose header is at `offset` of the segment."""
        return Extent(NAME, segment.slot * self.segment_size + offset, payload_size)

    def next_sequence(self) -> int:
        """A number above all before it. The caller holds `lock`."""
        self._sequence += 1
        return self._sequence

    def load(self) -> None:
        """Find the segments on disk. Raises `OSError`, or `ConfigError` for another version's."""
        for slot, size in find_segments(self._folder).items():
            path = self.files.path(slot)
            segment = Segment(slot, self.segment_size, None)
            try:
                if size > self.segment_size:
                    self._cut(slot)
                header = read_segment_header(path, self._ops)
                if header is not None and self._is_ours(slot, header):
                    segment = Segment(slot, self.segment_size, header)
                    self._sequence = max(self._sequence, header.sequence)
            except OSError as error:
                LOGGER.warning("nvme segment=%d unreadable=%r", slot, error.strerror)
                segment.status = "poisoned"
            self.by_slot[slot] = segment

    def resume(self) -> Segment | None:
        """The newest segment, active again behind its last record; None if it has no room, or if
        some of it cannot be read: there might be records behind the last readable one.
        """
        living = self.living
        while living:
            newest = living.pop()
            failures: list[OSError] = []
            end = BLOCK_SIZE
            for record in self.scan(newest, failures):
                end = newest.size if record.is_end else record.end
                self._sequence = max(self._sequence, record.sequence)
            if failures or end > BLOCK_SIZE:
                break
            # It was opened ahead, and the one before it was still being filled.
            newest.empty()
        else:
            return None
        if failures or end + 2 * BLOCK_SIZE > newest.size:
            return None
        try:
            fd = self.files.pin(newest.slot)
            # After a kill, what was found may be in the page cache only.
            self._ops.fdatasync(fd)
        except OSError as error:
            LOGGER.warning("nvme segment=%d resumed=no reason=%r", newest.slot, error.strerror)
            return None
        newest.is_pinned = True
        newest.status, newest.end = "active", end
        return newest

    def begin(self) -> Segment | None:
        """A void segment, or a new one, with a new life; None where the bounds leave neither.

        Raises `OSError`: then a file that could not be made is gone, one that could not be written
        is poisoned.
        """
        with self.lock:
            voids = [s for s in self.by_slot.values() if s.status == "void"]
            sequence = self.next_sequence()
        segment = min(voids, key=lambda void: void.slot) if voids else self._create()
        if segment is None:
            return None
        header = SegmentHeader(
            log_id=self.log_id,
            segment_size=self.segment_size,
            slot=segment.slot,
            life=secrets.randbits(64) or 1,
            sequence=sequence,
            key_id=self.key_id,
        )
        try:
            self._write_life(segment, pack_segment(header))
        except OSError:
            with self.lock:
                segment.status = "poisoned"
            raise
        with self.lock:
            segment.is_pinned = True
            segment.begin(header)
        return segment

    def seal(self, segment: Segment) -> None:
        """No record is added to it; where there is room, a mark spares the next scan a search."""
        with self.lock:
            offset = segment.place(BLOCK_SIZE)
            sequence = self.next_sequence()
            segment.retire()
        if offset is not None:
            assert segment.header is not None
            mark = RecordHeader(
                log_id=self.log_id,
                life=segment.header.life,
                sequence=sequence,
                offset=offset,
                payload_size=0,
                payload_checksum=0,
                pieces=(),
                label=b"",
                is_end=True,
            )
            with suppress(OSError):
                self.write_block(segment, offset, pack_header(mark))
            with self.lock:
                segment.writing -= 1
        self.let_go(segment)

    def empty(self, segment: Segment) -> None:
        """Void: its next life may begin. A poisoned one is deleted. Raises `OSError`."""
        if segment.status == "poisoned":
            self.remove(segment)
            return
        with self.lock:
            segment.empty()
        # A courtesy to the next scan: only the new life is the end of the old one for good.
        with suppress(OSError):
            self.write_block(segment, 0, bytes(BLOCK_SIZE))

    def remove(self, segment: Segment) -> None:
        """Delete the file. Raises `OSError`, and `InvalidRequest` while somebody reads it."""
        if not self.files.remove(segment.slot):
            raise InvalidRequest(f"segment {segment.slot} is being read; try again")
        with self.lock:
            del self.by_slot[segment.slot]

    @property
    def lacks_reserve(self) -> bool:
        """Whether the file system has less free than it should keep."""
        return self._ops.free_size(self._folder) < self._reserve

    def room(self) -> int:
        """Bytes of segments that could be begun now: void ones, and new ones within the bounds."""
        with self.lock:
            voids = sum(segment.status == "void" for segment in self.by_slot.values())
        free = self._ops.free_size(self._folder) - self._reserve
        new = max(min(self.size - self.disk_size, free), 0) // self.segment_size
        return (voids + new) * self.segment_size

    def superfluous(self) -> Segment | None:
        """A segment to delete: a void one while the log or the file system is too full, the oldest
        without a live record while the log is larger than it may be.
        """
        with self.lock:
            idle = [s for s in self.by_slot.values() if s.status != "active" and s.is_idle]
            is_large = self.disk_size > self.size
        voids = [segment for segment in idle if segment.header is None]
        if voids and (is_large or self.lacks_reserve):
            return voids[-1]
        dead = [segment for segment in idle if not segment.live]
        return min(dead, key=lambda s: s.sequence) if is_large and dead else None

    def scan(self, segment: Segment, failures: list[OSError]) -> Iterator[RecordHeader]:
        """Every record of the segment's life, and its end mark; `failures` gets what was not
        readable.
        """

        def read(offset: int, size: int) -> Buffer | None:
            try:
                with self.files.use(segment.slot) as fd:
                    return read_bytes(self._ops, fd, size, offset)
            except OSError as error:
                failures.append(error)
                return None

        if segment.header is not None:
            yield from scan(segment.header, read)

    def write_block(self, segment: Segment, offset: int, content: bytes) -> None:
        """One block. Raises `OSError`."""
        block = aligned_bytes(BLOCK_SIZE)
        block[:] = np.frombuffer(content, dtype=np.uint8)
        with self.files.use(segment.slot) as fd:
            write_all(self._ops, fd, [block], offset)
        with self.lock:
            self.device_bytes += BLOCK_SIZE

    def let_go(self, segment: Segment) -> None:
        """Allow its descriptor to be closed, unless bytes may still be on their way."""
        with self.lock:
            if segment.status == "active" or not segment.is_idle or not segment.is_pinned:
                return
            segment.is_pinned = False
        self.files.unpin(segment.slot)

    def _create(self) -> Segment | None:
        if self.disk_size + self.segment_size > self.size:
            return None
        if self._ops.free_size(self._folder) - self.segment_size < self._reserve:
            return None
        slot = next(slot for slot in range(len(self.by_slot) + 1) if slot not in self.by_slot)
        self.files.create(slot)
        segment = Segment(slot, self.segment_size, None)
        with self.lock:
            self.by_slot[slot] = segment
        return segment

    def _write_life(self, segment: Segment, header: bytes) -> None:
        fd = self.files.pin(segment.slot)
        try:
            # Durable before the first record: the last life is then over, whatever happens.
            self.write_block(segment, 0, header)
            self._ops.fdatasync(fd)
        except OSError:
            self.files.unpin(segment.slot)
            raise

    def _cut(self, slot: int) -> None:
        fd = self._ops.open(self.files.path(slot), os.O_RDWR)
        try:
            self._ops.ftruncate(fd, self.segment_size)
        finally:
            self._ops.close(fd)

    def _is_ours(self, slot: int, header: SegmentHeader) -> bool:
        return (
            header.log_id == self.log_id
            and header.slot == slot
            and header.segment_size == self.segment_size
            and header.key_id == self.key_id
        )
