"""Whole sections of `kvq` from elements, many in a call: normalise, quantise, choose, code, pack.

Elements are turned once, so that a channel's tokens lie side by side: every loop is along tokens.
Words come last, from the last group of 32 tokens to the first. What is written is said in
kvq_section.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from kvd.codecs.kernels.kvq import LANES, STATE_BITS, SYMBOL_MAX
from kvd.codecs.kernels.numba_kvq_choice import choose_tables
from kvd.codecs.kernels.numba_kvq_coder import encode_group_by_lane
from kvd.codecs.kernels.numba_kvq_lanes import IS_WIDE, encode_group
from kvd.codecs.kernels.numba_kvq_numbers import mixed
from kvd.codecs.kernels.numba_kvq_pack import collect_escapes, write_section
from kvd.codecs.kernels.numba_kvq_rows import read_row, tiles_of, turn_columns
from kvd.codecs.tables import CLASS_RAW, NUM_CLASSES


class Books(NamedTuple):
    """What is known of tables. `spans` and `by_class` are flat; `costs` uint32 [classes,
    magnitudes, tables].
    """

    spans: Any
    by_class: Any
    supports: Any
    costs: Any


class Task(NamedTuple):
    """What all sections of a chunk share. `exponent`: the mask of what is not finite; `factors`
    float32 [classes]; `cos` and `sin`, negative, float32 [pairs, tokens], tokens rounded up to
    tiles; `turns` are offset, stride and reach of a rotation.
    """

    start: Any
    is_dithered: bool
    is_half: bool
    exponent: int
    factors: Any
    means: Any
    steps: Any
    cos: Any
    sin: Any
    turns: Any
    books: Any


class Room(NamedTuple):
    """One section at a time, its tokens rounded up to tiles, its groups not. `symbols` int16
    [channels, tokens]; `words` uint16, LANES more than symbols; `elements` float32 [dim, a tile];
    `factors` float32 and `seeds` uint32 [tokens]; `bad` uint32 [tokens], and `holes`, bits of
    groups: what does not fit, and what is not finite; `flags` uint32 [classes, groups]; `highest`
    int16 [classes, channels]; `ends` int64 [tokens].
    """

    classes: Any
    ids: Any
    symbols: Any
    words: Any
    states: Any
    lanes: Any
    elements: Any
    factors: Any
    seeds: Any
    bad: Any
    holes: Any
    flags: Any
    highest: Any
    escapes: Any
    ends: Any


@njit(nogil=True, cache=True, error_model="numpy")
def make_room(num_tokens: int, num_channels: int, dim: int) -> Any:
    """For a section of so many tokens and channels, `dim` in a row."""
    width, num_tiles = tiles_of(num_tokens)
    count, num_groups = width * num_tiles, -(-num_tokens // LANES)
    return Room(
        np.empty(num_tokens, np.uint8),
        np.empty(num_channels, np.uint8),
        np.empty((num_channels, count), np.int16),
        np.empty(num_channels * count + LANES, np.uint16),
        np.empty(LANES, np.uint32),
        np.empty(LANES, np.uint32),
        np.empty((dim, width), np.float32),
        np.empty(count, np.float32),
        np.empty(count, np.uint32),
        np.empty(count, np.uint32),
        np.empty(count // LANES, np.uint32),
        np.empty((NUM_CLASSES - 1, num_groups), np.uint32),
        np.empty((NUM_CLASSES - 1, num_channels), np.int16),
        np.empty(num_channels * count, np.int16),
        np.empty(num_tokens, np.int64),
    )


@njit(nogil=True, cache=True, error_model="numpy")
def encode_sections(
    kv: Any, places: Any, task: Any, wanted: Any, align: int, out: Any, sizes: Any
) -> None:
    """Sections without a transform into `out`, each from a multiple of `align` on, and their sizes.
    `places` int64 [sections, 4]: the ends of layers and heads; `wanted` uint8 [layers, tokens,
    heads], classes. Reads 2 bytes an element, writes what is coded: the coder's speed.
    """
    # Without a transform a section is one head of one layer.
    _, num_planes, num_tokens, _, dim = kv.shape
    at, room = 0, make_room(num_tokens, num_planes * dim, dim)
    for index in range(len(places)):
        place = places[index]
        _begin(place, task, wanted, room)
        for tile in range(room.symbols.shape[1] // room.elements.shape[1]):
            _quantise_tile(kv, tile, place, task, room)
        sizes[index] = _finish(kv, place, task, room, out[at:])
        at += -(-sizes[index] // align) * align


@njit(nogil=True, cache=True, error_model="numpy")
def read_numbers(kv: Any, place: Any, task: Any, wanted: Any, numbers: Any, room: Any) -> None:
    """The numbers of one section, float32 [channels, tokens], tokens rounded up to tiles."""
    num_planes, dim, width = kv.shape[1], kv.shape[4], room.elements.shape[1]
    _begin(place, task, wanted, room)
    for first in range(0, numbers.shape[1], width):
        channel = 0
        for layer in range(place[0], place[1]):
            for plane in range(num_planes):
                for head in range(place[2], place[3]):
                    _read(kv, layer, plane, head, first, task, room)
                    mean, step = task.means[layer, plane, head], task.steps[layer, plane, head]
                    for index in range(dim):
                        target = numbers[channel, first : first + width]
                        _normalise(room.elements[index], mean[index], step[index], target)
                        channel += 1


@njit(nogil=True, cache=True, error_model="numpy")
def encode_numbers(kv: Any, place: Any, task: Any, numbers: Any, room: Any, out: Any) -> Any:
    """What `read_numbers` gave, behind a transform, into `out`; the section's size."""
    _, num_planes, _, num_heads, dim = kv.shape
    channel = 0
    for layer in range(place[0], place[1]):
        for plane in range(num_planes):
            for head in range(place[2], place[3]):
                row = ((layer * num_planes + plane) * num_heads + head) * dim
                for index in range(dim):
                    _quantise(numbers[channel], 0, row + index, task, room, room.symbols[channel])
                    channel += 1
    return _finish(kv, place, task, room, out)


@njit(nogil=True, cache=True, error_model="numpy")
def _begin(place: Any, task: Any, wanted: Any, room: Any) -> None:
    """The finest class of each token that a layer or head of the section wants."""
    classes = room.classes
    classes[:] = np.uint8(0)
    for layer in range(place[0], place[1]):
        for token in range(len(classes)):
            for head in range(place[2], place[3]):
                classes[token] = max(classes[token], wanted[layer, token, head])
    room.factors[:] = np.float32(0)
    for token in range(len(classes)):
        room.factors[token] = task.factors[classes[token]]
    if task.is_dithered:
        for token in range(len(room.seeds)):
            position = np.uint32(task.start + np.uint32(token))
            room.seeds[token] = mixed(np.uint32(position * np.uint32(0x9E3779B1)))
    room.bad[:] = np.uint32(0)
    room.holes[:] = np.uint32(0)


@njit(nogil=True, cache=True, error_model="numpy")
def _read(kv: Any, layer: int, plane: int, head: int, first: int, task: Any, room: Any) -> None:
    """A tile of a row, un-rotated, into `room.elements`."""
    mask = task.exponent
    read_row(kv, layer, plane, head, first, task.is_half, mask, room.elements, room.holes)
    if plane == 0:
        turn_columns(room.elements, task.cos, task.sin, task.turns, first)


@njit(nogil=True, cache=True, error_model="numpy")
def _quantise_tile(kv: Any, tile: int, place: Any, task: Any, room: Any) -> None:
    """Elements of a tile to symbols."""
    num_planes, num_heads, dim = kv.shape[1], kv.shape[3], kv.shape[4]
    width = room.elements.shape[1]
    first, channel = tile * width, 0
    for layer in range(place[0], place[1]):
        for plane in range(num_planes):
            for head in range(place[2], place[3]):
                _read(kv, layer, plane, head, first, task, room)
                mean, step = task.means[layer, plane, head], task.steps[layer, plane, head]
                row = ((layer * num_planes + plane) * num_heads + head) * dim
                for index in range(dim):
                    numbers = room.elements[index]
                    _normalise(numbers, mean[index], step[index], numbers)
                    target = room.symbols[channel, first : first + width]
                    _quantise(numbers, first, row + index, task, room, target)
                    channel += 1


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _normalise(elements: Any, mean: Any, step: Any, out: Any) -> None:
    for token in range(len(elements)):
        out[token] = (elements[token] - mean) / step


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _quantise(numbers: Any, first: int, index: int, task: Any, room: Any, symbols: Any) -> None:
    """Numbers of a channel to symbols; what does not fit is noted in `room.bad`."""
    end = first + len(numbers)
    factors, bad = room.factors[first:end], room.bad[first:end]
    if not task.is_dithered:
        for token in range(len(numbers)):
            rounded = np.rint(numbers[token] * factors[token])
            is_good = abs(rounded) <= np.float32(SYMBOL_MAX)
            bad[token] |= np.uint32(not is_good)
            symbols[token] = np.int16(rounded if is_good else np.float32(0))
        return
    seeds, mark = room.seeds[first:end], np.uint32(np.uint32(index) * np.uint32(0x85EBCA77))
    for token in range(len(numbers)):
        hashed = mixed(np.uint32(seeds[token] + mark))
        fraction = np.float32(np.int32(hashed >> np.uint32(8))) * np.float32(2.0**-24)
        offset = fraction - np.float32(0.5)
        rounded = np.rint(numbers[token] * factors[token] + offset)
        is_good = abs(rounded) <= np.float32(SYMBOL_MAX)
        bad[token] |= np.uint32(not is_good)
        symbols[token] = np.int16(rounded if is_good else np.float32(0))


@njit(nogil=True, cache=True, error_model="numpy")
def _finish(kv: Any, place: Any, task: Any, room: Any, out: Any) -> Any:
    """Symbols and classes to bytes; how many."""
    settle_classes(room)
    choose_tables(room.symbols, room.flags, task.books.costs, room.ids, room.highest)
    begin = encode_symbols(task.books, room)
    num_escapes = collect_escapes(task.books, room)
    return write_section(kv, place, begin, num_escapes, room, out)


@njit(nogil=True, cache=True, error_model="numpy")
def settle_classes(room: Any) -> None:
    """What does not fit is raw; which tokens are of which class. Those that are raw, or none, get
    zeros.
    """
    classes, room.flags[:] = room.classes, np.uint32(0)
    keep = np.zeros(room.symbols.shape[1], np.int16)
    num_kept = 0
    for token in range(len(classes)):
        group, bit = token // LANES, np.uint32(1) << np.uint32(token % LANES)
        if room.bad[token] or room.holes[group] & bit:
            classes[token] = CLASS_RAW
        if classes[token] != CLASS_RAW:
            room.flags[classes[token], group] |= bit
            keep[token] = -1
            num_kept += 1
    if num_kept < len(keep):
        for channel in range(len(room.symbols)):
            row = room.symbols[channel]
            for token in range(len(row)):
                row[token] &= keep[token]


@njit(nogil=True, cache=True, error_model="numpy")
def encode_symbols(books: Any, room: Any) -> Any:
    """Words from the end of `room.words`, and states; where the words begin."""
    num_tokens, stride = len(room.classes), room.symbols.shape[1]
    flat = room.symbols.reshape(-1)
    room.states[:] = np.uint32(1 << STATE_BITS)
    at = np.uint64(len(room.words))
    for group in range(room.flags.shape[1] - 1, -1, -1):
        first = group * LANES
        room.lanes[:] = np.uint32(CLASS_RAW)
        for lane in range(min(LANES, num_tokens - first)):
            room.lanes[lane] = room.classes[first + lane]
        at = _encode(books, at, room, flat[first:], stride)
    return np.int64(at)


@njit(nogil=True, cache=True, error_model="numpy")
def _encode(books: Any, at: Any, room: Any, symbols: Any, stride: int) -> Any:
    """The channels of a group, by vectors where there are some."""
    spans, by_class = books.spans, books.by_class
    if IS_WIDE:
        return encode_group(
            spans, room.words, at, room.states, room.lanes, by_class, room.ids, symbols, stride
        )
    return encode_group_by_lane(
        spans, room.words, at, room.states, room.lanes, by_class, room.ids, symbols, stride
    )
