"""Leases as the daemon keeps them: what a session may read or write, and until when."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Literal, NamedTuple

from kvd.chunk import ChunkMeta, Extent, Placement
from kvd.daemon.arrival import Arrival
from kvd.daemon.codec_rules import RAW
from kvd.daemon.directory import Entry
from kvd.daemon.expiries import Expiry
from kvd.errors import InvalidRequest, UnknownLease

LEASE_NS_DEFAULT = 30 * 10**9
LEASE_NS_MAX = 3600 * 10**9

# Between a pin's deadline and the reuse of its bytes, for a reader whose copy ends on the deadline.
GRACE_NS = 1 * 10**9


class Writer(NamedTuple):
    """Who writes into reserved extents, for a later daemon on the same arena: the process, when it
    started (clock ticks since the boot), the token of its session.
    """

    pid: int = 0
    start: int = 0
    token: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What a client takes: whether exact chunks only, and bitstreams of which codecs."""

    is_exact: bool = False
    codecs: frozenset[str] = frozenset()


ANYTHING_RAW = Terms()


class Loan(Arrival):
    """A bitstream on its way into an extent of one lease's own, or there. `copy` is what it is
    taken from; for those who bring it `source` calls it raw: its bytes come as they are.
    """

    __slots__ = ("copy", "is_wanted", "state")

    def __init__(self, entry: Entry, extent: Extent, copy: Placement) -> None:
        super().__init__(entry, extent, replace(copy, codec=RAW))
        self.copy = copy
        self.state: Literal["coming", "here", "lost"] = "coming"
        # Until the lease ends.
        self.is_wanted = True


@dataclass(slots=True, eq=False)
class Lease:
    """Chunks that one session reads or writes until `deadline_ns`."""

    id: int
    deadline_ns: int
    is_expired: bool = False


@dataclass(slots=True, eq=False)
class ReadLease(Lease):
    """Pinned chunks, in the order asked for. `loans[i]` is there of chunk i where it is lent as a
    bitstream.
    """

    entries: list[Entry] = field(default_factory=list)
    loans: dict[int, Loan] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class WriteLease(Lease):
    """Reserved extents; `metas[i]` will live in `extents[i]`.

    `is_shared` says that a client writes them through its own mapping: nobody can stop it, so they
    stay its own until it lets go. Others are written by the daemon, and end with the deadline.
    `is_exact` says of the chunks that they are not computed on top of approximate KV, `expiry` how
    long they stay.
    """

    is_shared: bool = True
    writer: Writer | None = None
    is_exact: bool = True
    expiry: Expiry | None = None

    metas: list[ChunkMeta] = field(default_factory=list)
    extents: list[Extent] = field(default_factory=list)


class LeaseBook:
    """The open leases of a store, and which of them are overdue."""

    def __init__(self) -> None:
        self.num_pinned = 0
        self.num_reserved = 0
        self._open: dict[int, ReadLease | WriteLease] = {}
        self._ids = count(1)
        # (deadline when it was noted, id); a renewed lease is looked at again later.
        self._expiries: list[tuple[int, int]] = []

    def next_id(self) -> int:
        """A number that no lease has had."""
        return next(self._ids)

    def open(self, lease: ReadLease | WriteLease) -> None:
        """The lease is given out."""
        self._open[lease.id] = lease
        if isinstance(lease, ReadLease):
            self.num_pinned += 1
        else:
            self.num_reserved += len(lease.extents)
        heapq.heappush(self._expiries, (lease.deadline_ns, lease.id))

    def end(self, lease: ReadLease | WriteLease) -> None:
        """Its session has let go of it."""
        del self._open[lease.id]
        if isinstance(lease, ReadLease):
            self.num_pinned -= 1
        else:
            self.num_reserved -= len(lease.extents)

    def get(self, lease_id: int) -> ReadLease | WriteLease:
        """An open lease. Raises `UnknownLease`."""
        lease = self._open.get(lease_id)
        if lease is None:
            raise UnknownLease(
                f"lease {lease_id} is not open: committed or released already, or never granted"
            )
        return lease

    def get_write(self, lease_id: int) -> WriteLease:
        """An open reservation. Raises `UnknownLease`."""
        lease = self.get(lease_id)
        if not isinstance(lease, WriteLease):
            raise UnknownLease(f"lease {lease_id} is a pin, there is nothing to commit")
        return lease

    def reads(self) -> list[ReadLease]:
        """Open pins; those that are expired have no entries."""
        return [lease for lease in self._open.values() if isinstance(lease, ReadLease)]

    def writes(self) -> list[WriteLease]:
        """Open reservations, expired ones among them."""
        return [lease for lease in self._open.values() if isinstance(lease, WriteLease)]

    def overdue(self, now_ns: int) -> Iterator[ReadLease | WriteLease]:
        """Leases whose deadline and grace have passed, each once."""
        while self._expiries and self._expiries[0][0] + GRACE_NS < now_ns:
            _, lease_id = heapq.heappop(self._expiries)
            lease = self._open.get(lease_id)
            if lease is None or lease.is_expired:
                continue
            if lease.deadline_ns + GRACE_NS >= now_ns:
                heapq.heappush(self._expiries, (lease.deadline_ns, lease_id))
                continue
            yield lease

    def check(self) -> None:
        """Assert that the counts are right. O(n), for audits and tests."""
        assert self.num_pinned == len(self.reads())
        assert self.num_reserved == sum(len(lease.extents) for lease in self.writes())


def check_lease_ns(lease_ns: int) -> None:
    """Raise `InvalidRequest` for a lease that ends before it starts or outlasts every patience."""
    if not 0 < lease_ns <= LEASE_NS_MAX:
        raise InvalidRequest(f"a lease lasts 1..{LEASE_NS_MAX} ns, found {lease_ns}")
