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
from kvd.codecs.kernels.numba_kvq_lanes import encode_group
from kvd.codecs.tables import (
    BIAS_SHIFT,
    CLASS_RAW,
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
def choose_tables(symbols: Any, classes: Any, costs: Any, ids: Any) -> None:
    """Reads 2 bytes an element twice, in L2."""
    num_tokens, num_channels = symbols.shape
    num_coded = costs.shape[0]
    counts = np.empty(num_coded * _HISTOGRAMS_SIZE, np.uint32)
    sums = np.empty(NUM_TABLES, np.float64)
    has_class = np.zeros(num_coded + 1, np.bool_)
    for token in range(num_tokens):
        has_class[classes[token]] = True
    highest = _highest(symbols)
    for first in range(0, num_channels, _HISTOGRAMS):
        for index in range(num_coded):
            if has_class[index]:
                for at in range(index * _HISTOGRAMS_SIZE, (index + 1) * _HISTOGRAMS_SIZE):
                    counts[at] = np.uint32(0)
        width = min(_HISTOGRAMS, num_channels - first)
        for token in range(num_tokens):
            if classes[token] == CLASS_RAW:
                continue
            begin = np.uint64(classes[token]) * np.uint64(_HISTOGRAMS_SIZE)
            # The same twice: where the width is known the loop is unrolled.
            if width == _HISTOGRAMS:
                for channel in range(_HISTOGRAMS):
                    _count(symbols, token, first, channel, begin, counts)
            else:
                for channel in range(width):
                    _count(symbols, token, first, channel, begin, counts)
        for channel in range(width):
            limit = min(highest[first + channel], _NUM_MAGNITUDES - 1) + 1
            for table in range(NUM_TABLES):
                sums[table] = 0.0
            for index in range(num_coded):
                if has_class[index]:
                    begin = np.uint64(index * _HISTOGRAMS_SIZE + channel * _NUM_MAGNITUDES)
                    for magnitude in range(limit):
                        # Whole numbers below 2^53: exact.
                        count = np.float64(counts[begin + np.uint64(magnitude)])
                        # Few tokens of a finer class are spread over many magnitudes.
                        if count == 0.0:
                            continue
                        for table in range(NUM_TABLES):
                            sums[table] += count * costs[index, magnitude, table]
            ids[first + channel] = _least(sums) if limit > 1 else 0


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _count(symbols: Any, token: int, first: int, channel: int, begin: Any, counts: Any) -> None:
    symbol = symbols[token, np.uint64(first + channel)]
    magnitude = np.uint64(min(abs(symbol), np.int16(_NUM_MAGNITUDES - 1)))
    counts[begin + np.uint64(channel * _NUM_MAGNITUDES) + magnitude] += np.uint32(1)


@njit(nogil=True, cache=True, error_model="numpy")
def _highest(symbols: Any) -> Any:
    """The largest magnitude of each channel."""
    highest = np.zeros(symbols.shape[1], np.int16)
    for token in range(symbols.shape[0]):
        for channel in range(symbols.shape[1]):
            magnitude = abs(symbols[token, channel])
            highest[channel] = max(highest[channel], magnitude)
    return highest


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _least(sums: Any) -> int:
    best = 0
    for table in range(1, len(sums)):
        if sums[table] < sums[best]:
            best = table
    return best


@njit(nogil=True, cache=True, error_model="numpy")
def encode(
    symbols: Any,
    classes: Any,
    ids: Any,
    by_class: Any,
    spans: Any,
    reciprocals: Any,
    states: Any,
    words: Any,
) -> Any:
    """Reads 2 bytes an element, writes 2 at most, from the end of `words`; where they begin."""
    num_tokens, num_channels = symbols.shape
    spans, reciprocals = spans.reshape(-1), reciprocals.reshape(-1)
    bases = np.zeros((NUM_TABLES, LANES), np.uint64)
    at = np.uint64(len(words))
    for first in range((num_tokens - 1) // LANES * LANES, -1, -LANES):
        num_lanes = min(LANES, num_tokens - first)
        group = symbols[first : first + num_lanes]
        _fill_bases(classes[first : first + num_lanes], by_class, NUM_SYMBOLS, bases)
        for channel in range(num_channels - 1, -1, -1):
            table = ids[channel]
            if table == 0:
                continue
            for back in range(num_lanes):
                lane = np.uint64(num_lanes - 1 - back)
                known = min(max(group[lane, np.uint64(channel)], -SYMBOL_OFFSET), SYMBOL_OFFSET - 1)
                index = bases[table, lane] + np.uint64(known + SYMBOL_OFFSET)
                span = np.uint64(spans[index])
                frequency = (span >> _WORD) + _ONE
                state = states[lane]
                words[at - _ONE] = np.uint16(state)
                is_full = np.uint64(state >= frequency << _ROOM_BITS)
                at -= is_full
                state = state >> (is_full << np.uint64(4))
                quotient = (state * reciprocals[index]) >> _RECIPROCAL_BITS
                rest = state - quotient * frequency
                states[lane] = (quotient << _TOTAL_BITS) + rest + (span & _WORD_MASK)
    return at


@njit(nogil=True, cache=True, error_model="numpy")
def encode_wide(
    symbols: Any, classes: Any, ids: Any, by_class: Any, spans: Any, states: Any, words: Any
) -> Any:
    """As `encode`, 32 lanes at a time; `states` uint32 [LANES], and `words` has room for a symbol
    of every lane, and LANES more.
    """
    num_tokens, num_channels = symbols.shape
    tile = np.empty(num_channels * LANES, np.int16)
    lanes = np.empty(LANES, np.uint32)
    spans, by_class = spans.reshape(-1), by_class.reshape(-1)
    at = np.uint64(len(words))
    for first in range((num_tokens - 1) // LANES * LANES, -1, -LANES):
        num_lanes = min(LANES, num_tokens - first)
        lanes[:] = np.uint32(CLASS_RAW)
        if num_lanes < LANES:
            tile[:] = np.int16(0)
        for lane in range(num_lanes):
            lanes[lane] = classes[first + lane]
            row = symbols[first + lane]
            for channel in range(num_channels):
                tile[np.uint64(channel) * np.uint64(LANES) + np.uint64(lane)] = row[channel]
        at = encode_group(spans, words, at, states, lanes, by_class, ids, tile)
    return at


@njit(nogil=True, cache=True, error_model="numpy")
def escapes(symbols: Any, classes: Any, ids: Any, by_class: Any, supports: Any, out: Any) -> int:
    """What the tables do not know, token by token; how many. Reads 2 bytes an element."""
    num_tokens, num_channels = symbols.shape
    limits = np.empty(num_channels, np.int16)
    num_escapes = 0
    for token in range(num_tokens):
        if token == 0 or classes[token] != classes[token - 1]:
            for channel in range(num_channels):
                limits[channel] = supports[by_class[classes[token], ids[channel]]]
        row = symbols[token]
        num_found = 0
        for channel in range(num_channels):
            num_found += abs(row[channel]) > limits[channel]
        if num_found:
            for channel in range(num_channels):
                if abs(row[channel]) > limits[channel]:
                    out[num_escapes] = row[channel]
                    num_escapes += 1
    return num_escapes


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
