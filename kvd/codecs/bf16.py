"""bf16/1: lossless for 16-bit dtypes, 1.5 times smaller. docs/formats/bitstream.md.

A section is one layer, all heads; in it a block for each plane. A block is coded, or the values as
they are where coding does not pay.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvd.codecs.base import WHOLE, Bytes, Part, Span
from kvd.codecs.bf16_block import (
    Values,
    decode_block,
    fastest_kernels,
    fastest_sections,
    fastest_writer,
    read_block,
    write_block,
)
from kvd.codecs.bitstream import (
    SECTION_ALIGN,
    Header,
    Section,
    body_offset,
    read_header_of,
    read_sections,
    section_ranges,
    total_size,
    write_bitstream,
    write_head,
)
from kvd.codecs.kernels import reference_bf16
from kvd.codecs.values import as_layers
from kvd.errors import Corrupt, Unsupported
from kvd.layout import KVLayout

NAME = "bf16/1"

# A step of a channel's offset is one octave: bits of the high byte below the exponent.
_SHIFTS = {"bfloat16": 0, "float16": 3}


class Bf16:
    """The lossless codec: every bit pattern comes back. A part of the heads costs all of them."""

    name = NAME
    is_exact = True

    def __init__(self, *, with_numba: bool = True) -> None:
        self._with_numba = with_numba
        self._kernels = fastest_kernels() if with_numba else reference_bf16

    def size_bytes_max(self, layout: KVLayout, num_tokens: int) -> int:
        header = _header(layout)
        block = 1 + 2 * num_tokens * layout.num_kv_heads * layout.head_dim
        return total_size(header, layout, [layout.num_planes * block] * layout.num_layers)

    def encode(self, kv: Bytes, layout: KVLayout, span: Span, out: Bytes) -> int:
        shift = _shift_of(layout)
        assert out.size >= self.size_bytes_max(layout, span.num_tokens)
        chunk = as_layers(kv, layout, span.num_tokens, np.uint16)
        write = fastest_writer() if self._with_numba else None
        if write is None:
            return _encode_each(chunk, layout, span, shift, out)
        header = _header(layout)
        ends = [
            (layers.start, layers.stop, heads.start, heads.stop)
            for layers, heads in section_ranges(header, layout)
        ]
        places, sizes = np.array(ends, np.int64), np.empty(len(ends), np.int64)
        target = out[body_offset(header, layout) :]
        write(_frozen(chunk), places, np.int64(shift), SECTION_ALIGN, target, sizes)
        return write_head(header, layout, span, sizes.tolist(), out)

    def decode(
        self, bitstream: Bytes, layout: KVLayout, span: Span, out: Bytes, part: Part = WHOLE
    ) -> None:
        shift = _shift_of(layout)
        header = read_header_of(bitstream, NAME, is_exact=True)
        chunk = as_layers(out, layout, span.num_tokens, np.uint16)
        sections = list(read_sections(bitstream, header, layout, span, part))
        restore = fastest_sections() if self._with_numba else None
        if restore is None:
            for section in sections:
                self._decode_section(section, layout, chunk, part, shift)
            return
        layers, heads, tokens = part.within(layout, span.num_tokens)
        base = int(bitstream.ctypes.data)
        places = np.array([_place(section, base, layers, heads) for section in sections])
        corrupt = restore(_frozen(bitstream), places, np.int64(shift), tokens, chunk)
        if corrupt >= 0:
            # What is wrong with it is found, and said, once more.
            self._decode_section(sections[corrupt], layout, chunk, part, shift)
            raise Corrupt("a section that is not its blocks")

    def _decode_section(
        self, section: Section, layout: KVLayout, chunk: Values, part: Part, shift: int
    ) -> None:
        layers, heads, tokens = part.within(layout, chunk.shape[2])
        within = range(max(heads.start, section.heads.start), min(heads.stop, section.heads.stop))
        first = (within.start - section.heads.start) * layout.head_dim
        channels = len(section.heads) * layout.head_dim
        rest = section.content
        for layer in section.layers:
            for plane in range(layout.num_planes):
                block, rest = read_block(rest, chunk.shape[2], channels)
                if layer in layers:
                    target = chunk[layer, plane, :tokens, within.start : within.stop]
                    decode_block(self._kernels, block, shift, first, target)
        if rest.size:
            raise Corrupt(f"{rest.size} bytes behind the last block of a section")


def _encode_each(chunk: Values, layout: KVLayout, span: Span, shift: int, out: Bytes) -> int:
    """A block at a time, by the reference."""

    def write_section(layers: range, heads: range, target: Bytes) -> int:
        size = 0
        for layer in layers:
            for plane in chunk[layer, :, :, heads.start : heads.stop]:
                values = np.ascontiguousarray(plane).reshape(span.num_tokens, -1)
                size += write_block(values, shift, target[size:])
        return size

    return write_bitstream(_header(layout), layout, span, out, write_section)


def _frozen(array: NDArray[Any]) -> NDArray[Any]:
    """A view that cannot be written: Numba would compile once more for what can."""
    view = array.view()
    view.flags.writeable = False
    return view


def _place(section: Section, base: int, layers: range, heads: range) -> tuple[int, ...]:
    """Where a section stands, what it holds, what of that is wanted. Its content is a view of the
    bitstream, which begins at address `base`.
    """
    return (
        int(section.content.ctypes.data) - base,
        section.content.size,
        section.layers.start,
        section.layers.stop,
        section.heads.start,
        section.heads.stop,
        max(layers.start, section.layers.start),
        min(layers.stop, section.layers.stop),
        max(heads.start, section.heads.start),
        min(heads.stop, section.heads.stop),
    )


def _header(layout: KVLayout) -> Header:
    return Header(codec=NAME, is_exact=True, section_heads=layout.num_kv_heads)


def _shift_of(layout: KVLayout) -> int:
    if layout.dtype not in _SHIFTS:
        raise Unsupported(f"{NAME} keeps {' and '.join(_SHIFTS)}, the layout has {layout.dtype}")
    return _SHIFTS[layout.dtype]
