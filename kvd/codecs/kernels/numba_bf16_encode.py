"""Whole sections of `bf16/1` from values, many in a call: what bf16_block.py writes, a block at a
time, without Python in between.

Two lanes are coded side by side: what one symbol adds to a lane waits for the one before it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from kvd.codecs.kernels.memory import store64
from kvd.codecs.kernels.numba_bf16 import centers_of, code_lengths, codes_of
from kvd.codecs.kernels.reference_bf16 import CODE_BITS_MAX, NUM_LANES, NUM_SYMBOLS, OFFSET_MAX

_VERBATIM, _CODED = 0, 1
_HEAD_SIZE = 4 + 4 * NUM_LANES

# 7 bits may be left when the next codes come: with four of 11 bits all fit a store.
_CODES_A_STORE = 4
# What is written behind the last byte of a lane.
_SLACK = 8


class Room(NamedTuple):
    """One block at a time: `values` uint16 and `symbols` uint8, [tokens * channels]; `lanes` uint8
    [lanes, bytes], with room for the longest codes.
    """

    values: Any
    symbols: Any
    lanes: Any


@njit(nogil=True, cache=True)
def write_sections(kv: Any, places: Any, shift: Any, align: int, out: Any, sizes: Any) -> None:
    """Sections of `kv`, a chunk, into `out`, each from a multiple of `align` on, and their sizes.
    `places` int64 [sections, 4]: the ends of layers and heads. Reads 2 bytes a value three times,
    twice in L2, writes 1.3.
    """
    num_layers, num_planes, num_tokens, num_heads, dim = kv.shape
    rows = kv.reshape((num_layers, num_planes, num_tokens, num_heads * dim))
    room = _room(num_tokens, num_heads * dim)
    at = 0
    for index in range(len(places)):
        first, end = places[index, 2] * dim, places[index, 3] * dim
        count, size = num_tokens * (end - first), 0
        values = room.values[:count].reshape((num_tokens, end - first))
        symbols = room.symbols[:count].reshape((num_tokens, end - first))
        for layer in range(places[index, 0], places[index, 1]):
            for plane in range(num_planes):
                target, found = out[at + size :], rows[layer, plane]
                # All heads lie side by side; of others a copy does.
                if end - first == found.shape[1]:
                    size += _write_block(found, shift, symbols, room.lanes, target)
                else:
                    values[:] = found[:, first:end]
                    size += _write_block(values, shift, symbols, room.lanes, target)
        sizes[index] = size
        at += -(-size // align) * align


@njit(nogil=True, cache=True)
def _room(tokens: int, channels: int) -> Any:
    lane_max = -(-tokens // NUM_LANES) * channels * CODE_BITS_MAX // 8
    return Room(
        np.empty(tokens * channels, np.uint16),
        np.empty(tokens * channels, np.uint8),
        np.empty((NUM_LANES, lane_max + 2 * _SLACK), np.uint8),
    )


@njit(nogil=True, cache=True)
def _write_block(values: Any, shift: Any, symbols: Any, lanes: Any, out: Any) -> Any:
    """A plane of a layer, uint16 [tokens, channels]; its size."""
    tokens, channels = values.shape
    base, offsets = _channel_offsets(values, shift)
    _take_symbols(values, centers_of(base, offsets, shift), symbols)
    counts = _count(symbols.reshape(-1))
    lengths = code_lengths(counts)
    used = np.flatnonzero(lengths)
    first, last = used[0], used[-1]
    lows_at = _HEAD_SIZE + (channels + 1) // 2 + (last - first + 2) // 2
    lanes_at = lows_at + tokens * channels
    # Bits round up to bytes in each lane.
    lanes_max = (counts * lengths).sum() // 8 + NUM_LANES
    if lanes_at + lanes_max >= 2 * values.size:
        out[0] = _VERBATIM
        out[1 : 1 + 2 * values.size] = values.reshape(-1).view(np.uint8)
        return 1 + 2 * values.size
    sizes = _encode(symbols, _packed(lengths), lanes)
    out[0], out[1], out[2], out[3] = _CODED, base, first, last
    at = lanes_at
    for lane in range(NUM_LANES):
        for index in range(4):
            out[4 + 4 * lane + index] = np.uint8(sizes[lane] >> (8 * index) & 255)
        out[at : at + sizes[lane]] = lanes[lane, : sizes[lane]]
        at += sizes[lane]
    _put_nibbles(offsets, out[_HEAD_SIZE:])
    _put_nibbles(lengths[first : last + 1], out[_HEAD_SIZE + (channels + 1) // 2 :])
    _take_lows(values.reshape(-1), out[lows_at:lanes_at])
    return at


@njit(nogil=True, cache=True)
def _channel_offsets(values: Any, shift: Any) -> Any:
    tokens, channels = values.shape
    sums = np.zeros(channels, np.uint32)
    for token in range(tokens):
        row = values[token]
        for channel in range(channels):
            sums[channel] += np.uint32((row[channel] >> np.uint16(7)) & np.uint16(255))
    means = (2 * sums.astype(np.int64) + tokens) // (2 * tokens)
    base = max(0, np.max(means) - (OFFSET_MAX << shift))
    offsets = np.empty(channels, np.uint8)
    for channel in range(channels):
        above = max(means[channel] - base, 0) + ((1 << shift) >> 1)
        offsets[channel] = min(above >> shift, OFFSET_MAX)
    return base, offsets


@njit(nogil=True, cache=True)
def _take_symbols(values: Any, centers: Any, symbols: Any) -> None:
    for token in range(len(values)):
        row, target = values[token], symbols[token]
        for channel in range(len(centers)):
            target[channel] = np.uint8(row[channel] >> np.uint16(7)) - centers[channel]


@njit(nogil=True, cache=True)
def _count(symbols: Any) -> Any:
    # Four tables, so that equal neighbours do not wait for each other.
    found = np.zeros(4 * NUM_SYMBOLS, np.uint32)
    whole = symbols.size // 4 * 4
    for at in range(0, whole, 4):
        first = np.uint64(at)
        for table in range(4):
            symbol = np.uint64(symbols[first + np.uint64(table)])
            found[np.uint64(table * NUM_SYMBOLS) + symbol] += np.uint32(1)
    for at in range(whole, symbols.size):
        found[symbols[at]] += np.uint32(1)
    return found.reshape((4, NUM_SYMBOLS)).sum(0).astype(np.int64)


@njit(nogil=True, cache=True)
def _take_lows(values: Any, out: Any) -> None:
    for index in range(len(values)):
        value = values[index]
        out[index] = np.uint8(value << np.uint16(1)) | np.uint8(value >> np.uint16(15))


@njit(nogil=True, cache=True)
def _put_nibbles(values: Any, out: Any) -> None:
    """Two values a byte, the first one below."""
    for index in range(0, len(values) - 1, 2):
        out[index >> 1] = values[index] | values[index + 1] << np.uint8(4)
    if len(values) % 2:
        out[len(values) >> 1] = values[len(values) - 1]


@njit(nogil=True, cache=True)
def _packed(lengths: Any) -> Any:
    """Codes in the low 16 bits, their lengths above."""
    codes = codes_of(lengths)
    packed = np.empty(NUM_SYMBOLS, np.uint32)
    for symbol in range(NUM_SYMBOLS):
        packed[symbol] = np.uint32(codes[symbol]) | np.uint32(lengths[symbol]) << np.uint32(16)
    return packed


@njit(nogil=True, cache=True)
def _encode(symbols: Any, packed: Any, lanes: Any) -> Any:
    """All tokens, two lanes at a time: four would need more registers than there are; the sizes of
    the lanes.
    """
    sizes = np.empty(NUM_LANES, np.int64)
    for lane in range(0, NUM_LANES, 2):
        sizes[lane], sizes[lane + 1] = _encode_lanes(symbols, lane, packed, lanes)
    return sizes


@njit(nogil=True, cache=True)
def _encode_lanes(symbols: Any, lane: int, packed: Any, lanes: Any) -> Any:
    """A lane and the one behind it; their sizes."""
    out0, out1 = lanes[lane], lanes[lane + 1]
    at0, buffer0, filled0 = np.int64(0), np.uint64(0), np.uint64(0)
    at1, buffer1, filled1 = np.int64(0), np.uint64(0), np.uint64(0)
    whole = symbols.shape[1] // _CODES_A_STORE * _CODES_A_STORE
    for token in range(lane, len(symbols), NUM_LANES):
        row0 = symbols[token]
        if token + 1 == len(symbols):
            at0, buffer0, filled0 = _encode_row(row0, 0, packed, out0, at0, buffer0, filled0)
            break
        row1 = symbols[token + 1]
        for first in range(0, whole, _CODES_A_STORE):
            for step in range(_CODES_A_STORE):
                channel = np.uint64(first + step)
                buffer0, filled0 = _push(buffer0, filled0, packed[row0[channel]])
                buffer1, filled1 = _push(buffer1, filled1, packed[row1[channel]])
            store64(out0, at0, buffer0)
            store64(out1, at1, buffer1)
            at0, buffer0, filled0 = _drop(at0, buffer0, filled0)
            at1, buffer1, filled1 = _drop(at1, buffer1, filled1)
        at0, buffer0, filled0 = _encode_row(row0, whole, packed, out0, at0, buffer0, filled0)
        at1, buffer1, filled1 = _encode_row(row1, whole, packed, out1, at1, buffer1, filled1)
    return _ended(out0, at0, buffer0, filled0), _ended(out1, at1, buffer1, filled1)


@njit(nogil=True, cache=True, inline="always")
def _ended(out: Any, at: Any, buffer: Any, filled: Any) -> Any:
    """The size of a lane, its last bits written."""
    if filled:
        out[at] = np.uint8(buffer)
        at += 1
    return at


@njit(nogil=True, cache=True)
def _encode_row(
    row: Any, first: int, packed: Any, lane: Any, at: Any, buffer: Any, filled: Any
) -> Any:
    """Symbols of a row from `first` on, one by one."""
    for channel in range(first, row.size):
        buffer, filled = _push(buffer, filled, packed[row[channel]])
        store64(lane, at, buffer)
        at, buffer, filled = _drop(at, buffer, filled)
    return at, buffer, filled


@njit(nogil=True, cache=True, inline="always")
def _push(buffer: Any, filled: Any, code: Any) -> Any:
    """Add a code, in the low 16 bits, of as many bits as the high 16 say."""
    buffer |= np.uint64(code & np.uint32(0xFFFF)) << filled
    return buffer, filled + np.uint64(code >> np.uint32(16))


@njit(nogil=True, cache=True, inline="always")
def _drop(at: Any, buffer: Any, filled: Any) -> Any:
    """Whole bytes were stored; what is left are 7 bits or fewer."""
    at += np.int64(filled >> np.uint64(3))
    return at, buffer >> (filled & ~np.uint64(7)), filled & np.uint64(7)
