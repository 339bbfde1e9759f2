"""Which tokens get finer steps, for all layers in a call: attention_score.py, to the same bits.

A sum's order is numpy's: by pairs of halves down to 128 numbers, these in eight sums side by side.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from kvd.codecs.kernels.kvq import LANES
from kvd.codecs.kernels.numba_kvq_rows import read_row, tiles_of, turn_columns

_BLOCK, _SUMS = 128, 8


@njit(nogil=True, cache=True, error_model="numpy")
def token_classes(
    kv: Any,
    is_half: bool,
    mask: int,
    cos: Any,
    sin: Any,
    turns: Any,
    scores: Any,
    highest: int,
    classes: Any,
) -> None:
    """Into `classes`, uint8 [layers, tokens, heads], up to `highest`, by `scores`, float32 [layers,
    heads, head_dim + 1]. A token with a key in the layer that is not finite has keys of 0. Reads
    the keys, 2 bytes an element.
    """
    num_layers, _, num_tokens, num_heads, dim = kv.shape
    width, num_tiles = tiles_of(num_tokens)
    elements = np.empty((dim, width), np.float32)
    sums = np.empty((num_heads, width), np.float32)
    bad = np.empty(width * num_tiles // LANES, np.uint32)
    for layer in range(num_layers):
        bad[:] = np.uint32(0)
        for first in range(0, num_tokens, width):
            for head in range(num_heads):
                read_row(kv, layer, 0, head, first, is_half, mask, elements, bad)
                turn_columns(elements, cos, sin, turns, first)
                _weigh(elements, scores[layer, head])
                _add(elements, sums[head])
            for head in range(num_heads):
                bias = scores[layer, head, dim]
                for token in range(first, min(first + width, num_tokens)):
                    is_bad = bad[token // LANES] >> np.uint32(token % LANES) & np.uint32(1)
                    total = np.float32(0) if is_bad else sums[head, token - first]
                    classes[layer, token, head] = _class_of(total + bias, highest)


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _class_of(score: Any, highest: int) -> Any:
    # What is no number is of class 0.
    rounded = np.rint(score)
    if rounded >= np.float32(highest):
        return np.uint8(highest)
    return np.uint8(rounded) if rounded > np.float32(0) else np.uint8(0)


@njit(nogil=True, cache=True, error_model="numpy")
def _weigh(elements: Any, weights: Any) -> None:
    for index in range(len(elements)):
        weight, row = weights[index], elements[index]
        for token in range(len(row)):
            row[token] *= weight


@njit(nogil=True, cache=True, error_model="numpy")
def _add(rows: Any, out: Any) -> None:
    """The sum of all rows; they are overwritten."""
    count = len(rows)
    if count > _BLOCK:
        half = count // 2 // _SUMS * _SUMS
        other = np.empty_like(out)
        _add(rows[:half], out)
        _add(rows[half:], other)
        _add_row(out, other)
        return
    whole = count // _SUMS * _SUMS
    for index in range(_SUMS, whole):
        _add_row(rows[index % _SUMS], rows[index])
    step = 1
    while step < _SUMS and whole:
        for index in range(0, _SUMS, 2 * step):
            _add_row(rows[index], rows[index + step])
        step *= 2
    for index in range(max(whole, 1), count):
        _add_row(rows[0], rows[index])
    out[:] = rows[0]


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _add_row(sums: Any, row: Any) -> None:
    for token in range(len(sums)):
        sums[token] += row[token]
