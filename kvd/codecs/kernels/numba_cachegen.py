"""The Numba kernels of cachegen/1: what reference_cachegen.py says, without its arrays a step.

Each channel has a table of its own, so a symbol is searched for, eight steps, not looked up: about
20 ns. CacheGen is here to be compared with, not to be fast.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from kvd.codecs.kernels.reference_cachegen import (
    NUM_LANES,
    NUM_SYMBOLS,
    STATE_MIN,
    TOTAL,
    TOTAL_BITS,
    WORD_BITS,
)
from kvd.errors import Corrupt

U8 = NDArray[np.uint8]
U16 = NDArray[np.uint16]
U64 = NDArray[np.uint64]

_TOO_SHORT = -1


def encode(symbols: U8, kinds: U8, cumulative: U16) -> tuple[U64, U16]:
    """As the reference."""
    states = np.full(min(NUM_LANES, symbols.shape[1]), STATE_MIN, np.uint64)
    words = np.empty(symbols.size, np.uint16)
    count = _encode(symbols, kinds, cumulative, states, words)
    return states, words[words.size - count :]


def decode(states: U64, words: U16, kinds: U8, cumulative: U16, *, is_whole: bool) -> U8:
    """As the reference."""
    symbols = np.empty((len(kinds), cumulative.shape[1]), np.uint8)
    states = states.copy()
    used = _decode(states, words, kinds, cumulative, symbols)
    if used == _TOO_SHORT:
        raise Corrupt("the words of a section end before its symbols do")
    if is_whole and (used != len(words) or np.any(states != STATE_MIN)):
        raise Corrupt("a section does not end where its last symbol does")
    return symbols


@njit(nogil=True, cache=True)
def _encode(symbols: Any, kinds: Any, cumulative: Any, states: Any, words: Any) -> Any:
    """Fill `words` from its end; how many. A symbol gives one at most."""
    tokens, channels = symbols.shape
    at = words.size
    for token in range(tokens - 1, -1, -1):
        tables = cumulative[kinds[token]]
        for channel in range(channels - 1, -1, -1):
            table = tables[channel]
            symbol = symbols[token, channel]
            start = np.uint64(table[symbol])
            frequency = np.uint64(table[np.int64(symbol) + 1]) - start
            state = states[channel % NUM_LANES]
            if state >> np.uint64(32 - TOTAL_BITS) >= frequency:
                at -= 1
                words[at] = np.uint16(state)
                state >>= np.uint64(WORD_BITS)
            quotient = state // frequency
            rest = state - quotient * frequency
            states[channel % NUM_LANES] = (quotient << np.uint64(TOTAL_BITS)) + rest + start
    return words.size - at


@njit(nogil=True, cache=True)
def _decode(states: Any, words: Any, kinds: Any, cumulative: Any, symbols: Any) -> Any:
    """Fill `symbols`; how many words it took, or `_TOO_SHORT`."""
    tokens, channels = symbols.shape
    at = 0
    for token in range(tokens):
        tables = cumulative[kinds[token]]
        for channel in range(channels):
            table = tables[channel]
            state = states[channel % NUM_LANES]
            slot = np.uint16(state & np.uint64(TOTAL - 1))
            symbol = 0
            half = NUM_SYMBOLS // 2
            while half:
                symbol += half if table[symbol + half] <= slot else 0
                half >>= 1
            start = np.uint64(table[symbol])
            frequency = np.uint64(table[symbol + 1]) - start
            state = frequency * (state >> np.uint64(TOTAL_BITS)) + np.uint64(slot) - start
            if state < np.uint64(STATE_MIN):
                if at == words.size:
                    return _TOO_SHORT
                state = state << np.uint64(WORD_BITS) | np.uint64(words[at])
                at += 1
            states[channel % NUM_LANES] = state
            symbols[token, channel] = symbol
    return at
