"""Transit: a store's chunks between memory and what lies below it, either way.

    fetch ─► arriving, pinned ─► land: in memory
                             └─► lose: gone; who has it pinned keeps what had come of it
    begin_demotion ─► demoting, pinned ─► end_demotion: on disk as well, or not

A chunk that is dropped on its way keeps its extent until the move has ended. Bookkeeping only: the
`Lower` moves the bytes, and says here what has become of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from kvd.chunk import ChunkMeta, Extent, Placement
from kvd.daemon.arrival import Arrival, Arrivals
from kvd.daemon.codec_rules import RAW
from kvd.daemon.directory import Directory, Entry
from kvd.daemon.memory import Memory
from kvd.keys import ChunkKey, PackedKeys

# Chunks that come from disk because a lookup found them: enough to keep the device busy until the
# pin, few enough that lookups which no pin follows cost little.
PREFETCHES_MAX = 32


class Transit:
    """Between `memory` and its `lower`. `make_room` gives an extent of so many bytes at a time, or
    None; `whole_size` knows how many a chunk has there; `remove` unlists a chunk.
    """

    def __init__(
        self,
        memory: Memory,
        directory: Directory,
        counters: Counter[str],
        arrivals: Arrivals,
        *,
        make_room: Callable[[int, int], Extent | None],
        whole_size: Callable[[ChunkMeta, Placement], int | None],
        remove: Callable[[Entry], None],
    ) -> None:
        # Chunks on their way into memory, and those whose bytes are being written or encoded.
        self.arriving = arrivals.coming
        self.demoting: set[Entry] = set()
        self.packing: set[Entry] = set()
        # What had come of chunks that were lost on the way, while somebody has them pinned.
        self.lost: dict[Entry, Extent] = {}
        self._arrivals = arrivals
        self._memory = memory
        self._directory = directory
        self._counters = counters
        self._make_room = make_room
        self._whole_size = whole_size
        self._remove = remove

    def fetch(self, entry: Entry, now_ns: int) -> bool:
        """Let a listed chunk begin to come to memory unless it is there; False where there is no
        room.
        """
        if entry.in_memory is not None or entry in self.arriving:
            return True
        source, home = entry.placement, self._memory.packed if entry.packed else self._memory.lower
        assert home is not None
        size = self._whole_size(entry.meta, source)
        extent = None if size is None else self._make_room(size, now_ns)
        if extent is None:
            return False
        arrival = Arrival(entry, extent, source)
        self.arriving[entry] = arrival
        self._memory.reserve(extent)
        self._memory.policy.insert(entry.meta, now_ns)
        self._memory.pin(entry)
        home.fetch(arrival)
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
            size = self._whole_size(entry.meta, entry.placement)
            if size is None or size > self._memory.ready_size or not self.fetch(entry, now_ns):
                return
            self._counters["prefetch_chunks"] += 1

    def land(self, arrival: Arrival) -> None:
        """All bytes of a chunk from disk are in memory, verified."""
        entry = arrival.entry
        self._end_arrival(arrival)
        if not self._is_listed(entry):
            self._memory.free(arrival.extent)
            return
        source = arrival.source
        # A bitstream's checksum is not that of what comes out of it.
        checksum = source.checksum if source.codec == RAW else None
        self._memory.place(
            entry, Placement(arrival.extent, is_exact=source.is_exact, checksum=checksum)
        )
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
        if not self._stays(entry):
            return False
        if placement is not None:
            self._memory.shelve(entry, placement)
            entry.is_recent = False
        return True

    def begin_packing(self, entry: Entry) -> None:
        """The chunk's bytes are being encoded: they stay where they are."""
        assert entry.in_memory is not None
        assert entry.packed is None
        self.packing.add(entry)
        self._memory.pin(entry)

    def end_packing(self, entry: Entry) -> bool:
        """They are encoded, or will not be. False if nobody wants them any more."""
        self.packing.discard(entry)
        return self._stays(entry)

    def pack(self, entry: Entry, placement: Placement) -> None:
        """The chunk has an encoded copy."""
        self._memory.pack(entry, placement)

    def unpack(self, entry: Entry) -> None:
        """Give up the encoded copy of a chunk that is not arriving; without another, the chunk."""
        assert entry not in self.arriving
        if entry.in_memory is None and entry.on_disk is None:
            self._remove(entry)
            return
        assert self._memory.packed is not None
        self._memory.packed.drop(entry)
        self._memory.unpack(entry)

    def is_leaving(self, entry: Entry) -> bool:
        """Whether its bytes in memory are being written or encoded."""
        return entry in self.demoting or entry in self.packing

    def _stays(self, entry: Entry) -> bool:
        """A move that needed the chunk's bytes has ended; False if it is not listed any more."""
        self._memory.unpin(entry)
        if self._is_listed(entry):
            return True
        if not self.is_leaving(entry):
            assert entry.in_memory is not None
            self._memory.free(entry.in_memory.extent)
            entry.in_memory = None
        return False

    @property
    def demoting_size(self) -> int:
        """Bytes of memory that are being written to disk."""
        return _size_in_memory(self.demoting)

    @property
    def packing_size(self) -> int:
        """Bytes of memory that are being encoded."""
        return _size_in_memory(self.packing)

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
        """Give up the copy on disk of a chunk, which nobody reads; without another, the chunk."""
        assert not self._arrivals.reads_disk(entry)
        if entry.in_memory is None and entry.packed is None:
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


def _size_in_memory(entries: Iterable[Entry]) -> int:
    return sum(e.in_memory.extent.size for e in entries if e.in_memory is not None)
