"""Arrival: a chunk on its way into memory, readable from its first byte as far as it has come."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from kvd.chunk import Extent, Placement
from kvd.daemon.directory import Entry


class Arrival:
    """`entry` is being read into `extent`; its first `ready` bytes are there, verified.

    `reach` is for any thread; the rest belongs to the event loop.
    """

    __slots__ = ("_waiting", "entry", "extent", "ready", "source")

    def __init__(self, entry: Entry, extent: Extent, source: Placement) -> None:
        self.entry = entry
        self.extent = extent
        # The copy that it comes from.
        self.source = source
        self.ready = 0
        self._waiting: list[Callable[[], None]] = []

    def watch(self, callback: Callable[[], None]) -> None:
        """Call back once, at the next progress or at the end."""
        self._waiting.append(callback)

    def reach(self, ready: int, loop: asyncio.AbstractEventLoop) -> None:
        """So many leading bytes are there: said by the thread that brought them."""
        self.ready = ready
        if self._waiting:
            loop.call_soon_threadsafe(self.notify)

    def notify(self) -> None:
        """There is progress, or it has ended: those who watch are called."""
        waiting, self._waiting = self._waiting, []
        for callback in waiting:
            callback()


class Arrivals:
    """All that are on their way: coming from another copy, and what an earlier daemon left and is
    being checked.
    A chunk is one of them at most.
    """

    def __init__(self) -> None:
        self.coming: dict[Entry, Arrival] = {}
        self.checking: dict[Entry, Arrival] = {}

    def get(self, entry: Entry) -> Arrival | None:
        """The entry's way into memory while it lasts."""
        return self.coming.get(entry) or self.checking.get(entry)

    def reads_disk(self, entry: Entry) -> bool:
        """Whether the entry comes from disk, where it is now or where it was."""
        arrival = self.coming.get(entry)
        if arrival is None or entry.on_disk is None:
            return False
        return arrival.source.extent.tier == entry.on_disk.extent.tier

    def are_ready(self, entries: Sequence[Entry]) -> bool:
        """Whether every byte of pinned chunks may be read."""
        if self.checking and any(entry in self.checking for entry in entries):
            return False
        return all(entry.in_memory is not None for entry in entries)

    def ready_size(self, entry: Entry) -> int | None:
        """How many leading bytes of a pinned chunk may be read now; None if it is lost."""
        arrival = self.get(entry)
        if arrival is not None:
            return arrival.ready
        return None if entry.in_memory is None else entry.in_memory.extent.size

    def extent_of(self, entry: Entry) -> Extent:
        """Where a pinned chunk's bytes are in memory, or will be when they are ready."""
        if entry.in_memory is not None:
            return entry.in_memory.extent
        return self.coming[entry].extent
