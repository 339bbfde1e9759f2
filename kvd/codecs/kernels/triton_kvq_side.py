"""What stands before the symbols of `kvq` sections, read on the GPU: one program a section.

docs/formats/bitstream-kvq.md says what is bad; here that is a flag, and nothing is read outside of
the section. What a section says goes to `parts`, int64 `[sections, PART_FIELDS]`; the host's table
of sections is int64 `[sections, FIELDS]`.

    sections   offset, size | tokens, start modulo 2^32 | first layer, layers, first head
               basis, first row of sines | address of the chunk
    parts      is bad | words, escapes | where states, words, escapes, raw tokens stand | channels
               that are coded

Offsets are in bytes from the buffer's start, that of the basis in numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]

from kvd.codecs.kernels.ids import FAMILY_SHIFT, LOW_BITS_MAX, SCALE_MASK
from kvd.codecs.kernels.kvq import LANES
from kvd.codecs.tables import CLASS_RAW

FIELDS = 10
PART_FIELDS = 8

OFFSET, SIZE, TOKENS, START, LAYER, LAYERS, HEAD, BASIS, TURN, ADDRESS = map(
    tl.constexpr, range(FIELDS)
)
IS_BAD, WORDS, ESCAPES, STATES_AT, WORDS_AT, ESCAPES_AT, RAWS_AT, CODED = map(
    tl.constexpr, range(PART_FIELDS)
)
# An entry of `order`: a channel that is coded, and below it the channel's table.
ORDER_SHIFT = tl.constexpr(8)
ORDER_MASK = tl.constexpr(255)

_FIELDS, _PART_FIELDS = tl.constexpr(FIELDS), tl.constexpr(PART_FIELDS)
_RAW, _LANES = tl.constexpr(CLASS_RAW), tl.constexpr(LANES)
_LOW_BITS_MAX = tl.constexpr(LOW_BITS_MAX)
_FAMILY_SHIFT, _SCALE_MASK = tl.constexpr(FAMILY_SHIFT), tl.constexpr(SCALE_MASK)
_COUNTS_SIZE = tl.constexpr(16)
# No difference of two scales is longer: a reader stops there, whatever the bits say.
_UNARY_MAX = tl.constexpr(2 * SCALE_MASK)


def jit(function: Callable[..., None]) -> Any:
    """A kernel: launched as `kernel[grid](...)`."""
    return triton.jit(function)


def jit_part(function: Callable[..., Any]) -> Any:
    """A piece of kernels."""
    return triton.jit(function)


@jit
def read_side(
    stream: tl.tensor,
    sections: tl.tensor,
    parts: tl.tensor,
    order: tl.tensor,
    classes: tl.tensor,
    row_size: tl.tensor,
    channels_max: tl.tensor,
    tokens_max: tl.tensor,
    BLOCK: tl.constexpr,  # noqa: N803
) -> None:
    """Reads a few bits a channel, one after the other: 1 % of what decoding takes. `classes` hold
    zeros before. A section that is bad has no words and no coded channels in `parts`.
    """
    section = tl.program_id(0).to(tl.int64)
    sections += section * _FIELDS
    start, size = tl.load(sections + OFFSET), tl.load(sections + SIZE)
    num_tokens = tl.load(sections + TOKENS)
    num_channels = tl.load(sections + LAYERS) * row_size
    is_good = size >= _COUNTS_SIZE
    num_words = _uint32(stream + start, is_good)
    num_escapes = _uint32(stream + start + 4, is_good)
    num_classes = _uint32(stream + start + 8, is_good)
    counts = _uint32(stream + start + 12, is_good)
    low_bits, num_ids = (counts & 7).to(tl.int32), counts >> 3
    is_good &= low_bits <= _LOW_BITS_MAX
    is_good &= num_classes <= (num_tokens + 3) // 4
    is_good &= _COUNTS_SIZE + num_ids + num_classes <= size
    ids_at = start + _COUNTS_SIZE
    num_coded, are_ids = _read_ids(
        stream + ids_at, num_ids, low_bits, num_channels, order + section * channels_max, is_good
    )
    is_good &= are_ids
    num_raws, are_classes = _read_classes(
        stream + ids_at + num_ids,
        num_classes,
        num_tokens,
        classes + section * tokens_max,
        is_good,
        BLOCK,
    )
    is_good &= are_classes
    is_good &= (num_coded > 0) | (num_words + num_escapes == 0)
    states_at = ids_at + num_ids + num_classes
    words_at = states_at + 4 * tl.where(num_coded > 0, tl.minimum(num_tokens, _LANES), 0)
    escapes_at = words_at + 2 * num_words
    raws_at = escapes_at + 2 * num_escapes
    is_good &= raws_at + 2 * num_raws * num_channels == start + size
    parts += section * _PART_FIELDS
    tl.store(parts + IS_BAD, tl.where(is_good, 0, 1))
    tl.store(parts + WORDS, tl.where(is_good, num_words, 0))
    tl.store(parts + ESCAPES, tl.where(is_good, num_escapes, 0))
    tl.store(parts + STATES_AT, states_at)
    tl.store(parts + WORDS_AT, words_at)
    tl.store(parts + ESCAPES_AT, escapes_at)
    tl.store(parts + RAWS_AT, raws_at)
    tl.store(parts + CODED, tl.where(is_good, num_coded, 0))


@jit_part
def _read_ids(
    ids: tl.tensor,
    size: tl.tensor,
    low_bits: tl.tensor,
    num_channels: tl.tensor,
    order: tl.tensor,
    is_good: tl.tensor,
) -> Any:
    """The channels whose table is not 0, into `order`; how many, and whether all bits are ids."""
    at, end = size * 0, size * 8
    channel, scale, num_coded = low_bits * 0, low_bits * 0, low_bits * 0
    while (channel < num_channels) & is_good:
        is_good &= at + 2 + low_bits <= end
        head = (_pair(ids + (at >> 3), is_good, (at >> 3) + 1 < size) >> (at & 7)).to(tl.int32)
        head &= (2 << low_bits) - 1
        at += 1 + low_bits
        high = low_bits * 0
        bit = _bit(ids, at, end)
        while (bit == 1) & (high <= _UNARY_MAX):
            high += 1
            at += 1
            bit = _bit(ids, at, end)
        at += 1
        is_good &= high <= _UNARY_MAX
        folded = (high << low_bits) | (head >> 1)
        scale += tl.where((folded & 1) == 1, -((folded + 1) >> 1), folded >> 1)
        is_good &= (scale >= 0) & (scale <= _SCALE_MASK)
        table = ((head & 1) << _FAMILY_SHIFT) | scale
        is_coded = is_good & (table != 0)
        tl.store(order + num_coded, (channel << ORDER_SHIFT) | table, mask=is_coded)
        num_coded += is_coded.to(tl.int32)
        channel += 1
    return num_coded, is_good & ((at + 7) >> 3 == size)


@jit_part
def _read_classes(
    found: tl.tensor,
    size: tl.tensor,
    num_tokens: tl.tensor,
    classes: tl.tensor,
    is_good: tl.tensor,
    BLOCK: tl.constexpr,  # noqa: N803
) -> Any:
    """How many raw tokens there are, and whether all runs are within the tokens."""
    lane = tl.arange(0, BLOCK)
    num_raws, end = size * 0, size * 0
    if size == (num_tokens + 3) // 4:
        for first in range(0, num_tokens.to(tl.int32), BLOCK):
            token = first + lane
            is_token = (token < num_tokens) & is_good
            byte = tl.load(found + (token >> 2), mask=is_token, other=0).to(tl.int32)
            kind = (byte >> ((token & 3) * 2)) & 3
            tl.store(classes + token, kind.to(tl.uint8), mask=is_token)
            num_raws += tl.sum((is_token & (kind == _RAW)).to(tl.int32), 0)
    else:
        for first in range(0, tl.where(is_good, size, 0).to(tl.int32), BLOCK):
            index = first + lane
            byte = tl.load(found + index, mask=index < size, other=0).to(tl.int32)
            lengths = tl.where(index < size, (byte >> 2) + 1, 0)
            token = end + tl.cumsum(lengths, 0) - 1
            is_token = (index < size) & (token < num_tokens)
            tl.store(classes + token, (byte & 3).to(tl.uint8), mask=is_token)
            num_raws += tl.sum((is_token & ((byte & 3) == _RAW)).to(tl.int32), 0)
            end += tl.sum(lengths, 0)
    return num_raws, end <= num_tokens


@jit_part
def _bit(source: tl.tensor, at: tl.tensor, end: tl.tensor) -> Any:
    """Behind the end there are ones."""
    byte = tl.load(source + (at >> 3), mask=at < end, other=255).to(tl.int64)
    return (byte >> (at & 7)) & 1


@jit_part
def _pair(source: tl.tensor, has_low: tl.tensor, has_high: tl.tensor) -> Any:
    low = tl.load(source, mask=has_low, other=0).to(tl.int64)
    return low | (tl.load(source + 1, mask=has_low & has_high, other=0).to(tl.int64) << 8)


@jit_part
def _uint32(source: tl.tensor, is_there: tl.tensor) -> Any:
    low = load_pair(source, is_there).to(tl.int64)
    return low | (load_pair(source + 2, is_there).to(tl.int64) << 16)


@jit_part
def load_pair(source: tl.tensor, mask: tl.tensor) -> Any:
    """The uint16 that begins at any byte, as int32; 0 where it is masked."""
    low = tl.load(source, mask=mask, other=0).to(tl.int32)
    return low | (tl.load(source + 1, mask=mask, other=0).to(tl.int32) << 8)
