"""LRU: the chunk that was unused for longest goes first.

The store touches a prompt's chunks tail first, so among chunks of one access the tail is the older:
prefixes, which more prompts share, outlive their continuations.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from itertools import islice

from kvd.chunk import ChunkMeta
from kvd.keys import ChunkKey

# Victims are named in batches: the order may change between them, not within one.
_BATCH = 64


class Lru:
    """An `EvictionPolicy`: least recently used first."""

    def __init__(self) -> None:
        self._order: OrderedDict[ChunkKey, None] = OrderedDict()

    def insert(self, meta: ChunkMeta, now_ns: int) -> None:
        assert meta.key not in self._order
        self._order[meta.key] = None

    def touch(self, key: ChunkKey, now_ns: int) -> None:
        self._order.move_to_end(key)

    def remove(self, key: ChunkKey) -> None:
        del self._order[key]

    def expects_return(self, key: ChunkKey, now_ns: int) -> bool:
        # The order of uses says nothing of the next one.
        return False

    def victims(self) -> Iterator[ChunkKey]:
        # Keys that the caller keeps stay in front: step over those, not over ones it took or
        # touched.
        kept = 0
        for _ in range(len(self._order) // _BATCH + 1):
            batch = tuple(islice(self._order, kept, kept + _BATCH))
            if not batch:
                return
            yield from batch
            front = set(islice(self._order, kept + len(batch)))
            kept += sum(key in front for key in batch)
