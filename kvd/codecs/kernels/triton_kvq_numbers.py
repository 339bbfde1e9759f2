"""Elements to symbols and back: the numeric kernels of `kvq` in Triton.

To be launched without fused multiply-adds, or the bits are others than those of reference.py. A
row is the `head_dim` elements of a layer, a plane and a head; kernels take a block of tokens of one
row. Both elements of a rotated pair are read for each of them: the second time they are in L1.
Numbers lie as symbols do, float32 `[sections, channels, tokens]`.

The tensors of a level, as kernels get them:

    means, steps   float32 [layers, planes, kv_heads, head_dim]
    cos, sin       float32 [rows, pairs]
    turns          int32 [3, head_dim]: a dim's pair, -1 for none; the other dim of the pair; the
                   sign of the other's sine when keys are rotated
    basis          float32 [groups, channels, channels]; a section's begins where its BASIS says
"""

from __future__ import annotations

from typing import Any

import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]

from kvd.codecs.kernels.kvq import SYMBOL_MAX
from kvd.codecs.kernels.triton_kvq_side import (
    ADDRESS,
    BASIS,
    FIELDS,
    HEAD,
    IS_BAD,
    LAYER,
    LAYERS,
    PART_FIELDS,
    RAWS_AT,
    START,
    TOKENS,
    TURN,
    jit,
    jit_part,
    load_pair,
)
from kvd.codecs.tables import CLASS_RAW

_FIELDS, _PART_FIELDS = tl.constexpr(FIELDS), tl.constexpr(PART_FIELDS)
_RAW = tl.constexpr(CLASS_RAW)
# What is below, before it is rounded, becomes a symbol.
_BOUND = tl.constexpr(SYMBOL_MAX + 0.5)
# Added and subtracted again, it leaves the nearest integer of a number below 2^22, ties to even.
_ROUNDER = tl.constexpr(1.5 * 2.0**23)
_HALF_MAX = tl.constexpr(65504.0)


@jit
def restore(
    stream: tl.tensor,
    sections: tl.tensor,
    parts: tl.tensor,
    classes: tl.tensor,
    ranks: tl.tensor,
    source: tl.tensor,
    means: tl.tensor,
    steps: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    turns: tl.tensor,
    num_planes: tl.tensor,
    num_heads: tl.tensor,
    section_heads: tl.tensor,
    dim: tl.tensor,
    num_pairs: tl.tensor,
    channels_max: tl.tensor,
    tokens_max: tl.tensor,
    HAS_BASIS: tl.constexpr,  # noqa: N803
    IS_DITHERED: tl.constexpr,  # noqa: N803
    IS_HALF: tl.constexpr,  # noqa: N803
    BLOCK_TOKENS: tl.constexpr,  # noqa: N803
    BLOCK_DIM: tl.constexpr,  # noqa: N803
) -> None:
    """Elements of a chunk from `source`: numbers behind a transform, otherwise symbols. Reads 4 or
    2 bytes an element, writes 2: memory's speed. Sections that are bad are left out.
    """
    section, row = tl.program_id(0).to(tl.int64), tl.program_id(1)
    sections += section * _FIELDS
    parts += section * _PART_FIELDS
    num_tokens = tl.load(sections + TOKENS).to(tl.int32)
    num_layers = tl.load(sections + LAYERS).to(tl.int32)
    is_there = (row < num_layers * num_planes * section_heads) & (tl.load(parts + IS_BAD) == 0)
    token = tl.program_id(2) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    index = tl.arange(0, BLOCK_DIM)
    is_token, is_dim = (token < num_tokens) & is_there, (index < dim) & is_there
    mask = is_token[:, None] & is_dim[None, :]
    kind = tl.load(classes + section * tokens_max + token, mask=is_token, other=_RAW).to(tl.int32)
    first = _first_channel(sections, row, num_planes, num_heads, section_heads, dim)
    position = tl.load(sections + START).to(tl.uint32) + token.to(tl.uint32)
    source += (section * channels_max + row * dim) * tokens_max + token[:, None]
    element = _element(
        source,
        index,
        mask,
        is_dim,
        kind,
        position,
        first,
        means,
        steps,
        tokens_max,
        HAS_BASIS,
        IS_DITHERED,
    )
    if (row // section_heads) % num_planes == 0:
        pair, other, sign = _turn(turns, index, dim)
        second = _element(
            source,
            other,
            mask,
            is_dim,
            kind,
            position,
            first,
            means,
            steps,
            tokens_max,
            HAS_BASIS,
            IS_DITHERED,
        )
        start = tl.load(sections + TURN)
        at = (start + token)[:, None] * num_pairs + pair[None, :]
        element = _turned(element, second, cos + at, sin + at, sign[None, :], mask, pair)
    bits = _narrow(element, IS_HALF)
    rank = tl.load(ranks + section * tokens_max + token, mask=is_token, other=0)
    num_channels = num_layers * num_planes * section_heads * dim
    raw_at = (rank[:, None].to(tl.int64) * num_channels + row * dim + index[None, :]) * 2
    is_raw = (kind == _RAW)[:, None]
    raw = load_pair(stream + tl.load(parts + RAWS_AT) + raw_at, mask & is_raw)
    kv = tl.load(sections + ADDRESS).to(tl.pointer_type(tl.int16), bitcast=True)
    at = _places(sections, row, token, index, num_planes, num_heads, section_heads, dim)
    tl.store(kv + at, tl.where(is_raw, raw, bits).to(tl.int16), mask=mask)


@jit
def normalise(
    sections: tl.tensor,
    classes: tl.tensor,
    means: tl.tensor,
    steps: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    turns: tl.tensor,
    out: tl.tensor,
    num_planes: tl.tensor,
    num_heads: tl.tensor,
    section_heads: tl.tensor,
    dim: tl.tensor,
    num_pairs: tl.tensor,
    channels_max: tl.tensor,
    tokens_max: tl.tensor,
    HAS_BASIS: tl.constexpr,  # noqa: N803
    IS_DITHERED: tl.constexpr,  # noqa: N803
    IS_HALF: tl.constexpr,  # noqa: N803
    BLOCK_TOKENS: tl.constexpr,  # noqa: N803
    BLOCK_DIM: tl.constexpr,  # noqa: N803
) -> None:
    """Numbers of a chunk into `out` where a transform comes next, otherwise symbols. A token that
    is not finite, or does not fit, becomes raw in `classes`; what `out` has for it is never used.
    Reads 2 bytes an element, writes 4 or 2.
    """
    section, row = tl.program_id(0).to(tl.int64), tl.program_id(1)
    sections += section * _FIELDS
    num_tokens = tl.load(sections + TOKENS).to(tl.int32)
    is_there = row < tl.load(sections + LAYERS).to(tl.int32) * num_planes * section_heads
    token = tl.program_id(2) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    index = tl.arange(0, BLOCK_DIM)
    is_token, is_dim = (token < num_tokens) & is_there, (index < dim) & is_there
    mask = is_token[:, None] & is_dim[None, :]
    kv = tl.load(sections + ADDRESS).to(tl.pointer_type(tl.int16), bitcast=True)
    at = _places(sections, row, token, index, num_planes, num_heads, section_heads, dim)
    element = _widen(tl.load(kv + at, mask=mask, other=0).to(tl.int32), IS_HALF)
    if (row // section_heads) % num_planes == 0:
        pair, other, sign = _turn(turns, index, dim)
        at = _places(sections, row, token, other, num_planes, num_heads, section_heads, dim)
        second = _widen(tl.load(kv + at, mask=mask, other=0).to(tl.int32), IS_HALF)
        start = tl.load(sections + TURN)
        turn_at = (start + token)[:, None] * num_pairs + pair[None, :]
        element = _turned(element, second, cos + turn_at, sin + turn_at, -sign[None, :], mask, pair)
    first = _first_channel(sections, row, num_planes, num_heads, section_heads, dim)
    mean = tl.load(means + first + index, mask=is_dim, other=0.0)
    step = tl.load(steps + first + index, mask=is_dim, other=1.0)
    number = tl.div_rn(element - mean[None, :], tl.broadcast_to(step[None, :], element.shape))
    out += (section * channels_max + row * dim + index[None, :]) * tokens_max + token[:, None]
    if HAS_BASIS:
        # What is not finite makes components that are not.
        tl.store(out, number, mask=mask)
    else:
        classes += section * tokens_max + token
        kind = tl.load(classes, mask=is_token, other=_RAW).to(tl.int32)
        position = tl.load(sections + START).to(tl.uint32) + token.to(tl.uint32)
        symbol, is_good = _quantised(number, kind, position, first + index, IS_DITHERED)
        tl.store(out, symbol, mask=mask)
        _make_raw(classes, mask & ~is_good, is_token)


@jit
def transform(
    sections: tl.tensor,
    classes: tl.tensor,
    source: tl.tensor,
    bases: tl.tensor,
    basis_stride: tl.tensor,
    out: tl.tensor,
    num_planes: tl.tensor,
    num_heads: tl.tensor,
    section_heads: tl.tensor,
    dim: tl.tensor,
    channels_max: tl.tensor,
    tokens_max: tl.tensor,
    IS_INVERSE: tl.constexpr,  # noqa: N803
    IS_DITHERED: tl.constexpr,  # noqa: N803
    BLOCK_TOKENS: tl.constexpr,  # noqa: N803
    BLOCK_CHANNELS: tl.constexpr,  # noqa: N803
    BLOCK_SUM: tl.constexpr,  # noqa: N803
) -> None:
    """Symbols to numbers of channels (inverse), or numbers to symbols of components. 2 FLOP for
    each channel of a section and element: 512 to 16,384, so that arithmetic is the bound.
    """
    section = tl.program_id(0).to(tl.int64)
    sections += section * _FIELDS
    num_tokens = tl.load(sections + TOKENS).to(tl.int32)
    num_channels = (tl.load(sections + LAYERS) * num_planes * section_heads * dim).to(tl.int32)
    token = tl.program_id(1) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    target = tl.program_id(2) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    is_token, is_target = token < num_tokens, target < num_channels
    kind = tl.load(classes + section * tokens_max + token, mask=is_token, other=_RAW).to(tl.int32)
    position = tl.load(sections + START).to(tl.uint32) + token.to(tl.uint32)
    bases += tl.load(sections + BASIS)
    source += section * channels_max * tokens_max + token[:, None]
    sums = tl.zeros([BLOCK_TOKENS, BLOCK_CHANNELS], tl.float32)
    for first in range(0, num_channels, BLOCK_SUM):
        channel = first + tl.arange(0, BLOCK_SUM)
        is_channel = channel < num_channels
        mask = is_token[:, None] & is_channel[None, :]
        found = tl.load(source + channel.to(tl.int64)[None, :] * tokens_max, mask=mask, other=0)
        if IS_INVERSE:
            marks = _marks(sections, channel, num_planes, num_heads, section_heads, dim)
            found = _dequantised(found, kind, position, marks, IS_DITHERED)
            found = tl.where(mask, found, 0.0)
            at = channel.to(tl.int64)[:, None] * basis_stride + target[None, :]
        else:
            at = target.to(tl.int64)[None, :] * basis_stride + channel[:, None]
        factor = tl.load(bases + at, mask=is_channel[:, None] & is_target[None, :], other=0.0)
        sums += tl.dot(found, factor, input_precision="ieee")
    mask = is_token[:, None] & is_target[None, :]
    out += (section * channels_max + target[None, :]) * tokens_max + token[:, None]
    if IS_INVERSE:
        tl.store(out, sums, mask=mask)
    else:
        marks = _marks(sections, target, num_planes, num_heads, section_heads, dim)
        symbol, is_good = _quantised(sums, kind, position, marks, IS_DITHERED)
        tl.store(out, symbol, mask=mask)
        _make_raw(classes + section * tokens_max + token, mask & ~is_good, is_token)


@jit_part
def _element(
    source: tl.tensor,
    index: tl.tensor,
    mask: tl.tensor,
    is_dim: tl.tensor,
    kind: tl.tensor,
    position: tl.tensor,
    first: tl.tensor,
    means: tl.tensor,
    steps: tl.tensor,
    tokens_max: tl.tensor,
    HAS_BASIS: tl.constexpr,  # noqa: N803
    IS_DITHERED: tl.constexpr,  # noqa: N803
) -> Any:
    """Elements `[tokens, dims]` at the dims `index` of a row, before they are rotated."""
    number = tl.load(source + index[None, :].to(tl.int64) * tokens_max, mask=mask, other=0)
    if not HAS_BASIS:
        number = _dequantised(number, kind, position, first + index, IS_DITHERED)
    step = tl.load(steps + first + index, mask=is_dim, other=0.0)
    return number * step[None, :] + tl.load(means + first + index, mask=is_dim, other=0.0)[None, :]


@jit_part
def _dequantised(
    symbol: tl.tensor,
    kind: tl.tensor,
    position: tl.tensor,
    marks: tl.tensor,
    IS_DITHERED: tl.constexpr,  # noqa: N803
) -> Any:
    number = symbol.to(tl.float32)
    if IS_DITHERED:
        number -= _dither(position, marks)
    # A power of two: the product is the quotient.
    number *= tl.where(kind == 1, 0.25, tl.where(kind == 2, 0.0625, 1.0))[:, None]
    return tl.where((kind == _RAW)[:, None], 0.0, number)


@jit_part
def _quantised(
    number: tl.tensor,
    kind: tl.tensor,
    position: tl.tensor,
    marks: tl.tensor,
    IS_DITHERED: tl.constexpr,  # noqa: N803
) -> Any:
    """Symbols int16, and whether they are."""
    scaled = number * tl.where(kind == 1, 4.0, tl.where(kind == 2, 16.0, 1.0))[:, None]
    if IS_DITHERED:
        scaled += _dither(position, marks)
    is_good = tl.abs(scaled) < _BOUND
    rounded = (tl.where(is_good, scaled, 0.0) + _ROUNDER) - _ROUNDER
    return rounded.to(tl.int16), is_good


@jit_part
def _dither(position: tl.tensor, marks: tl.tensor) -> Any:
    """float32 `[tokens, channels]`."""
    seed = _mixed(position * 0x9E3779B1)
    hashed = _mixed(seed[:, None] + marks.to(tl.uint32)[None, :] * 0x85EBCA77)
    return (hashed >> 8).to(tl.float32) * (2.0**-24) - 0.5


@jit_part
def _mixed(number: tl.tensor) -> Any:
    number = (number ^ (number >> 16)) * 0x7FEB352D
    number = (number ^ (number >> 15)) * 0x846CA68B
    return number ^ (number >> 16)


@jit_part
def _make_raw(classes: tl.tensor, is_bad: tl.tensor, is_token: tl.tensor) -> None:
    """Whoever does it, all write the same."""
    has_bad = tl.max(is_bad.to(tl.int32), 1) > 0
    raw = tl.full(has_bad.shape, _RAW, tl.uint8)
    tl.store(classes, raw, mask=has_bad & is_token)


@jit_part
def _turn(turns: tl.tensor, index: tl.tensor, dim: tl.tensor) -> Any:
    """Pair, the other dim of it, sign."""
    is_dim = index < dim
    pair = tl.load(turns + index, mask=is_dim, other=-1)
    other = tl.load(turns + dim + index, mask=is_dim, other=0)
    return pair, other, tl.load(turns + 2 * dim + index, mask=is_dim, other=1).to(tl.float32)


@jit_part
def _turned(
    element: tl.tensor,
    other: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    sign: tl.tensor,
    mask: tl.tensor,
    pair: tl.tensor,
) -> Any:
    is_turned = mask & (pair >= 0)[None, :]
    cosine = tl.load(cos, mask=is_turned, other=1.0)
    sine = tl.load(sin, mask=is_turned, other=0.0) * sign
    return tl.where(is_turned, element * cosine + other * sine, element)


@jit_part
def _first_channel(
    sections: tl.tensor,
    row: tl.tensor,
    num_planes: tl.tensor,
    num_heads: tl.tensor,
    section_heads: tl.tensor,
    dim: tl.tensor,
) -> Any:
    """A row's first channel in the chunk, planes before heads."""
    head = tl.load(sections + HEAD).to(tl.int32) + row % section_heads
    plane = (row // section_heads) % num_planes
    layer = tl.load(sections + LAYER).to(tl.int32) + row // (section_heads * num_planes)
    return ((layer * num_planes + plane) * num_heads + head) * dim


@jit_part
def _marks(
    sections: tl.tensor,
    channel: tl.tensor,
    num_planes: tl.tensor,
    num_heads: tl.tensor,
    section_heads: tl.tensor,
    dim: tl.tensor,
) -> Any:
    """The index in the chunk of each channel of a section."""
    first = _first_channel(sections, channel // dim, num_planes, num_heads, section_heads, dim)
    return first + channel % dim


@jit_part
def _places(
    sections: tl.tensor,
    row: tl.tensor,
    token: tl.tensor,
    index: tl.tensor,
    num_planes: tl.tensor,
    num_heads: tl.tensor,
    section_heads: tl.tensor,
    dim: tl.tensor,
) -> Any:
    """Where the elements `[tokens, dims]` of a row stand in their chunk."""
    head = tl.load(sections + HEAD) + row % section_heads
    plane = (row // section_heads) % num_planes
    layer = tl.load(sections + LAYER) + row // (section_heads * num_planes)
    first = (layer * num_planes + plane) * tl.load(sections + TOKENS)
    return ((first + token[:, None]) * num_heads + head) * dim + index[None, :]


@jit_part
def _widen(bits: tl.tensor, IS_HALF: tl.constexpr) -> Any:  # noqa: N803
    if IS_HALF:
        return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return (bits << 16).to(tl.float32, bitcast=True)


@jit_part
def _narrow(element: tl.tensor, IS_HALF: tl.constexpr) -> Any:  # noqa: N803
    """Bits as int32, rounded to nearest, ties to even; in float16 never above the largest."""
    if IS_HALF:
        clipped = tl.minimum(tl.maximum(element, -_HALF_MAX), _HALF_MAX)
        return clipped.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
    else:
        bits = element.to(tl.uint32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int32)
