"""What stands before the symbols of a `kvq` section: table ids and token classes, in few bits.

Neighbouring channels have tables of neighbouring scales, the more so behind a transform, and most
tokens are of class 0: together they take about 3 bits a channel and 1 byte a token that is special.
docs/formats/bitstream-kvq.md.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvd.codecs.base import Bytes
from kvd.codecs.kernels.ids import LOW_BITS_MAX
from kvd.errors import Corrupt

CLASS_BITS = 2
# A run: up to so many tokens of class 0, then one whose class is in the lowest bits.
_GAP_MAX = 63


def ids_size_max(num_channels: int) -> int:
    """With the most low bits a difference has one more bit, or two."""
    return packed_size(num_channels, 3 + LOW_BITS_MAX)


def pack_ids(ids: NDArray[np.uint8]) -> tuple[Bytes, int]:
    """Bytes, and how many low bits are in them: what makes it shortest, the fewest of equals."""
    sizes = [_loops().num_bits(ids, count) for count in range(LOW_BITS_MAX + 1)]
    num_low_bits = sizes.index(min(sizes))
    out = np.zeros(packed_size(sizes[num_low_bits], 1), np.uint8)
    _loops().write(ids, num_low_bits, out)
    return out, num_low_bits


def unpack_ids(found: Bytes, num_low_bits: int, num_channels: int) -> NDArray[np.uint8]:
    """Raises `Corrupt` where there are not as many as channels, or one is none."""
    ids = np.empty(num_channels, np.uint8)
    num_bits = _loops().read(found, num_low_bits, ids)
    if num_bits < 0 or packed_size(num_bits, 1) != len(found):
        raise Corrupt(f"{len(found)} bytes are not the table ids of {num_channels} channels")
    return ids


@cache
def _loops() -> Any:
    try:
        from kvd.codecs.kernels import numba_ids as found
    except ImportError:
        from kvd.codecs.kernels import ids as found  # type: ignore[no-redef]
    return found


def pack_classes(classes: NDArray[np.uint8]) -> Bytes:
    """Runs, if they take less than 2 bits a token."""
    size = packed_size(len(classes), CLASS_BITS)
    tokens = np.flatnonzero(classes)
    if len(tokens) >= size:
        return packed(classes, CLASS_BITS)
    runs, end = [], 0
    for token in tokens:
        whole, gap = divmod(int(token) - end, _GAP_MAX + 1)
        runs += [_GAP_MAX << CLASS_BITS] * whole + [gap << CLASS_BITS | int(classes[token])]
        end = int(token) + 1
    return np.array(runs, np.uint8) if len(runs) < size else packed(classes, CLASS_BITS)


def unpack_classes(found: Bytes, num_tokens: int) -> NDArray[np.uint8]:
    """Raises `Corrupt` where runs go beyond the tokens."""
    if len(found) == packed_size(num_tokens, CLASS_BITS):
        return unpacked(found, num_tokens, CLASS_BITS)
    classes = np.zeros(num_tokens, np.uint8)
    if not len(found):
        return classes
    ends = np.cumsum((found >> CLASS_BITS).astype(np.int64) + 1)
    if ends[-1] > num_tokens:
        raise Corrupt(f"classes of {ends[-1]} tokens, there are {num_tokens}")
    classes[ends - 1] = found & ((1 << CLASS_BITS) - 1)
    return classes


def packed_size(count: int, bits: int) -> int:
    """Bytes of so many numbers."""
    return -(-count * bits // 8)


def packed(numbers: NDArray[np.uint8], bits: int) -> Bytes:
    """Numbers of a few bits, the first in the lowest bits of the first byte."""
    digits = np.unpackbits(numbers[:, None], axis=1, count=bits, bitorder="little")
    return np.packbits(digits, bitorder="little")


def unpacked(found: Bytes, count: int, bits: int) -> NDArray[np.uint8]:
    """The inverse of `packed`."""
    digits = np.unpackbits(found, count=count * bits, bitorder="little").reshape(count, bits)
    return np.packbits(digits, axis=1, bitorder="little").reshape(-1)
