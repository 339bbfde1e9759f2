"""The kernels of `kvq` in numpy: the specification, in as few words as it can be said.

float32 throughout, each product rounded before it is added, so that every implementation finds the
same bits. The coder is rANS (Duda, arXiv:1311.2540, section 3): 32 tokens are its lanes, all words
are in one stream, in the order in which a decoder asks for them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvd.codecs.kernels.kvq import (
    LANES,
    STATE_BITS,
    SYMBOL_MAX,
    Coded,
    Dither,
    Scales,
    Window,
)
from kvd.codecs.rope import rotate, unrotate
from kvd.codecs.tables import (
    BIAS_SHIFT,
    CLASS_FACTORS,
    CLASS_RAW,
    ESCAPE,
    FREQUENCY_MASK,
    NUM_TABLES,
    SUPPORT_MAX,
    SYMBOL_OFFSET,
    SYMBOL_SHIFT,
    TOTAL_BITS,
    tables,
)
from kvd.errors import Corrupt

_HALF_MAX = np.float32(65504)


def normalise(
    kv: NDArray[np.uint16], window: Window, scales: Scales, out: NDArray[np.float32]
) -> NDArray[np.bool_]:
    """`Kernels.normalise`."""
    layers, heads = _slice(window.layers), _slice(window.heads)
    bits = kv[layers, :, :, heads]
    mask = np.uint16(scales.exponent_mask)
    is_finite: NDArray[np.bool_] = ((bits & mask) != mask).all(axis=(0, 1, 3, 4))
    elements = _widened(bits, scales.is_half)
    elements[:, :, ~is_finite] = 0
    elements[:, 0] = unrotate(elements[:, 0], scales.rotation)
    means, steps = (_by_token(array, layers, heads) for array in (scales.means, scales.steps))
    with np.errstate(over="ignore", invalid="ignore"):
        numbers = (elements - means) / steps
    out[:] = numbers.transpose(2, 0, 1, 3, 4).reshape(out.shape)
    out[~is_finite] = 0
    return is_finite


def quantise(
    numbers: NDArray[np.float32], classes: NDArray[np.uint8], dither: Dither | None
) -> NDArray[np.int16]:
    """`Kernels.quantise`."""
    with np.errstate(over="ignore"):
        scaled = numbers * CLASS_FACTORS[classes][:, None]
    if dither is not None:
        scaled += offsets(dither, *numbers.shape)
    rounded: NDArray[np.float32] = np.rint(scaled)
    classes[~(np.abs(rounded) <= SYMBOL_MAX).all(axis=1)] = CLASS_RAW
    rounded[classes == CLASS_RAW] = 0
    return rounded.astype(np.int16)


def offsets(dither: Dither, num_tokens: int, num_channels: int) -> NDArray[np.float32]:
    """`float32 [tokens, channels]`: the dither of a section."""
    row_size = num_channels // len(dither.rows)
    channels = (dither.rows[:, None] + np.arange(row_size, dtype=np.uint32)).reshape(-1)
    positions = (dither.start + np.arange(num_tokens)).astype(np.uint32)
    seeds = _mixed(np.multiply(positions, np.uint32(0x9E3779B1), dtype=np.uint32))
    marks = np.multiply(channels, np.uint32(0x85EBCA77), dtype=np.uint32)
    hashes = _mixed(np.add(seeds[:, None], marks[None, :], dtype=np.uint32))
    return (hashes >> np.uint32(8)).astype(np.float32) * np.float32(2**-24) - np.float32(0.5)


def _mixed(numbers: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """A permutation of 32 bits in which each input bit changes half of the output."""
    numbers = (numbers ^ (numbers >> np.uint32(16))) * np.uint32(0x7FEB352D)
    numbers = (numbers ^ (numbers >> np.uint32(15))) * np.uint32(0x846CA68B)
    return numbers ^ (numbers >> np.uint32(16))


def choose_tables(symbols: NDArray[np.int16], classes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """`Kernels.choose_tables`."""
    magnitudes = np.minimum(np.abs(symbols.astype(np.int32)), SUPPORT_MAX + 1)
    num_channels = symbols.shape[1]
    costs = np.zeros((num_channels, NUM_TABLES), np.float64)
    for index in range(CLASS_RAW):
        for row in magnitudes[classes == index]:
            costs += tables().costs[index][row]
    ids: NDArray[np.uint8] = costs.argmin(axis=1).astype(np.uint8)
    ids[~symbols.any(axis=0)] = 0
    return ids


def encode(symbols: NDArray[np.int16], classes: NDArray[np.uint8], ids: NDArray[np.uint8]) -> Coded:
    """`Kernels.encode`."""
    by_token = tables().by_class[classes]
    num_tokens = len(symbols)
    states = np.full(min(LANES, num_tokens), 1 << STATE_BITS, np.uint64)
    words: list[NDArray[np.uint64]] = []
    for first in reversed(range(0, num_tokens, LANES)):
        lanes = slice(first, min(first + LANES, num_tokens))
        active = states[: lanes.stop - lanes.start]
        for channel in reversed(np.flatnonzero(ids)):
            spans = tables().spans[
                by_token[lanes, ids[channel]], _looked_up(symbols[lanes, channel])
            ]
            frequencies = (spans >> np.uint32(16)).astype(np.uint64) + np.uint64(1)
            starts = (spans & np.uint32(0xFFFF)).astype(np.uint64)
            is_full = active >= frequencies << np.uint64(32 - TOTAL_BITS)
            words.append((active[is_full] & np.uint64(0xFFFF))[::-1])
            active[is_full] >>= np.uint64(16)
            quotients, remainders = np.divmod(active, frequencies)
            active[:] = (quotients << np.uint64(TOTAL_BITS)) + remainders + starts
    stream = np.concatenate(words)[::-1] if words else np.empty(0, np.uint64)
    supports = tables().supports[by_token[:, ids]]
    is_escaped = np.abs(symbols.astype(np.int32)) > supports
    return Coded(
        states=states.astype(np.uint32),
        words=stream.astype(np.uint16),
        escapes=symbols[is_escaped],
    )


def _looked_up(symbols: NDArray[np.int16]) -> NDArray[np.int64]:
    return np.clip(symbols, -SYMBOL_OFFSET, SYMBOL_OFFSET - 1).astype(np.int64) + SYMBOL_OFFSET


def decode(
    coded: Coded, classes: NDArray[np.uint8], ids: NDArray[np.uint8], num_tokens: int
) -> NDArray[np.int16]:
    """`Kernels.decode`."""
    by_token = tables().by_class[classes]
    symbols = np.zeros((num_tokens, len(ids)), np.int16)
    is_escaped = np.zeros(symbols.shape, np.bool_)
    states = coded.states.astype(np.uint64)
    next_word = 0
    for first in range(0, num_tokens, LANES):
        # A group is decoded whole, whatever part of it is wanted.
        lanes = slice(first, min(first + LANES, len(classes)))
        wanted = min(num_tokens, lanes.stop) - first
        active = states[: lanes.stop - lanes.start]
        for channel in np.flatnonzero(ids):
            slots = active & np.uint64((1 << TOTAL_BITS) - 1)
            entries = tables().slots[by_token[lanes, ids[channel]], slots.astype(np.int64)]
            found = (entries.view(np.int32) >> np.int32(SYMBOL_SHIFT)).astype(np.int16)
            symbols[first : first + wanted, channel] = found[:wanted]
            is_escaped[first : first + wanted, channel] = found[:wanted] == ESCAPE
            frequencies = (entries & np.uint32(FREQUENCY_MASK)).astype(np.uint64) + np.uint64(1)
            biases = (entries >> np.uint32(BIAS_SHIFT)) & np.uint32(FREQUENCY_MASK)
            active[:] = frequencies * (active >> np.uint64(TOTAL_BITS)) + biases
            is_low = active < np.uint64(1 << STATE_BITS)
            taken = coded.words[next_word : next_word + int(is_low.sum())]
            if len(taken) < is_low.sum():
                raise Corrupt("a stream of symbols ends too early")
            active[is_low] = active[is_low] << np.uint64(16) | taken
            next_word += len(taken)
    num_escapes = int(is_escaped.sum())
    if num_escapes > len(coded.escapes):
        raise Corrupt("there are more escaped symbols than escapes")
    symbols[is_escaped] = coded.escapes[:num_escapes]
    is_whole = num_tokens == len(classes)
    if is_whole and (next_word != len(coded.words) or num_escapes != len(coded.escapes)):
        raise Corrupt("a stream of symbols is longer than its tokens")
    if is_whole and (states != np.uint64(1 << STATE_BITS)).any():
        raise Corrupt("a stream of symbols does not end where it should")
    return symbols


def dequantise(
    symbols: NDArray[np.int16], classes: NDArray[np.uint8], dither: Dither | None
) -> NDArray[np.float32]:
    """`Kernels.dequantise`."""
    numbers = symbols.astype(np.float32)
    if dither is not None:
        numbers -= offsets(dither, *symbols.shape)
    numbers /= CLASS_FACTORS[classes[: len(symbols)]][:, None]
    numbers[classes[: len(symbols)] == CLASS_RAW] = 0
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
    shape = (len(section.layers), kv.shape[1], len(section.heads), kv.shape[4])
    inside = (
        slice(part.layers.start - section.layers.start, part.layers.stop - section.layers.start),
        slice(None),
        slice(part.heads.start - section.heads.start, part.heads.stop - section.heads.start),
    )
    layers, heads = _slice(part.layers), _slice(part.heads)
    num_tokens = len(numbers)
    elements = numbers.reshape(num_tokens, *shape)[(slice(None), *inside)].transpose(1, 2, 0, 3, 4)
    elements = elements * _by_token(scales.steps, layers, heads)
    elements = elements + _by_token(scales.means, layers, heads)
    elements[:, 0] = rotate(elements[:, 0], scales.rotation.first(num_tokens))
    target = kv[layers, :, :num_tokens, heads]
    target[:] = _narrowed(elements, scales.is_half)
    for token, values in raws.items():
        target[:, :, token] = values.reshape(shape)[inside]


def _by_token(array: NDArray[np.float32], layers: slice, heads: slice) -> NDArray[np.float32]:
    return array[layers, :, None, heads]


def _slice(indices: range) -> slice:
    return slice(indices.start, indices.stop)


def _widened(bits: NDArray[np.uint16], is_half: bool) -> NDArray[np.float32]:
    if is_half:
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _narrowed(elements: NDArray[np.float32], is_half: bool) -> NDArray[np.uint16]:
    """To the nearest element, ties to even. What is too large for float16 becomes its largest: an
    infinity would spread.
    """
    if is_half:
        return np.clip(elements, -_HALF_MAX, _HALF_MAX).astype(np.float16).view(np.uint16)
    bits = np.ascontiguousarray(elements).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
