"""Arrival: a chunk on its way into memory, readable from its first byte as far as it has come."""

from __future__ import annotations

from collections.abc import Callable

from kvd.chunk import Extent
from kvd.daemon.directory import Entry


class Arrival:
    """`entry` is being read into `extent`; its first `ready` bytes are there, verified.

    `ready` may be raised by any thread; `notify` belongs to the event loop.
    """

    __slots__ = ("_waiting", "entry", "extent", "ready")

    def __init__(self, entry: Entry, extent: Extent) -> None:
        self.entry = entry
        self.extent = extent
        self.ready = 0
        self._waiting: list[Callable[[], None]] = []

    @property
    def is_awaited(self) -> bool:
        """Whether somebody wants to hear of progress."""
        return bool(self._waiting)

    def watch(self, callback: Callable[[], None]) -> None:
        """Call back once, at the next progress or at the end."""
        self._waiting.append(callback)

    def notify(self) -> None:
        """There is progress, or it has ended: those who watch are called."""
        waiting, self._waiting = self._waiting, []
        for callback in waiting:
            callback()
