"""The reference of cachegen/1's entropy coder, in numpy. docs/formats/bitstream.md.

rANS (Duda 2013, arXiv 1311.2540) of 32-bit states and 16-bit words. Lane j codes the channels j,
j + 32, ...: one step is up to 32 channels of one token, and all lanes share one stream of words, in
the order in which they are read: step after step, lane after lane. Encoding runs backwards, so that
decoding runs forwards in time, and a prefix of the tokens is an early stop.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvd.errors import Corrupt

NUM_LANES = 32
NUM_SYMBOLS = 256
TOTAL_BITS = 14
TOTAL = 1 << TOTAL_BITS
WORD_BITS = 16
# A state is below 2^32 and, between two symbols, at least this.
STATE_MIN = 1 << 16

U8 = NDArray[np.uint8]
U16 = NDArray[np.uint16]
U64 = NDArray[np.uint64]


def encode(symbols: U8, kinds: U8, cumulative: U16) -> tuple[U64, U16]:
    """States and words of `symbols`, uint8 [tokens, channels]. `kinds` says which tables a token
    has; `cumulative`, uint16 [kinds, channels, 257], what comes before each symbol of 2^14.
    """
    tokens, channels = symbols.shape
    states = np.full(min(NUM_LANES, channels), STATE_MIN, np.uint64)
    words: list[U16] = []
    for token in range(tokens - 1, -1, -1):
        for first in range((channels - 1) // NUM_LANES * NUM_LANES, -1, -NUM_LANES):
            found = symbols[token, first : first + NUM_LANES].astype(np.int64)
            lanes = states[: found.size]
            tables = cumulative[kinds[token], first : first + NUM_LANES].astype(np.uint64)
            rows = np.arange(found.size)
            starts, ends = tables[rows, found], tables[rows, found + 1]
            frequencies = ends - starts
            overflows = lanes >> np.uint64(32 - TOTAL_BITS) >= frequencies
            words.append((lanes[overflows] & np.uint64(0xFFFF)).astype(np.uint16))
            lanes[overflows] >>= np.uint64(WORD_BITS)
            quotients = lanes // frequencies
            lanes[:] = (quotients << np.uint64(TOTAL_BITS)) + lanes % frequencies + starts
    return states, np.concatenate(words[::-1])


def decode(states: U64, words: U16, kinds: U8, cumulative: U16, *, is_whole: bool) -> U8:
    """The symbols of the first tokens, as many as `kinds` has. Raises `Corrupt` where the words end
    too soon, or, if these are all tokens, states and words are not used up.
    """
    channels = cumulative.shape[1]
    symbols = np.empty((len(kinds), channels), np.uint8)
    states = states.copy()
    at = 0
    for token in range(len(kinds)):
        for first in range(0, channels, NUM_LANES):
            tables = cumulative[kinds[token], first : first + NUM_LANES].astype(np.uint64)
            rows = np.arange(len(tables))
            lanes = states[: len(tables)]
            slots = lanes & np.uint64(TOTAL - 1)
            found = (tables <= slots[:, None]).sum(1) - 1
            starts, ends = tables[rows, found], tables[rows, found + 1]
            lanes[:] = (ends - starts) * (lanes >> np.uint64(TOTAL_BITS)) + slots - starts
            wants = lanes < STATE_MIN
            end = at + int(wants.sum())
            if end > len(words):
                raise Corrupt("the words of a section end before its symbols do")
            lanes[wants] = lanes[wants] << np.uint64(WORD_BITS) | words[at:end].astype(np.uint64)
            at = end
            symbols[token, first : first + NUM_LANES] = found
    if is_whole and (at != len(words) or np.any(states != STATE_MIN)):
        raise Corrupt("a section does not end where its last symbol does")
    return symbols
