"""The audit of a store: every invariant, asserted. O(n), for `kvd status --audit` and tests.

It alone looks at what the store keeps to itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvd.daemon.directory import Entry

if TYPE_CHECKING:
    from kvd.daemon.store import ChunkStore


def check_store(store: ChunkStore) -> None:
    """Raise `AssertionError` where an invariant does not hold."""
    store.directory.check()
    store.tier.check()
    store._leases.check()
    listed = list(store.directory)
    # Nobody lists them, but their bytes are still being written to disk or encoded.
    leaving = store.transit.demoting | store.transit.packing
    orphans = [entry for entry in leaving if not store._is_listed(entry)]
    _check_extents(store, [*listed, *orphans])
    _check_pins(store, [*listed, *orphans])
    _check_copies(store, listed)
    _check_inherited(store)
    _check_loans(store)
    live = {
        meta.key: lease
        for lease in store._leases.writes()
        if not lease.is_expired
        for meta in lease.metas
    }
    assert live == store._writing
    assert store._held == {entry for entry in listed if entry.is_held}
    if store.hot is not None:
        store.hot.check(store.tier.num_extents)
    for below in store.below:
        below.check(listed)


def _check_extents(store: ChunkStore, entries: Sequence[Entry]) -> None:
    """Every extent that is allocated has one owner, and every owner's is allocated."""
    tier = store.tier
    filled = [extent for lease in store._leases.writes() for extent in lease.extents]
    filled += [arrival.extent for arrival in store.transit.arriving.values()]
    filled += [*store.inherited.strays, *store.transit.lost.values()]
    filled += [loan.extent for loan in store.loans.open]
    extents = [entry.in_memory.extent for entry in entries if entry.in_memory] + filled
    assert len({extent.offset for extent in extents}) == len(extents), "extents overlap"
    assert len(extents) == tier.num_extents, "an extent is leaked"
    assert sum(map(tier.allocated_size, extents)) == tier.used, "sizes + free != tier"
    assert sum(map(tier.allocated_size, filled)) == store.memory.reserved_size


def _check_pins(store: ChunkStore, entries: Sequence[Entry]) -> None:
    pins: Counter[Entry] = Counter()
    for lease in store._leases.reads():
        pins.update(lease.entries)
    pins.update(store.transit.demoting)
    pins.update(store.transit.packing)
    pins.update(store.transit.arriving.keys())
    for entry in entries:
        assert entry.pins == pins[entry], "pins do not match the leases and moves"
    pinned = sum(e.in_memory.extent.size for e in entries if e.pins and e.in_memory)
    assert pinned == store.memory.pinned_size


def _check_copies(store: ChunkStore, listed: Sequence[Entry]) -> None:
    arriving = store.transit.arriving
    for entry in listed:
        assert entry.in_memory or entry.is_backed, "a listed chunk has no copy"
        assert entry.in_memory is None or entry not in arriving
    clean = [entry.size for entry in listed if entry.in_memory and entry.is_backed]
    assert sum(clean) == store.memory.clean_size
    ranked = {entry.meta.key for entry in listed if entry.in_memory or entry in arriving}
    assert set(store.memory.policy.victims()) == ranked, "the policy ranks what is in memory"


def _check_inherited(store: ChunkStore) -> None:
    unverified, checking = store.inherited.unverified, store._arrivals.checking
    assert unverified.isdisjoint(checking)
    for entry in (*unverified, *checking):
        assert store._is_listed(entry)
        assert entry.in_memory is not None


def _check_loans(store: ChunkStore) -> None:
    lent = [loan for lease in store._leases.reads() for loan in lease.loans.values()]
    assert len(set(lent)) == len(lent), "a bitstream is lent twice"
    assert {loan for loan in store.loans.open if loan.is_wanted} == set(lent)
    # What no lease wants any more is free as soon as nobody fills it.
    assert all(loan.is_wanted or loan.state == "coming" for loan in store.loans.open)
