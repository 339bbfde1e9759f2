"""The kernels of `kvq` in Triton: the bits of reference.py, all sections of many chunks at once.

Here tensors are made and kernels launched; triton_kvq_side.py, triton_kvq_coder.py and
triton_kvq_numbers.py hold them. Torch tensors are `Any`; their shapes stand beside them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from kvd.codecs.kernels import triton_kvq_coder as coder
from kvd.codecs.kernels import triton_kvq_numbers as numbers
from kvd.codecs.kernels import triton_kvq_side as side
from kvd.codecs.kernels.kvq import LANES
from kvd.codecs.tables import tables

# Bits are those of the reference only if products are rounded before they are added.
EXACT = {"enable_fp_fusion": False}
# A section is one warp's: its steps depend on each other.
ONE_WARP = {"num_warps": 1}
# 8 elements of a block a thread: with more, registers leave room for few warps.
_ROW_WARPS = {"num_warps": 8}

# Elements of a block, and tokens of one at most.
_BLOCK = 2048
_BLOCK_TOKENS_MAX = 64
_SIDE_BLOCK = 128
# Tokens and channels of a tile of a product, and channels that are summed at a time.
TILE = {"BLOCK_TOKENS": 64, "BLOCK_CHANNELS": 64, "BLOCK_SUM": 32}
_COLLECT_BLOCK = 1024
_COST_TOKENS = 16
_ESCAPE_CHANNELS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """What all sections of a launch share; the largest of them has `layers_max` layers and
    `tokens_max` tokens.
    """

    num_planes: int
    num_heads: int
    section_heads: int
    dim: int
    layers_max: int
    tokens_max: int
    is_half: bool
    is_dithered: bool

    @property
    def rows_max(self) -> int:
        """Rows of `dim` channels of a section."""
        return self.layers_max * self.num_planes * self.section_heads

    @property
    def channels_max(self) -> int:
        """Channels of a section."""
        return self.rows_max * self.dim

    @property
    def row_size(self) -> int:
        """Channels of one layer of a section."""
        return self.num_planes * self.section_heads * self.dim

    @property
    def blocks(self) -> dict[str, int]:
        """Sizes of a block of a row."""
        width = 1 << (self.dim - 1).bit_length()
        tokens = min(_BLOCK_TOKENS_MAX, max(1, _BLOCK // width))
        return {"BLOCK_TOKENS": tokens, "BLOCK_DIM": width}

    def heads(self) -> tuple[int, int, int, int]:
        """As kernels take it."""
        return self.num_planes, self.num_heads, self.section_heads, self.dim

    def row_grid(self, num_sections: int) -> tuple[int, int, int]:
        """A program for each block of tokens of each row."""
        return num_sections, self.rows_max, -(-self.tokens_max // self.blocks["BLOCK_TOKENS"])

    def tile_grid(self, num_sections: int) -> tuple[int, int, int]:
        """A program for each tile of a product."""
        return (
            num_sections,
            -(-self.tokens_max // TILE["BLOCK_TOKENS"]),
            -(-self.channels_max // TILE["BLOCK_CHANNELS"]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LevelTensors:
    """A level of a profile on a device: triton_kvq_numbers.py says what. `bases` is None where the
    level has no transform.
    """

    means: Any
    steps: Any
    turns: Any
    bases: Any

    @property
    def basis_stride(self) -> int:
        """Numbers from one row of a basis to the next."""
        return int(self.bases.shape[-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Tables:
    """The canned tables on a device. int32 where torch knows no unsigned numbers."""

    by_class: Any
    slots: Any
    spans: Any
    costs: Any
    supports: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """What an encoder found, by section. `ids` uint8 [sections, channels], `classes` uint8
    [sections, tokens], `states` int32 [sections, 32], `counts` int32 [sections, 2] of words and
    escapes, `room` int16 [sections, room]: escapes at its front, words at its end.
    """

    ids: Any
    classes: Any
    states: Any
    counts: Any
    room: Any


@cache
def device_tables(device: str) -> Tables:
    """Uploaded once a device and process."""
    found = tables()

    def tensor(array: Any) -> Any:
        return torch.from_numpy(array).to(device)

    return Tables(
        by_class=tensor(found.by_class),
        slots=tensor(found.slots.view("i4")),
        spans=tensor(found.spans.view("i4")),
        costs=tensor(found.costs.astype("i4")),
        supports=tensor(found.supports),
    )


def decode(
    stream: Any, sections: Any, level: LevelTensors, cos: Any, sin: Any, geometry: Geometry
) -> Any:
    """Fill the chunks whose addresses stand in `sections`. `stream` uint8 [bytes]. Which sections
    are bad, int64 [sections]: of those nothing is written.
    """
    assert stream.dtype == torch.uint8
    _check(sections, cos, sin)
    count, device = len(sections), stream.device
    channels, tokens = geometry.channels_max, geometry.tokens_max
    parts = torch.empty((count, side.PART_FIELDS), dtype=torch.int64, device=device)
    order = torch.empty((count, channels), dtype=torch.int32, device=device)
    classes = torch.zeros((count, tokens), dtype=torch.uint8, device=device)
    symbols = torch.zeros((count, channels, tokens), dtype=torch.int16, device=device)
    ranks = torch.empty((count, tokens), dtype=torch.int32, device=device)
    known = device_tables(str(device))
    side.read_side[(count,)](
        stream,
        sections,
        parts,
        order,
        classes,
        geometry.row_size,
        channels,
        tokens,
        BLOCK=_SIDE_BLOCK,
        **ONE_WARP,
    )
    coder.decode[(count,)](
        stream,
        sections,
        parts,
        order,
        classes,
        known.by_class,
        known.slots,
        symbols,
        ranks,
        channels,
        tokens,
        **ONE_WARP,
    )
    source = symbols
    if level.bases is not None:
        source = torch.empty((count, channels, tokens), dtype=torch.float32, device=device)
        _transform(sections, classes, symbols, source, level, geometry, is_inverse=True)
    numbers.restore[geometry.row_grid(count)](
        stream,
        sections,
        parts,
        classes,
        ranks,
        source,
        level.means,
        level.steps,
        cos,
        sin,
        level.turns,
        *geometry.heads(),
        cos.shape[1],
        channels,
        tokens,
        HAS_BASIS=level.bases is not None,
        IS_DITHERED=geometry.is_dithered,
        IS_HALF=geometry.is_half,
        **geometry.blocks,
        **EXACT,
        **_ROW_WARPS,
    )
    return parts[:, 0]


def encode(
    sections: Any,
    classes: Any,
    level: LevelTensors,
    cos: Any,
    sin: Any,
    geometry: Geometry,
    room_size: int,
) -> Encoded:
    """Code the chunks whose addresses stand in `sections`. `classes` uint8 [sections, tokens] come
    in with what is raw whatever it holds, and get what must be. A section that takes more than
    `room_size` has counts that say so, and `room` is of no use.
    """
    _check(sections, cos, sin)
    assert classes.shape == (len(sections), geometry.tokens_max)
    assert room_size >= geometry.channels_max * geometry.tokens_max
    symbols = _symbols(sections, classes, level, cos, sin, geometry)
    count, device = len(sections), sections.device
    channels, tokens = geometry.channels_max, geometry.tokens_max
    known = device_tables(str(device))
    ids = torch.zeros((count, channels), dtype=torch.uint8, device=device)
    states = torch.empty((count, LANES), dtype=torch.int32, device=device)
    counts = torch.empty((count, 2), dtype=torch.int32, device=device)
    room = torch.empty((count, room_size), dtype=torch.int16, device=device)
    coder.choose_tables[(count, channels)](
        sections,
        symbols,
        classes,
        known.costs,
        ids,
        geometry.row_size,
        channels,
        tokens,
        BLOCK=_COST_TOKENS,
        **ONE_WARP,
    )
    coded = (sections, symbols, classes, ids, known.by_class)
    shape = (geometry.row_size, channels, tokens)
    coder.encode[(count,)](*coded, known.spans, room, room_size, states, counts, *shape, **ONE_WARP)
    coder.escape[(count,)](
        *coded, known.supports, room, room_size, counts, *shape, BLOCK=_ESCAPE_CHANNELS, **ONE_WARP
    )
    return Encoded(ids=ids, classes=classes, states=states, counts=counts, room=room)


def collect(encoded: Encoded, offsets: Any, size: int, longest: int) -> Any:
    """Words and behind them escapes of each section, at its offset: int16 [size]. `offsets` int64
    [sections]; no section has more than `longest`.
    """
    count, room_size = encoded.room.shape
    out = torch.empty(size, dtype=torch.int16, device=encoded.room.device)
    coder.collect[(count, -(-longest // _COLLECT_BLOCK))](
        encoded.room, room_size, encoded.counts, offsets, out, BLOCK=_COLLECT_BLOCK
    )
    return out


def _symbols(
    sections: Any, classes: Any, level: LevelTensors, cos: Any, sin: Any, geometry: Geometry
) -> Any:
    """int16 [sections, channels, tokens]; what it holds for raw tokens means nothing."""
    shape = (len(sections), geometry.channels_max, geometry.tokens_max)
    has_basis = level.bases is not None
    dtype = torch.float32 if has_basis else torch.int16
    found = torch.empty(shape, dtype=dtype, device=sections.device)
    numbers.normalise[geometry.row_grid(len(sections))](
        sections,
        classes,
        level.means,
        level.steps,
        cos,
        sin,
        level.turns,
        found,
        *geometry.heads(),
        cos.shape[1],
        geometry.channels_max,
        geometry.tokens_max,
        HAS_BASIS=has_basis,
        IS_DITHERED=geometry.is_dithered,
        IS_HALF=geometry.is_half,
        **geometry.blocks,
        **EXACT,
        **_ROW_WARPS,
    )
    if not has_basis:
        return found
    symbols = torch.empty(shape, dtype=torch.int16, device=sections.device)
    _transform(sections, classes, found, symbols, level, geometry, is_inverse=False)
    return symbols


def _transform(
    sections: Any,
    classes: Any,
    source: Any,
    out: Any,
    level: LevelTensors,
    geometry: Geometry,
    *,
    is_inverse: bool,
) -> None:
    # Fused sums are welcome in a product, but the dither in front of it must be exact: both are.
    numbers.transform[geometry.tile_grid(len(sections))](
        sections,
        classes,
        source,
        level.bases,
        level.basis_stride,
        out,
        *geometry.heads(),
        geometry.channels_max,
        geometry.tokens_max,
        IS_INVERSE=is_inverse,
        IS_DITHERED=geometry.is_dithered,
        **TILE,
    )


def _check(sections: Any, cos: Any, sin: Any) -> None:
    assert sections.dtype == torch.int64
    assert sections.shape[1] == side.FIELDS
    assert sections.is_contiguous()
    assert cos.shape == sin.shape
