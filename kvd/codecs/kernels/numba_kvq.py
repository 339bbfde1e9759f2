"""The kernels of `kvq` in Numba: the bits of reference.py, one core at a time, without the GIL.

Here arrays are made and checked; numba_kvq_numbers.py and numba_kvq_coder.py loop over them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvd.codecs.kernels import numba_kvq_coder as coder
from kvd.codecs.kernels import numba_kvq_numbers as loops
from kvd.codecs.kernels.kvq import (
    LANES,
    STATE_BITS,
    Coded,
    Dither,
    Scales,
    Window,
)
from kvd.codecs.tables import CLASS_FACTORS, tables
from kvd.errors import Corrupt

_NO_ROWS = np.empty(0, np.uint32)

_PROBLEMS = {
    coder.TOO_SHORT: "a stream of symbols ends too early",
    coder.TOO_MANY_ESCAPES: "there are more escaped symbols than escapes",
    coder.TOO_LONG: "a stream of symbols is longer than its tokens",
    coder.BAD_END: "a stream of symbols does not end where it should",
}


def normalise(
    kv: NDArray[np.uint16], window: Window, scales: Scales, out: NDArray[np.float32]
) -> NDArray[np.bool_]:
    """`Kernels.normalise`."""
    is_finite = np.empty(kv.shape[2], np.bool_)
    loops.normalise(
        kv,
        (window.layers.start, window.layers.stop),
        (window.heads.start, window.heads.stop),
        scales.means,
        scales.steps,
        *_turns(scales),
        (scales.is_half, scales.exponent_mask),
        out,
        is_finite,
    )
    return is_finite


def quantise(
    numbers: NDArray[np.float32], classes: NDArray[np.uint8], dither: Dither | None
) -> NDArray[np.int16]:
    """`Kernels.quantise`."""
    symbols = np.empty(numbers.shape, np.int16)
    rows, start = _dithered(dither)
    loops.quantise(numbers, classes, CLASS_FACTORS, rows, start, symbols)
    return symbols


def choose_tables(symbols: NDArray[np.int16], classes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """`Kernels.choose_tables`."""
    ids = np.empty(symbols.shape[1], np.uint8)
    coder.choose_tables(symbols, classes, tables().costs, ids)
    return ids


def encode(symbols: NDArray[np.int16], classes: NDArray[np.uint8], ids: NDArray[np.uint8]) -> Coded:
    """`Kernels.encode`."""
    num_tokens = len(symbols)
    states = np.full(min(LANES, num_tokens), 1 << STATE_BITS, np.uint64)
    # A word a symbol at most, and one that is written in vain.
    words = np.empty(symbols.size + 1, np.uint16)
    escapes = np.empty(symbols.size, np.int16)
    found = tables()
    begin = coder.encode(
        symbols, classes, ids, found.by_class, found.spans, found.reciprocals, states, words
    )
    num_escapes = coder.escapes(symbols, classes, ids, found.by_class, found.supports, escapes)
    return Coded(
        states=states.astype(np.uint32), words=words[int(begin) :], escapes=escapes[:num_escapes]
    )


def decode(
    coded: Coded, classes: NDArray[np.uint8], ids: NDArray[np.uint8], num_tokens: int
) -> NDArray[np.int16]:
    """`Kernels.decode`."""
    num_decoded = min(-(-num_tokens // LANES) * LANES, len(classes))
    symbols = np.zeros((num_decoded, len(ids)), np.int16)
    # A step may look at as many words behind the end as there are lanes.
    words = np.zeros(len(coded.words) + LANES, np.uint16)
    words[: len(coded.words)] = coded.words
    states = coded.states.astype(np.uint64)
    answer = coder.decode(
        words,
        coded.escapes,
        states,
        classes,
        ids,
        tables().by_class,
        tables().slots.reshape(-1),
        num_tokens,
        symbols,
    )
    if answer != coder.WHOLE:
        raise Corrupt(_PROBLEMS[answer])
    return symbols[:num_tokens]


def dequantise(
    symbols: NDArray[np.int16], classes: NDArray[np.uint8], dither: Dither | None
) -> NDArray[np.float32]:
    """`Kernels.dequantise`."""
    numbers = np.empty(symbols.shape, np.float32)
    rows, start = _dithered(dither)
    loops.dequantise(symbols, classes, CLASS_FACTORS, rows, start, numbers)
    return numbers


def restore(
    numbers: NDArray[np.float32],
    section: Window,
    part: Window,
    scales: Scales,
    raws: dict[int, NDArray[np.uint16]],
    kv: NDArray[np.uint16],
) -> None:
    """`Kernels.restore`."""
    loops.restore(
        numbers,
        (section.layers.start, len(section.heads), section.heads.start),
        (part.layers.start, part.layers.stop),
        (part.heads.start, part.heads.stop),
        scales.means,
        scales.steps,
        *_turns(scales),
        scales.is_half,
        kv,
    )
    if raws:
        _copy_raws(raws, section, part, kv)


def _copy_raws(
    raws: dict[int, NDArray[np.uint16]], section: Window, part: Window, kv: NDArray[np.uint16]
) -> None:
    layers, heads = part.layers, part.heads
    shape = (len(section.layers), kv.shape[1], len(section.heads), kv.shape[4])
    skipped = section.layers.start, section.heads.start
    for token, values in raws.items():
        kv[layers.start : layers.stop, :, token, heads.start : heads.stop] = values.reshape(shape)[
            layers.start - skipped[0] : layers.stop - skipped[0],
            :,
            heads.start - skipped[1] : heads.stop - skipped[1],
        ]


def _turns(scales: Scales) -> tuple[Any, Any, tuple[int, int, int]]:
    by = scales.rotation
    return by.cos, by.sin, (by.offset, by.stride, by.reach)


def _dithered(dither: Dither | None) -> tuple[NDArray[np.uint32], np.uint32]:
    if dither is None:
        return _NO_ROWS, np.uint32(0)
    return dither.rows, np.uint32(dither.start & 0xFFFFFFFF)
