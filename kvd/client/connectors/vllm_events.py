"""KV events: which of an engine's block hashes kvd has taken, for routers that listen to vLLM's.

A piece is told of when every rank that stores it has committed it. What the daemon evicts later it
does not tell: an event is a good hint where to send a prompt, no promise.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping
from typing import Any, NamedTuple

# Pieces on their way that are remembered, at most; the oldest are not told of.
PENDING_MAX = 1 << 14


class Stored(NamedTuple):
    """Whole blocks behind `parent`, by the engine's hashes, with their tokens."""

    hashes: list[Any]
    parent: Any
    tokens: list[int]
    lora_name: str | None


class EventBook:
    """What is being stored, by the name of its piece, until all of `num_ranks` have it."""

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self._pending: OrderedDict[bytes, Stored] = OrderedDict()
        self._counts: Counter[bytes] = Counter()
        self._events: list[Stored] = []

    def expect(self, name: bytes, stored: Stored) -> None:
        """A piece was given to be saved."""
        self._pending[name] = stored
        while len(self._pending) > PENDING_MAX:
            gone, _ = self._pending.popitem(last=False)
            del self._counts[gone]

    def committed(self, names: Mapping[bytes, int]) -> None:
        """So many ranks have committed these."""
        for name, count in names.items():
            if name not in self._pending:
                continue
            self._counts[name] += count
            if self._counts[name] >= self._num_ranks:
                self._events.append(self._pending.pop(name))
                del self._counts[name]

    def take(self) -> list[Stored]:
        """What was stored since the last time."""
        events, self._events = self._events, []
        return events
