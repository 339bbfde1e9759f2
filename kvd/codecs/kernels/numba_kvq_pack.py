"""The bytes of a section of `kvq`, from what encoding found: as kvq_section.py and kvq_side.py have
it, without Python in between.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from kvd.codecs.kernels import numba_ids
from kvd.codecs.kernels.ids import LOW_BITS_MAX, SCALE_MASK
from kvd.codecs.kernels.kvq import LANES
from kvd.codecs.kernels.numba_kvq_bits import bits_above
from kvd.codecs.tables import CLASS_RAW, NUM_TABLES

_HEAD_SIZE, _LOW_BITS_BITS = 16, 3
_GAP_MAX, _CLASS_BITS = 63, 2


@njit(nogil=True, cache=True, error_model="numpy")
def collect_escapes(books: Any, room: Any) -> Any:
    """What the tables do not know, token by token, into `room.escapes`; how many."""
    ends = room.ends
    ends[:] = 0
    _visit_escapes(books, room, False)
    count = 0
    for token in range(len(ends)):
        found, ends[token] = ends[token], count
        count += found
    if count:
        _visit_escapes(books, room, True)
    return count


@njit(nogil=True, cache=True, error_model="numpy")
def _visit_escapes(books: Any, room: Any, is_placed: bool) -> None:
    """Count each token's escapes in `room.ends`, or put them there."""
    num_channels = len(room.ids)
    for index in range(len(room.flags)):
        for channel in range(num_channels):
            table = books.by_class[index * NUM_TABLES + np.int64(room.ids[channel])]
            limit = books.supports[table]
            if room.highest[index, channel] <= limit:
                continue
            row = room.symbols[channel]
            for group in range(room.flags.shape[1]):
                first = group * LANES
                above = bits_above(row, first, np.int16(limit))
                below = ~bits_above(row, first, np.int16(-limit - 1))
                found = (above | below) & room.flags[index, group]
                if found:
                    _visit(found, first, row, is_placed, room)


@njit(nogil=True, cache=True, error_model="numpy")
def _visit(found: Any, first: int, row: Any, is_placed: bool, room: Any) -> None:
    for lane in range(LANES):
        if found >> np.uint32(lane) & np.uint32(1):
            token = first + lane
            if is_placed:
                room.escapes[room.ends[token]] = row[token]
            room.ends[token] += 1


@njit(nogil=True, cache=True, error_model="numpy")
def write_section(kv: Any, place: Any, begin: int, num_escapes: int, room: Any, out: Any) -> Any:
    """The section, or one of raw tokens alone where that takes less; its size. `begin`: where its
    words do.
    """
    num_words = len(room.words) - begin
    if _size(num_words, num_escapes, room) > _size_max(room):
        # Symbols that take more room than what they stand for.
        room.classes[:] = CLASS_RAW
        room.ids[:] = 0
        num_words = num_escapes = 0
    at = _write_side(num_words, num_escapes, room, out)
    at = _write(room.states[: _num_states(room)].view(np.uint8), out, at)
    at = _write(room.words[len(room.words) - num_words :].view(np.uint8), out, at)
    at = _write(room.escapes[:num_escapes].view(np.uint8), out, at)
    return _write_raws(kv, place, room.classes, out, at)


@njit(nogil=True, cache=True, error_model="numpy")
def _write_raws(kv: Any, place: Any, classes: Any, out: Any, at: Any) -> Any:
    """Elements of raw tokens as they stand; what is behind them."""
    _, num_planes, num_tokens, num_heads, dim = kv.shape
    bits = kv.reshape(-1).view(np.uint8)
    for token in range(num_tokens):
        if classes[token] != CLASS_RAW:
            continue
        for layer in range(place[0], place[1]):
            for plane in range(num_planes):
                row = (layer * num_planes + plane) * num_tokens + token
                first = 2 * dim * (row * num_heads + place[2])
                end = 2 * dim * (row * num_heads + place[3])
                at = _write(bits[first:end], out, at)
    return at


@njit(nogil=True, cache=True, error_model="numpy")
def _size(num_words: int, num_escapes: int, room: Any) -> Any:
    _, id_bits = _low_bits(room.ids)
    num_raws = 0
    for token in range(len(room.classes)):
        num_raws += room.classes[token] == CLASS_RAW
    side = _HEAD_SIZE + (id_bits + 7) // 8 + _classes_size(room.classes)
    states = 4 * _num_states(room)
    return side + states + 2 * (num_words + num_escapes + num_raws * len(room.ids))


@njit(nogil=True, cache=True, error_model="numpy")
def _size_max(room: Any) -> Any:
    num_tokens, num_channels = len(room.classes), len(room.ids)
    ids_max = (num_channels * (3 + LOW_BITS_MAX) + 7) // 8
    return _HEAD_SIZE + ids_max + (num_tokens + 3) // 4 + 2 * num_tokens * num_channels


@njit(nogil=True, cache=True, error_model="numpy")
def _num_states(room: Any) -> Any:
    for channel in range(len(room.ids)):
        if room.ids[channel]:
            return min(LANES, len(room.classes))
    return 0


@njit(nogil=True, cache=True, error_model="numpy")
def _low_bits(ids: Any) -> Any:
    """How many low bits make the ids shortest, and how many bits they take."""
    sizes = np.zeros(LOW_BITS_MAX + 1, np.int64)
    before = np.int64(0)
    for channel in range(len(ids)):
        scale = np.int64(ids[channel]) & SCALE_MASK
        difference = scale - before
        folded = -2 * difference - 1 if difference < 0 else 2 * difference
        for count in range(len(sizes)):
            sizes[count] += 2 + count + (folded >> count)
        before = scale
    best = np.argmin(sizes)
    return best, sizes[best]


@njit(nogil=True, cache=True, error_model="numpy")
def _classes_size(classes: Any) -> Any:
    """In runs, or in 2 bits a token where that is not more."""
    count, end = 0, 0
    for token in range(len(classes)):
        if classes[token]:
            count += (token - end) // (_GAP_MAX + 1) + 1
            end = token + 1
    return min(count, (len(classes) + 3) // 4)


@njit(nogil=True, cache=True, error_model="numpy")
def _write_side(num_words: int, num_escapes: int, room: Any, out: Any) -> Any:
    """Counts, table ids and classes; what is behind them."""
    num_low_bits, id_bits = _low_bits(room.ids)
    num_ids, num_classes = (id_bits + 7) // 8, _classes_size(room.classes)
    _write_number(num_words, out, 0)
    _write_number(num_escapes, out, 4)
    _write_number(num_classes, out, 8)
    _write_number(num_ids << _LOW_BITS_BITS | num_low_bits, out, 12)
    at = _HEAD_SIZE
    out[at : at + num_ids + num_classes] = np.uint8(0)
    numba_ids.write(room.ids, num_low_bits, out[at : at + num_ids])
    at += num_ids
    _write_classes(room.classes, out[at : at + num_classes])
    return at + num_classes


@njit(nogil=True, cache=True, error_model="numpy")
def _write_number(number: int, out: Any, at: int) -> None:
    for index in range(4):
        out[at + index] = np.uint8(number >> (8 * index) & 255)


@njit(nogil=True, cache=True, error_model="numpy")
def _write_classes(classes: Any, out: Any) -> None:
    """Into zeros, of `_classes_size`."""
    if len(out) == (len(classes) + 3) // 4:
        for token in range(len(classes)):
            out[token >> 2] |= np.uint8(classes[token] << np.uint8(2 * (token & 3)))
        return
    at, end = 0, 0
    for token in range(len(classes)):
        if classes[token]:
            for _ in range((token - end) // (_GAP_MAX + 1)):
                out[at] = np.uint8(_GAP_MAX << _CLASS_BITS)
                at += 1
            gap = (token - end) % (_GAP_MAX + 1)
            out[at] = np.uint8(gap << _CLASS_BITS | np.int64(classes[token]))
            at += 1
            end = token + 1


@njit(nogil=True, cache=True, error_model="numpy")
def _write(found: Any, out: Any, at: Any) -> Any:
    """Bytes at `at`; what is behind them."""
    end = at + len(found)
    out[at:end] = found
    return end
