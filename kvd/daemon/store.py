"""ChunkStore: the conductor. It alone composes directory, memory and the disk below it, and keeps
what every one of them promises.

    reserve ─► client writes into its extents ─► commit    nothing half-written is ever listed
       └─ release or session's end: extents freed          a late writer keeps them until then
    pin ─► client copies ─► release                        a pinned chunk is never evicted or moved
       └─ deadline + grace: the pins go                    a late reader is told
    pin of a chunk on disk ─► it arrives, from its first   a client waits for the bytes it wants
       byte to its last ─► in memory, or lost              what fails its checks is a miss
    time to live ─► over ─► nobody finds it ─► gone        who has it pinned reads on until release

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
from kvd.daemon.arrival import Arrivals
from kvd.daemon.directory import Directory, Entry, with_ancestors
from kvd.daemon.eviction.base import EvictionPolicy
from kvd.daemon.expiries import Expiry
from kvd.daemon.inherited import Inherited
from kvd.daemon.labels import encode_label
from kvd.daemon.layout_book import LayoutBook
from kvd.daemon.leases import (
    ANYTHING_RAW,
    LeaseBook,
    Loan,
    ReadLease,
    Terms,
    WriteLease,
    Writer,
    check_lease_ns,
)
from kvd.daemon.loans import Loans
from kvd.daemon.memory import Memory
from kvd.daemon.roles import HotSet, Lower, Packed
from kvd.daemon.store_check import check_store
from kvd.daemon.transit import Transit
from kvd.errors import InvalidRequest, LayoutMismatch, LeaseExpired, TooLarge
from kvd.keys import ChunkKey, PackedKeys, short
from kvd.tiers.cpu import CpuTier

ReserveState = Literal["granted", "exists", "busy", "full"]

# Chunks that one step of a sweep ends, at some 20 us each: no client waits longer behind it than
# behind a pin.
EXPIRED_AT_ONCE_MAX = 64


class ChunkStore:
    """lookup, reserve, commit, pin, release, evict over memory and what lies below it.

    Its parts answer for themselves what they alone know: under the store's own names where clients
    wait for it, else as `transit` and `inherited`. With more than 30 attributes of its own every
    access would be slower (CPython shares the keys of no larger object).
    """

    def __init__(self, tier: CpuTier, policy: EvictionPolicy) -> None:
        self.tier = tier
        self.directory = Directory()
        self.counters: Counter[str] = Counter()
        # Whether a lookup lets what it found on disk begin to come.
        self.is_prefetching = False
        self.memory = Memory(tier, policy, self.directory, evict=self._evict)
        self._policy = policy
        self._leases = LeaseBook()
        # Keys that somebody is writing, with the lease that does.
        self._writing: dict[ChunkKey, WriteLease] = {}
        # Entries that an operator holds.
        self._held: set[Entry] = set()

        self._book = LayoutBook(tier)
        self.layouts, self.tenants = self._book.layouts, self._book.tenants
        self.declare, self.tenant_of = self._book.declare, self._book.tenant_of

        self._arrivals = arrivals = Arrivals()
        self.arrival, self.are_ready = arrivals.get, arrivals.are_ready
        self.ready_size, self.extent_of = arrivals.ready_size, arrivals.extent_of
        self.reads_disk = arrivals.reads_disk

        self.loans = Loans(
            self.memory,
            self.directory,
            self.counters,
            make_room=self._make_room,
            remove=self._remove,
        )
        self.transit = transit = Transit(
            self.memory,
            self.directory,
            self.counters,
            arrivals,
            self.loans,
            make_room=self._make_room,
            whole_size=self._book.whole_size,
            evict=self._evict,
            remove=self._remove,
        )
        self.bring, self.land, self.lose = transit.fetch, transit.land, transit.lose
        self.restore, self.unshelve = transit.restore, transit.unshelve

        self.inherited = Inherited(
            self.memory, self.directory, self.counters, arrivals, remove=self._remove
        )

    @property
    def lower(self) -> Lower | None:
        """What lies below memory, if anything does."""
        return self.memory.lower

    @lower.setter
    def lower(self, lower: Lower) -> None:
        self.memory.lower = lower

    @property
    def below(self) -> Sequence[Lower | Packed]:
        """What has chunks that are not in memory, if anything does."""
        return [below for below in (self.memory.packed, self.memory.lower) if below is not None]

    @property
    def packed(self) -> Packed | None:
        """What keeps chunks encoded in memory, if anything does."""
        return self.memory.packed

    @packed.setter
    def packed(self, packed: Packed) -> None:
        self.memory.packed = packed

    @property
    def hot(self) -> HotSet | None:
        """What remembers memory beyond the daemon's life, if anything does."""
        return self.memory.hot

    @hot.setter
    def hot(self, hot: HotSet) -> None:
        self.memory.hot = hot

    @property
    def num_pinned(self) -> int:
        """Open read leases."""
        return self._leases.num_pinned

    @property
    def num_reserved(self) -> int:
        """Extents that are written, or that a late writer may still write."""
        return self._leases.num_reserved

    def lookup(
        self,
        keys: Sequence[ChunkKey] | PackedKeys,
        *,
        now_ns: int = 0,
        prefetch: bool = False,
        terms: Terms = ANYTHING_RAW,
    ) -> int:
        """How many of the first `keys`, a chain in order, are here at `now_ns` for a client of
        `terms`. Says nothing of a moment later: `pin` does. With `prefetch`, those on disk begin to
        come.
        """
        found = self.directory.match(keys)
        if self.directory.expiries.is_due(now_ns):
            find = self.directory.finder(now_ns)
            found = next((at for at in range(found) if find(keys[at]) is None), found)
        if terms.is_exact:
            exact = (self._is_exact(self.directory.get(keys[at])) for at in range(found))
            found = next((at for at, is_exact in enumerate(exact) if not is_exact), found)
        if prefetch and self.below and found:
            self.transit.prefetch(keys, found, now_ns, terms=terms)
        self.counters["lookups"] += 1
        self.counters["lookup_chunks"] += len(keys)
        self.counters["lookup_hits"] += found
        return found

    def present(
        self, keys: Sequence[ChunkKey], *, now_ns: int = 0, terms: Terms = ANYTHING_RAW
    ) -> list[bool]:
        """Which of `keys`, each for itself, are here at `now_ns` for a client of `terms`."""
        entries = map(self.directory.finder(now_ns), keys)
        if terms.is_exact:
            found = [self._is_exact(entry) for entry in entries]
        else:
            found = [entry is not None for entry in entries]
        self.counters["lookups"] += 1
        self.counters["lookup_chunks"] += len(keys)
        self.counters["lookup_hits"] += sum(found)
        return found

    def missing_size(self, metas: Sequence[ChunkMeta]) -> int:
        """Bytes of those chunks that are not here. Raises as `reserve`."""
        return sum(self._book.size_of(meta) for meta in metas if meta.key not in self.directory)

    def reserve(
        self,
        metas: Sequence[ChunkMeta],
        *,
        lease_ns: int,
        now_ns: int,
        is_shared: bool = True,
        is_exact: bool = True,
        writer: Writer | None = None,
        expiry: Expiry | None = None,
    ) -> tuple[WriteLease | None, list[ReserveState]]:
        """Extents for those chunks that are neither here nor on their way, evicting others where
        needed.

        The first chunk without room ends it: those behind it are "full" too, a chain with a hole is
        of no use. `is_exact` is False of chunks computed on top of approximate ones; those that are
        exact are granted where there is only an approximate copy that nobody reads, and take its
        place. They end with `expiry`. One that is over and that somebody still reads is "busy".
        Raises `InvalidRequest`, `LayoutMismatch` or `TooLarge` before anything changes.
        """
        check_lease_ns(lease_ns)
        sizes = [self._book.size_of(meta) for meta in metas]
        if len({meta.key for meta in metas}) != len(metas):
            raise InvalidRequest("a reservation names each chunk once")
        if sum(sizes) > self.tier.size:
            raise TooLarge(
                f"{sum(sizes)} bytes reserved at once, "
                f"the {self.tier.name} tier has {self.tier.size}"
            )
        states: list[ReserveState] = []
        lease = WriteLease(
            self._leases.next_id(),
            now_ns + lease_ns,
            is_shared=is_shared,
            writer=writer,
            is_exact=is_exact,
            expiry=expiry,
        )
        self._end_named(metas, now_ns)
        find = self.directory.finder(now_ns)
        replaced = {meta.key for meta in metas if is_exact and self._is_inferior(meta.key)}
        family = self._family(metas)
        for entry in family:
            self.memory.pin(entry)
        try:
            for meta, size in zip(metas, sizes, strict=True):
                is_full = "full" in states[-1:]
                if is_full:
                    states.append("full")
                elif meta.key in self.directory and meta.key not in replaced:
                    states.append("exists" if find(meta.key) is not None else "busy")
                else:
                    states.append(self._reserve_one(lease, meta, size, now_ns))
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
        self._end_named(lease.metas, now_ns)
        is_over = lease.expiry is not None and lease.expiry.expires_ns <= now_ns
        entries: list[Entry] = []
        # The tail first: what is inserted last is evicted last.
        for index in reversed(range(len(lease.metas))):
            meta, extent = lease.metas[index], lease.extents[index]
            del self._writing[meta.key]
            self.memory.unreserve(extent)
            if is_over or not self._make_way(meta.key):
                self.memory.free(extent)
                continue
            entry = Entry(meta)
            checksum = checksums[index] if checksums else None
            placement = Placement(extent, is_exact=lease.is_exact, checksum=checksum)
            self.memory.place(entry, placement)
            self.directory.insert(entry, lease.expiry)
            self._policy.insert(meta, now_ns)
            self.counters["commit_bytes"] += extent.size
            entries.append(entry)
        if self.memory.hot is not None and lease.is_exact:
            # What is remembered beyond the daemon's life is taken for exact. Only now is it known
            # when they end.
            for entry in entries:
                self.memory.hot.keep(entry)
        self.counters["commit_chunks"] += len(entries)
        for below in self.below:
            below.wake(entries)
        return len(entries)

    def absent_size(self, keys: Sequence[ChunkKey], *, terms: Terms = ANYTHING_RAW) -> int:
        """Bytes that those of `keys` which are not in memory will have there for a client of
        `terms`.
        """
        size = 0
        for entry in map(self.directory.get, keys):
            if entry is None or entry.in_memory is not None or entry in self.transit.arriving:
                continue
            bitstream = self.transit.lent_from(entry, terms)
            if bitstream is not None:
                size += bitstream.extent.size
            else:
                size += self._book.whole_size(entry.meta, entry.placement) or 0
        return size

    def pin(
        self,
        keys: Sequence[ChunkKey],
        layout: Fingerprint,
        *,
        standalone: bool,
        lease_ns: int,
        now_ns: int,
        terms: Terms = ANYTHING_RAW,
    ) -> tuple[ReadLease | None, list[bool]]:
        """Keep chunks where they are: the leading ones that are here for a client of `terms`, or
        with `standalone` each that is here.

        Returns the lease, None if there was nothing to pin, and for each key looked at whether it
        is in it. Raises `LayoutMismatch` if one is of another layout: then nothing is pinned.
        """
        check_lease_ns(lease_ns)
        entries, found = self._find(keys, layout, now_ns, standalone=standalone, terms=terms)
        self.counters["pin_chunks"] += len(keys)
        loans: dict[int, Loan] = {}
        if terms.is_exact or any(entry.in_memory is None for entry in entries):
            entries, found, loans = self.transit.fetch_all(
                entries, found, now_ns, standalone=standalone, terms=terms
            )
        self.counters["pin_hits"] += len(entries)
        if not entries:
            return None, found
        # What is lent need not be in memory.
        touch = self._touch if loans else self._policy.touch
        for entry in reversed(entries):
            touch(entry.meta.key, now_ns)
            entry.uses += 1
            entry.is_recent = True
            self.memory.pin(entry)
        if self.inherited.unverified:
            self.inherited.verify(entries)
        self.counters["pin_bytes"] += sum(entry.size for entry in entries)
        lease = ReadLease(self._leases.next_id(), now_ns + lease_ns, entries=entries, loans=loans)
        self._leases.open(lease)
        return lease, found

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

    def expire_chunks(self, now_ns: int) -> bool:
        """Drop chunks that are over, but none that somebody reads; whether there may be more than
        one call takes.
        """
        expiries = self.directory.expiries
        is_more = expiries.spend(now_ns, EXPIRED_AT_ONCE_MAX)
        for entry in expiries.spent:
            self._end(entry)
        return is_more

    def label_of(self, entry: Entry) -> bytes:
        """What a copy that outlives the daemon says of its chunk."""
        expiry = self.directory.expiries.get(entry)
        stamp = expiry.stamp if expiry is not None else None
        return encode_label(entry.meta, self.tenant_of(entry.meta), stamp)

    def lease(self, lease_id: int) -> ReadLease | WriteLease:
        """An open lease whose deadline has not passed unnoticed, for byte transfers. Raises
        `UnknownLease`, `LeaseExpired`.
        """
        lease = self._leases.get(lease_id)
        if lease.is_expired:
            raise LeaseExpired(f"lease {lease_id} has ended")
        return lease

    def hold(self, keys: Sequence[ChunkKey], is_held: bool, *, now_ns: int = 0) -> int:
        """An operator's pin without a deadline, or its end, for those of `keys` that are here; how
        many are. It does not keep a chunk beyond its time to live.
        """
        find = self.directory.finder(now_ns)
        entries = [entry for key in keys if (entry := find(key)) is not None]
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

    def discard(self, entry: Entry) -> None:
        """Drop a chunk whose bytes are not what was committed, unless somebody reads it."""
        if self._is_listed(entry) and not entry.pins:
            self._remove(entry)

    def check(self) -> None:
        """Assert every invariant of the store. O(n), for audits and tests."""
        check_store(self)

    def _reserve_one(
        self, lease: WriteLease, meta: ChunkMeta, size: int, now_ns: int
    ) -> ReserveState:
        if meta.key in self._writing:
            return "busy"
        extent = self._make_room(size, now_ns, lease.writer)
        if extent is None:
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

    def _make_room(self, size: int, now_ns: int, writer: Writer | None = None) -> Extent | None:
        """An extent that may be written, by a client or (None) by the daemon."""
        extent = self.tier.allocate(size)
        if extent is None:
            self.expire(now_ns)
            extent = self.memory.make_room(size, now_ns, blocked=self._blocked_families)
        if extent is None or not self.memory.give_out(extent, writer):
            return None
        return extent

    def _blocked_families(self) -> set[Entry]:
        return self._pinned_families(pinned=(entry for entry in self.directory if entry.pins))

    def _pinned_families(self, pinned: Iterable[Entry] = ()) -> set[Entry]:
        """What is pinned, leased or held, and all that it continues."""
        leases = self._leases.reads()
        return with_ancestors(chain(pinned, self._held, *(lease.entries for lease in leases)))

    def _evict(self, entry: Entry) -> None:
        """Take a chunk out of memory; what is nowhere else is gone."""
        self.counters["evict_chunks"] += 1
        self.counters["evict_bytes"] += entry.size
        if entry.is_backed:
            if entry.packed is not None:
                assert self.memory.packed is not None
                self.memory.packed.touch(entry)
            extent = self.memory.forget(entry)
            assert extent is not None
            self.inherited.forget(entry)
            self.memory.free(extent)
            return
        if self.memory.is_owed(entry):
            self.counters["demote_missed_chunks"] += 1
        self._remove(entry)

    def _touch(self, key: ChunkKey, now_ns: int) -> None:
        """It was asked for: where it is ranked it is the youngest."""
        entry = self.directory.get(key)
        assert entry is not None
        if entry.in_memory is not None or entry in self.transit.arriving:
            self._policy.touch(key, now_ns)
        elif entry.packed is not None:
            assert self.memory.packed is not None
            self.memory.packed.touch(entry)

    def _is_inferior(self, key: ChunkKey) -> bool:
        """Whether a chunk is here, approximate, and nobody would miss it for an exact one."""
        entry = self.directory.get(key)
        return entry is not None and not entry.is_pinned and not self._is_exact(entry)

    def _make_way(self, key: ChunkKey) -> bool:
        """Let what is here of a chunk that was written go; False if it is wanted as it is."""
        entry = self.directory.get(key)
        if entry is not None and self._is_inferior(key):
            self._remove(entry)
        return key not in self.directory

    def _is_exact(self, entry: Entry | None) -> bool:
        """Whether a chunk is here, and a pin gives its exact KV."""
        return entry is not None and self.transit.source_of(entry, is_exact=True) is not None

    def _is_listed(self, entry: Entry) -> bool:
        return self.directory.get(entry.meta.key) is entry

    def _remove(self, entry: Entry) -> None:
        """Unlist a chunk and give its copies back; what is being moved, when the move has ended."""
        self.directory.remove(entry)
        self._held.discard(entry)
        if entry.on_disk is not None:
            assert self.lower is not None
            self.lower.drop(entry)
        if entry.packed is not None:
            assert self.memory.packed is not None
            self.memory.packed.drop(entry)
        if self.transit.is_leaving(entry):
            self.memory.orphan(entry)
        elif entry.in_memory is not None or entry in self.transit.arriving:
            extent = self.memory.forget(entry)
            if extent is not None:
                self.memory.free(extent)
        self.inherited.forget(entry)
        entry.on_disk = entry.packed = None

    def _end_named(self, metas: Sequence[ChunkMeta], now_ns: int) -> None:
        """Make way for those of `metas` that are over, before any sweep."""
        expiries = self.directory.expiries
        if not expiries.is_due(now_ns):
            return
        for meta in metas:
            entry = self.directory.get(meta.key)
            if entry is not None and expiries.is_over(entry, now_ns):
                self._end(entry)

    def _end(self, entry: Entry) -> None:
        """A chunk is over: it goes, or stays for those who read it until they have done."""
        if entry.pins > self.transit.num_moves(entry):
            return
        self.counters["expired_chunks"] += 1
        self._remove(entry)

    def _find(
        self,
        keys: Sequence[ChunkKey],
        layout: Fingerprint,
        now_ns: int,
        *,
        standalone: bool,
        terms: Terms,
    ) -> tuple[list[Entry], list[bool]]:
        entries: list[Entry] = []
        found: list[bool] = []
        get = self.directory.finder(now_ns)
        for key in keys:
            entry = get(key)
            if entry is not None and entry.meta.layout != layout:
                raise LayoutMismatch(
                    f"layout {short(layout)} expected, "
                    f"chunk {short(key)} has {short(entry.meta.layout)}"
                )
            is_here = self._is_exact(entry) if terms.is_exact else entry is not None
            found.append(is_here)
            if entry is not None and is_here:
                entries.append(entry)
            elif not standalone:
                break
        return entries, found

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
        lost = self.transit.lost
        for entry in lease.entries:
            self.memory.unpin(entry)
            if not entry.pins and entry in lost:
                self.transit.free_lost(entry)
        for loan in lease.loans.values():
            self.loans.end(loan)
        lease.entries, lease.loans = [], {}

    def _free(self, lease: WriteLease) -> None:
        for extent in lease.extents:
            self.memory.unreserve(extent)
            self.memory.free(extent)
        lease.extents = []
