"""What int8/1 and fp8/1 share: a section is one layer, all heads; scales, then a byte a value.

Everything has its place: any part of a section can be read without the rest.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kvd.codecs.base import WHOLE, Bytes, Part, Span
from kvd.codecs.bitstream import (
    Header,
    Section,
    read_header_of,
    read_sections,
    total_size,
    write_bitstream,
)
from kvd.codecs.values import as_stored, narrow, widen
from kvd.errors import Corrupt
from kvd.layout import KVLayout


class Scaling(Protocol):
    """How values become bytes. `numbers` are float32 [planes, tokens, kv_heads, head_dim]; scales
    have 1 for what shares one.
    """

    name: str
    scale_dtype: str

    def scales_shape(self, planes: int, tokens: int, heads: int) -> tuple[int, int, int, int]:
        """The shape of a layer's scales."""
        ...

    def quantise(self, numbers: NDArray[np.float32]) -> tuple[NDArray[Any], Bytes]:
        """Scales as they are stored, and a byte for each value."""
        ...

    def dequantise(self, scales: NDArray[Any], codes: Bytes) -> NDArray[np.float32]:
        """The numbers again. Raises `Corrupt` for a scale that cannot be."""
        ...


class Scaled:
    """The codec of a `Scaling`."""

    is_exact = False

    def __init__(self, scaling: Scaling) -> None:
        self._scaling = scaling

    @property
    def name(self) -> str:
        return self._scaling.name

    def size_bytes_max(self, layout: KVLayout, num_tokens: int) -> int:
        """Exactly what each bitstream has."""
        scales, codes = self._section_sizes(layout, num_tokens, layout.num_kv_heads)
        sizes = [scales + codes] * layout.num_layers
        return total_size(self._header(layout), layout, sizes)

    def encode(self, kv: Bytes, layout: KVLayout, span: Span, out: Bytes) -> int:
        chunk = as_stored(kv, layout, span.num_tokens)
        assert out.size >= self.size_bytes_max(layout, span.num_tokens)

        def write_section(layers: range, _heads: range, target: Bytes) -> int:
            scales, codes = self._scaling.quantise(widen(chunk[layers.start]))
            stored = scales.astype(self._scaling.scale_dtype).reshape(-1).view(np.uint8)
            size = stored.size + codes.size
            target[: stored.size] = stored
            target[stored.size : size] = codes.reshape(-1).view(np.uint8)
            return size

        return write_bitstream(self._header(layout), layout, span, out, write_section)

    def decode(
        self, bitstream: Bytes, layout: KVLayout, span: Span, out: Bytes, part: Part = WHOLE
    ) -> None:
        chunk = as_stored(out, layout, span.num_tokens)
        header = read_header_of(bitstream, self.name, is_exact=False)
        if header.section_layers != 1 or header.section_heads != layout.num_kv_heads:
            raise Corrupt("sections of one layer and all heads expected")
        layers, heads, tokens = part.within(layout, span.num_tokens)
        for section in read_sections(bitstream, header, layout, span, part):
            scales, codes = self._parse(section, layout, span.num_tokens)
            wanted = np.s_[:, :tokens, heads.start : heads.stop]
            shared = scales[:, : min(tokens, scales.shape[1]), heads.start : heads.stop]
            numbers = self._scaling.dequantise(shared, codes[wanted])
            assert section.layers.start in layers
            chunk[section.layers.start][wanted] = narrow(numbers, chunk.dtype)

    def _parse(
        self, section: Section, layout: KVLayout, num_tokens: int
    ) -> tuple[NDArray[Any], Bytes]:
        heads = len(section.heads)
        scales_size, codes_size = self._section_sizes(layout, num_tokens, heads)
        if section.content.size != scales_size + codes_size:
            raise Corrupt(
                f"a section of {scales_size + codes_size} bytes, found {section.content.size}"
            )
        scales = section.content[:scales_size].view(self._scaling.scale_dtype)
        codes = section.content[scales_size:]
        planes = layout.num_planes
        return (
            scales.reshape(self._scaling.scales_shape(planes, num_tokens, heads)),
            codes.reshape(planes, num_tokens, heads, layout.head_dim),
        )

    def _section_sizes(self, layout: KVLayout, num_tokens: int, heads: int) -> tuple[int, int]:
        count = int(np.prod(self._scaling.scales_shape(layout.num_planes, num_tokens, heads)))
        itemsize = np.dtype(self._scaling.scale_dtype).itemsize
        return count * itemsize, layout.num_planes * num_tokens * heads * layout.head_dim

    def _header(self, layout: KVLayout) -> Header:
        return Header(codec=self.name, is_exact=False, section_heads=layout.num_kv_heads)
