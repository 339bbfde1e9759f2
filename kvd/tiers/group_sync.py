"""GroupSync: one fdatasync for all records that were written before it.

Whoever waits while one runs shares the next. The one rule: an fdatasync that fails takes all that
it should have kept; asking again would get a yes that proves nothing.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable

from kvd.chunk import Extent
from kvd.errors import TierFailed
from kvd.tiers.file_ops import FileOps
from kvd.tiers.segment_pool import SegmentPool
from kvd.tiers.segment_state import Segment

LOGGER = logging.getLogger(__name__)


class GroupSync:
    """Makes what stands in the segments of `pool` durable. Thread-safe."""

    def __init__(self, pool: SegmentPool, *, ops: FileOps) -> None:
        self._pool = pool
        self._ops = ops
        self._syncing = threading.Lock()

    def sync(self, extents: Iterable[Extent] | None) -> None:
        """`SegmentLog.sync`."""
        wanted = self._unsynced() if extents is None else list(extents)
        if self._has_unsynced(wanted):
            with self._syncing:
                # Whoever held the lock may have done it.
                if self._has_unsynced(wanted):
                    self._sync_written()
        for extent in wanted:
            if self.is_lost(extent):
                raise TierFailed(f"the record at {extent.offset} could not be made durable")

    def sync_segment(self, segment: Segment) -> bool:
        """Make all that was written to it durable; False if that fails: it is poisoned then."""
        with self._syncing:
            with self._pool.lock:
                offsets = set(segment.unsynced)
            return self._sync_one(segment, offsets)

    def is_lost(self, extent: Extent) -> bool:
        """The record does not live, or not any more."""
        slot, offset = divmod(extent.offset, self._pool.segment_size)
        with self._pool.lock:
            segment = self._pool.by_slot.get(slot)
            return segment is None or segment.live.get(offset) != extent.size

    def _sync_written(self) -> None:
        with self._pool.lock:
            written = [(s, set(s.unsynced)) for s in self._pool.by_slot.values() if s.unsynced]
        for segment, offsets in written:
            self._sync_one(segment, offsets)
            self._pool.let_go(segment)

    def _sync_one(self, segment: Segment, offsets: set[int]) -> bool:
        try:
            with self._pool.files.use(segment.slot) as fd:
                self._ops.fdatasync(fd)
        except OSError as error:
            LOGGER.error("nvme segment=%d poisoned=%r", segment.slot, error.strerror)
            with self._pool.lock:
                segment.poison()
            return False
        with self._pool.lock:
            segment.unsynced -= offsets
        return True

    def _unsynced(self) -> list[Extent]:
        with self._pool.lock:
            return [
                self._pool.extent(segment, offset, segment.live[offset])
                for segment in self._pool.by_slot.values()
                for offset in segment.unsynced
            ]

    def _has_unsynced(self, extents: Iterable[Extent]) -> bool:
        with self._pool.lock:
            return any(
                extent.offset % self._pool.segment_size in segment.unsynced
                for extent in extents
                if (segment := self._pool.by_slot.get(extent.offset // self._pool.segment_size))
            )
