"""Memory: the tier that clients map, whose turn it is to leave it, and what must stay.

    in the policy's order, cheapest loss first:

    copy elsewhere       the memory goes, the chunk stays listed
    no copy, not wanted  the chunk goes
    no copy, wanted      passed over while there is another: its write may be under way
    pinned, held         stays

Synchronous; what a chunk's leaving means to the store is the store's own (`evict`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from kvd.chunk import Extent, Placement
from kvd.daemon.directory import Directory, Entry
from kvd.daemon.eviction.base import EvictionPolicy
from kvd.daemon.eviction.window import Run, cheapest_window
from kvd.daemon.leases import Writer
from kvd.daemon.roles import HotSet, Lower, Packed
from kvd.tiers.cpu import CpuTier

# Chunks whose write to disk is owed and that one search for room passes over: many, for each that
# is not is lost, and few enough that a disk that is far behind costs half a millisecond.
LATE_CHUNKS_MAX = 1024


class Memory:
    """The memory tier of a store. Every listed chunk that is in it or on its way into it is in the
    policy, and no other.
    """

    def __init__(
        self,
        tier: CpuTier,
        policy: EvictionPolicy,
        directory: Directory,
        *,
        evict: Callable[[Entry], None],
    ) -> None:
        self.tier = tier
        self.policy = policy
        # What keeps chunks encoded, what lies below, and what remembers memory beyond the daemon's
        # life: where they are.
        self.packed: Packed | None = None
        self.lower: Lower | None = None
        self.hot: HotSet | None = None
        self.pinned_size = 0
        self.reserved_size = 0
        # Bytes of chunks that have another copy: they can leave at any moment.
        self.clean_size = 0
        self._directory = directory
        self._evict = evict

    @property
    def ready_size(self) -> int:
        """Bytes that can be had without losing a chunk that is wanted on disk; pins not counted."""
        return self.tier.size - self.tier.used + self.clean_size

    def is_owed(self, entry: Entry) -> bool:
        """Whether it should have another copy before it leaves memory."""
        if self.packed is not None and entry.packed is None and self.packed.is_owed(entry):
            return True
        return self.lower is not None and entry.on_disk is None and self.lower.is_owed(entry)

    def give_out(self, extent: Extent, writer: Writer | None) -> bool:
        """Whether an extent just allocated may be written, by a client or (None) by the daemon; if
        not, it is free again.
        """
        if self.hot is None or self.hot.write(extent, writer):
            return True
        self.tier.free(extent)
        return False

    def free(self, extent: Extent) -> None:
        """Nobody needs the extent any more."""
        # First forgotten, then free: whoever finds the arena later must not take it for the old.
        if self.hot is not None:
            self.hot.erase(extent)
        self.tier.free(extent)

    def reserve(self, extent: Extent) -> None:
        """Somebody fills the extent; it cannot be evicted."""
        self.reserved_size += self.tier.allocated_size(extent)

    def unreserve(self, extent: Extent) -> None:
        """The extent is filled or given up."""
        self.reserved_size -= self.tier.allocated_size(extent)

    def place(self, entry: Entry, placement: Placement) -> None:
        """The entry's copy in memory is complete."""
        assert entry.in_memory is None
        entry.in_memory = placement
        if entry.pins:
            self.pinned_size += placement.extent.size
        if entry.is_backed:
            self.clean_size += placement.extent.size

    def shelve(self, entry: Entry, placement: Placement) -> None:
        """The entry has a durable copy."""
        assert entry.on_disk is None
        if entry.in_memory is not None and not entry.is_backed:
            self.clean_size += entry.in_memory.extent.size
        entry.on_disk = placement

    def unshelve(self, entry: Entry) -> None:
        """The entry's durable copy is gone."""
        assert entry.on_disk is not None
        entry.on_disk = None
        if entry.in_memory is not None and not entry.is_backed:
            self.clean_size -= entry.in_memory.extent.size

    def pack(self, entry: Entry, placement: Placement) -> None:
        """The entry has an encoded copy."""
        assert entry.packed is None
        if entry.in_memory is not None and not entry.is_backed:
            self.clean_size += entry.in_memory.extent.size
        entry.packed = placement

    def unpack(self, entry: Entry) -> None:
        """The entry's encoded copy is gone."""
        assert entry.packed is not None
        entry.packed = None
        if entry.in_memory is not None and not entry.is_backed:
            self.clean_size -= entry.in_memory.extent.size

    def orphan(self, entry: Entry) -> None:
        """The entry is nobody's any more, but its bytes are needed until a move has ended."""
        assert entry.in_memory is not None
        self.policy.remove(entry.meta.key)
        if entry.is_backed:
            self.clean_size -= entry.in_memory.extent.size

    def forget(self, entry: Entry) -> Extent | None:
        """The entry leaves memory; the extent, if it had one, for the caller to free."""
        self.policy.remove(entry.meta.key)
        if entry.in_memory is None:
            return None
        extent = entry.in_memory.extent
        if entry.is_backed:
            self.clean_size -= extent.size
        if entry.pins:
            self.pinned_size -= extent.size
        entry.in_memory = None
        return extent

    def pin(self, entry: Entry) -> None:
        """One more who needs the entry where it is."""
        if not entry.pins and entry.in_memory is not None:
            self.pinned_size += entry.in_memory.extent.size
        entry.pins += 1

    def unpin(self, entry: Entry) -> None:
        """One less."""
        entry.pins -= 1
        if not entry.pins and entry.in_memory is not None:
            self.pinned_size -= entry.in_memory.extent.size

    def make_room(
        self, size: int, now_ns: int, *, blocked: Callable[[], set[Entry]]
    ) -> Extent | None:
        """An extent of `size` bytes, evicting the cheapest losses until there is one, or None.

        Where pinned chunks leave no run that is long enough, chunks may have been evicted for
        nothing: at most twice `size` in the policy's order, after that only such whose place
        completes a run. `blocked` says then what is pinned and what pinned chunks continue.
        """
        extent = self.tier.allocate(size)
        if extent is not None:
            return extent
        if size > self.tier.size - self.pinned_size - self.reserved_size:
            return None
        evicted_size = 0
        for entry in self._evictable(now_ns):
            evicted_size += entry.size
            self._evict(entry)
            extent = self.tier.allocate(size)
            if extent is not None or evicted_size > 2 * size:
                break
        return extent or self._clear_window(size, blocked())

    def owed(self, size: int, chunks_max: int) -> list[Entry]:
        """What to write to disk next, so that the coldest `size` bytes of memory can leave at any
        moment: chunks without a copy there that are wanted, coldest first.
        """
        found: list[Entry] = []
        left = size - (self.tier.size - self.tier.used)
        for seen, key in enumerate(self.policy.victims()):
            if left <= 0 or seen == chunks_max:
                break
            entry = self._directory.get(key)
            assert entry is not None
            if entry.in_memory is None:
                continue
            if not entry.is_pinned:
                left -= entry.in_memory.extent.size
            if self.is_owed(entry):
                found.append(entry)
        return found

    def _evictable(self, now_ns: int) -> Iterator[Entry]:
        late: list[Entry] = []
        parents: list[Entry] = []
        for key in self.policy.victims():
            entry = self._directory.get(key)
            assert entry is not None
            if entry.is_pinned:
                continue
            if not entry.is_leaf_in_memory:
                # It has younger chunks behind it that need it: it is as young as they are.
                self.policy.touch(key, now_ns)
                if entry.is_backed and len(parents) < LATE_CHUNKS_MAX:
                    parents.append(entry)
                continue
            if len(late) < LATE_CHUNKS_MAX and self.is_owed(entry):
                late.append(entry)
                continue
            yield entry
        # The disk is behind. What can come back from it goes first, then what cannot, the coldest
        # first.
        for entry in (*parents, *late):
            if entry.in_memory is not None and not entry.is_pinned:
                yield entry

    def _clear_window(self, size: int, blocked: set[Entry]) -> Extent | None:
        """Evict neighbours whose places make `size` bytes in one piece; None if pins forbid it."""
        runs = [Run(offset, length, None) for offset, length in self.tier.free_runs()]
        for entry in self._directory:
            if entry not in blocked and entry.in_memory is not None:
                extent = entry.in_memory.extent
                runs.append(Run(extent.offset, self.tier.allocated_size(extent), entry))
        window = cheapest_window(runs, size)
        if window is None:
            return None
        for label in window:
            assert isinstance(label, Entry)
            self._clear(label)
        cleared = self.tier.allocate(size)
        assert cleared is not None
        return cleared

    def _clear(self, root: Entry) -> None:
        # Another copy keeps the chunk and what continues it; without one, they go together.
        members: Iterable[Entry] = [root] if root.is_backed else root.descendants()
        for entry in members:
            if self._directory.get(entry.meta.key) is entry and entry.in_memory is not None:
                self._evict(entry)
