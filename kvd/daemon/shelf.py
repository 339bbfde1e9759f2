"""Shelf: which chunks have a copy on disk, segment by segment and tenant by tenant, and which of
them are worth a second copy when their segment's room is wanted.

Segments are given back oldest first (the log is a queue), with a second chance for what was asked
for since it was written. Copying is bounded by a fraction of what is given back, so that it cannot
eat the device; on an agentic trace three times the fraction found no more and wrote more. What one
segment does not use of it the next ones may, for hot chunks come in clusters. Bookkeeping only, no
I/O.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from kvd.daemon.directory import Entry
from kvd.tiers.segment import record_size
from kvd.tiers.segment_state import SegmentInfo

# Of all segments that are given back, at most this much is copied on.
COPY_FRACTION = 0.05

# Of one segment, at most this much.
COPY_FRACTION_OF_ONE = 0.5

# A segment with so much of it dead is given back before older ones.
DEAD_FRACTION = 0.5


class Shelf:
    """Entries that have a copy on disk. `quota` bounds the bytes of each tenant, 0 for no bound."""

    def __init__(self, segment_size: int, *, quota: int = 0) -> None:
        self.quota = quota
        self.num_chunks = 0
        self._segment_size = segment_size
        self._by_slot: dict[int, set[Entry]] = {}
        # Bytes on disk, and chunks in the order they came there; both only where there is a quota.
        self._sizes: Counter[bytes] = Counter()
        # Bytes that are being written: several chunks of a tenant at a time.
        self._coming: Counter[bytes] = Counter()
        self._by_tenant: dict[bytes, dict[Entry, None]] = {}

    def add(self, entry: Entry, tenant: bytes) -> None:
        """The entry has a copy on disk now."""
        slot, size = self._place_of(entry)
        self._by_slot.setdefault(slot, set()).add(entry)
        self.num_chunks += 1
        if self.quota:
            self._sizes[tenant] += size
            self._by_tenant.setdefault(tenant, {})[entry] = None

    def remove(self, entry: Entry, tenant: bytes) -> None:
        """The entry is about to lose it."""
        slot, size = self._place_of(entry)
        self._by_slot[slot].remove(entry)
        if not self._by_slot[slot]:
            del self._by_slot[slot]
        self.num_chunks -= 1
        if self.quota:
            self._sizes[tenant] -= size
            del self._by_tenant[tenant][entry]

    @contextmanager
    def expecting(self, tenant: bytes, size: int) -> Iterator[None]:
        """`size` bytes are being written for a tenant: they count against its quota."""
        self._coming[tenant] += size
        try:
            yield
        finally:
            self._coming[tenant] -= size

    def on(self, slot: int) -> list[Entry]:
        """The entries of a segment, in the order of their places."""
        return sorted(self._by_slot.get(slot, ()), key=_offset)

    def slots(self) -> list[int]:
        """Segments that hold something."""
        return sorted(self._by_slot)

    def tenants(self) -> list[bytes]:
        """Whoever has something here; known where there is a quota."""
        return list(self._by_tenant)

    def excess(
        self, tenant: bytes, size: int, *, is_read: Callable[[Entry], bool]
    ) -> list[Entry] | None:
        """What of a tenant's chunks, oldest first, has to go for `size` bytes more within its
        quota; None if that cannot be.

        Chunks in memory keep their copies: without them they would be written again at once. So do
        those that are being read.
        """
        taken = self._sizes[tenant] + self._coming[tenant]
        excess = taken + size - self.quota if self.quota else 0
        found: list[Entry] = []
        for entry in self._by_tenant.get(tenant, ()):
            if excess <= 0:
                break
            if not entry.is_held and entry.in_memory is None and not is_read(entry):
                found.append(entry)
                excess -= self._place_of(entry)[1]
        return found if excess <= 0 else None

    def check(self, entries: Iterable[Entry]) -> None:
        """Assert that it knows exactly those of `entries` that are on disk. O(n), for audits."""
        here = {entry for entry in entries if entry.on_disk is not None}
        assert here == {entry for found in self._by_slot.values() for entry in found}
        assert len(here) == self.num_chunks
        for slot, found in self._by_slot.items():
            assert all(self._place_of(entry)[0] == slot for entry in found)
        if self.quota:
            assert sum(self._sizes.values()) == sum(self._place_of(entry)[1] for entry in here)

    def _place_of(self, entry: Entry) -> tuple[int, int]:
        assert entry.on_disk is not None
        extent = entry.on_disk.extent
        return extent.offset // self._segment_size, record_size(extent.size)


def choose_segment(segments: Sequence[SegmentInfo]) -> SegmentInfo | None:
    """The segment whose room costs least: one that is mostly dead, else the oldest; None if none
    can be given back.
    """
    closed = [info for info in segments if info.status in ("full", "poisoned")]
    if not closed:
        return None
    deadest = max(closed, key=lambda info: info.dead_size)
    whole = deadest.live_size + deadest.dead_size
    if deadest.dead_size > whole * DEAD_FRACTION:
        return deadest
    return min(closed, key=lambda info: info.sequence)


def worth_a_copy(entries: Sequence[Entry], size: int) -> list[Entry]:
    """Those of a segment's entries that get a second chance: what an operator holds, then what was
    asked for since it was written, most often first, `size` bytes at most.

    Of equals the one nearer the prompt's start: more prompts share it.
    """
    left = size
    kept: list[Entry] = []
    for entry in sorted(entries, key=_worth, reverse=True):
        # What is in memory can be written again, unless the daemon is killed first: what is held
        # must not depend on that.
        if not entry.is_held and (entry.in_memory is not None or not entry.is_recent):
            continue
        assert entry.on_disk is not None
        size = record_size(entry.on_disk.extent.size)
        if entry.is_held or size <= left:
            kept.append(entry)
            left -= size
    return kept


def _worth(entry: Entry) -> tuple[bool, int, int]:
    return entry.is_held, entry.uses, -entry.meta.start


def _offset(entry: Entry) -> int:
    assert entry.on_disk is not None
    return entry.on_disk.extent.offset
