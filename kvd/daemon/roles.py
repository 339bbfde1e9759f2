"""Roles that stand beside and below a store: what moves chunks to and from disk, and what remembers
memory beyond the daemon's life. They call the store when something has happened.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

from kvd.chunk import Extent
from kvd.daemon.arrival import Arrival
from kvd.daemon.directory import Entry
from kvd.daemon.leases import Writer
from kvd.tiers.cpu import CpuTier


class PersistCount(NamedTuple):
    """Chunks that are durable, those that are being written, and why others cannot be."""

    num_durable: int
    num_pending: int
    reason: str


class ScrubCount(NamedTuple):
    """Records and bytes that a pass has verified, those it has to, and those that were bad."""

    is_running: bool = False
    num_done: int = 0
    num_all: int = 0
    num_bad: int = 0
    size_done: int = 0
    size_all: int = 0


class Lower(Protocol):
    """What lies below memory, as the store sees it. What is not `async` does not wait."""

    def is_owed(self, entry: Entry) -> bool:
        """Whether a chunk without a copy on disk should have one before it leaves memory."""
        ...

    def fetch(self, arrival: Arrival) -> None:
        """Read a chunk into its extent, then call `land` or `lose`."""
        ...

    def drop(self, entry: Entry) -> None:
        """The entry's copy on disk is nobody's any more."""
        ...

    def wake(self, committed: Sequence[Entry] = ()) -> None:
        """There may be something to write; these are new."""
        ...

    def has_room(self, size: int) -> bool:
        """Whether `size` bytes of memory can be had at once without losing what is owed to disk, or
        waiting would be of no use.
        """
        ...

    async def make_room(self, size: int, timeout_s: float) -> None:
        """Wait until `has_room`, or as long as `timeout_s`."""
        ...

    async def persist(self, entries: Sequence[Entry], timeout_s: float) -> PersistCount:
        """Write chunks to disk now; what has become of them when all are durable, or the time is
        over.
        """
        ...

    def facts(self) -> dict[str, Any]:
        """What `kvd status` says of the tier, by the names of its message."""
        ...

    def check(self, entries: Iterable[Entry]) -> None:
        """Assert that it knows exactly those of `entries` that are on disk. O(n), for audits."""
        ...

    def scrub(self, rate: int) -> None:
        """Begin a pass over everything on disk, at `rate` bytes a second, unless there is one."""
        ...

    @property
    def scrubbed(self) -> ScrubCount:
        """How far the pass has come, or where the last one ended."""
        ...


class Packed(Protocol):
    """What keeps chunks encoded in the daemon's own memory, as the store sees it. What is not
    `async` does not wait. `tier` holds the bitstreams.
    """

    @property
    def tier(self) -> CpuTier: ...

    def is_owed(self, entry: Entry) -> bool:
        """Whether a chunk without an encoded copy should have one before it leaves memory."""
        ...

    def fetch(self, arrival: Arrival) -> None:
        """Decode a chunk into its extent, then call `land` or `lose`."""
        ...

    def drop(self, entry: Entry) -> None:
        """The entry's encoded copy is nobody's any more."""
        ...

    def touch(self, entry: Entry) -> None:
        """The entry's copy that clients map goes: from now on the encoded one is what ages."""
        ...

    def wake(self, committed: Sequence[Entry] = ()) -> None:
        """There may be something to encode; these are new."""
        ...

    def has_room(self, size: int) -> bool:
        """As `Lower.has_room`."""
        ...

    async def make_room(self, size: int, timeout_s: float) -> None:
        """As `Lower.make_room`."""
        ...

    def facts(self) -> dict[str, Any]:
        """What `kvd status` says of it, by the names of its message."""
        ...

    def check(self, entries: Iterable[Entry]) -> None:
        """Assert that it knows exactly those of `entries` that are packed. O(n), for audits."""
        ...


class HotSet(Protocol):
    """What remembers memory beyond the daemon's life, as the store sees it. No method waits."""

    def write(self, extent: Extent, writer: Writer | None) -> bool:
        """An extent is about to be written, by a client or (None) by the daemon; False if it cannot
        be remembered: then it must not be used.
        """
        ...

    def keep(self, entry: Entry) -> None:
        """The entry's copy in memory is complete."""
        ...

    def erase(self, extent: Extent) -> None:
        """The extent is about to be free."""
        ...

    def stopped(self, tokens: Iterable[int]) -> None:
        """Nobody writes any more in the sessions of these tokens."""
        ...

    def verify(self, arrival: Arrival) -> None:
        """See whether the bytes of a chunk from before are what they were, then call `verified`."""
        ...

    def check(self, num_extents: int) -> None:
        """Assert that so many extents are remembered."""
        ...
