"""Expiries: when chunks end that were stored for a time only.

    stored with a time to live  ─► it stands, whoever stores the chunk again
    continues such a chunk      ─► ends with it, or before
    over                        ─► found by nobody from that moment on
      └─ at the next sweep      ─► gone; while somebody has it pinned: spent, and gone after that

A side table of such chunks alone: a chunk without an end costs nothing. In memory the end is on the
host's monotonic clock, in labels (docs/formats/index.md) on the wall's, with the time to live
beside it: a clock that was set back adds no more than that.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from itertools import count
from typing import TYPE_CHECKING, NamedTuple

from kvd.errors import InvalidRequest
from kvd.proto.limits import TTL_NS_MAX

if TYPE_CHECKING:
    from kvd.daemon.directory import Entry

# What is queued of chunks that are gone is looked for when there is more of it than this and than
# of chunks that are here.
STALE_MAX = 1024


class Stamp(NamedTuple):
    """What a label says of a chunk's end: the nanosecond since 1970, and its time to live."""

    wall_ns: int
    ttl_ns: int


class Expiry(NamedTuple):
    """A chunk's end on the host's monotonic clock, and what its label says of it."""

    expires_ns: int
    stamp: Stamp


class Expiries:
    """The ends of those listed chunks that have one. What continues a chunk ends no later: a
    directory says here what it lists and unlists.
    """

    def __init__(self) -> None:
        self._by_entry: dict[Entry, Expiry] = {}
        # (end, less the position, a number, entry): of one end, what stands last in the prompt is
        # first, for whoever goes before what continues it must cut it off. A chunk that is gone, or
        # ends earlier by now, stays in here for a while.
        self._queue: list[tuple[int, int, int, Entry]] = []
        self._numbers = count()
        # Over, as a sweep has found, and not gone yet.
        self._spent: dict[Entry, None] = {}

    def __len__(self) -> int:
        return len(self._by_entry)

    def get(self, entry: Entry) -> Expiry | None:
        """The entry's end, if it has one."""
        return self._by_entry.get(entry)

    def begin(self, entry: Entry, expiry: Expiry | None) -> None:
        """The entry is listed. It ends with `expiry`, or earlier with what it continues; and so
        does what continues it.
        """
        if expiry is None and not self._by_entry:
            return
        self._bound(entry, expiry)
        if entry.parent is not None:
            self._bound(entry, self.get(entry.parent))
        if entry.is_leaf or entry not in self._by_entry:
            return
        # Parents before their children.
        for member in reversed([*entry.descendants()]):
            if member is not entry:
                assert member.parent is not None
                self._bound(member, self._by_entry[member.parent])

    def forget(self, entry: Entry) -> None:
        """The entry is unlisted."""
        if self._by_entry.pop(entry, None) is None:
            return
        self._spent.pop(entry, None)
        if len(self._queue) > max(2 * len(self._by_entry), STALE_MAX):
            self._queue = [item for item in self._queue if self._is_current(item)]
            heapq.heapify(self._queue)

    def is_due(self, now_ns: int) -> bool:
        """Whether a chunk may be over that is not gone yet."""
        return bool(self._spent) or (bool(self._queue) and self._queue[0][0] <= now_ns)

    def is_over(self, entry: Entry, now_ns: int) -> bool:
        """Whether nobody may find the entry any more."""
        expiry = self._by_entry.get(entry)
        return expiry is not None and expiry.expires_ns <= now_ns

    def is_spent(self, entry: Entry) -> bool:
        """Whether a sweep has found the entry over: what is left of it only waits for its end."""
        return entry in self._spent

    def spend(self, now_ns: int, count_max: int) -> bool:
        """Look for chunks that are over, `count_max` at most; whether there may be more."""
        for _ in range(count_max):
            if not self._queue or self._queue[0][0] > now_ns:
                return False
            item = heapq.heappop(self._queue)
            if self._is_current(item):
                self._spent[item[-1]] = None
        return True

    @property
    def spent(self) -> list[Entry]:
        """Chunks that sweeps have found over; what continues another stands before it."""
        return list(self._spent)

    def check(self, entries: Iterable[Entry]) -> None:
        """Assert that it knows none but `entries`, and that none of them outlives what it
        continues. O(n), for audits and tests.
        """
        listed = set(entries)
        assert self._by_entry.keys() <= listed, "the end of a chunk that is not here"
        assert self._spent.keys() <= self._by_entry.keys()
        queued = {item[-1] for item in self._queue if self._is_current(item)}
        assert queued | self._spent.keys() == self._by_entry.keys(), "an end that is never met"
        for entry in listed:
            limit = self.get(entry.parent) if entry.parent is not None else None
            if limit is not None:
                assert self._by_entry[entry].expires_ns <= limit.expires_ns

    def _bound(self, entry: Entry, expiry: Expiry | None) -> None:
        known = self._by_entry.get(entry)
        if expiry is None or (known is not None and known.expires_ns <= expiry.expires_ns):
            return
        self._by_entry[entry] = expiry
        item = (expiry.expires_ns, -entry.meta.start, next(self._numbers), entry)
        heapq.heappush(self._queue, item)

    def _is_current(self, item: tuple[int, int, int, Entry]) -> bool:
        known = self._by_entry.get(item[-1])
        return known is not None and known.expires_ns == item[0]


def expiry_after(ttl_ns: int, *, now_ns: int, wall_now_ns: int) -> Expiry | None:
    """The end of what is stored now for `ttl_ns`; None for 0. Raises as `check_ttl_ns`."""
    check_ttl_ns(ttl_ns)
    if not ttl_ns:
        return None
    return Expiry(now_ns + ttl_ns, Stamp(max(wall_now_ns, 0) + ttl_ns, ttl_ns))


def expiry_of(stamp: Stamp | None, *, now_ns: int, wall_now_ns: int) -> Expiry | None:
    """The end that an earlier daemon meant; it may be over. Where the wall's clock was set back in
    the meantime, the whole time to live is left, and no more.
    """
    if stamp is None:
        return None
    return Expiry(now_ns + min(stamp.wall_ns - wall_now_ns, stamp.ttl_ns), stamp)


def check_ttl_ns(ttl_ns: int) -> None:
    """Raise `InvalidRequest` for a time to live that is longer than any."""
    if not 0 <= ttl_ns <= TTL_NS_MAX:
        raise InvalidRequest(f"a time to live is 0 (none) to {TTL_NS_MAX} ns, found {ttl_ns}")
