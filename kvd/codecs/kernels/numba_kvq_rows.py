"""Elements of a section to columns of float32, a channel's tokens side by side: what encoding
begins with. The other way is in numba_kvq_sections.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from kvd.codecs.kernels.kvq import LANES
from kvd.codecs.kernels.numba_kvq_lanes import BLOCK, gather_columns
from kvd.codecs.kernels.numba_kvq_numbers import widen

# Tokens that are read together: with 128 dims their elements are a tenth of an L2.
_TILE_MAX = 256


@njit(nogil=True, cache=True, error_model="numpy")
def tiles_of(num_tokens: int) -> Any:
    """How many tokens a tile has, whole groups, and how many tiles there are."""
    width = min(-(-num_tokens // LANES) * LANES, _TILE_MAX)
    return width, -(-num_tokens // width)


@njit(nogil=True, cache=True, error_model="numpy")
def read_row(
    kv: Any,
    layer: int,
    plane: int,
    head: int,
    first: int,
    is_half: bool,
    mask: int,
    elements: Any,
    bad: Any,
) -> None:
    """Tokens from `first` on, as many as `elements`, float32 [dim, tokens], has room for: 0 behind
    the last. Those with an element whose bits of `mask` are all set are added to `bad`, uint32, as
    bits of groups. Reads 2 bytes an element, writes 4, to L1.
    """
    _, num_planes, num_tokens, num_heads, dim = kv.shape
    stride, width = num_heads * dim, elements.shape[1]
    offset = ((layer * num_planes + plane) * num_tokens + first) * stride + head * dim
    source, bits = kv.reshape(-1), elements.view(np.uint32).reshape(-1)
    shift = np.uint32(0 if is_half else 16)
    for lane in range(0, width, BLOCK):
        num_lanes = min(BLOCK, num_tokens - first - lane)
        begin = offset + lane * stride
        whole = dim // (2 * BLOCK) * (2 * BLOCK) if num_lanes == BLOCK else 0
        found = np.uint32(0)
        for index in range(0, whole, 2 * BLOCK):
            found |= gather_columns(
                source,
                begin + index,
                stride,
                bits,
                index * width + lane,
                width,
                np.uint32(mask),
                shift,
            )
        if whole < dim:
            found |= _read_slowly(
                source, begin, stride, num_lanes, whole, bits, lane, width, np.uint32(mask), shift
            )
        group = (first + lane) // LANES
        bad[group] |= found << np.uint32((first + lane) % LANES)
    if is_half:
        widen(True, bits, elements.reshape(-1))


@njit(nogil=True, cache=True, error_model="numpy")
def _read_slowly(
    source: Any,
    begin: int,
    stride: int,
    num_lanes: int,
    first: int,
    bits: Any,
    at: int,
    width: int,
    mask: Any,
    shift: Any,
) -> Any:
    """Dims from `first` on, one by one."""
    found = np.uint32(0)
    for index in range(first, len(bits) // width):
        for lane in range(BLOCK):
            element = np.uint32(0)
            if lane < num_lanes:
                element = np.uint32(source[begin + lane * stride + index])
                found |= np.uint32((element & mask) == mask) << np.uint32(lane)
            bits[index * width + at + lane] = element << shift
    return found


@njit(nogil=True, cache=True, error_model="numpy")
def turn_columns(elements: Any, cos: Any, sin: Any, turns: Any, first: int) -> None:
    """Rotate columns of float32 [dim, tokens] by `cos` and `sin`, float32 [pairs, all tokens]."""
    offset, stride, reach = turns
    width = elements.shape[1]
    for pair in range(len(cos)):
        one, other = elements[offset + pair * stride], elements[offset + pair * stride + reach]
        cosines, sines = cos[pair, first : first + width], sin[pair, first : first + width]
        for token in range(width):
            x, y = one[token], other[token]
            one[token] = x * cosines[token] - y * sines[token]
            other[token] = y * cosines[token] + x * sines[token]
