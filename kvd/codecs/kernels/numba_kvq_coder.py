"""Symbols to words and back: the coder of `kvq` in Numba.

Nothing branches on data where it matters: at each step a coder reads or writes a word whether it
needs it or not, and moves on by 0 or 1. All lanes of a step share a table (8 KiB, in L1); rows of
32 tokens are written a channel at a time and read back token by token while they are near.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from kvd.codecs.kernels.kvq import LANES, STATE_BITS
from kvd.codecs.tables import (
    BIAS_SHIFT,
    ESCAPE,
    FREQUENCY_MASK,
    NUM_SYMBOLS,
    NUM_TABLES,
    SUPPORT_MAX,
    SYMBOL_OFFSET,
    SYMBOL_SHIFT,
    TOTAL,
    TOTAL_BITS,
)

# What `decode` answers.
WHOLE, TOO_SHORT, TOO_MANY_ESCAPES, TOO_LONG, BAD_END = range(5)

_ZERO, _ONE, _WORD = np.uint64(0), np.uint64(1), np.uint64(16)
_WORD_MASK = np.uint64(0xFFFF)
_STATE_MIN = np.uint64(1 << STATE_BITS)
_TOTAL_BITS, _SLOT_MASK = np.uint64(TOTAL_BITS), np.uint64(FREQUENCY_MASK)
_BIAS_SHIFT, _SYMBOL_SHIFT = np.uint64(BIAS_SHIFT), np.int32(SYMBOL_SHIFT)
_ROOM_BITS = np.uint64(32 - TOTAL_BITS)
_RECIPROCAL_BITS = np.uint64(32 + TOTAL_BITS)
# Channels whose histograms fit L1 together.
_HISTOGRAMS = 16
_NUM_MAGNITUDES = SUPPORT_MAX + 2
_HISTOGRAMS_SIZE = _HISTOGRAMS * _NUM_MAGNITUDES


@njit(nogil=True, cache=True, error_model="numpy")
def decode(
    words: Any,
    escapes: Any,
    states: Any,
    classes: Any,
    ids: Any,
    by_class: Any,
    slots: Any,
    num_wanted: int,
    symbols: Any,
) -> int:
    """Reads the stream, writes 2 bytes an element. `words` has LANES more than count."""
    num_rows, num_channels = symbols.shape
    num_words = np.uint64(len(words) - LANES)
    bases = np.zeros((NUM_TABLES, LANES), np.uint64)
    at = _ZERO
    num_escapes = 0
    for first in range(0, num_rows, LANES):
        num_lanes = min(LANES, num_rows - first)
        is_plain = num_lanes == LANES
        for lane in range(num_lanes):
            is_plain &= classes[first + lane] == 0
        if not is_plain:
            _fill_bases(classes[first : first + num_lanes], by_class, TOTAL, bases)
        for channel in range(num_channels):
            table = ids[channel]
            if table == 0:
                continue
            if is_plain:
                base = np.uint64(table) << _TOTAL_BITS
                for lane in range(LANES):
                    at = _step(
                        base, np.uint64(lane), first, channel, slots, states, words, symbols, at
                    )
            else:
                for lane in range(num_lanes):
                    base = bases[table, lane]
                    at = _step(
                        base, np.uint64(lane), first, channel, slots, states, words, symbols, at
                    )
            if at > num_words:
                return TOO_SHORT
        for token in range(first, min(first + num_lanes, num_wanted)):
            num_escapes = _unescape(symbols[token], escapes, num_escapes)
            if num_escapes < 0:
                return TOO_MANY_ESCAPES
    if num_wanted < len(classes):
        return WHOLE
    if at != num_words or num_escapes != len(escapes):
        return TOO_LONG
    for lane in range(len(states)):
        if states[lane] != _STATE_MIN:
            return BAD_END
    return WHOLE


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _step(
    base: Any,
    lane: Any,
    first: int,
    channel: int,
    slots: Any,
    states: Any,
    words: Any,
    symbols: Any,
    at: Any,
) -> Any:
    """One symbol of one lane; where the next word is."""
    state = states[lane]
    slot = slots[base + (state & _SLOT_MASK)]
    symbols[first + lane, channel] = np.int16(np.int32(slot) >> _SYMBOL_SHIFT)
    entry = np.uint64(slot)
    frequency = (entry & _SLOT_MASK) + _ONE
    state = frequency * (state >> _TOTAL_BITS) + ((entry >> _BIAS_SHIFT) & _SLOT_MASK)
    word = np.uint64(words[at])
    is_low = state < _STATE_MIN
    states[lane] = (state << _WORD | word) if is_low else state
    return at + np.uint64(is_low)


@njit(nogil=True, cache=True, error_model="numpy")
def _unescape(row: Any, escapes: Any, num_used: int) -> int:
    """Put escapes where the tables had no symbol; how many are used up, -1 if they do not do."""
    num_found = 0
    for channel in range(len(row)):
        num_found += row[channel] == ESCAPE
    if num_used + num_found > len(escapes):
        return -1
    if num_found:
        for channel in range(len(row)):
            if row[channel] == ESCAPE:
                row[channel] = escapes[num_used]
                num_used += 1
    return num_used


@njit(nogil=True, cache=True, error_model="numpy")
def _fill_bases(classes: Any, by_class: Any, size: int, bases: Any) -> None:
    """Where the table of each lane begins, by the channel's table; tables have `size` entries."""
    for table in range(NUM_TABLES):
        for lane in range(len(classes)):
            bases[table, lane] = np.uint64(by_class[classes[lane], table]) * np.uint64(size)


@njit(nogil=True, cache=True, error_model="numpy")
def decode_group_by_lane(
    slots: Any,
    words: Any,
    num_words: Any,
    at: Any,
    states: Any,
    classes: Any,
    by_class: Any,
    ids: Any,
    symbols: Any,
) -> Any:
    """As numba_kvq_lanes.py has it, for machines without such vectors."""
    bases = np.empty(LANES, np.uint64)
    for channel in range(len(ids)):
        begin = np.uint64(channel) * np.uint64(LANES)
        table = np.uint64(ids[channel])
        if table == 0:
            symbols[begin : begin + np.uint64(LANES)] = np.int16(0)
            continue
        for lane in range(LANES):
            shifted = np.uint64(classes[lane]) * np.uint64(NUM_TABLES) + table
            bases[lane] = np.uint64(by_class[shifted]) << _TOTAL_BITS
        for lane in range(LANES):
            state = np.uint64(states[lane])
            slot = slots[bases[lane] + (state & _SLOT_MASK)]
            symbols[begin + np.uint64(lane)] = np.int16(np.int32(slot) >> _SYMBOL_SHIFT)
            entry = np.uint64(slot)
            frequency = (entry & _SLOT_MASK) + _ONE
            state = frequency * (state >> _TOTAL_BITS) + ((entry >> _BIAS_SHIFT) & _SLOT_MASK)
            word = np.uint64(words[at])
            is_low = state < _STATE_MIN
            states[lane] = np.uint32((state << _WORD | word) if is_low else state)
            at += np.uint64(is_low)
        if at > num_words:
            return at
    return at


@njit(nogil=True, cache=True, error_model="numpy")
def encode_group_by_lane(
    spans: Any,
    words: Any,
    at: Any,
    states: Any,
    classes: Any,
    by_class: Any,
    ids: Any,
    symbols: Any,
    stride: int,
) -> Any:
    """As numba_kvq_lanes.py has it, for machines without such vectors."""
    for channel in range(len(ids) - 1, -1, -1):
        begin = np.uint64(channel) * np.uint64(stride)
        table = np.uint64(ids[channel])
        if table == 0:
            continue
        for back in range(LANES):
            lane = np.uint64(LANES - 1 - back)
            shifted = np.uint64(by_class[np.uint64(classes[lane]) * np.uint64(NUM_TABLES) + table])
            known = min(max(symbols[begin + lane], -SYMBOL_OFFSET), SYMBOL_OFFSET - 1)
            span = spans[shifted * np.uint64(NUM_SYMBOLS) + np.uint64(known + SYMBOL_OFFSET)]
            frequency = (span >> np.uint32(16)) + np.uint32(1)
            state = states[lane]
            words[at - _ONE] = np.uint16(state)
            if state >> np.uint32(32 - TOTAL_BITS) >= frequency:
                state >>= np.uint32(16)
                at -= _ONE
            quotient = state // frequency
            rest = state - quotient * frequency + (span & np.uint32(0xFFFF))
            states[lane] = (quotient << np.uint32(TOTAL_BITS)) + rest
    return at
