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
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvd.chunk import Extent
from kvd.errors import ConfigError, Corrupt, InvalidRequest, KvdError, TierFailed
from kvd.tiers.file_ops import FILE_OPS, FileOps
from kvd.tiers.group_sync import GroupSync
from kvd.tiers.log_directory import LogDirectory
from kvd.tiers.segment import (
    BLOCK_SIZE,
    NO_KEY,
    SEGMENT_SIZE_DEFAULT,
    RecordHeader,
    record_size,
)
from kvd.tiers.segment_pool import NAME, SegmentPool
from kvd.tiers.segment_reader import STRIPE_SIZE, SegmentReader
from kvd.tiers.segment_state import SegmentInfo
from kvd.tiers.segment_writer import SegmentWriter

if TYPE_CHECKING:
    from kvd.tiers.cipher import Cipher

__all__ = ["NAME", "FoundRecord", "SegmentLog"]

LOGGER = logging.getLogger(__name__)


class FoundRecord(NamedTuple):
    """A record that a scan met: its header is intact, its payload unread."""

    extent: Extent
    header: RecordHeader


class SegmentLog:
    """The log in the folder `path`: at most `size` bytes of segments, each made only if `reserve`
    bytes of the file system stay free then.

    After opening, no extent is known: `adopt` those that an index remembers or `scan` finds. With
    `cipher`, all payloads are encrypted, and records that were not written with its key are none.
    Raises `ConfigError` for a folder that is in use, of another format or key, or read-only.
    """

    def __init__(
        self,
        path: Path,
        size: int,
        *,
        reserve: int = 0,
        segment_size: int = SEGMENT_SIZE_DEFAULT,
        is_direct: bool = True,
        cipher: Cipher | None = None,
        ops: FileOps = FILE_OPS,
    ) -> None:
        if size < segment_size:
            raise ConfigError(f"the nvme tier needs a segment of {segment_size} bytes, has {size}")
        self.name = NAME
        self.path = path
        self.size = size
        self.reserve = reserve
        self.segment_size = segment_size
        # Of the key that payloads are encrypted with, or zeros.
        self.key_id = cipher.key_id if cipher is not None else NO_KEY
        self._directory = LogDirectory(path, segment_size, key_id=self.key_id, ops=ops)
        error = self._directory.direct_error
        if is_direct and error is not None:
            LOGGER.warning("nvme path=%s direct=no reason=%r", path, error.strerror)
        self.is_direct = is_direct and error is None
        self._pool = SegmentPool(
            self._directory, size, reserve=reserve, is_direct=self.is_direct, ops=ops
        )
        self._reader = SegmentReader(self._pool, cipher=cipher, ops=ops)
        self._sync = GroupSync(self._pool, ops=ops)
        try:
            self._pool.load()
            self.trim()
            self._writer = SegmentWriter(self._pool, self._pool.resume(), cipher=cipher, ops=ops)
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
    def payload_bytes(self) -> int:
        """Payload bytes stored since opening."""
        return self._writer.payload_bytes

    @property
    def num_extents(self) -> int:
        """How many records live."""
        with self._pool.lock:
            return sum(len(segment.live) for segment in self._pool.by_slot.values())

    @property
    def write_amplification(self) -> float:
        """Bytes given to the device for each payload byte that was stored, since opening."""
        return self.device_bytes / self.payload_bytes if self.payload_bytes else 1.0

    @property
    def log_id(self) -> bytes:
        """16 bytes, drawn when the log was made."""
        return self._pool.log_id

    @property
    def room(self) -> int:
        """Bytes that records can still take before a segment has to be reclaimed."""
        return self._writer.room + self._pool.room()

    @property
    def lacks_reserve(self) -> bool:
        """Whether the file system has less free than `reserve`: others have filled it."""
        return self._pool.lacks_reserve

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
        return self._writer.append(
            label, payload, codec=codec, payload_checksum=payload_checksum or 0
        )

    @property
    def wants_spare(self) -> bool:
        """The active segment is half full, and the one after it was not asked for yet."""
        return self._writer.wants_spare

    def prepare(self) -> None:
        """Open the next segment before it is needed: no append then waits for an fdatasync of it.

        What fails here fails again when the segment is needed; only then is it told.
        """
        self._writer.prepare()

    def sync(self, extents: Iterable[Extent] | None = None) -> None:
        """Make records durable: `extents`, or all that are written.

        Calls that wait for one another share an fdatasync. Raises `TierFailed` if one of them is
        lost: it is gone from the log, its segment takes no more records, and what was durable
        before still is.
        """
        self._sync.sync(extents)

    def read(self, extent: Extent, out: NDArray[np.uint8]) -> RecordHeader:
        """Fill `out`, `uint8 [extent.size]`, and return the record's header, both verified.

        Compare its label with what is wanted: an extent that was freed may be another record's by
        now. Raises `Corrupt` where record and checksums disagree, `TierFailed` where the device
        refuses; `out` is then undefined. `out` at a page's start is filled in place.
        """
        return self._reader.read_stream(
            extent, out, check=_no_check, progress=_no_progress, stripe_size=self.segment_size
        )

    def read_stream(
        self,
        extent: Extent,
        out: NDArray[np.uint8],
        *,
        check: Callable[[RecordHeader], None],
        progress: Callable[[int], None],
        stripe_size: int = STRIPE_SIZE,
    ) -> RecordHeader:
        """`SegmentReader.read_stream`: as `read`, but `out` counts from its start on, stripe by
        stripe.
        """
        return self._reader.read_stream(
            extent, out, check=check, progress=progress, stripe_size=stripe_size
        )

    def read_header(self, extent: Extent) -> RecordHeader:
        """`SegmentReader.read_header`."""
        return self._reader.read_header(extent)

    def read_range(
        self,
        extent: Extent,
        offset: int,
        out: NDArray[np.uint8],
        *,
        header: RecordHeader | None = None,
    ) -> RecordHeader:
        """`SegmentReader.read_range`."""
        return self._reader.read_range(extent, offset, out, header=header)

    def free(self, extent: Extent) -> None:
        """The record is dead; its bytes come back with its segment. One that does not live is a
        programmer's error.
        """
        with self._pool.lock:
            segment = self._pool.by_slot[extent.offset // self.segment_size]
            size = segment.free(extent.offset % self.segment_size)
            assert size == extent.size
        self._pool.let_go(segment)

    def kill(self, extent: Extent) -> bool:
        """Free a record that was found bad and clear its header, so that no scan meets it again.

        Whether that is durable; False too for a record that does not live. Where the device refuses
        it is freed all the same, and a scan may find it again. Raises nothing.
        """
        slot, offset = divmod(extent.offset, self.segment_size)
        with self._pool.lock:
            segment = self._pool.by_slot.get(slot)
            if segment is None or segment.live.get(offset) != extent.size:
                return False
            segment.free(offset)
            # Its room must not become another record's while the header is cleared.
            segment.writing += 1
        try:
            with self._pool.files.use(slot):
                self._pool.write_block(segment, offset, bytes(BLOCK_SIZE))
                return self._sync.sync_segment(segment)
        except OSError as error:
            LOGGER.warning("nvme segment=%d killed=no reason=%r", slot, error.strerror)
            return False
        finally:
            with self._pool.lock:
                segment.writing -= 1
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
        with self._pool.opening:
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
        self._writer.retire()

    def trim(self) -> int:
        """Delete void segments while the log is larger than it may be or less than `reserve` is
        free on the file system, and full ones, the oldest first, while it is larger than it may be.
        How many.
        """
        count = 0
        with self._pool.opening:
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
                if record.is_end or record.offset >= segment.end:
                    continue
                with suppress(Corrupt):
                    header = self._reader.authentic(record)
                    extent = self._pool.extent(segment, record.offset, record.payload_size)
                    yield FoundRecord(extent, header)
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
        self._reader.close()
        self._pool.files.close()
        self._directory.close()


def _no_check(_: RecordHeader) -> None:
    """Whoever reads compares the label."""


def _no_progress(_: int) -> None:
    """Whoever reads waits for the end."""
