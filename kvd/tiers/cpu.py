"""The CPU tier: host memory in one arena that every local client maps."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvd.arena import Arena
from kvd.chunk import Extent
from kvd.tiers.allocator import Allocator


class CpuTier:
    """A `Tier` over an `Arena`; its extents are offsets into the mapping."""

    def __init__(self, arena: Arena, *, name: str = "cpu") -> None:
        self.name = name
        self.arena = arena
        self.size = arena.size
        self._allocator = Allocator(arena.size)

    @property
    def used(self) -> int:
        return self._allocator.used

    @property
    def largest_free(self) -> int:
        return self._allocator.largest_free

    @property
    def num_extents(self) -> int:
        return self._allocator.num_allocated

    def allocate(self, size: int) -> Extent | None:
        offset = self._allocator.allocate(size)
        return None if offset is None else Extent(self.name, offset, size)

    def allocate_at(self, offset: int, size: int) -> Extent | None:
        """Exactly these bytes, or None where they are not all free: for an arena that was adopted.
        In the order of their offsets it is O(1) for each.
        """
        return (
            Extent(self.name, offset, size) if self._allocator.allocate_at(offset, size) else None
        )

    def free(self, extent: Extent) -> None:
        self._allocator.free(extent.offset)

    def allocated_size(self, extent: Extent) -> int:
        return self._allocator.allocated_size(extent.offset)

    def free_runs(self) -> list[tuple[int, int]]:
        return self._allocator.free_runs()

    def view(self, extent: Extent) -> NDArray[np.uint8]:
        """`uint8 [extent.size]`, without a copy."""
        return self.arena.view(extent.offset, extent.size)

    async def write(self, extent: Extent, offset: int, data: bytes | memoryview) -> None:
        assert offset + len(data) <= extent.size
        self.view(extent)[offset : offset + len(data)] = np.frombuffer(data, dtype=np.uint8)

    async def read(self, extent: Extent, offset: int, out: NDArray[np.uint8]) -> None:
        assert offset + out.size <= extent.size
        out[:] = self.view(extent)[offset : offset + out.size]

    def check(self) -> None:
        """Assert the allocator's invariants; for audits and tests."""
        self._allocator.check()
