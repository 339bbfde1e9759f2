"""The Numba kernels of bf16/1: what reference_bf16.py says, at the speed of memory.

Four lanes are decoded side by side, each with a 64-bit window that one load fills. A look-up in a
table of 2^11 entries gives all whole codes in the next 11 bits: of 2.6-bit symbols about four, so a
symbol costs about two instructions. Nothing in the loop branches on data.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from kvd.codecs.kernels import reference_bf16 as reference
from kvd.codecs.kernels.memory import load64, store64
from kvd.codecs.kernels.reference_bf16 import (
    CODE_BITS_MAX,
    NUM_LANES,
    NUM_SYMBOLS,
)

# An entry: symbols from the lowest byte up, their count in byte 6, their bits in byte 7.
_ENTRY_SYMBOLS = 6
_COUNT_AT = np.uint64(48)
_SYMBOLS_MASK = np.uint64((1 << 48) - 1)
_BITS_AT = np.uint64(56)
_WINDOW = np.uint64((1 << CODE_BITS_MAX) - 1)
# A load gives 57 bits or more: five look-ups.
_LOOKUPS = 5
_FAST_SYMBOLS = _LOOKUPS * _ENTRY_SYMBOLS

# What is written behind the last symbol of a lane.
SLACK = 8

code_lengths = njit(nogil=True, cache=True)(reference.code_lengths)
centers_of = njit(nogil=True, cache=True)(reference.centers_of)


@njit(nogil=True, cache=True)
def decode(
    content: Any, bounds: Any, lengths: Any, lows: Any, centers: Any, first: Any, out: Any
) -> Any:
    """As the reference. Reads 1.3 bytes a value, writes and reads one in between, writes 2."""
    table = make_table(lengths)
    tokens, channels = out.shape[0], centers.size
    tile = np.empty((NUM_LANES, -(-tokens // NUM_LANES) * channels + SLACK), np.uint8)
    bits = decode_lanes(content, bounds, lengths, table, tokens, channels, tile)
    for lane in range(NUM_LANES):
        if bits[lane] > 8 * (bounds[lane + 1] - bounds[lane]):
            return bits
    merge(tile, lows, centers, first, out.shape[1], out, 0)
    return bits


@njit(nogil=True, cache=True)
def codes_of(lengths: Any) -> Any:
    """As the reference, in one look at each symbol."""
    counts = np.zeros(CODE_BITS_MAX + 1, np.int64)
    for symbol in range(NUM_SYMBOLS):
        counts[lengths[symbol]] += 1
    # The first code of each length.
    following = np.zeros(CODE_BITS_MAX + 2, np.int64)
    for bits in range(1, CODE_BITS_MAX + 1):
        following[bits + 1] = (following[bits] + counts[bits]) << 1
    codes = np.zeros(NUM_SYMBOLS, np.uint16)
    for symbol in range(NUM_SYMBOLS):
        bits = lengths[symbol]
        if bits:
            code, reverse = following[bits], 0
            following[bits] += 1
            for _ in range(bits):
                reverse = reverse << 1 | code & 1
                code >>= 1
            codes[symbol] = reverse
    return codes


@njit(nogil=True, cache=True)
def make_table(lengths: Any) -> Any:
    """The uint64 [2^11] that gives all whole codes in a window of 11 bits, up to six. The code is
    complete: each window begins with a code.

    A window of so many bits is a code and what a shorter window gives: those of k bits stand from
    2^k on, the longest ones last.
    """
    codes = codes_of(lengths)
    used = np.flatnonzero(lengths)
    tables = np.zeros(2 << CODE_BITS_MAX, np.uint64)
    for width in range(1, CODE_BITS_MAX + 1):
        table = tables[1 << width : 2 << width]
        for symbol in used:
            bits = np.int64(lengths[symbol])
            if bits <= width:
                rest = tables[1 << (width - bits) : 2 << (width - bits)]
                _prepend(symbol, bits, np.int64(codes[symbol]), rest, lengths, table)
    return tables[1 << CODE_BITS_MAX :]


@njit(nogil=True, cache=True)
def _prepend(symbol: Any, bits: Any, code: Any, rest: Any, lengths: Any, table: Any) -> None:
    """Windows that begin with a code."""
    head = np.uint64(symbol) | np.uint64(1) << _COUNT_AT | np.uint64(bits) << _BITS_AT
    for index in range(len(rest)):
        entry = rest[index]
        if _count_of(entry) == _ENTRY_SYMBOLS:
            # No room for the last one.
            last = (entry >> np.uint64(8 * (_ENTRY_SYMBOLS - 1))) & np.uint64(255)
            entry -= np.uint64(lengths[last]) << _BITS_AT | np.uint64(1) << _COUNT_AT
        symbols = entry << np.uint64(8) & _SYMBOLS_MASK
        table[np.uint64(code) + (np.uint64(index) << np.uint64(bits))] = (
            entry & ~_SYMBOLS_MASK
        ) + head | symbols


@njit(nogil=True, cache=True)
def decode_lanes(
    content: Any, bounds: Any, lengths: Any, table: Any, tokens: Any, channels: Any, tile: Any
) -> Any:
    """Decode the symbols of `tokens` tokens into `tile`; the bits that each lane took."""
    row0, row1, row2, row3 = tile[0], tile[1], tile[2], tile[3]
    out0 = out1 = out2 = out3 = np.int64(0)
    at0, at1, at2, at3 = bounds[0] * 8, bounds[1] * 8, bounds[2] * 8, bounds[3] * 8
    # Before these bits eight bytes can be loaded, and before this symbol what they give fits.
    last0, last1 = (bounds[1] - 7) * 8, (bounds[2] - 7) * 8
    last2, last3 = (bounds[3] - 7) * 8, (bounds[4] - 7) * 8
    limit = tokens // NUM_LANES * channels - _FAST_SYMBOLS
    while (
        max(max(out0, out1), max(out2, out3)) <= limit
        and at0 < last0
        and at1 < last1
        and at2 < last2
        and at3 < last3
    ):
        window0 = load64(content, at0 >> 3) >> np.uint64(at0 & 7)
        window1 = load64(content, at1 >> 3) >> np.uint64(at1 & 7)
        window2 = load64(content, at2 >> 3) >> np.uint64(at2 & 7)
        window3 = load64(content, at3 >> 3) >> np.uint64(at3 & 7)
        for _ in range(_LOOKUPS):
            entry0 = table[window0 & _WINDOW]
            entry1 = table[window1 & _WINDOW]
            entry2 = table[window2 & _WINDOW]
            entry3 = table[window3 & _WINDOW]
            store64(row0, out0, entry0)
            store64(row1, out1, entry1)
            store64(row2, out2, entry2)
            store64(row3, out3, entry3)
            out0 += _count_of(entry0)
            out1 += _count_of(entry1)
            out2 += _count_of(entry2)
            out3 += _count_of(entry3)
            window0 >>= entry0 >> _BITS_AT
            window1 >>= entry1 >> _BITS_AT
            window2 >>= entry2 >> _BITS_AT
            window3 >>= entry3 >> _BITS_AT
            at0 += np.int64(entry0 >> _BITS_AT)
            at1 += np.int64(entry1 >> _BITS_AT)
            at2 += np.int64(entry2 >> _BITS_AT)
            at3 += np.int64(entry3 >> _BITS_AT)
    at = (at0, at1, at2, at3)
    done = (out0, out1, out2, out3)
    bits = np.empty(NUM_LANES, np.int64)
    for lane in range(NUM_LANES):
        count = (tokens - lane + NUM_LANES - 1) // NUM_LANES * channels
        end = bounds[lane + 1]
        behind = _finish(content, at[lane], end, table, lengths, tile[lane], done[lane], count)
        bits[lane] = behind - 8 * bounds[lane]
    return bits


@njit(nogil=True, cache=True, inline="always")
def _count_of(entry: Any) -> Any:
    return np.int64((entry >> _COUNT_AT) & np.uint64(255))


@njit(nogil=True, cache=True)
def _finish(
    content: Any, at: Any, end: Any, table: Any, lengths: Any, row: Any, out: Any, count: int
) -> Any:
    """Decode what is left of a lane, entry by entry; the bit behind it. The lane is followed by
    zeros, whatever stands there.
    """
    while out < count:
        window = np.uint64(0)
        byte = at >> 3
        if byte + 8 <= end:
            window = load64(content, byte)
        else:
            for index in range(byte, end):
                window |= np.uint64(content[index]) << np.uint64(8 * (index - byte))
        entry = table[(window >> np.uint64(at & 7)) & _WINDOW]
        for _ in range(min(_count_of(entry), count - out)):
            symbol = np.uint8(entry & np.uint64(255))
            row[out] = symbol
            out += 1
            at += np.int64(lengths[symbol])
            entry >>= np.uint64(8)
    return at


@njit(nogil=True, cache=True)
def merge(
    tile: Any, lows: Any, centers: Any, first: Any, width: Any, out: Any, column: Any
) -> None:
    """Symbols and low bytes of `width` channels from `first` on to values, from `column` on."""
    tokens, channels = len(out), centers.size
    # Slices of one length: so LLVM makes vectors of it, 30 GB/s.
    center = centers[first : first + width]
    for token in range(tokens):
        start = token // NUM_LANES * channels + first
        row = tile[token % NUM_LANES, start : start + width]
        low = lows[token, first : first + width]
        target = out[token, column : column + width]
        for channel in range(width):
            high = np.uint8(row[channel] + center[channel])
            rotated = np.uint16(np.uint16(high) << np.uint16(8)) | np.uint16(low[channel])
            target[channel] = np.uint16(rotated >> np.uint16(1)) | np.uint16(
                rotated << np.uint16(15)
            )
