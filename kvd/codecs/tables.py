"""The canned frequency tables of `kvq/1`: constants for ever, kept in `kvq_tables.bin`.

    id 0        every symbol is 0; nothing is coded for the channel
    1 to 31     a Gauss law, standard deviation 2^(-8/3) steps, then a third of an octave apart
    32 to 63    a law with longer tails, exp(-|x|^1.3), from 2^(-9/3)

A table gives a frequency of `TOTAL` to each symbol of -support to support, the same to both signs,
and one to the escape, behind which a symbol stands elsewhere. docs/formats/bitstream-kvq.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import numpy as np
from numpy.typing import NDArray

NUM_TABLES = 64
TOTAL_BITS = 11
TOTAL = 1 << TOTAL_BITS
SUPPORT_MAX = 254

FILE_NAME = "kvq_tables.bin"
_FAMILIES = (range(1, 32), range(32, 64))
# A class divides the step by 4 or 16: its table is two or four octaves further, in thirds.
_CLASS_SHIFTS = (0, 6, 12)
NUM_CLASSES = 4
CLASS_RAW = 3
CLASS_FACTORS = np.array([1, 4, 16, 1], np.float32)

# A slot's entry: frequency less 1, slot less the symbol's first slot, symbol.
FREQUENCY_MASK = TOTAL - 1
BIAS_SHIFT = TOTAL_BITS
SYMBOL_SHIFT = 2 * TOTAL_BITS
ESCAPE = -(1 << (31 - SYMBOL_SHIFT))
# Symbols that an encoder looks up: SYMBOL_OFFSET + symbol, both ends clipped to escapes.
NUM_SYMBOLS = 512
SYMBOL_OFFSET = NUM_SYMBOLS // 2

# Costs are in 2^-COST_BITS bits; an escape has 16 bits more.
COST_BITS = 12
ESCAPE_BITS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Tables:
    """The tables as coders want them.

    supports       int32 [tables]
    by_class       uint8 [classes, tables]: the table of a token of that class
    slots          uint32 [tables, TOTAL]: what a slot decodes to
    spans          uint32 [tables, NUM_SYMBOLS]: frequency less 1 in the high half, first slot below
    reciprocals    uint64 [tables, NUM_SYMBOLS]: ceil(2^(32 + TOTAL_BITS) / frequency)
    costs          float64 [classes, SUPPORT_MAX + 2, tables]: whole numbers; the last magnitude
                   stands for an escape
    """

    supports: NDArray[np.int32]
    by_class: NDArray[np.uint8]
    slots: NDArray[np.uint32]
    spans: NDArray[np.uint32]
    reciprocals: NDArray[np.uint64]
    costs: NDArray[np.float64]


@cache
def tables() -> Tables:
    """Read once a process."""
    content = files("kvd.codecs").joinpath(FILE_NAME).read_bytes()
    return _build(_parse(content))


@dataclass(frozen=True, slots=True)
class _Table:
    escape: int
    magnitudes: list[int]


def _parse(content: bytes) -> list[_Table]:
    """For each table: support, frequency of the escape, frequencies of 0 to support; uint16."""
    numbers = np.frombuffer(content, "<u2").tolist()
    found = []
    while numbers:
        support, escape, *rest = numbers
        found.append(_Table(escape, rest[: support + 1]))
        numbers = rest[support + 1 :]
    assert len(found) == NUM_TABLES
    return found


def _build(found: list[_Table]) -> Tables:
    by_class = _class_tables()
    slots = np.empty((NUM_TABLES, TOTAL), np.uint32)
    spans = np.empty((NUM_TABLES, NUM_SYMBOLS), np.uint32)
    for index, table in enumerate(found):
        _fill(table, slots[index], spans[index])
    frequencies = (spans >> np.uint32(16)).astype(np.uint64) + np.uint64(1)
    scale = np.uint64(1 << (32 + TOTAL_BITS))
    costs = _costs(found)
    return Tables(
        supports=np.array([len(table.magnitudes) - 1 for table in found], np.int32),
        by_class=by_class,
        slots=slots,
        spans=spans,
        reciprocals=(scale + frequencies - np.uint64(1)) // frequencies,
        costs=np.array(
            [costs[:, by_class[index]] for index in range(CLASS_RAW)], np.float64, order="C"
        ),
    )


def _class_tables() -> NDArray[np.uint8]:
    by_class = np.zeros((NUM_CLASSES, NUM_TABLES), np.uint8)
    for index, shift in enumerate(_CLASS_SHIFTS):
        for family in _FAMILIES:
            for table in family:
                by_class[index, table] = min(table + shift, family[-1])
    return by_class


def _fill(table: _Table, slots: NDArray[np.uint32], spans: NDArray[np.uint32]) -> None:
    support = len(table.magnitudes) - 1
    symbols = [*range(-support, support + 1)]
    frequencies = [table.magnitudes[abs(symbol)] for symbol in symbols]
    if table.escape:
        symbols.append(ESCAPE)
        frequencies.append(table.escape)
    assert sum(frequencies) == TOTAL
    start = 0
    # What the table does not know is an escape; table 0 is never asked for one.
    spans[:] = ((table.escape - 1) << 16 | (TOTAL - table.escape)) if table.escape else 0
    for symbol, frequency in zip(symbols, frequencies, strict=True):
        bias = np.arange(frequency, dtype=np.uint32)
        head = (symbol << SYMBOL_SHIFT) & 0xFFFFFFFF | (frequency - 1)
        slots[start : start + frequency] = np.uint32(head) | bias << np.uint32(BIAS_SHIFT)
        if symbol != ESCAPE:
            spans[SYMBOL_OFFSET + symbol] = (frequency - 1) << 16 | start
        start += frequency


def _costs(found: list[_Table]) -> NDArray[np.uint64]:
    """`[SUPPORT_MAX + 2, tables]`; table 0 costs more than any chunk."""
    bits = _log2_costs()
    costs = np.empty((SUPPORT_MAX + 2, NUM_TABLES), np.uint64)
    for index, table in enumerate(found):
        costs[:, index] = bits[table.escape] + np.uint64(ESCAPE_BITS << COST_BITS)
        for magnitude, frequency in enumerate(table.magnitudes):
            costs[magnitude, index] = bits[frequency]
    costs[:, 0] = 1 << 24
    return costs


def _log2_costs() -> NDArray[np.uint64]:
    """-log2(frequency / TOTAL) by frequency, in integers, so that every machine finds the same:
    squaring a number in [1, 2) and looking at its 2 gives the next binary digit of its logarithm.
    """
    costs = np.zeros(TOTAL + 1, np.uint64)
    for frequency in range(1, TOTAL + 1):
        whole = frequency.bit_length() - 1
        number, digits = frequency << (30 - whole), 0
        for _ in range(COST_BITS):
            number = number * number >> 30
            digits = digits << 1 | number >> 31
            number >>= number >> 31
        costs[frequency] = ((TOTAL_BITS - whole) << COST_BITS) - digits
    return costs
