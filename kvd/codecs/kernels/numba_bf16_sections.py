"""Whole sections of `bf16/1` to values, many in a call: what bf16_block.py reads and decodes, a
block at a time, without Python in between. The words for a block that cannot be are found there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from kvd.codecs.kernels.numba_bf16 import (
    SLACK,
    centers_of,
    decode_lanes,
    make_table,
    merge,
)
from kvd.codecs.kernels.reference_bf16 import CODE_BITS_MAX, NUM_LANES, NUM_SYMBOLS

_VERBATIM, _CODED = 0, 1
_HEAD_SIZE = 4 + 4 * NUM_LANES
_BAD = -1


@njit(nogil=True, cache=True)
def restore_sections(bitstream: Any, places: Any, shift: Any, num_wanted: Any, kv: Any) -> int:
    """Sections into `kv`, a chunk; the index of one that is corrupt, or -1. `places` int64
    [sections, 10]: offset and size in the bitstream; the ends of its layers and heads; those of
    what is wanted. Reads 1.3 bytes a value, writes 2.
    """
    num_layers, num_planes, num_tokens, num_heads, dim = kv.shape
    rows = kv.reshape((num_layers, num_planes, num_tokens, num_heads * dim))
    # For the widest section; new memory for each block would cost page faults.
    lane_max = -(-num_wanted // NUM_LANES) * num_heads * dim
    tile = np.empty((NUM_LANES, lane_max + SLACK), np.uint8)
    for index in range(len(places)):
        place = places[index]
        content = bitstream[place[0] : place[0] + place[1]]
        channels = (place[5] - place[4]) * dim
        columns = (place[8] - place[4]) * dim, place[8] * dim, (place[9] - place[8]) * dim
        at = 0
        for layer in range(place[2], place[3]):
            for plane in range(num_planes):
                tokens = num_wanted if place[6] <= layer < place[7] else 0
                at = _restore_block(
                    content, at, channels, shift, tokens, columns, tile, rows[layer, plane]
                )
                if at < 0:
                    return index
        if at != len(content):
            return index
    return -1


@njit(nogil=True, cache=True)
def _restore_block(
    content: Any,
    at: Any,
    channels: Any,
    shift: Any,
    tokens: Any,
    columns: Any,
    tile: Any,
    out: Any,
) -> Any:
    """A block into `out`, uint16 [tokens, channels]; what is behind it, -1 where it is corrupt.
    `columns`: the first that is wanted, where it goes, and how many there are. `tile`: room for
    symbols, uint8 [lanes, bytes].
    """
    size = len(content)
    if at < size and content[at] == _VERBATIM:
        end = at + 1 + 2 * len(out) * channels
        if end > size:
            return _BAD
        _copy(content[at + 1 : end], channels, tokens, columns, out)
        return end
    if at + _HEAD_SIZE > size or content[at] != _CODED:
        return _BAD
    base, first, last = (
        np.int64(content[at + 1]),
        np.int64(content[at + 2]),
        np.int64(content[at + 3]),
    )
    if first > last:
        return _BAD
    bounds = np.zeros(NUM_LANES + 1, np.int64)
    for lane in range(NUM_LANES):
        bounds[lane + 1] = bounds[lane] + _number(content, at + 4 + 4 * lane)
    offsets_at = at + _HEAD_SIZE
    lengths_at = offsets_at + (channels + 1) // 2
    count = last - first + 1
    lows_at = lengths_at + (count + 1) // 2
    lanes_at = lows_at + len(out) * channels
    end = lanes_at + bounds[NUM_LANES]
    if end > size:
        return _BAD
    lengths = np.zeros(NUM_SYMBOLS, np.uint8)
    _fill_nibbles(content[lengths_at:lows_at], lengths[first : last + 1])
    if not _is_complete(lengths):
        return _BAD
    if not tokens:
        return end
    offsets = np.empty(channels, np.uint8)
    _fill_nibbles(content[offsets_at:lengths_at], offsets)
    table = make_table(lengths)
    lanes = content[lanes_at:end]
    bits = decode_lanes(lanes, bounds, lengths, table, tokens, channels, tile)
    for lane in range(NUM_LANES):
        lane_size = bounds[lane + 1] - bounds[lane]
        if bits[lane] > 8 * lane_size:
            return _BAD
        if tokens == len(out) and (bits[lane] + 7) // 8 != lane_size:
            return _BAD
    lows = content[lows_at:lanes_at].reshape((len(out), channels))
    centers = centers_of(int(base), offsets, shift)
    merge(tile, lows, centers, columns[0], columns[2], out[:tokens], columns[1])
    return end


@njit(nogil=True, cache=True)
def _copy(found: Any, channels: int, tokens: Any, columns: Any, out: Any) -> None:
    first, target, width = columns
    for token in range(tokens):
        begin = 2 * (token * channels + first)
        row = found[begin : begin + 2 * width]
        for index in range(width):
            low, high = np.uint16(row[2 * index]), np.uint16(row[2 * index + 1])
            out[token, target + index] = low | high << np.uint16(8)


@njit(nogil=True, cache=True)
def _number(content: Any, at: int) -> Any:
    found = np.int64(0)
    for index in range(4):
        found |= np.int64(content[at + index]) << np.int64(8 * index)
    return found


@njit(nogil=True, cache=True)
def _fill_nibbles(packed: Any, out: Any) -> None:
    for index in range(len(out)):
        out[index] = packed[index >> 1] >> np.uint8(4 * (index & 1)) & np.uint8(15)


@njit(nogil=True, cache=True)
def _is_complete(lengths: Any) -> Any:
    total = np.int64(0)
    for symbol in range(NUM_SYMBOLS):
        bits = np.int64(lengths[symbol])
        if bits > CODE_BITS_MAX:
            return False
        total += (1 << (CODE_BITS_MAX - bits)) if bits else 0
    return total == 1 << CODE_BITS_MAX
