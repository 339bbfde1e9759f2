"""EvictionPolicy: which chunk is the cheapest loss. It ranks, it never frees: the store decides
what may go.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from kvd.chunk import ChunkMeta
from kvd.keys import ChunkKey


class EvictionPolicy(Protocol):
    """What the store asks of a policy. Time is the host's monotonic clock in nanoseconds, given by
    the caller.
    """

    def insert(self, meta: ChunkMeta, now_ns: int) -> None:
        """A chunk is here now."""
        ...

    def touch(self, key: ChunkKey, now_ns: int) -> None:
        """A chunk was used, or has a longer prefix's chunk behind it that must outlive nothing."""
        ...

    def remove(self, key: ChunkKey) -> None:
        """A chunk is gone."""
        ...

    def expects_return(self, key: ChunkKey, now_ns: int) -> bool:
        """Whether a chunk that is here will probably be asked for again: then it is worth a write
        to disk however rarely it was asked for so far.
        """
        ...

    def victims(self) -> Iterator[ChunkKey]:
        """All chunks, cheapest loss first. The caller may touch and remove what it was given while
        it iterates.
        """
        ...
