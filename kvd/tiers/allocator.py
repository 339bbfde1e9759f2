"""Allocator: which bytes of an arena are free. Two-level segregated fit with immediate coalescing.

KV chunks come in a few sizes (one a layout, and shorter tails), are freed in any order, and are
large. So: exact sizes in 4 KiB granules (no power-of-two waste), the smallest free run that fits
(within 1/16 of best fit), neighbours merged at once (no two free runs ever touch), and O(1) for
each step: two bitmaps find the bin. M. Masmano et al., "TLSF: A New Dynamic Memory Allocator for
Real-Time Systems", ECRTS 2004, section 3. We keep the headers outside the arena, where no client
can overwrite them.

    run of n granules -> level = bit length of n, bin = level * 16 + the four bits below the top one

A larger chunk may find no run although enough bytes are free in total: then the store evicts, and
because chunks of one prompt are allocated and evicted together, runs grow back. That every byte
comes back, and that all bytes make one run once everything is freed, is property-tested.
"""

from __future__ import annotations

from itertools import chain, islice

GRANULE_SIZE = 4096

_SUB_BITS = 4
_SUB_BINS = 1 << _SUB_BITS

# Runs looked at in the bin that may hold too short ones; keeps `allocate` O(1).
_OWN_BIN_LOOKS = 64


class Allocator:
    """Hands out `[offset, offset + size)` ranges of `size` bytes, never overlapping. Not thread-
    safe; does no I/O.
    """

    def __init__(self, size: int) -> None:
        assert size > 0
        assert size % GRANULE_SIZE == 0
        self.size = size
        self.used = 0
        self._allocated: dict[int, int] = {}
        self._free_by_start: dict[int, int] = {}
        self._free_by_end: dict[int, int] = {}
        # A bin is a dict for its order: the run freed first is reused first.
        self._bins: dict[int, dict[int, None]] = {}
        self._bitmap = 0
        # Start of the run behind the last range that `allocate_at` took.
        self._behind = 0
        self._insert_run(0, size)

    @property
    def num_allocated(self) -> int:
        """How many ranges are allocated."""
        return len(self._allocated)

    @property
    def largest_free(self) -> int:
        """Bytes of the longest free run."""
        if not self._bitmap:
            return 0
        return max(
            self._free_by_start[start] for start in self._bins[self._bitmap.bit_length() - 1]
        )

    def allocate(self, size: int) -> int | None:
        """The offset of `size` bytes, rounded up to granules, or None where no free run is that
        long.
        """
        assert size > 0
        size = size if size % GRANULE_SIZE == 0 else round_up(size)
        found = self._find_run(size)
        if found is None:
            return None
        length = self._remove_run(found)
        if length > size:
            self._insert_run(found + size, length - size)
        self._allocated[found] = size
        self.used += size
        return found

    def allocate_at(self, offset: int, size: int) -> bool:
        """Take exactly `size` bytes at `offset`, rounded up to granules; False, and nothing is
        taken, where they are not all free or not all here.

        For rebuilding from what another process wrote, so nothing is trusted. O(1) for ranges in
        the order of their offsets, else O(free runs).
        """
        if size <= 0 or offset % GRANULE_SIZE:
            return False
        end = offset + round_up(size)
        start = self._run_around(offset, end)
        if start is None:
            return False
        run_end = start + self._remove_run(start)
        if start < offset:
            self._insert_run(start, offset - start)
        if end < run_end:
            self._insert_run(end, run_end - end)
        self._allocated[offset] = end - offset
        self.used += end - offset
        self._behind = end
        return True

    def free(self, offset: int) -> None:
        """Give the range that starts at `offset` back and merge it with its free neighbours."""
        size = self._allocated.pop(offset)
        self.used -= size
        start, end = offset, offset + size
        if (before := self._free_by_end.get(start)) is not None:
            self._remove_run(before)
            start = before
        if end in self._free_by_start:
            end += self._remove_run(end)
        self._insert_run(start, end - start)

    def allocated_size(self, offset: int) -> int:
        """Bytes of the allocated range at `offset`, rounding included."""
        return self._allocated[offset]

    def free_runs(self) -> list[tuple[int, int]]:
        """(offset, bytes) of every free run, in any order."""
        return list(self._free_by_start.items())

    def check(self) -> None:
        """Assert that allocated and free ranges tile the arena and that no two free runs touch. O(n
        log n), for tests.
        """
        at, was_free = 0, False
        ranges = [(start, size, False) for start, size in self._allocated.items()]
        ranges += [(start, size, True) for start, size in self._free_by_start.items()]
        for start, size, is_free in sorted(ranges):
            assert start == at, f"hole or overlap at {at}, next range at {start}"
            assert not (is_free and was_free), f"two free runs touch at {start}"
            at, was_free = start + size, is_free
        assert at == self.size
        assert sum(self._allocated.values()) == self.used

    def _find_run(self, size: int) -> int | None:
        # The bin of `size` itself holds runs of nearly its length, some too short: look through it,
        # then take any run of the next bin that has one.
        own = _bin_of(size)
        fitting = None
        for start in islice(self._bins.get(own, ()), _OWN_BIN_LOOKS):
            length = self._free_by_start[start]
            if length == size:
                return start
            if fitting is None and length > size:
                fitting = start
        if fitting is not None:
            return fitting
        above = self._bitmap >> (own + 1)
        if not above:
            return None
        nearest = own + 1 + (above & -above).bit_length() - 1
        return next(iter(self._bins[nearest]))

    def _run_around(self, offset: int, end: int) -> int | None:
        """Start of the free run that holds `offset` to `end`, or None."""
        likely = (offset, self._behind)
        for start in chain(likely, self._free_by_start):
            if start <= offset and end <= start + self._free_by_start.get(start, 0):
                return start
        return None

    def _insert_run(self, start: int, size: int) -> None:
        self._free_by_start[start] = size
        self._free_by_end[start + size] = start
        index = _bin_of(size)
        self._bins.setdefault(index, {})[start] = None
        self._bitmap |= 1 << index

    def _remove_run(self, start: int) -> int:
        size = self._free_by_start.pop(start)
        del self._free_by_end[start + size]
        index = _bin_of(size)
        del self._bins[index][start]
        if not self._bins[index]:
            del self._bins[index]
            self._bitmap &= ~(1 << index)
        return size


def round_up(size: int) -> int:
    """`size` in whole granules."""
    return -(-size // GRANULE_SIZE) * GRANULE_SIZE


def _bin_of(size: int) -> int:
    granules = size // GRANULE_SIZE
    level = granules.bit_length()
    shift = max(level - 1 - _SUB_BITS, 0)
    return level * _SUB_BINS + ((granules >> shift) & (_SUB_BINS - 1))
