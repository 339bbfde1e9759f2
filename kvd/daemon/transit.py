"""Transit: a store's chunks between memory and what lies below it, either way.

    fetch ─► arriving, pinned ─► land: in memory
                             └─► lose: gone; who has it pinned keeps what had come of it
    begin_demotion ─► demoting, pinned ─► end_demotion: on disk as well, or not

A chunk that is dropped on its way keeps its extent until the move has ended. Bookkeeping only: the
`Lower` moves the bytes, and says here what has become of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from kvd.chunk import ChunkMeta, Extent, Placement
from kvd.daemon.arrival import Arrival, Arrivals
from kvd.daemon.directory import Directory, Entry
from kvd.daemon.memory import Memory
from kvd.keys import ChunkKey, PackedKeys

# Chunks that come from disk because a lookup found them: enough to keep the device busy until the
# pin, few enough that lookups which no pin follows cost little.
PREFETCHES_MAX = 32


class Transit:
    """Between `memory` and its `lower`. `make_room` gives an extent of so many bytes at a time, or
    None; `remove` unlists a chunk.
    """

    def __init__(
        self,
        memory: Memory,
        directory: Directory,
        counters: Counter[str],
        arrivals: Arrivals,
        *,
        make_room: Callable[[int, int], Extent | None],
        remove: Callable[[Entry], None],
    ) -> None:
        # Chunks on their way from disk, and those whose bytes are being written to it.
        self.arriving = arrivals.from_disk
        self.demoting: set[Entry] = set()
        # What had come of chunks that were lost on the way, while somebody has them pinned.
        self.lost: dict[Entry, Extent] = {}
        self._memory = memory
        self._directory = directory
        self._counters = counters
        self._make_room = make_room
        self._remove = remove

    def fetch(self, entry: Entry, now_ns: int) -> bool:
        """Let a listed chunk begin to come to memory unless it is there; False where there is no
        room.
        """
        if entry.in_memory is not None or entry in self.arriving:
            return True
        assert entry.on_disk is not None
        assert self._memory.lower is not None
        extent = self._make_room(entry.on_disk.extent.size, now_ns)
        if extent is None:
            return False
        arrival = Arrival(entry, extent)
        self.arriving[entry] = arrival
        self._memory.reserve(extent)
        self._memory.policy.insert(entry.meta, now_ns)
        self._memory.pin(entry)
        self._memory.lower.fetch(arrival)
        return True

    def fetch_all(
        self, entries: list[Entry], found: list[bool], now_ns: int, *, standalone: bool
    ) -> tuple[list[Entry], list[bool]]:
        """Let those of the found chunks that are on disk only begin to come. Where memory has no
        room for one it counts as not found, and so do those behind it in a chain.
        """
        for entry in entries:
            self._memory.pin(entry)
        missing: set[Entry] = set()
        try:
            for index, entry in enumerate(entries):
                if self.fetch(entry, now_ns):
                    continue
                self._counters["promote_full"] += 1
                missing.update([entry] if standalone else entries[index:])
                if not standalone:
                    break
        finally:
            for entry in entries:
                self._memory.unpin(entry)
        if not missing:
            return entries, found
        kept = [entry for entry in entries if entry not in missing]
        if not standalone:
            return kept, [True] * len(kept) + [False]
        each = iter(entries)
        return kept, [is_here and next(each) not in missing for is_here in found]

    def prefetch(self, keys: Sequence[ChunkKey] | PackedKeys, count: int, now_ns: int) -> None:
        """Let those of the first `count` chunks that are on disk only begin to come, as far as that
        costs nobody a chunk.
        """
        for index in range(count):
            entry = self._directory.get(keys[index])
            if entry is None or entry.in_memory is not None or entry in self.arriving:
                continue
            if len(self.arriving) >= PREFETCHES_MAX:
                return
            if entry.size > self._memory.ready_size or not self.fetch(entry, now_ns):
                return
            self._counters["prefetch_chunks"] += 1

    def land(self, arrival: Arrival) -> None:
        """All bytes of a chunk from disk are in memory, verified."""
        entry = arrival.entry
        self._end_arrival(arrival)
        if not self._is_listed(entry):
            self._memory.free(arrival.extent)
            return
        assert entry.on_disk is not None
        self._memory.place(entry, Placement(arrival.extent, checksum=entry.on_disk.checksum))
        if self._memory.hot is not None:
            self._memory.hot.keep(entry)
        self._counters["promote_chunks"] += 1
        self._counters["promote_bytes"] += arrival.extent.size

    def lose(self, arrival: Arrival) -> None:
        """The chunk could not be read right: it is gone, and a miss for those who wait for it."""
        entry = arrival.entry
        if self._is_listed(entry):
            self._remove(entry)
        self._end_arrival(arrival)
        if entry.pins:
            # Somebody may be copying what has come of it, which was right.
            self.lost[entry] = arrival.extent
            self._memory.reserve(arrival.extent)
        else:
            self._memory.free(arrival.extent)

    def free_lost(self, entry: Entry) -> None:
        """Nobody has the lost chunk pinned any more."""
        extent = self.lost.pop(entry)
        self._memory.unreserve(extent)
        self._memory.free(extent)

    def begin_demotion(self, entry: Entry) -> None:
        """The chunk's bytes are being written to disk: they stay where they are."""
        assert entry.in_memory is not None
        assert entry.on_disk is None
        self.demoting.add(entry)
        self._memory.pin(entry)

    def end_demotion(self, entry: Entry, placement: Placement | None) -> bool:
        """They are on disk, or, with None, will not be. False if nobody wants them any more: then
        the copy is the caller's to drop.
        """
        self.demoting.discard(entry)
        is_listed = self._is_listed(entry)
        self._memory.unpin(entry)
        if not is_listed:
            assert entry.in_memory is not None
            self._memory.free(entry.in_memory.extent)
            entry.in_memory = None
            return False
        if placement is not None:
            self._memory.shelve(entry, placement)
            entry.is_recent = False
        return True

    @property
    def demoting_size(self) -> int:
        """Bytes of memory that are being written to disk."""
        return sum(e.in_memory.extent.size for e in self.demoting if e.in_memory is not None)

    def is_demoting(self, entry: Entry) -> bool:
        """Whether its bytes are on their way to disk."""
        return entry in self.demoting

    def restore(self, meta: ChunkMeta, placement: Placement) -> Entry | None:
        """List a chunk that is on disk from before; None if it is listed with such a copy."""
        entry = self._directory.get(meta.key)
        if entry is None:
            entry = Entry(meta, on_disk=placement)
            self._directory.insert(entry)
            return entry
        if entry.on_disk is not None:
            return None
        self._memory.shelve(entry, placement)
        return entry

    def unshelve(self, entry: Entry) -> None:
        """Give up the copy on disk of a chunk that is not arriving; without one in memory, the
        chunk.
        """
        assert entry not in self.arriving
        if entry.in_memory is None:
            self._remove(entry)
            return
        assert self._memory.lower is not None
        self._memory.lower.drop(entry)
        self._memory.unshelve(entry)

    def _end_arrival(self, arrival: Arrival) -> None:
        del self.arriving[arrival.entry]
        self._memory.unreserve(arrival.extent)
        self._memory.unpin(arrival.entry)

    def _is_listed(self, entry: Entry) -> bool:
        return self._directory.get(entry.meta.key) is entry
