"""Tier: a bounded arena of bytes in one kind of memory. A tier knows offsets, never keys."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kvd.chunk import Extent


class Tier(Protocol):
    """What the store asks of a tier. `tests/contracts/tier.py` holds every implementation to it."""

    name: str
    size: int

    @property
    def used(self) -> int:
        """Bytes allocated, rounding included."""
        ...

    @property
    def largest_free(self) -> int:
        """Bytes of the longest free run: what one `allocate` can get without an eviction."""
        ...

    @property
    def num_extents(self) -> int:
        """How many extents are allocated."""
        ...

    def allocate(self, size: int) -> Extent | None:
        """`size` bytes in one piece, or None where no free run is that long."""
        ...

    def free(self, extent: Extent) -> None:
        """Give an allocated extent back; one that is not allocated is a programmer's error."""
        ...

    def allocated_size(self, extent: Extent) -> int:
        """The bytes an allocated extent takes, rounding included."""
        ...

    def free_runs(self) -> list[tuple[int, int]]:
        """(offset, bytes) of every free run, in any order."""
        ...

    def check(self) -> None:
        """Assert the tier's own invariants. O(n), for audits and tests."""
        ...

    async def write(self, extent: Extent, offset: int, data: bytes | memoryview) -> None:
        """Put `data` at `offset` within the extent."""
        ...

    async def read(self, extent: Extent, offset: int, out: NDArray[np.uint8]) -> None:
        """Fill `out`, `uint8 [size]`, from `offset` within the extent."""
        ...
