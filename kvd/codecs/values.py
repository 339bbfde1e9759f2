"""A chunk's bytes as numbers: views by layer and plane, float32 and back."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from kvd.codecs.base import Bytes
from kvd.errors import Unsupported
from kvd.layout import KVLayout

FLOATS = ("bfloat16", "float16", "float32")

# Below the smallest normal number float32 is not the same on every machine.
SCALE_MIN = np.float32(2.0**-126)
INT8_MAX = 127

_BFLOAT16_MAX = np.uint32(0x7F7F0000).view(np.float32)
_BFLOAT16_NAN = 0x7FC0


def as_layers(chunk: Bytes, layout: KVLayout, num_tokens: int, dtype: DTypeLike) -> NDArray[Any]:
    """A view `dtype [layers, planes, tokens, kv_heads, head_dim]`; copies nothing."""
    assert chunk.size == layout.size(num_tokens)
    assert chunk.flags.c_contiguous
    return chunk.view(dtype).reshape(layout.shape(num_tokens))


def as_stored(chunk: Bytes, layout: KVLayout, num_tokens: int) -> NDArray[Any]:
    """The view that `widen` reads and `narrow` makes: bfloat16 as uint16. Raises `Unsupported` for
    what is no float of 16 or 32 bits.
    """
    if layout.dtype not in FLOATS:
        raise Unsupported(f"one of {', '.join(FLOATS)} expected, the layout has {layout.dtype}")
    dtype = np.uint16 if layout.dtype == "bfloat16" else layout.dtype
    return as_layers(chunk, layout, num_tokens, dtype)


def widen(stored: NDArray[Any]) -> NDArray[np.float32]:
    """The numbers as float32, a copy; uint16 are bfloat16."""
    if stored.dtype == np.uint16:
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32)


def narrow(numbers: NDArray[np.float32], dtype: DTypeLike) -> NDArray[Any]:
    """The numbers as `dtype`, rounded to nearest, ties to even; what is too large becomes the
    largest that is finite, a NaN stays one. uint16 is bfloat16.
    """
    if np.dtype(dtype) != np.uint16:
        largest = np.finfo(dtype).max
        return np.clip(numbers, -largest, largest).astype(dtype)
    bits = np.clip(numbers, -_BFLOAT16_MAX, _BFLOAT16_MAX).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(numbers), _BFLOAT16_NAN, rounded).astype(np.uint16)


def largest_finite(numbers: NDArray[np.float32], axis: tuple[int, ...]) -> NDArray[np.float32]:
    """The largest magnitude along `axis` but for infinities and NaNs, 0 where nothing else is."""
    magnitudes = np.abs(numbers)
    found: NDArray[np.float32] = np.where(np.isfinite(magnitudes), magnitudes, np.float32(0)).max(
        axis=axis
    )
    return found


def scale_bits(largest: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bfloat16 by which int8 reaches `largest`, rounded up; 0 for what is too small."""
    scales = largest / np.float32(INT8_MAX)
    bits = (scales.view(np.uint32).astype(np.uint64) + 0xFFFF) >> 16
    return np.where(scales < SCALE_MIN, 0, bits).astype(np.uint16)


def to_int8(numbers: NDArray[np.float32], scales: NDArray[np.float32]) -> NDArray[np.int8]:
    """The nearest multiples of `scales`, 127 at most; 0 where the scale is 0. No NaNs."""
    with np.errstate(over="ignore"):
        multiples = numbers / np.where(scales > 0, scales, np.float32(1))
    nearest = np.clip(np.rint(multiples), -INT8_MAX, INT8_MAX)
    return np.where(scales > 0, nearest, 0).astype(np.int8)
