"""int8/1: each head of each token has a scale, its largest magnitude / 127. The plain baseline.

The scale is a bfloat16, rounded up: 8 + 16 / head_dim bits a value. A NaN is -128, an infinity the
largest number of its vector.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvd.codecs.base import Bytes
from kvd.codecs.scaled import Scaled
from kvd.codecs.values import largest_finite, scale_bits, to_int8, widen
from kvd.errors import Corrupt

NAME = "int8/1"

_NAN = -128
# The bits of the smallest bfloat16 that is no positive number.
_INFINITY_BITS = 0x7F80


class _PerToken:
    name = NAME
    scale_dtype = "<u2"

    def scales_shape(self, planes: int, tokens: int, heads: int) -> tuple[int, int, int, int]:
        return (planes, tokens, heads, 1)

    def quantise(self, numbers: NDArray[np.float32]) -> tuple[NDArray[np.uint16], Bytes]:
        bits = scale_bits(largest_finite(numbers, axis=(-1,)))[..., None]
        is_nan = np.isnan(numbers)
        codes = to_int8(np.where(is_nan, np.float32(0), numbers), widen(bits))
        return bits, np.where(is_nan, np.int8(_NAN), codes).view(np.uint8)

    def dequantise(self, scales: NDArray[np.uint16], codes: Bytes) -> NDArray[np.float32]:
        if scales.size and scales.max() >= _INFINITY_BITS:
            raise Corrupt(f"a scale of bits {scales.max():#x} is no positive number")
        multiples = np.ascontiguousarray(codes).view(np.int8)
        with np.errstate(over="ignore"):
            numbers = multiples.astype(np.float32) * widen(scales)
        return np.where(multiples == _NAN, np.float32(np.nan), numbers)


def int8() -> Scaled:
    """The codec."""
    return Scaled(_PerToken())
