"""Table ids to bits and back, a bit at a time: in Python as it stands, and in Numba.

A channel has, lowest bit first: its law (1 bit); of the difference of its scale from that of the
channel before, folded to 0, -1, 1, -2, ..., the low bits; the rest in unary, ended by a 0.
"""

from __future__ import annotations

from typing import Any

# An id: the law above, the scale below.
FAMILY_SHIFT = 5
SCALE_MASK = (1 << FAMILY_SHIFT) - 1
# With so many low bits the rest of a difference is 0 or 1.
LOW_BITS_MAX = 5


def num_bits(ids: Any, num_low_bits: int) -> int:
    """Bits of all ids with so many low bits each."""
    count, before = 0, 0
    for channel in range(len(ids)):
        scale = int(ids[channel]) & SCALE_MASK
        difference = scale - before
        folded = -2 * difference - 1 if difference < 0 else 2 * difference
        count += 2 + num_low_bits + (folded >> num_low_bits)
        before = scale
    return count


def write(ids: Any, num_low_bits: int, out: Any) -> None:
    """Into `out`, uint8, zeros before."""
    at, before = 0, 0
    for channel in range(len(ids)):
        number = int(ids[channel])
        scale = number & SCALE_MASK
        difference = scale - before
        folded = -2 * difference - 1 if difference < 0 else 2 * difference
        before = scale
        head = number >> FAMILY_SHIFT | (folded & ((1 << num_low_bits) - 1)) << 1
        for bit in range(1 + num_low_bits):
            out[at >> 3] |= (head >> bit & 1) << (at & 7)
            at += 1
        for _ in range(folded >> num_low_bits):
            out[at >> 3] |= 1 << (at & 7)
            at += 1
        at += 1


def read(found: Any, num_low_bits: int, ids: Any) -> int:
    """Into `ids`; how many bits they took, -1 where they are no ids."""
    at, scale, end = 0, 0, 8 * len(found)
    for channel in range(len(ids)):
        if at + 2 + num_low_bits > end:
            return -1
        head = 0
        for bit in range(1 + num_low_bits):
            head |= (int(found[at >> 3]) >> (at & 7) & 1) << bit
            at += 1
        high = 0
        while int(found[at >> 3]) >> (at & 7) & 1:
            high += 1
            at += 1
            if at == end:
                return -1
        at += 1
        folded = high << num_low_bits | head >> 1
        scale += -((folded + 1) >> 1) if folded & 1 else folded >> 1
        if scale < 0 or scale > SCALE_MASK:
            return -1
        ids[channel] = (head & 1) << FAMILY_SHIFT | scale
    return at
