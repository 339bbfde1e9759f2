"""Leases as the daemon keeps them: what a session may read or write, and until when."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from kvd.chunk import ChunkMeta, Extent
from kvd.daemon.directory import Entry
from kvd.errors import InvalidRequest

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


@dataclass(slots=True, eq=False)
class Lease:
    """Chunks that one session reads or writes until `deadline_ns`."""

    id: int
    deadline_ns: int
    is_expired: bool = False


@dataclass(slots=True, eq=False)
class ReadLease(Lease):
    """Pinned chunks, in the order asked for."""

    entries: list[Entry] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class WriteLease(Lease):
    """Reserved extents; `metas[i]` will live in `extents[i]`.

    `is_shared` says that a client writes them through its own mapping: nobody can stop it, so they
    stay its own until it lets go. Others are written by the daemon, and end with the deadline.
    """

    is_shared: bool = True
    writer: Writer | None = None

    metas: list[ChunkMeta] = field(default_factory=list)
    extents: list[Extent] = field(default_factory=list)


def check_lease_ns(lease_ns: int) -> None:
    """Raise `InvalidRequest` for a lease that ends before it starts or outlasts every patience."""
    if not 0 < lease_ns <= LEASE_NS_MAX:
        raise InvalidRequest(f"a lease lasts 1..{LEASE_NS_MAX} ns, found {lease_ns}")
