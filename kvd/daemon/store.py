"""ChunkStore: the conductor. It alone composes directory, tier and policy, and keeps what every one
of them promises.

    reserve ─► client writes into its extents ─► commit    nothing half-written is ever listed
       └─ release or session's end: extents freed          a late writer keeps them until then
    pin ─► client copies ─► release                        a pinned chunk is never evicted or moved
       └─ deadline + grace: the pins go                    a late reader is told

Synchronous and single-threaded: the event loop calls it, no call waits for anything. Time comes in
as `now_ns`. A failed call leaves everything as it was; the one exception is named at `_make_room`.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain, count
from typing import Literal

from kvd.chunk import ChunkMeta, Extent, Fingerprint, Placement
from kvd.daemon.directory import Directory, Entry
from kvd.daemon.eviction.base import EvictionPolicy
from kvd.daemon.eviction.window import Run, cheapest_window
from kvd.daemon.leases import GRACE_NS, ReadLease, WriteLease, check_lease_ns
from kvd.errors import InvalidRequest, LayoutMismatch, LeaseExpired, TooLarge, UnknownLease
from kvd.keys import ChunkKey, PackedKeys, short
from kvd.layout import KVLayout
from kvd.tiers.cpu import CpuTier

# Layouts a daemon keeps in mind: every model, rank and tenant of a node, with room.
LAYOUTS_MAX = 65536

ReserveState = Literal["granted", "exists", "busy", "full"]


class ChunkStore:
    """lookup, reserve, commit, pin, release, evict over one tier."""

    def __init__(self, tier: CpuTier, policy: EvictionPolicy) -> None:
        self.tier = tier
        self.layouts: dict[Fingerprint, KVLayout] = {}
        self.directory = Directory()
        self.counters: Counter[str] = Counter()
        self._policy = policy
        self._leases: dict[int, ReadLease | WriteLease] = {}
        self._lease_ids = count(1)
        self._expiries: list[tuple[int, int]] = []
        # Keys that somebody is writing, with the lease that does.
        self._writing: dict[ChunkKey, WriteLease] = {}
        # Open read leases, and extents that are written or that a late writer may still write.
        self.num_pinned = 0
        self.num_reserved = 0
        # Entries that an operator holds.
        self._held: set[Entry] = set()
        self._pinned_size = 0
        self._reserved_size = 0
        # One int object a size, not one a chunk: a million chunks feel it.
        self._sizes: dict[int, int] = {}

    def declare(self, layout: KVLayout) -> Fingerprint:
        """Make a layout known; its fingerprint names it from now on. Twice is once."""
        fingerprint = Fingerprint(layout.fingerprint)
        if fingerprint not in self.layouts and len(self.layouts) >= LAYOUTS_MAX:
            raise InvalidRequest(
                f"{LAYOUTS_MAX} layouts are known already, and are kept until the daemon restarts"
            )
        self.layouts.setdefault(fingerprint, layout)
        return fingerprint

    def lookup(self, keys: Sequence[ChunkKey] | PackedKeys) -> int:
        """How many of the first `keys`, a chain in order, are here. Says nothing of a moment later:
        `pin` does.
        """
        found = self.directory.match(keys)
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

    def reserve(
        self,
        metas: Sequence[ChunkMeta],
        *,
        lease_ns: int,
        now_ns: int,
        is_shared: bool = True,
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
        lease = WriteLease(next(self._lease_ids), now_ns + lease_ns, is_shared=is_shared)
        family = self._family(metas)
        for entry in family:
            self._pin(entry)
        try:
            for meta, size in zip(metas, sizes, strict=True):
                is_full = bool(states) and states[-1] == "full"
                states.append("full" if is_full else self._reserve_one(lease, meta, size, now_ns))
        finally:
            for entry in family:
                self._unpin(entry)
        self.counters["reserve_full"] += states.count("full")
        if not lease.extents:
            return None, states
        self._open(lease)
        return lease, states

    def commit(self, lease_id: int, checksums: Sequence[int], *, now_ns: int) -> int:
        """List the reserved chunks, all at once; the count of those that are new. Ends the lease.

        Raises `UnknownLease`, `InvalidRequest`, or `LeaseExpired`: then nothing is listed, and the
        lease stays to be released, for its extents are reused only when the writer says that it has
        stopped.
        """
        lease = self._write_lease(lease_id)
        if checksums and len(checksums) != len(lease.metas):
            raise InvalidRequest(
                f"{len(lease.metas)} checksums wanted or none, found {len(checksums)}"
            )
        if lease.is_expired or now_ns > lease.deadline_ns:
            self._expire(lease)
            raise LeaseExpired(
                f"lease {lease_id} ended before its commit; release it, then reserve again"
            )
        self._end(lease)
        # The tail first: what is inserted last is evicted last.
        for index in reversed(range(len(lease.metas))):
            meta, extent = lease.metas[index], lease.extents[index]
            del self._writing[meta.key]
            self._reserved_size -= self.tier.allocated_size(extent)
            checksum = checksums[index] if checksums else None
            self.directory.insert(Entry(meta, Placement(extent, checksum=checksum)))
            self._policy.insert(meta, now_ns)
            self.counters["commit_bytes"] += extent.size
        self.counters["commit_chunks"] += len(lease.metas)
        return len(lease.metas)

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
        self.counters["pin_chunks"] += len(keys)
        self.counters["pin_hits"] += len(entries)
        if not entries:
            return None, found
        touch = self._policy.touch
        for entry in reversed(entries):
            touch(entry.meta.key, now_ns)
            self._pin(entry)
        self.counters["pin_bytes"] += sum(entry.placement.extent.size for entry in entries)
        lease = ReadLease(next(self._lease_ids), now_ns + lease_ns, entries=entries)
        self._open(lease)
        return lease, found

    def renew(self, lease_id: int, *, lease_ns: int, now_ns: int) -> int:
        """A later deadline for a lease that is still good; the new one. Raises `UnknownLease` or
        `LeaseExpired`.
        """
        check_lease_ns(lease_ns)
        lease = self._lease(lease_id)
        if lease.is_expired or now_ns > lease.deadline_ns:
            raise LeaseExpired(f"lease {lease_id} has ended and cannot be renewed")
        lease.deadline_ns = max(lease.deadline_ns, now_ns + lease_ns)
        return lease.deadline_ns

    def release(self, lease_id: int) -> None:
        """End a lease: its pins are gone, its uncommitted extents free. Raises `UnknownLease`."""
        lease = self._lease(lease_id)
        self._expire(lease)
        self._end(lease)
        if isinstance(lease, WriteLease):
            self._free(lease)

    def expire(self, now_ns: int) -> int:
        """Take the pins of read leases whose deadline and grace have passed; how many leases that
        were.
        """
        ended = 0
        while self._expiries and self._expiries[0][0] + GRACE_NS < now_ns:
            _, lease_id = heapq.heappop(self._expiries)
            lease = self._leases.get(lease_id)
            if lease is None or lease.is_expired:
                continue
            if lease.deadline_ns + GRACE_NS >= now_ns:
                heapq.heappush(self._expiries, (lease.deadline_ns, lease_id))
                continue
            self._expire(lease)
            ended += 1
        self.counters["leases_expired"] += ended
        return ended

    def lease(self, lease_id: int) -> ReadLease | WriteLease:
        """An open lease whose deadline has not passed unnoticed, for byte transfers. Raises
        `UnknownLease`, `LeaseExpired`.
        """
        lease = self._lease(lease_id)
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
                self._remove(member)
                count += 1
                size += member.placement.extent.size
        self.counters["clear_chunks"] += count
        return count, size

    def check(self) -> None:
        """Assert every invariant of the store. O(n), for audits and tests."""
        self.directory.check()
        self.tier.check()
        extents = [entry.placement.extent for entry in self.directory]
        writing = [lease for lease in self._leases.values() if isinstance(lease, WriteLease)]
        extents += [extent for lease in writing for extent in lease.extents]
        assert len({extent.offset for extent in extents}) == len(extents), "extents overlap"
        assert len(extents) == self.tier.num_extents, "an extent is leaked"
        assert sum(map(self.tier.allocated_size, extents)) == self.tier.used, "sizes + free != tier"
        pins: Counter[ChunkKey] = Counter()
        for lease in self._leases.values():
            if isinstance(lease, ReadLease) and not lease.is_expired:
                pins.update(entry.meta.key for entry in lease.entries)
        for entry in self.directory:
            assert entry.pins == pins[entry.meta.key], "pins do not match the leases"
        assert sum(e.placement.extent.size for e in self.directory if e.pins) == self._pinned_size
        reserved = [extent for lease in writing for extent in lease.extents]
        assert sum(map(self.tier.allocated_size, reserved)) == self._reserved_size
        live = {
            meta.key: lease for lease in writing if not lease.is_expired for meta in lease.metas
        }
        assert live == self._writing
        assert self.num_pinned == sum(isinstance(x, ReadLease) for x in self._leases.values())
        assert self.num_reserved == len(reserved)
        assert self._held == {entry for entry in self.directory if entry.is_held}

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
        if extent is None:
            return "full"
        self._writing[meta.key] = lease
        self._reserved_size += self.tier.allocated_size(extent)
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
        """An extent of `size` bytes, evicting the cheapest losses until there is one, or None.

        Where pinned chunks leave no run that is long enough, chunks may have been evicted for
        nothing: at most twice `size` in the policy's order, after that only such whose place
        completes a run.
        """
        extent = self.tier.allocate(size)
        if extent is not None:
            return extent
        self.expire(now_ns)
        if size > self.tier.size - self._pinned_size - self._reserved_size:
            return None
        evicted_size = 0
        for key in self._policy.victims():
            entry = self.directory.get(key)
            assert entry is not None
            if not entry.is_leaf:
                # It has younger chunks behind it that need it: it is as young as they are.
                self._policy.touch(key, now_ns)
                continue
            if entry.is_pinned:
                continue
            evicted_size += entry.placement.extent.size
            self._evict(entry)
            extent = self.tier.allocate(size)
            if extent is not None or evicted_size > 2 * size:
                break
        return extent or self._clear_window(size)

    def _clear_window(self, size: int) -> Extent | None:
        """Evict neighbours whose places make `size` bytes in one piece; None if pins forbid it."""
        blocked = self._pinned_families(pinned=(entry for entry in self.directory if entry.pins))
        runs = [Run(offset, length, None) for offset, length in self.tier.free_runs()]
        for entry in self.directory:
            if entry not in blocked:
                extent = entry.placement.extent
                runs.append(Run(extent.offset, self.tier.allocated_size(extent), entry))
        window = cheapest_window(runs, size)
        if window is None:
            return None
        for label in window:
            assert isinstance(label, Entry)
            for member in label.descendants():
                if self.directory.get(member.meta.key) is member:
                    self._evict(member)
        cleared = self.tier.allocate(size)
        assert cleared is not None
        return cleared

    def _pinned_families(self, pinned: Iterable[Entry] = ()) -> set[Entry]:
        """What is pinned, leased or held, and all that it continues."""
        leases = [lease for lease in self._leases.values() if isinstance(lease, ReadLease)]
        blocked: set[Entry] = set()
        for entry in chain(pinned, self._held, *(lease.entries for lease in leases)):
            ancestor: Entry | None = entry
            while ancestor is not None and ancestor not in blocked:
                blocked.add(ancestor)
                ancestor = ancestor.parent
        return blocked

    def _evict(self, entry: Entry) -> None:
        self.counters["evict_chunks"] += 1
        self.counters["evict_bytes"] += entry.placement.extent.size
        self._remove(entry)

    def _remove(self, entry: Entry) -> None:
        assert not entry.is_pinned
        self.directory.remove(entry)
        self._policy.remove(entry.meta.key)
        self.tier.free(entry.placement.extent)

    def _open(self, lease: ReadLease | WriteLease) -> None:
        self._leases[lease.id] = lease
        if isinstance(lease, ReadLease):
            self.num_pinned += 1
        else:
            self.num_reserved += len(lease.extents)
        heapq.heappush(self._expiries, (lease.deadline_ns, lease.id))

    def _end(self, lease: ReadLease | WriteLease) -> None:
        del self._leases[lease.id]
        if isinstance(lease, ReadLease):
            self.num_pinned -= 1
        else:
            self.num_reserved -= len(lease.extents)

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
                self.num_reserved -= len(lease.extents)
                self._free(lease)
            return
        for entry in lease.entries:
            self._unpin(entry)
        lease.entries = []

    def _free(self, lease: WriteLease) -> None:
        for extent in lease.extents:
            self._reserved_size -= self.tier.allocated_size(extent)
            self.tier.free(extent)
        lease.extents = []

    def _pin(self, entry: Entry) -> None:
        if not entry.pins:
            self._pinned_size += entry.placement.extent.size
        entry.pins += 1

    def _unpin(self, entry: Entry) -> None:
        entry.pins -= 1
        if not entry.pins:
            self._pinned_size -= entry.placement.extent.size

    def _lease(self, lease_id: int) -> ReadLease | WriteLease:
        lease = self._leases.get(lease_id)
        if lease is None:
            raise UnknownLease(
                f"lease {lease_id} is not open: committed or released already, or never granted"
            )
        return lease

    def _write_lease(self, lease_id: int) -> WriteLease:
        lease = self._lease(lease_id)
        if not isinstance(lease, WriteLease):
            raise UnknownLease(f"lease {lease_id} is a pin, there is nothing to commit")
        return lease
