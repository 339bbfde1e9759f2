"""fp8/1: each value in 8 bits, e4m3 (no infinities), by a scale for each layer, plane and head.

The scale is a float32 that takes the head's largest magnitude in the chunk to 448. An infinity
becomes the largest number, a NaN stays one. Micikevicius et al. 2022, arXiv 2209.05433.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvd.codecs.base import Bytes
from kvd.codecs.scaled import Scaled
from kvd.codecs.values import SCALE_MIN, largest_finite
from kvd.errors import Corrupt

NAME = "fp8/1"

E4M3_MAX = np.float32(448)
_NAN = 0x7F
_SIGN = 0x80
_MANTISSA_BITS = 3
# The exponent of the smallest normal number; those below have its step.
_EXPONENT_MIN = -6


class _PerHead:
    name = NAME
    scale_dtype = "<f4"

    def scales_shape(self, planes: int, tokens: int, heads: int) -> tuple[int, int, int, int]:
        return (planes, 1, heads, 1)

    def quantise(self, numbers: NDArray[np.float32]) -> tuple[NDArray[np.float32], Bytes]:
        scales = largest_finite(numbers, axis=(1, 3))[:, None, :, None] / E4M3_MAX
        scales = np.where(scales < SCALE_MIN, np.float32(0), scales)
        with np.errstate(over="ignore", invalid="ignore"):
            scaled = numbers / np.where(scales > 0, scales, np.float32(1))
        return scales, to_e4m3(np.where((scales > 0) | np.isnan(numbers), scaled, np.float32(0)))

    def dequantise(self, scales: NDArray[np.float32], codes: Bytes) -> NDArray[np.float32]:
        if not np.all(np.isfinite(scales) & (scales >= 0)):
            raise Corrupt("a scale is no positive number")
        with np.errstate(over="ignore"):
            return _E4M3[codes] * scales


def to_e4m3(numbers: NDArray[np.float32]) -> Bytes:
    """The nearest e4m3, ties to even; what is too large becomes 448, a NaN stays one."""
    magnitudes = np.minimum(np.abs(numbers), E4M3_MAX)
    exponents = np.where(magnitudes > 0, np.frexp(magnitudes)[1] - 1, _EXPONENT_MIN)
    exponents = np.maximum(exponents, _EXPONENT_MIN)
    steps = np.rint(np.ldexp(magnitudes, _MANTISSA_BITS - exponents))
    codes = ((exponents - _EXPONENT_MIN) << _MANTISSA_BITS) + np.nan_to_num(steps).astype(np.int32)
    codes = np.where(np.isnan(numbers), _NAN, codes)
    return (codes | np.where(np.signbit(numbers), _SIGN, 0)).astype(np.uint8)


def _e4m3_numbers() -> NDArray[np.float32]:
    """What each of the 256 codes stands for."""
    codes = np.arange(_SIGN)
    fields, mantissas = codes >> _MANTISSA_BITS, codes & 7
    significands = mantissas + np.where(fields > 0, 8, 0)
    exponents = np.maximum(fields, 1) - 1 + _EXPONENT_MIN - _MANTISSA_BITS
    numbers = np.ldexp(significands.astype(np.float32), exponents)
    numbers[_NAN] = np.nan
    return np.concatenate([numbers, -numbers])


_E4M3 = _e4m3_numbers()


def fp8() -> Scaled:
    """The codec."""
    return Scaled(_PerHead())
