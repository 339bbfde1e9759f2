"""Inherited: what an earlier daemon left in memory, as the store sees it.

revive ─► unverified ── first pin ─► checking ── verified ─► a chunk like any other, or gone
hold_stray ─► a client of before may still write ── free_stray ─► free
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from kvd.chunk import ChunkMeta, Extent, Placement
from kvd.daemon.arrival import Arrival, Arrivals
from kvd.daemon.directory import Directory, Entry
from kvd.daemon.expiries import Expiry
from kvd.daemon.memory import Memory


class Inherited:
    """Chunks that nobody has looked at yet, and extents that nobody may have; those being looked at
    are among `arrivals`. `remove` unlists a chunk.
    """

    def __init__(
        self,
        memory: Memory,
        directory: Directory,
        counters: Counter[str],
        arrivals: Arrivals,
        *,
        remove: Callable[[Entry], None],
    ) -> None:
        self.unverified: set[Entry] = set()
        self.strays: set[Extent] = set()
        self._memory = memory
        self._directory = directory
        self._counters = counters
        self._checking = arrivals.checking
        self._remove = remove

    def revive(
        self, meta: ChunkMeta, placement: Placement, now_ns: int, expiry: Expiry | None = None
    ) -> bool:
        """List a chunk that an earlier daemon left in memory, in an extent that is allocated; it is
        verified when it is first pinned. False if it is here already.
        """
        if meta.key in self._directory:
            return False
        entry = Entry(meta)
        self._memory.place(entry, placement)
        self._directory.insert(entry, expiry)
        self._memory.policy.insert(meta, now_ns)
        self.unverified.add(entry)
        return True

    def verify(self, entries: Sequence[Entry]) -> None:
        """Let those of the entries be looked at that were not yet."""
        assert self._memory.hot is not None
        for entry in entries:
            if entry in self.unverified:
                assert entry.in_memory is not None
                self.unverified.remove(entry)
                arrival = Arrival(entry, entry.in_memory.extent, entry.in_memory)
                self._checking[entry] = arrival
                self._memory.hot.verify(arrival)

    def verified(self, arrival: Arrival, *, is_good: bool) -> None:
        """What `HotSet.verify` has found."""
        entry = arrival.entry
        if self._checking.get(entry) is not arrival:
            return
        del self._checking[entry]
        if is_good:
            self._counters["revive_chunks"] += 1
            return
        self._counters["damaged_chunks"] += 1
        self._remove(entry)

    def forget(self, entry: Entry) -> None:
        """The entry leaves memory, or is unlisted."""
        self.unverified.discard(entry)
        self._checking.pop(entry, None)

    def hold_stray(self, extent: Extent) -> None:
        """A client of an earlier daemon may still write into an allocated extent."""
        self.strays.add(extent)
        self._memory.reserve(extent)

    def free_stray(self, extent: Extent) -> None:
        """It has stopped."""
        self.strays.remove(extent)
        self._memory.unreserve(extent)
        self._memory.free(extent)
