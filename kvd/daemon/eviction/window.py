"""Window: the cheapest neighbours to evict where the policy's own order opens no run long enough.

A large chunk can find every byte it needs free and no two of them together. Any run of free ranges
and evictable chunks that touch each other would do; the cheapest has the fewest bytes in use.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Run(NamedTuple):
    """A free range (`label` None) or the place of an evictable chunk (what the caller calls it)."""

    offset: int
    size: int
    label: object


def cheapest_window(runs: Iterable[Run], size: int) -> list[object] | None:
    """The labels of those chunks whose eviction makes `size` bytes in one piece at the lowest cost.

    `runs` do not overlap and come in any order; what is neither free nor evictable is not among
    them. None if no window is long enough. O(n log n).
    """
    ordered = sorted(runs, key=lambda run: run.offset)
    best: tuple[int, int, int] | None = None
    start = used = 0
    for end, run in enumerate(ordered):
        if end and ordered[end - 1].offset + ordered[end - 1].size != run.offset:
            start, used = end, 0
        used += _used(run)
        reach = run.offset + run.size
        while start < end and reach - ordered[start + 1].offset >= size:
            used -= _used(ordered[start])
            start += 1
        if reach - ordered[start].offset >= size and (best is None or used < best[0]):
            best = used, start, end + 1
    if best is None:
        return None
    return [run.label for run in ordered[best[1] : best[2]] if run.label is not None]


def _used(run: Run) -> int:
    return run.size if run.label is not None else 0
