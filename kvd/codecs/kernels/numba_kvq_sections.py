"""Whole sections of `kvq` to elements, many in a call: parse, decode, dequantise, restore.

A group of 32 tokens goes through all steps while it is in L1, each channel's 32 lanes side by side:
every inner loop has 32 turns and no gathers; the last step turns channels back into rows. What a
section may say is said in kvq_section.py, which finds the words for one that cannot be.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from kvd.codecs.kernels import numba_ids
from kvd.codecs.kernels.ids import LOW_BITS_MAX
from kvd.codecs.kernels.kvq import LANES, STATE_BITS
from kvd.codecs.kernels.numba_kvq_coder import decode_group_by_lane
from kvd.codecs.kernels.numba_kvq_lanes import BLOCK, IS_WIDE, decode_group, transpose
from kvd.codecs.kernels.numba_kvq_numbers import mixed, narrow
from kvd.codecs.tables import CLASS_RAW, ESCAPE

_HEAD_SIZE = 16
_STATE_MIN = np.uint32(1 << STATE_BITS)
_BAD = -1


class Job(NamedTuple):
    """What all sections of a chunk share. `slots` and `by_class` are flat; `factors` float32
    [classes], 0 for raw tokens; `cos` and `sin` float32 [pairs, tokens], tokens rounded up to
    groups; `pairs` are offset, stride and reach of a rotation.
    """

    num_tokens: int
    num_wanted: int
    start: Any
    is_dithered: bool
    is_half: bool
    slots: Any
    by_class: Any
    factors: Any
    means: Any
    steps: Any
    cos: Any
    sin: Any
    pairs: Any


class Scratch(NamedTuple):
    """One section at a time. `words` uint16, LANES more than the section may have; `lanes` uint32
    [LANES], classes; `symbols` int16 [channels * LANES].
    """

    ids: Any
    classes: Any
    states: Any
    words: Any
    lanes: Any
    symbols: Any


class Marks(NamedTuple):
    """Where things stand in a section, and how many there are."""

    num_words: int
    escapes: int
    num_escapes: int
    raws: int


@njit(nogil=True, cache=True, error_model="numpy")
def restore_sections(bitstream: Any, places: Any, job: Any, kv: Any) -> int:
    """Sections without a transform into `kv`; the index of one that is corrupt, or -1. `places`
    int64 [sections, 10]: offset and size in the bitstream; the ends of its layers and heads; those
    of what is wanted. Reads what is coded, writes 2 bytes an element: the coder's speed.
    """
    num_groups = -(-job.num_wanted // LANES)
    for index in range(len(places)):
        place = places[index]
        num_channels = _num_channels(place, kv)
        scratch = make_scratch(job.num_tokens, num_channels)
        numbers = np.empty(num_channels * LANES, np.float32)
        content = bitstream[place[0] : place[0] + place[1]]
        marks = parse_section(content, scratch)
        if marks.num_words < 0:
            return index
        at, used = np.uint64(0), 0
        for group in range(num_groups):
            at, used = decode_group_of(content, group, at, used, marks, job, scratch)
            if used < 0:
                return index
            _dequantise(group, place, job, scratch, kv, numbers, LANES, 0)
            _restore_group(numbers, LANES, 0, group, place, job, kv)
        if not _is_end(at, used, marks, job, scratch):
            return index
        _copy_raws(content, marks.raws, scratch.classes, place, job, kv)
    return -1


@njit(nogil=True, cache=True, error_model="numpy")
def decode_numbers(
    bitstream: Any, place: Any, job: Any, kv: Any, numbers: Any, classes: Any
) -> Any:
    """The numbers of one section, float32 [channels, tokens], in groups; where its raw tokens
    stand, -1 where it is corrupt. Columns of tokens that are not wanted are as they were.
    """
    scratch = make_scratch(job.num_tokens, _num_channels(place, kv))
    content = bitstream[place[0] : place[0] + place[1]]
    marks = parse_section(content, scratch)
    if marks.num_words < 0:
        return _BAD
    at, used = np.uint64(0), 0
    flat, width = numbers.reshape(-1), numbers.shape[1]
    for group in range(-(-job.num_wanted // LANES)):
        at, used = decode_group_of(content, group, at, used, marks, job, scratch)
        if used < 0:
            return _BAD
        _dequantise(group, place, job, scratch, kv, flat, width, group * LANES)
    if not _is_end(at, used, marks, job, scratch):
        return _BAD
    classes[:] = scratch.classes
    return place[0] + marks.raws


@njit(nogil=True, cache=True, error_model="numpy")
def restore_numbers(
    bitstream: Any, raws: int, place: Any, job: Any, numbers: Any, classes: Any, kv: Any
) -> None:
    """What `decode_numbers` gave, behind a transform, into `kv`. Reads 4 bytes an element, writes
    2.
    """
    flat, width = numbers.reshape(-1), numbers.shape[1]
    for group in range(-(-job.num_wanted // LANES)):
        _restore_group(flat, width, group * LANES, group, place, job, kv)
    content = bitstream[place[0] : place[0] + place[1]]
    _copy_raws(content, raws - place[0], classes, place, job, kv)


@njit(nogil=True, cache=True, error_model="numpy")
def _num_channels(place: Any, kv: Any) -> Any:
    return (place[3] - place[2]) * kv.shape[1] * (place[5] - place[4]) * kv.shape[4]


@njit(nogil=True, cache=True, error_model="numpy")
def make_scratch(num_tokens: int, num_channels: int) -> Any:
    """For sections of so many tokens and channels."""
    return Scratch(
        np.empty(num_channels, np.uint8),
        np.empty(num_tokens, np.uint8),
        np.empty(LANES, np.uint32),
        np.empty(num_tokens * num_channels + LANES, np.uint16),
        np.empty(LANES, np.uint32),
        np.empty(num_channels * LANES, np.int16),
    )


@njit(nogil=True, cache=True, error_model="numpy")
def parse_section(content: Any, scratch: Any) -> Any:
    """Ids, classes, states and words into `scratch`; no words, -1, where it is no section."""
    none = Marks(_BAD, 0, 0, 0)
    num_tokens, num_channels = len(scratch.classes), len(scratch.ids)
    if len(content) < _HEAD_SIZE:
        return none
    num_words, num_escapes = _number(content, 0), _number(content, 4)
    num_classes, id_counts = _number(content, 8), _number(content, 12)
    num_low_bits, num_ids = id_counts & 7, id_counts >> 3
    at = _HEAD_SIZE + num_ids
    if num_classes > -(-num_tokens // 4) or num_low_bits > LOW_BITS_MAX:
        return none
    if at + num_classes > len(content):
        return none
    num_bits = numba_ids.read(content[_HEAD_SIZE:at], num_low_bits, scratch.ids)
    if num_bits < 0 or (num_bits + 7) >> 3 != num_ids:
        return none
    if not _read_classes(content[at : at + num_classes], scratch.classes):
        return none
    at += num_classes
    is_coded, num_raws = False, 0
    for channel in range(num_channels):
        is_coded |= scratch.ids[channel] != 0
    for token in range(num_tokens):
        num_raws += scratch.classes[token] == CLASS_RAW
    num_states = min(LANES, num_tokens) if is_coded else 0
    escapes = at + 4 * num_states + 2 * num_words
    raws = escapes + 2 * num_escapes
    if raws + 2 * num_raws * num_channels != len(content):
        return none
    if num_words + num_escapes and not is_coded:
        return none
    scratch.states[:] = _STATE_MIN
    for lane in range(num_states):
        scratch.states[lane] = np.uint32(_number(content, at + 4 * lane))
        if scratch.states[lane] < _STATE_MIN:
            return none
    _copy_words(content, at + 4 * num_states, num_words, scratch.words)
    return Marks(num_words, escapes, num_escapes, raws)


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _number(content: Any, at: int) -> Any:
    found = np.int64(0)
    for index in range(4):
        found |= np.int64(content[at + index]) << np.int64(8 * index)
    return found


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _short(content: Any, at: int) -> Any:
    low, high = content[np.uint64(at)], content[np.uint64(at) + np.uint64(1)]
    return np.uint16(np.uint16(low) | np.uint16(np.uint16(high) << np.uint16(8)))


@njit(nogil=True, cache=True, error_model="numpy")
def _copy_words(content: Any, at: int, num_words: int, words: Any) -> None:
    """A symbol takes one word at most: those beyond are not looked at."""
    count = min(num_words, len(words) - LANES)
    found = content[at : at + 2 * count]
    for index in range(count):
        words[index] = _short(found, 2 * index)
    words[count : count + LANES] = np.uint16(0)


@njit(nogil=True, cache=True, error_model="numpy")
def _read_classes(found: Any, classes: Any) -> bool:
    num_tokens = len(classes)
    if len(found) == -(-num_tokens // 4):
        for token in range(num_tokens):
            classes[token] = found[token >> 2] >> np.uint8(2 * (token & 3)) & np.uint8(3)
        return True
    classes[:] = np.uint8(0)
    end = np.int64(0)
    for index in range(len(found)):
        end += np.int64(found[index] >> np.uint8(2)) + 1
        if end > num_tokens:
            return False
        classes[end - 1] = found[index] & np.uint8(3)
    return True


@njit(nogil=True, cache=True, error_model="numpy")
def decode_group_of(
    content: Any, group: int, at: Any, used: int, marks: Any, job: Any, scratch: Any
) -> Any:
    """Symbols of a group; where the next word is, and how many escapes are used, or -1."""
    first = group * LANES
    lanes, symbols = scratch.lanes, scratch.symbols
    # A lane without a token stays as it is, like one of a raw token.
    lanes[:] = np.uint32(CLASS_RAW)
    for lane in range(min(LANES, job.num_tokens - first)):
        lanes[lane] = scratch.classes[first + lane]
    num_words = np.uint64(min(marks.num_words, len(scratch.words) - LANES))
    at = decode_symbols(job, num_words, at, scratch)
    if at > num_words:
        return at, _BAD
    escaped = np.int16(0)
    for index in range(len(symbols)):
        escaped |= np.int16(symbols[index] == ESCAPE)
    if escaped:
        count = min(LANES, job.num_wanted - first)
        used = _unescape(content, marks, used, count, symbols)
    return at, used


@njit(nogil=True, cache=True, error_model="numpy")
def decode_symbols(job: Any, num_words: Any, at: Any, scratch: Any) -> Any:
    """The channels of a group, by vectors where there are some."""
    if IS_WIDE:
        return decode_group(
            job.slots,
            scratch.words,
            num_words,
            at,
            scratch.states,
            scratch.lanes,
            job.by_class,
            scratch.ids,
            scratch.symbols,
        )
    return decode_group_by_lane(
        job.slots,
        scratch.words,
        num_words,
        at,
        scratch.states,
        scratch.lanes,
        job.by_class,
        scratch.ids,
        scratch.symbols,
    )


@njit(nogil=True, cache=True, error_model="numpy")
def _unescape(content: Any, marks: Any, used: int, num_lanes: int, symbols: Any) -> int:
    """Put escapes where the tables had no symbol; how many are used up, -1 if they do not do."""
    for lane in range(num_lanes):
        for at in range(lane, len(symbols), LANES):
            if symbols[at] == ESCAPE:
                if used == marks.num_escapes:
                    return _BAD
                symbols[at] = np.int16(_short(content, marks.escapes + 2 * used))
                used += 1
    return used


@njit(nogil=True, cache=True, error_model="numpy")
def _is_end(at: Any, used: int, marks: Any, job: Any, scratch: Any) -> Any:
    """Whether all words and escapes of a section are used; of a prefix nothing is known."""
    if job.num_wanted < job.num_tokens:
        return True
    for lane in range(LANES):
        if scratch.states[lane] != _STATE_MIN:
            return False
    return at == np.uint64(marks.num_words) and used == marks.num_escapes


@njit(nogil=True, cache=True, error_model="numpy")
def _dequantise(
    group: int, place: Any, job: Any, scratch: Any, kv: Any, numbers: Any, width: int, column: int
) -> None:
    """Symbols to numbers, a channel every `width` numbers, from `column` on."""
    factors = np.empty(LANES, np.float32)
    for lane in range(LANES):
        factors[lane] = job.factors[scratch.lanes[lane]]
    if job.is_dithered:
        seeds = _seeds(job, group)
        _, num_planes, _, num_heads, dim = kv.shape
        channel = 0
        for layer in range(place[2], place[3]):
            for plane in range(num_planes):
                for head in range(place[4], place[5]):
                    row = ((layer * num_planes + plane) * num_heads + head) * dim
                    for index in range(dim):
                        begin = channel * width + column
                        _take_dithered(
                            scratch.symbols,
                            len(scratch.ids),
                            channel,
                            row + index,
                            seeds,
                            factors,
                            numbers,
                            begin,
                        )
                        channel += 1
        return
    count = len(scratch.ids)
    for channel in range(count):
        _take(scratch.symbols, count, channel, factors, numbers, channel * width + column)


# A loop over lanes takes their count from an array: LLVM unrolls one whose count it knows before it
# looks for vectors, and finds none. Indices are unsigned: a signed one may count from the end.


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _take(
    symbols: Any, num_channels: int, channel: int, factors: Any, numbers: Any, begin: int
) -> None:
    source, target = np.uint64(channel * LANES), np.uint64(begin)
    for lane in range(len(symbols) // num_channels):
        symbol = np.float32(symbols[source + np.uint64(lane)])
        numbers[target + np.uint64(lane)] = symbol * factors[lane]


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _take_dithered(
    symbols: Any,
    num_channels: int,
    channel: int,
    index: int,
    seeds: Any,
    factors: Any,
    numbers: Any,
    begin: int,
) -> None:
    source, target = np.uint64(channel * LANES), np.uint64(begin)
    mark = np.uint32(np.uint32(index) * np.uint32(0x85EBCA77))
    for lane in range(len(symbols) // num_channels):
        hashed = mixed(np.uint32(seeds[lane] + mark))
        fraction = np.float32(np.int32(hashed >> np.uint32(8))) * np.float32(2.0**-24)
        symbol = np.float32(symbols[source + np.uint64(lane)])
        offset = fraction - np.float32(0.5)
        numbers[target + np.uint64(lane)] = (symbol - offset) * factors[lane]


@njit(nogil=True, cache=True, error_model="numpy")
def _seeds(job: Any, group: int) -> Any:
    seeds = np.empty(LANES, np.uint32)
    for lane in range(LANES):
        position = np.uint32(job.start + np.uint32(group * LANES + lane))
        seeds[lane] = mixed(np.uint32(position * np.uint32(0x9E3779B1)))
    return seeds


@njit(nogil=True, cache=True, error_model="numpy")
def _restore_group(
    numbers: Any, width: int, column: int, group: int, place: Any, job: Any, kv: Any
) -> None:
    """Numbers of a group to elements of what is wanted of the section."""
    num_planes, dim = kv.shape[1], kv.shape[4]
    elements = np.empty(dim * LANES, np.float32)
    bits = elements.view(np.uint32)
    pairs = np.empty((dim + 1) // 2 * LANES, np.uint32)
    first = group * LANES
    num_heads = place[5] - place[4]
    for layer in range(place[6], place[7]):
        for plane in range(num_planes):
            for head in range(place[8], place[9]):
                row = ((layer - place[2]) * num_planes + plane) * num_heads + head - place[4]
                begin = row * dim * width + column
                mean, step = job.means[layer, plane, head], job.steps[layer, plane, head]
                _place(numbers, begin, width, step, mean, elements)
                if plane == 0:
                    _turn(elements, job, first)
                narrow(job.is_half, bits, elements)
                _pack(bits, pairs)
                _write(pairs, kv, layer, plane, first, head, min(LANES, job.num_wanted - first))


@njit(nogil=True, cache=True, error_model="numpy")
def _place(numbers: Any, begin: int, width: int, step: Any, mean: Any, elements: Any) -> None:
    """Numbers of a row to elements, [dim, LANES]."""
    num_lanes = len(elements) // len(step)
    for index in range(len(step)):
        source = np.uint64(begin + index * width)
        target = np.uint64(index * LANES)
        for lane in range(num_lanes):
            scaled = numbers[source + np.uint64(lane)] * step[index]
            elements[target + np.uint64(lane)] = scaled + mean[index]


@njit(nogil=True, cache=True, error_model="numpy")
def _turn(elements: Any, job: Any, first: int) -> None:
    offset, stride, reach = job.pairs
    for pair in range(len(job.cos)):
        at = (offset + pair * stride) * LANES
        one = elements[at : at + LANES]
        other = elements[at + reach * LANES : at + (reach + 1) * LANES]
        cos, sin = job.cos[pair, first : first + LANES], job.sin[pair, first : first + LANES]
        for lane in range(LANES):
            x, y = one[lane], other[lane]
            one[lane] = x * cos[lane] - y * sin[lane]
            other[lane] = y * cos[lane] + x * sin[lane]


@njit(nogil=True, cache=True, error_model="numpy")
def _pack(bits: Any, pairs: Any) -> None:
    """Two channels side by side in 32 bits."""
    num_pairs = len(bits) // (2 * LANES)
    num_lanes = len(pairs) // (-(-len(bits) // (2 * LANES)))
    for pair in range(num_pairs):
        low, target = np.uint64(2 * pair * LANES), np.uint64(pair * LANES)
        high = low + np.uint64(LANES)
        for lane in range(num_lanes):
            above = bits[high + np.uint64(lane)] << np.uint32(16)
            pairs[target + np.uint64(lane)] = bits[low + np.uint64(lane)] | above
    if len(bits) % (2 * LANES):
        pairs[num_pairs * LANES :] = bits[2 * num_pairs * LANES :]


@njit(nogil=True, cache=True, error_model="numpy")
def _write(
    pairs: Any, kv: Any, layer: int, plane: int, first: int, head: int, num_lanes: int
) -> None:
    _, num_planes, num_tokens, num_heads, dim = kv.shape
    stride = num_heads * dim
    offset = ((layer * num_planes + plane) * num_tokens + first) * stride + head * dim
    flat = kv.reshape(-1)
    whole = dim // (2 * BLOCK) * (2 * BLOCK) if num_lanes == LANES else 0
    for index in range(0, whole, 2 * BLOCK):
        for lane in range(0, LANES, BLOCK):
            at = index // 2 * LANES + lane
            transpose(pairs, at, flat, offset + lane * stride + index, stride)
    for lane in range(num_lanes):
        for index in range(whole, dim):
            found = pairs[(index >> 1) * LANES + lane] >> np.uint32(16 * (index & 1))
            flat[offset + lane * stride + index] = np.uint16(found)


@njit(nogil=True, cache=True, error_model="numpy")
def _copy_raws(content: Any, at: int, classes: Any, place: Any, job: Any, kv: Any) -> None:
    num_planes, dim = kv.shape[1], kv.shape[4]
    num_layers, num_heads = place[3] - place[2], place[5] - place[4]
    token_size = 2 * num_layers * num_planes * num_heads * dim
    for token in range(job.num_wanted):
        if classes[token] != CLASS_RAW:
            continue
        for layer in range(place[6], place[7]):
            for plane in range(num_planes):
                for head in range(place[8], place[9]):
                    row = ((layer - place[2]) * num_planes + plane) * num_heads + head - place[4]
                    begin = at + 2 * row * dim
                    source = content[begin : begin + 2 * dim]
                    target = kv[layer, plane, token, head]
                    for index in range(dim):
                        target[index] = _short(source, 2 * index)
        at += token_size
