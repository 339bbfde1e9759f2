"""The cheapest table of each channel of a section whose symbols stand in groups of 32 tokens.

How often each magnitude comes is counted by compares of whole groups, while magnitudes are few and
tokens many; otherwise each token adds what its symbol costs in all tables. Costs are whole numbers:
the sums are the same in any order.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from kvd.codecs.kernels.kvq import LANES
from kvd.codecs.kernels.numba_kvq_bits import (
    bits_equal,
    count_ones,
    sum_products,
    sum_rows,
)
from kvd.codecs.tables import NUM_TABLES, SUPPORT_MAX

_MAGNITUDE_MAX = SUPPORT_MAX + 1
# Tokens whose costs, below 2^17 each, fit 32 bits together.
_BATCH = 1 << 15
# In quarters of a cycle: a token's costs; those of a magnitude; a compare for it.
_ROW_TIME, _SUM_TIME, _COMPARE_TIME = 16, 40, 6


@njit(nogil=True, cache=True, error_model="numpy")
def choose_tables(symbols: Any, flags: Any, costs: Any, ids: Any, highest: Any) -> None:
    """Into `ids`, uint8 [channels], and the largest magnitudes of each class, 255 at most, into
    `highest`, int16 [classes, channels]. `symbols` int16 [channels, tokens]; `flags` uint32
    [classes, groups]: which tokens are of a class; `costs` uint32 [classes, magnitudes, tables].
    Reads 2 bytes an element, in L2.
    """
    num_classes, num_channels = highest.shape
    num_tokens = symbols.shape[1]
    column = np.empty(num_tokens, np.int16)
    masks = np.zeros((num_classes, num_tokens), np.int16)
    tokens = np.empty((num_classes, num_tokens), np.int64)
    counts = np.empty(num_classes, np.int64)
    for index in range(num_classes):
        counts[index] = _tokens_of(flags[index], tokens[index], masks[index])
    rows = np.empty(max(num_tokens, _MAGNITUDE_MAX + 1), np.uint32)
    sums, totals = np.empty(NUM_TABLES, np.uint32), np.empty(NUM_TABLES, np.uint64)
    for channel in range(num_channels):
        highest[:, channel] = np.int16(0)
        ids[channel] = 0
        if not _take_magnitudes(symbols[channel], column):
            continue
        totals[:] = np.uint64(0)
        for index in range(num_classes):
            count = counts[index]
            if not count:
                continue
            top = _highest(column, masks[index])
            highest[index, channel] = top
            compares_time = top * flags.shape[1] * _COMPARE_TIME + top * _SUM_TIME
            if compares_time < count * _ROW_TIME:
                _add_by_magnitude(column, flags[index], top, costs[index], rows, sums, totals)
            else:
                _add_by_token(column, tokens[index, :count], costs[index], rows, sums, totals)
        ids[channel] = _least(totals)


@njit(nogil=True, cache=True, error_model="numpy")
def _tokens_of(flags: Any, out: Any, masks: Any) -> int:
    """The tokens whose bits are set, and -1 in `masks`; how many."""
    count = 0
    for group in range(len(flags)):
        for lane in range(LANES):
            if flags[group] >> np.uint32(lane) & np.uint32(1):
                out[count] = group * LANES + lane
                masks[out[count]] = -1
                count += 1
    return count


@njit(nogil=True, cache=True, error_model="numpy")
def _take_magnitudes(symbols: Any, column: Any) -> Any:
    """A channel's magnitudes; whether one is not 0."""
    any_bits = np.int16(0)
    for token in range(len(column)):
        magnitude = min(abs(symbols[token]), np.int16(_MAGNITUDE_MAX))
        column[token] = magnitude
        any_bits |= magnitude
    return any_bits != 0


@njit(nogil=True, cache=True, error_model="numpy")
def _highest(column: Any, masks: Any) -> Any:
    """The largest magnitude of a class."""
    top = np.int16(0)
    for token in range(len(column)):
        top = max(top, np.int16(column[token] & masks[token]))
    return top


@njit(nogil=True, cache=True, error_model="numpy")
def _add_by_magnitude(
    column: Any, flags: Any, top: Any, costs: Any, counts: Any, sums: Any, totals: Any
) -> None:
    """Each magnitude's costs, as often as it comes."""
    for first in range(0, len(flags), _BATCH // LANES):
        end = min(first + _BATCH // LANES, len(flags))
        for magnitude in range(top + 1):
            count = np.uint32(0)
            for group in range(first, end):
                found = bits_equal(column, group * LANES, np.int16(magnitude))
                count += count_ones(found & flags[group])
            counts[magnitude] = count
        sum_products(counts, top + 1, costs, sums)
        _flush(sums, totals)


@njit(nogil=True, cache=True, error_model="numpy")
def _add_by_token(column: Any, tokens: Any, costs: Any, rows: Any, sums: Any, totals: Any) -> None:
    """The costs of each token's magnitude."""
    for first in range(0, len(tokens), _BATCH):
        count = min(_BATCH, len(tokens) - first)
        for index in range(count):
            rows[index] = column[tokens[first + index]]
        sum_rows(rows, count, costs, sums)
        _flush(sums, totals)


@njit(nogil=True, cache=True, error_model="numpy")
def _flush(sums: Any, totals: Any) -> None:
    for table in range(len(totals)):
        totals[table] += np.uint64(sums[table])


@njit(nogil=True, cache=True, error_model="numpy")
def _least(totals: Any) -> int:
    """The first of the cheapest; table 0 is for zeros alone."""
    least = totals[1]
    for table in range(2, len(totals)):
        least = min(least, totals[table])
    best = 1
    while totals[best] != least:
        best += 1
    return best
