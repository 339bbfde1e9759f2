"""Elements to symbols and back: the numeric loops of `kvq` in Numba.

A row is the `head_dim` elements of a token, a head and a plane; the loops along it are vectorised,
which is why an index that is not a loop's own is unsigned: a signed one may count from the end.
Division is numpy's: Python's would look for 0. No fastmath: it would fuse products with sums, and
the bits would be others than those of reference.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from kvd.codecs.kernels.kvq import SYMBOL_MAX
from kvd.codecs.tables import CLASS_RAW


@njit(nogil=True, cache=True, error_model="numpy")
def normalise(
    kv: Any,
    layers: Any,
    heads: Any,
    means: Any,
    steps: Any,
    cos: Any,
    sin: Any,
    pairs: Any,
    kind: Any,
    out: Any,
    is_finite: Any,
) -> None:
    """Reads 2 bytes an element, writes 4, in L2: memory's speed."""
    _, num_planes, num_tokens, _, dim = kv.shape
    is_half, mask = kind[0], np.uint16(kind[1])
    bits = np.empty(dim, np.uint32)
    elements = bits.view(np.float32)
    is_finite[:] = True
    channel = np.uint64(0)
    for layer in range(layers[0], layers[1]):
        for plane in range(num_planes):
            for head in range(heads[0], heads[1]):
                for token in range(num_tokens):
                    num_bad = np.uint16(0)
                    for index in range(dim):
                        element = kv[layer, plane, token, head, index]
                        num_bad |= np.uint16((element & mask) == mask)
                        bits[index] = element
                    if num_bad:
                        is_finite[token] = False
                    widen(is_half, bits, elements)
                    if plane == 0:
                        _turn(elements, cos, sin, token, pairs, np.float32(-1))
                    for index in range(dim):
                        centred = elements[index] - means[layer, plane, head, index]
                        out[token, channel + np.uint64(index)] = (
                            centred / steps[layer, plane, head, index]
                        )
                channel += np.uint64(dim)
    for token in range(num_tokens):
        if not is_finite[token]:
            for index in range(out.shape[1]):
                out[token, index] = np.float32(0)


@njit(nogil=True, cache=True, error_model="numpy")
def restore(
    numbers: Any,
    section: Any,
    layers: Any,
    heads: Any,
    means: Any,
    steps: Any,
    cos: Any,
    sin: Any,
    pairs: Any,
    is_half: bool,
    kv: Any,
) -> None:
    """Reads 4 bytes an element, in L2, writes 2: memory's speed."""
    _, num_planes, _, _, dim = kv.shape
    first_layer, num_heads, first_head = section
    bits = np.empty(dim, np.uint32)
    elements = bits.view(np.float32)
    for layer in range(layers[0], layers[1]):
        for plane in range(num_planes):
            for head in range(heads[0], heads[1]):
                row = ((layer - first_layer) * num_planes + plane) * num_heads + head - first_head
                channel = np.uint64(row * dim)
                for token in range(len(numbers)):
                    for index in range(dim):
                        number = numbers[token, channel + np.uint64(index)]
                        scaled = number * steps[layer, plane, head, index]
                        elements[index] = scaled + means[layer, plane, head, index]
                    if plane == 0:
                        _turn(elements, cos, sin, token, pairs, np.float32(1))
                    narrow(is_half, bits, elements)
                    for index in range(dim):
                        kv[layer, plane, token, head, index] = np.uint16(bits[index])


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _turn(elements: Any, cos: Any, sin: Any, token: int, pairs: Any, direction: Any) -> None:
    offset, stride, reach = np.uint64(pairs[0]), np.uint64(pairs[1]), np.uint64(pairs[2])
    # The same twice: where the stride is known the loop is vectorised.
    if stride == 1:
        for pair in range(cos.shape[1]):
            at = offset + np.uint64(pair)
            x, y, sine = elements[at], elements[at + reach], sin[token, pair] * direction
            elements[at] = x * cos[token, pair] - y * sine
            elements[at + reach] = y * cos[token, pair] + x * sine
        return
    for pair in range(cos.shape[1]):
        at = offset + np.uint64(pair) * stride
        x, y, sine = elements[at], elements[at + reach], sin[token, pair] * direction
        elements[at] = x * cos[token, pair] - y * sine
        elements[at + reach] = y * cos[token, pair] + x * sine


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def widen(is_half: bool, bits: Any, elements: Any) -> None:
    """Elements of 16 bits become float32, in place."""
    if not is_half:
        for index in range(len(bits)):
            bits[index] = bits[index] << np.uint32(16)
        return
    for index in range(len(bits)):
        sign = (bits[index] & np.uint32(0x8000)) << np.uint32(16)
        # The exponent at its new place; the product sets its bias, and is exact.
        bits[index] = sign | (bits[index] & np.uint32(0x7FFF)) << np.uint32(13)
        elements[index] *= np.float32(2.0**112)


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def narrow(is_half: bool, bits: Any, elements: Any) -> None:
    """float32 become elements of 16 bits, in place; ties to even."""
    if not is_half:
        for index in range(len(bits)):
            odd = (bits[index] >> np.uint32(16)) & np.uint32(1)
            rounded = np.uint32(np.uint32(bits[index] + np.uint32(0x7FFF)) + odd)
            bits[index] = rounded >> np.uint32(16)
        return
    for index in range(len(bits)):
        sign = (bits[index] >> np.uint32(16)) & np.uint32(0x8000)
        bits[index] &= np.uint32(0x7FFFFFFF)
        magnitude = min(elements[index], np.float32(65504))
        elements[index] = magnitude
        number = bits[index]
        odd = (number >> np.uint32(13)) & np.uint32(1)
        normal = np.uint32(np.uint32(number - np.uint32(0x37FFF001)) + odd) >> np.uint32(13)
        # Below 2^-14 the sum with a half leaves multiples of 2^-24, rounded.
        elements[index] = magnitude + np.float32(0.5)
        small = np.uint32(bits[index] - np.uint32(0x3F000000))
        bits[index] = sign | (small if magnitude < np.float32(2.0**-14) else normal)


@njit(nogil=True, cache=True, error_model="numpy")
def quantise(numbers: Any, classes: Any, factors: Any, rows: Any, start: Any, symbols: Any) -> None:
    """Reads 4 bytes an element, writes 2, in L2."""
    num_tokens, num_channels = numbers.shape
    dithers = np.zeros(num_channels, np.float32)
    for token in range(num_tokens):
        source, target = numbers[token], symbols[token]
        factor = factors[classes[token]]
        if len(rows):
            _dither_token(rows, np.uint32(start + np.uint32(token)), dithers)
        num_bad = 0
        for channel in range(num_channels):
            rounded = np.rint(source[channel] * factor + dithers[channel])
            is_good = abs(rounded) <= np.float32(SYMBOL_MAX)
            num_bad += not is_good
            target[channel] = np.int16(rounded if is_good else np.float32(0))
        if num_bad:
            classes[token] = CLASS_RAW
        if classes[token] == CLASS_RAW:
            target[:] = np.int16(0)


@njit(nogil=True, cache=True, error_model="numpy")
def dequantise(
    symbols: Any, classes: Any, factors: Any, rows: Any, start: Any, numbers: Any
) -> None:
    """Reads 2 bytes an element, writes 4, in L2."""
    num_tokens, num_channels = symbols.shape
    dithers = np.zeros(num_channels, np.float32)
    for token in range(num_tokens):
        source, target = symbols[token], numbers[token]
        if classes[token] == CLASS_RAW:
            target[:] = np.float32(0)
            continue
        # A power of two: the product is the quotient.
        factor = np.float32(1) / factors[classes[token]]
        if len(rows):
            _dither_token(rows, np.uint32(start + np.uint32(token)), dithers)
        for channel in range(num_channels):
            target[channel] = (np.float32(source[channel]) - dithers[channel]) * factor


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _dither_token(rows: Any, position: Any, out: Any) -> None:
    seed = mixed(np.uint32(position * np.uint32(0x9E3779B1)))
    size = len(out) // len(rows)
    for index in range(len(rows)):
        _fill_offsets(rows[index], seed, out[index * size : (index + 1) * size])


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _fill_offsets(row: Any, seed: Any, out: Any) -> None:
    """The dither of a token's channels from `row` on."""
    for index in range(len(out)):
        channel = np.uint32(row + np.uint32(index))
        hashed = mixed(np.uint32(seed + np.uint32(channel * np.uint32(0x85EBCA77))))
        fraction = np.float32(np.int32(hashed >> np.uint32(8))) * np.float32(2.0**-24)
        out[index] = fraction - np.float32(0.5)


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def mixed(number: Any) -> Any:
    """A permutation of 32 bits, as reference.py has it."""
    number = np.uint32(np.uint32(number ^ (number >> np.uint32(16))) * np.uint32(0x7FEB352D))
    number = np.uint32(np.uint32(number ^ (number >> np.uint32(15))) * np.uint32(0x846CA68B))
    return np.uint32(number ^ (number >> np.uint32(16)))
