"""ChunkStore: the conductor. It alone composes directory, memory and the disk below it, and keeps
what every one of them promises.

    reserve ─► client writes into its extents ─► commit    nothing half-written is ever listed
       └─ release or session's end: extents freed          a late writer keeps them until then
    pin ─► client copies ─► release                        a pinned chunk is never evicted or moved
       └─ deadline + grace: the pins go                    a late reader is told
    pin of a chunk on disk ─► it arrives, from its first   a client waits for the bytes it wants
       byte to its last ─► in memory, or lost              what fails its checks is a miss

Synchronous and single-threaded: the event loop calls it, no call waits for anything. What moves
bytes between memory and disk, the `Lower`, tells the store what has become of them. Time comes in
as `now_ns`. A failed call leaves everything as it was; the one exception is `Memory.make_room`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Literal

from kvd.chunk import ChunkMeta, Extent, Fingerprint, Placement
from kvd.daemon.arrival import Arrival
from kvd.daemon.directory import Directory, Entry
from kvd.daemon.eviction.base import EvictionPolicy
from kvd.daemon.labels import tenant_of
from kvd.daemon.leases import LeaseBook, ReadLease, WriteLease, Writer, check_lease_ns
from kvd.daemon.memory import Memory
from kvd.daemon.roles import HotSet, Lower
from kvd.errors import InvalidRequest, LayoutMismatch, LeaseExpired, TooLarge
from kvd.keys import ChunkKey, PackedKeys, short
from kvd.layout import KVLayout
from kvd.tiers.cpu import CpuTier

# Layouts a daemon keeps in mind: every model, rank and tenant of a node, with room.
LAYOUTS_MAX = 65536

# Chunks that come from disk because a lookup found them: enough to keep the device busy until the
# pin, few enough that lookups which no pin follows cost little.
PREFETCHES_MAX = 32

ReserveState = Literal["granted", "exists", "busy", "full"]


class ChunkStore:
    """lookup, reserve, commit, pin, release, evict over memory and what lies below it."""

    def __init__(self, tier: CpuTier, policy: EvictionPolicy) -> None:
        self.tier = tier
        self.layouts: dict[Fingerprint, KVLayout] = {}
        # Whose chunks they are; known of chunks from before even where their layout is not.
        self.tenants: dict[Fingerprint, bytes] = {}
        self.directory = Directory()
        self.counters: Counter[str] = Counter()
        self.lower: Lower | None = None
        # Whether a lookup lets what it found on disk begin to come.
        self.is_prefetching = False
        self.memory = Memory(tier, policy, self.directory, evict=self._evict, is_owed=self._is_owed)
        self._policy = policy
        # Chunks on their way from disk, and those whose bytes are being written to it.
        self._arriving: dict[Entry, Arrival] = {}
        # Chunks in memory from an earlier daemon: not looked at yet, and being looked at; and what
        # its clients may still be writing.
        self.hot: HotSet | None = None
        self._unverified: set[Entry] = set()
        self._checking: dict[Entry, Arrival] = {}
        self._strays: set[Extent] = set()
        self._demoting: set[Entry] = set()
        # What had come of chunks that were lost on the way, while somebody has them pinned.
        self._lost: dict[Entry, Extent] = {}
        self._leases = LeaseBook()
        # Keys that somebody is writing, with the lease that does.
        self._writing: dict[ChunkKey, WriteLease] = {}
        # Entries that an operator holds.
        self._held: set[Entry] = set()
        # One int object a size, not one a chunk: a million chunks feel it.
        self._sizes: dict[int, int] = {}

    @property
    def num_pinned(self) -> int:
        """Open read leases."""
        return self._leases.num_pinned

    @property
    def num_reserved(self) -> int:
        """Extents that are written, or that a late writer may still write."""
        return self._leases.num_reserved

    def declare(self, layout: KVLayout) -> Fingerprint:
        """Make a layout known; its fingerprint names it from now on. Twice is once."""
        fingerprint = Fingerprint(layout.fingerprint)
        if fingerprint not in self.layouts and len(self.layouts) >= LAYOUTS_MAX:
            raise InvalidRequest(
                f"{LAYOUTS_MAX} layouts are known already, and are kept until the daemon restarts"
            )
        self.layouts.setdefault(fingerprint, layout)
        self.tenants.setdefault(fingerprint, tenant_of(layout.salt))
        return fingerprint

    def lookup(
        self, keys: Sequence[ChunkKey] | PackedKeys, *, prefetch_at_ns: int | None = None
    ) -> int:
        """How many of the first `keys`, a chain in order, are here. Says nothing of a moment later:
        `pin` does. With `prefetch_at_ns`, the time, those on disk begin to come.
        """
        found = self.directory.match(keys)
        if prefetch_at_ns is not None and self.lower is not None and found:
            self._prefetch(keys, found, prefetch_at_ns)
        self.counters["lookups"] += 1
        self.counters["lookup_chunks"] += len(keys)
        self.counters["lookup_hits"] += found
        return found

    def present(self, keys: Sequence[ChunkKey]) -> list[bool]:
        """Which of `keys`, each for itself, are here."""
        found = [key in self.directory for key in keys]
        self.counters["lookups"] += 1
        self.counters["lookup_chunks"] += len(keys)
        self.counters["lookup_hits"] += sum(found)
        return found

    def missing_size(self, metas: Sequence[ChunkMeta]) -> int:
        """Bytes of those chunks that are not here. Raises as `reserve`."""
        return sum(self._check_new(meta) for meta in metas if meta.key not in self.directory)

    def reserve(
        self,
        metas: Sequence[ChunkMeta],
        *,
        lease_ns: int,
        now_ns: int,
        is_shared: bool = True,
        writer: Writer | None = None,
    ) -> tuple[WriteLease | None, list[ReserveState]]:
        """Extents for those chunks that are neither here nor on their way, evicting others where
        needed.

        The first chunk without room ends it: those behind it are "full" too, a chain with a hole is
        of no use. Raises `InvalidRequest`, `LayoutMismatch` or `TooLarge` before anything changes.
        """
        check_lease_ns(lease_ns)
        sizes = [self._check_new(meta) for meta in metas]
        if len({meta.key for meta in metas}) != len(metas):
            raise InvalidRequest("a reservation names each chunk once")
        if sum(sizes) > self.tier.size:
            raise TooLarge(
                f"{sum(sizes)} bytes reserved at once, "
                f"the {self.tier.name} tier has {self.tier.size}"
            )
        states: list[ReserveState] = []
        lease = WriteLease(
            self._leases.next_id(), now_ns + lease_ns, is_shared=is_shared, writer=writer
        )
        family = self._family(metas)
        for entry in family:
            self.memory.pin(entry)
        try:
            for meta, size in zip(metas, sizes, strict=True):
                is_full = "full" in states[-1:]
                states.append("full" if is_full else self._reserve_one(lease, meta, size, now_ns))
        finally:
            for entry in family:
                self.memory.unpin(entry)
        self.counters["reserve_full"] += states.count("full")
        if not lease.extents:
            return None, states
        self._leases.open(lease)
        return lease, states

    def commit(self, lease_id: int, checksums: Sequence[int], *, now_ns: int) -> int:
        """List the reserved chunks, all at once; the count of those that are new. Ends the lease.

        Raises `UnknownLease`, `InvalidRequest`, or `LeaseExpired`: then nothing is listed, and the
        lease stays to be released, for its extents are reused only when the writer says that it has
        stopped.
        """
        lease = self._leases.get_write(lease_id)
        if checksums and len(checksums) != len(lease.metas):
            raise InvalidRequest(
                f"{len(lease.metas)} checksums wanted or none, found {len(checksums)}"
            )
        if lease.is_expired or now_ns > lease.deadline_ns:
            self._expire(lease)
            raise LeaseExpired(
                f"lease {lease_id} ended before its commit; release it, then reserve again"
            )
        self._leases.end(lease)
        entries: list[Entry] = []
        # The tail first: what is inserted last is evicted last.
        for index in reversed(range(len(lease.metas))):
            meta, extent = lease.metas[index], lease.extents[index]
            del self._writing[meta.key]
            self.memory.unreserve(extent)
            entry = Entry(meta)
            checksum = checksums[index] if checksums else None
            self.memory.place(entry, Placement(extent, checksum=checksum))
            self.directory.insert(entry)
            self._policy.insert(meta, now_ns)
            self.counters["commit_bytes"] += extent.size
            if self.hot is not None:
                self.hot.keep(entry)
            entries.append(entry)
        self.counters["commit_chunks"] += len(entries)
        if self.lower is not None:
            self.lower.wake(entries)
        return len(entries)

    def absent_size(self, keys: Sequence[ChunkKey]) -> int:
        """Bytes of those of `keys` that are on disk only."""
        found = (self.directory.get(key) for key in keys)
        return sum(
            entry.size
            for entry in found
            if entry is not None and entry.in_memory is None and entry not in self._arriving
        )

    def pin(
        self,
        keys: Sequence[ChunkKey],
        layout: Fingerprint,
        *,
        standalone: bool,
        lease_ns: int,
        now_ns: int,
    ) -> tuple[ReadLease | None, list[bool]]:
        """Keep chunks where they are: the leading ones that are here, or with `standalone` each
        that is here.

        Returns the lease, None if there was nothing to pin, and for each key looked at whether it
        is in it. Raises `LayoutMismatch` if one is of another layout: then nothing is pinned.
        """
        check_lease_ns(lease_ns)
        entries, found = self._find(keys, layout, standalone=standalone)
        self.counters["pin_chunks"] += len(keys)
        if any(entry.in_memory is None for entry in entries):
            entries, found = self._bring(entries, found, now_ns, standalone=standalone)
        self.counters["pin_hits"] += len(entries)
        if not entries:
            return None, found
        touch = self._policy.touch
        for entry in reversed(entries):
            touch(entry.meta.key, now_ns)
            entry.uses += 1
            entry.is_recent = True
            self.memory.pin(entry)
        if self._unverified:
            self._verify(entries)
        self.counters["pin_bytes"] += sum(entry.size for entry in entries)
        lease = ReadLease(self._leases.next_id(), now_ns + lease_ns, entries=entries)
        self._leases.open(lease)
        return lease, found

    def arrival(self, entry: Entry) -> Arrival | None:
        """The entry's way into memory while it lasts."""
        return self._arriving.get(entry) or self._checking.get(entry)

    def are_ready(self, entries: Sequence[Entry]) -> bool:
        """Whether every byte of pinned chunks may be read."""
        if self._checking and any(entry in self._checking for entry in entries):
            return False
        return all(entry.in_memory is not None for entry in entries)

    def ready_size(self, entry: Entry) -> int | None:
        """How many leading bytes of a pinned chunk may be read now; None if it is lost."""
        arrival = self.arrival(entry)
        if arrival is not None:
            return arrival.ready
        return None if entry.in_memory is None else entry.in_memory.extent.size

    def extent_of(self, entry: Entry) -> Extent:
        """Where a pinned chunk's bytes are in memory, or will be when they are ready."""
        if entry.in_memory is not None:
            return entry.in_memory.extent
        return self._arriving[entry].extent

    def renew(self, lease_id: int, *, lease_ns: int, now_ns: int) -> int:
        """A later deadline for a lease that is still good; the new one. Raises `UnknownLease` or
        `LeaseExpired`.
        """
        check_lease_ns(lease_ns)
        lease = self._leases.get(lease_id)
        if lease.is_expired or now_ns > lease.deadline_ns:
            raise LeaseExpired(f"lease {lease_id} has ended and cannot be renewed")
        lease.deadline_ns = max(lease.deadline_ns, now_ns + lease_ns)
        return lease.deadline_ns

    def release(self, lease_id: int) -> None:
        """End a lease: its pins are gone, its uncommitted extents free. Raises `UnknownLease`."""
        lease = self._leases.get(lease_id)
        self._expire(lease)
        self._leases.end(lease)
        if isinstance(lease, WriteLease):
            self._free(lease)

    def expire(self, now_ns: int) -> int:
        """Take the pins of read leases whose deadline and grace have passed; how many leases that
        were.
        """
        ended = 0
        for lease in self._leases.overdue(now_ns):
            self._expire(lease)
            ended += 1
        self.counters["leases_expired"] += ended
        return ended

    def lease(self, lease_id: int) -> ReadLease | WriteLease:
        """An open lease whose deadline has not passed unnoticed, for byte transfers. Raises
        `UnknownLease`, `LeaseExpired`.
        """
        lease = self._leases.get(lease_id)
        if lease.is_expired:
            raise LeaseExpired(f"lease {lease_id} has ended")
        return lease

    def hold(self, keys: Sequence[ChunkKey], is_held: bool) -> int:
        """An operator's pin without a deadline, or its end, for those of `keys` that are here; how
        many are.
        """
        entries = [entry for key in keys if (entry := self.directory.get(key)) is not None]
        for entry in entries:
            entry.is_held = is_held
        if is_held:
            self._held.update(entries)
        else:
            self._held.difference_update(entries)
        return len(entries)

    def drop(self, entries: Iterable[Entry]) -> tuple[int, int]:
        """Remove chunks and all that continue them, but no family with a pinned chunk in it.

        Returns (chunks, bytes) removed. Entries that go with an earlier one may be named too.
        """
        blocked = self._pinned_families()
        count = size = 0
        for entry in entries:
            if entry in blocked or self.directory.get(entry.meta.key) is not entry:
                continue
            for member in entry.descendants():
                count += 1
                size += member.size
                self._remove(member)
        self.counters["clear_chunks"] += count
        return count, size

    def bring(self, entry: Entry, now_ns: int) -> bool:
        """Let a listed chunk begin to come to memory unless it is there; False where there is no
        room.
        """
        return self._fetch(entry, now_ns)

    def land(self, arrival: Arrival) -> None:
        """All bytes of a chunk from disk are in memory, verified."""
        entry = arrival.entry
        self._arrive(arrival)
        if not self._is_listed(entry):
            self._free_extent(arrival.extent)
            return
        assert entry.on_disk is not None
        self.memory.place(entry, Placement(arrival.extent, checksum=entry.on_disk.checksum))
        if self.hot is not None:
            self.hot.keep(entry)
        self.counters["promote_chunks"] += 1
        self.counters["promote_bytes"] += arrival.extent.size

    def lose(self, arrival: Arrival) -> None:
        """The chunk could not be read right: it is gone, and a miss for those who wait for it."""
        entry = arrival.entry
        if self._is_listed(entry):
            self._remove(entry)
        self._arrive(arrival)
        if entry.pins:
            # Somebody may be copying what has come of it, which was right.
            self._lost[entry] = arrival.extent
            self.memory.reserve(arrival.extent)
        else:
            self._free_extent(arrival.extent)

    def begin_demotion(self, entry: Entry) -> None:
        """The chunk's bytes are being written to disk: they stay where they are."""
        assert entry.in_memory is not None
        assert entry.on_disk is None
        self._demoting.add(entry)
        self.memory.pin(entry)

    def end_demotion(self, entry: Entry, placement: Placement | None) -> bool:
        """They are on disk, or, with None, will not be. False if nobody wants them any more: then
        the copy is the caller's to drop.
        """
        self._demoting.discard(entry)
        is_listed = self._is_listed(entry)
        self.memory.unpin(entry)
        if not is_listed:
            assert entry.in_memory is not None
            self._free_extent(entry.in_memory.extent)
            entry.in_memory = None
            return False
        if placement is not None:
            self.memory.shelve(entry, placement)
            entry.is_recent = False
        return True

    @property
    def demoting_size(self) -> int:
        """Bytes of memory that are being written to disk."""
        return sum(e.in_memory.extent.size for e in self._demoting if e.in_memory is not None)

    def is_demoting(self, entry: Entry) -> bool:
        """Whether its bytes are on their way to disk."""
        return entry in self._demoting

    def revive(self, meta: ChunkMeta, placement: Placement, now_ns: int) -> bool:
        """List a chunk that an earlier daemon left in memory, in an extent that is allocated; it is
        verified when it is first pinned. False if it is here already.
        """
        if meta.key in self.directory:
            return False
        entry = Entry(meta)
        self.memory.place(entry, placement)
        self.directory.insert(entry)
        self._policy.insert(meta, now_ns)
        self._unverified.add(entry)
        return True

    def verified(self, arrival: Arrival, *, is_good: bool) -> None:
        """What `HotSet.verify` has found."""
        entry = arrival.entry
        if self._checking.get(entry) is not arrival:
            return
        del self._checking[entry]
        if is_good:
            self.counters["revive_chunks"] += 1
            return
        self.counters["damaged_chunks"] += 1
        self._remove(entry)

    def hold_stray(self, extent: Extent) -> None:
        """A client of an earlier daemon may still write into an allocated extent."""
        self._strays.add(extent)
        self.memory.reserve(extent)

    def free_stray(self, extent: Extent) -> None:
        """It has stopped."""
        self._strays.remove(extent)
        self.memory.unreserve(extent)
        self._free_extent(extent)

    def restore(self, meta: ChunkMeta, placement: Placement) -> Entry | None:
        """List a chunk that is on disk from before; None if it is listed with such a copy."""
        entry = self.directory.get(meta.key)
        if entry is None:
            entry = Entry(meta, on_disk=placement)
            self.directory.insert(entry)
            return entry
        if entry.on_disk is not None:
            return None
        self.memory.shelve(entry, placement)
        return entry

    def unshelve(self, entry: Entry) -> None:
        """Give up the copy on disk of a chunk that is not arriving; without one in memory, the
        chunk.
        """
        assert entry not in self._arriving
        if entry.in_memory is None:
            self._remove(entry)
            return
        assert self.lower is not None
        self.lower.drop(entry)
        self.memory.unshelve(entry)

    def discard(self, entry: Entry) -> None:
        """Drop a chunk whose bytes are not what was committed, unless somebody reads it."""
        if self._is_listed(entry) and not entry.pins:
            self._remove(entry)

    def check(self) -> None:
        """Assert every invariant of the store. O(n), for audits and tests."""
        self.directory.check()
        self.tier.check()
        orphans = [entry for entry in self._demoting if not self._is_listed(entry)]
        present = [entry for entry in self.directory if entry.in_memory] + orphans
        extents = [entry.in_memory.extent for entry in present if entry.in_memory]
        writing = self._leases.writes()
        filled = [extent for lease in writing for extent in lease.extents]
        filled += [arrival.extent for arrival in self._arriving.values()]
        filled += [*self._strays, *self._lost.values()]
        extents += filled
        assert len({extent.offset for extent in extents}) == len(extents), "extents overlap"
        assert len(extents) == self.tier.num_extents, "an extent is leaked"
        assert sum(map(self.tier.allocated_size, extents)) == self.tier.used, "sizes + free != tier"
        assert sum(map(self.tier.allocated_size, filled)) == self.memory.reserved_size
        self._check_pins(orphans)
        assert self._unverified.isdisjoint(self._checking)
        for entry in (*self._unverified, *self._checking):
            assert self._is_listed(entry)
            assert entry.in_memory is not None
        if self.hot is not None:
            self.hot.check(self.tier.num_extents)
        if self.lower is not None:
            self.lower.check(self.directory)
        for entry in self.directory:
            assert entry.in_memory or entry.on_disk, "a listed chunk has no copy"
            assert entry.in_memory is None or entry not in self._arriving
        clean = [e.size for e in self.directory if e.in_memory and e.on_disk]
        assert sum(clean) == self.memory.clean_size
        ranked = {e.meta.key for e in self.directory if e.in_memory or e in self._arriving}
        assert set(self._policy.victims()) == ranked, "the policy ranks what is in memory"
        live = {
            meta.key: lease for lease in writing if not lease.is_expired for meta in lease.metas
        }
        assert live == self._writing
        self._leases.check()
        assert self._held == {entry for entry in self.directory if entry.is_held}

    def _check_pins(self, orphans: Sequence[Entry]) -> None:
        pins: Counter[Entry] = Counter()
        for lease in self._leases.reads():
            pins.update(lease.entries)
        pins.update(self._demoting)
        pins.update(self._arriving.keys())
        listed = [*self.directory, *orphans]
        for entry in listed:
            assert entry.pins == pins[entry], "pins do not match the leases and moves"
        pinned = sum(e.in_memory.extent.size for e in listed if e.pins and e.in_memory)
        assert pinned == self.memory.pinned_size

    def _check_new(self, meta: ChunkMeta) -> int:
        layout = self.layouts.get(meta.layout)
        if layout is None:
            raise LayoutMismatch(f"layout {short(meta.layout)} is not known here; declare it first")
        if meta.num_tokens > layout.chunk_tokens:
            raise InvalidRequest(
                f"a chunk of layout {short(meta.layout)} has at most {layout.chunk_tokens} tokens, "
                f"found {meta.num_tokens}"
            )
        if meta.parent == meta.key:
            raise InvalidRequest(f"chunk {short(meta.key)} names itself as its parent")
        size = layout.size(meta.num_tokens)
        if size > self.tier.size:
            raise TooLarge(
                f"a chunk of {size} bytes, the {self.tier.name} tier has {self.tier.size}"
            )
        return self._sizes.setdefault(size, size)

    def _reserve_one(
        self, lease: WriteLease, meta: ChunkMeta, size: int, now_ns: int
    ) -> ReserveState:
        if meta.key in self.directory:
            return "exists"
        if meta.key in self._writing:
            return "busy"
        extent = self._make_room(size, now_ns)
        if extent is None or not self._is_remembered(extent, lease.writer):
            return "full"
        self._writing[meta.key] = lease
        self.memory.reserve(extent)
        lease.metas.append(meta)
        lease.extents.append(extent)
        return "granted"

    def _family(self, metas: Sequence[ChunkMeta]) -> list[Entry]:
        # What a reservation continues, and what of it is here already, must not go to make room for
        # the rest.
        keys = {meta.key for meta in metas}
        keys |= {ChunkKey(meta.parent) for meta in metas if meta.parent is not None}
        return [entry for key in keys if (entry := self.directory.get(key)) is not None]

    def _make_room(self, size: int, now_ns: int) -> Extent | None:
        extent = self.tier.allocate(size)
        if extent is not None:
            return extent
        self.expire(now_ns)
        return self.memory.make_room(size, now_ns, blocked=self._blocked_families)

    def _blocked_families(self) -> set[Entry]:
        return self._pinned_families(pinned=(entry for entry in self.directory if entry.pins))

    def _pinned_families(self, pinned: Iterable[Entry] = ()) -> set[Entry]:
        """What is pinned, leased or held, and all that it continues."""
        leases = self._leases.reads()
        blocked: set[Entry] = set()
        for entry in chain(pinned, self._held, *(lease.entries for lease in leases)):
            ancestor: Entry | None = entry
            while ancestor is not None and ancestor not in blocked:
                blocked.add(ancestor)
                ancestor = ancestor.parent
        return blocked

    def _evict(self, entry: Entry) -> None:
        """Take a chunk out of memory; what is nowhere else is gone."""
        self.counters["evict_chunks"] += 1
        self.counters["evict_bytes"] += entry.size
        if entry.on_disk is not None:
            extent = self.memory.forget(entry)
            assert extent is not None
            self._unverified.discard(entry)
            self._free_extent(extent)
            return
        if self._is_owed(entry):
            self.counters["demote_missed_chunks"] += 1
        self._remove(entry)

    def _is_remembered(self, extent: Extent, writer: Writer | None) -> bool:
        """Whether an extent just allocated may be used; if not, it is free again."""
        if self.hot is None or self.hot.write(extent, writer):
            return True
        self.tier.free(extent)
        return False

    def _free_extent(self, extent: Extent) -> None:
        # First forgotten, then free: whoever finds the arena later must not take it for the old.
        if self.hot is not None:
            self.hot.erase(extent)
        self.tier.free(extent)

    def _verify(self, entries: Sequence[Entry]) -> None:
        """Let those chunks be looked at that came from an earlier daemon."""
        assert self.hot is not None
        for entry in entries:
            if entry in self._unverified:
                assert entry.in_memory is not None
                self._unverified.remove(entry)
                arrival = Arrival(entry, entry.in_memory.extent)
                self._checking[entry] = arrival
                self.hot.verify(arrival)

    def _is_owed(self, entry: Entry) -> bool:
        return self.lower is not None and entry.on_disk is None and self.lower.is_owed(entry)

    def _is_listed(self, entry: Entry) -> bool:
        return self.directory.get(entry.meta.key) is entry

    def _remove(self, entry: Entry) -> None:
        """Unlist a chunk and give its copies back; what is being moved, when the move has ended."""
        self.directory.remove(entry)
        self._held.discard(entry)
        if entry.on_disk is not None:
            assert self.lower is not None
            self.lower.drop(entry)
        if entry in self._demoting:
            self._policy.remove(entry.meta.key)
        elif entry.in_memory is not None or entry in self._arriving:
            extent = self.memory.forget(entry)
            if extent is not None:
                self._free_extent(extent)
        self._unverified.discard(entry)
        self._checking.pop(entry, None)
        entry.on_disk = None

    def _find(
        self, keys: Sequence[ChunkKey], layout: Fingerprint, *, standalone: bool
    ) -> tuple[list[Entry], list[bool]]:
        entries: list[Entry] = []
        found: list[bool] = []
        get = self.directory.get
        for key in keys:
            entry = get(key)
            found.append(entry is not None)
            if entry is not None:
                if entry.meta.layout != layout:
                    raise LayoutMismatch(
                        f"layout {short(layout)} expected, "
                        f"chunk {short(key)} has {short(entry.meta.layout)}"
                    )
                entries.append(entry)
            elif not standalone:
                break
        return entries, found

    def _bring(
        self, entries: list[Entry], found: list[bool], now_ns: int, *, standalone: bool
    ) -> tuple[list[Entry], list[bool]]:
        """Let those of the found chunks that are on disk only begin to come. Where memory has no
        room for one it counts as not found, and so do those behind it in a chain.
        """
        for entry in entries:
            self.memory.pin(entry)
        missing: set[Entry] = set()
        try:
            for index, entry in enumerate(entries):
                if self._fetch(entry, now_ns):
                    continue
                self.counters["promote_full"] += 1
                missing.update([entry] if standalone else entries[index:])
                if not standalone:
                    break
        finally:
            for entry in entries:
                self.memory.unpin(entry)
        if not missing:
            return entries, found
        kept = [entry for entry in entries if entry not in missing]
        if not standalone:
            return kept, [True] * len(kept) + [False]
        each = iter(entries)
        return kept, [is_here and next(each) not in missing for is_here in found]

    def _fetch(self, entry: Entry, now_ns: int) -> bool:
        """Let a chunk begin to come from disk unless it is in memory or on its way; False where
        there is no room.
        """
        if entry.in_memory is not None or entry in self._arriving:
            return True
        assert entry.on_disk is not None
        assert self.lower is not None
        extent = self._make_room(entry.on_disk.extent.size, now_ns)
        if extent is None or not self._is_remembered(extent, None):
            return False
        arrival = Arrival(entry, extent)
        self._arriving[entry] = arrival
        self.memory.reserve(extent)
        self._policy.insert(entry.meta, now_ns)
        self.memory.pin(entry)
        self.lower.fetch(arrival)
        return True

    def _arrive(self, arrival: Arrival) -> None:
        del self._arriving[arrival.entry]
        self.memory.unreserve(arrival.extent)
        self.memory.unpin(arrival.entry)

    def _prefetch(self, keys: Sequence[ChunkKey] | PackedKeys, count: int, now_ns: int) -> None:
        for index in range(count):
            entry = self.directory.get(keys[index])
            if entry is None or entry.in_memory is not None or entry in self._arriving:
                continue
            if len(self._arriving) >= PREFETCHES_MAX:
                return
            if entry.size > self.memory.ready_size or not self._fetch(entry, now_ns):
                return
            self.counters["prefetch_chunks"] += 1

    def _expire(self, lease: ReadLease | WriteLease) -> None:
        """Take what a lease keeps others from. A write lease keeps its extents: its writer may not
        have noticed yet.
        """
        if lease.is_expired:
            return
        lease.is_expired = True
        if isinstance(lease, WriteLease):
            for meta in lease.metas:
                del self._writing[meta.key]
            if not lease.is_shared:
                self._leases.num_reserved -= len(lease.extents)
                self._free(lease)
            return
        for entry in lease.entries:
            self.memory.unpin(entry)
            if not entry.pins and entry in self._lost:
                extent = self._lost.pop(entry)
                self.memory.unreserve(extent)
                self._free_extent(extent)
        lease.entries = []

    def _free(self, lease: WriteLease) -> None:
        for extent in lease.extents:
            self.memory.unreserve(extent)
            self._free_extent(extent)
        lease.extents = []
