"""What the log knows of one segment: its life, which bytes of it live, and what may come next.

    void ── begin ─► active ── no room ─► full ── reclaim ─► void
                       └── fdatasync failed ─► poisoned ── reclaim ─► no file

Bookkeeping only; the log holds its lock around every call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kvd.tiers.segment import BLOCK_SIZE, SegmentHeader, record_size

SegmentStatus = Literal["void", "active", "full", "poisoned"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentInfo:
    """A segment as the store sees it when it chooses one to reclaim.

    Sizes are bytes on the device, headers and padding included: live + dead + free is the whole.
    `sequence` is that of the life: the least is the oldest.
    """

    slot: int
    status: SegmentStatus
    live_size: int
    dead_size: int
    free_size: int
    num_extents: int
    sequence: int


class Segment:
    """One slot. Offsets are bytes from the segment's start, of record headers."""

    __slots__ = (
        "end",
        "header",
        "is_pinned",
        "live",
        "live_size",
        "size",
        "slot",
        "status",
        "unsynced",
        "writing",
    )

    def __init__(self, slot: int, size: int, header: SegmentHeader | None) -> None:
        self.slot = slot
        self.size = size
        self.status: SegmentStatus = "void"
        self.header: SegmentHeader | None = None
        # Payload size of each record that somebody may read, and those of them that a power cut
        # could take.
        self.live: dict[int, int] = {}
        self.unsynced: set[int] = set()
        self.live_size = 0
        # Records that are being written.
        self.writing = 0
        # Its descriptor is kept open, for fdatasync to hear of every write.
        self.is_pinned = False
        # Where the next record goes; behind it nothing belongs to anybody.
        self.end = BLOCK_SIZE
        if header is not None:
            self.begin(header)
            self.status, self.end = "full", size

    def begin(self, header: SegmentHeader) -> None:
        """A new life."""
        assert not self.live
        assert not self.writing
        self.status, self.header, self.end = "active", header, BLOCK_SIZE

    def place(self, size: int) -> int | None:
        """The offset of a record of `size` bytes, or None where the segment has no room."""
        if self.status != "active" or self.end + size > self.size:
            return None
        offset = self.end
        self.end += size
        self.writing += 1
        return offset

    def commit(self, offset: int, payload_size: int) -> bool:
        """The record is written; False if the segment can make nothing durable any more."""
        self.writing -= 1
        if self.status == "poisoned":
            return False
        self._insert(offset, payload_size)
        self.unsynced.add(offset)
        return True

    def abandon(self, offset: int, size: int) -> None:
        """The record was not written; its bytes are free again if they are the last."""
        self.writing -= 1
        if self.status == "active" and self.end == offset + size:
            self.end = offset

    def adopt(self, offset: int, payload_size: int) -> bool:
        """A record that an index remembers lives; False if it cannot be here."""
        is_here = (
            self.header is not None
            and offset >= BLOCK_SIZE
            and offset % BLOCK_SIZE == 0
            and payload_size > 0
            and offset + record_size(payload_size) <= self.end
            and offset not in self.live
        )
        if is_here:
            self._insert(offset, payload_size)
        return is_here

    def free(self, offset: int) -> int:
        """Nobody reads the record any more; its payload's size."""
        payload_size = self.live.pop(offset)
        self.live_size -= record_size(payload_size)
        self.unsynced.discard(offset)
        return payload_size

    def poison(self) -> None:
        """What is not synced is lost: a second fdatasync would say yes and prove nothing."""
        self.status = "poisoned"
        for offset in list(self.unsynced):
            self.free(offset)

    def retire(self) -> None:
        """No record is added in this life."""
        if self.status == "active":
            self.status, self.end = "full", self.size

    def empty(self) -> None:
        """The life is over."""
        assert self.is_idle
        assert not self.live
        self.status, self.header, self.end = "void", None, BLOCK_SIZE

    @property
    def sequence(self) -> int:
        """That of the life; 0 without one."""
        return self.header.sequence if self.header is not None else 0

    @property
    def is_idle(self) -> bool:
        """No byte of it is on its way to the device."""
        return not self.writing and not self.unsynced

    @property
    def info(self) -> SegmentInfo:
        """A copy of the figures."""
        used = self.end if self.header is not None else 0
        return SegmentInfo(
            slot=self.slot,
            status=self.status,
            live_size=self.live_size,
            dead_size=used - self.live_size,
            free_size=self.size - used,
            num_extents=len(self.live),
            sequence=self.sequence,
        )

    def check(self) -> None:
        """Assert that live records lie within the segment and apart. O(n log n), for tests."""
        at = BLOCK_SIZE
        for offset, payload_size in sorted(self.live.items()):
            assert offset >= at, f"records overlap at {offset} of segment {self.slot}"
            at = offset + record_size(payload_size)
        assert at <= self.end <= self.size
        assert self.live_size == sum(map(record_size, self.live.values()))
        assert self.unsynced <= self.live.keys()
        assert self.status != "void" or (self.header is None and not self.live)

    def _insert(self, offset: int, payload_size: int) -> None:
        assert offset not in self.live
        self.live[offset] = payload_size
        self.live_size += record_size(payload_size)
