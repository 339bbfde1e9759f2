"""Codecs that keep nothing but what `pattern` chunks are made of: 256 bytes a layer. One is exact,
the other takes the lowest bit of every byte. What they decode is wrong unless all else is right.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np

from kvd.codecs import registry
from kvd.codecs.base import WHOLE, Bytes, Part, Span
from kvd.codecs.bitstream import Header, body_offset, read_header, read_sections, write_head
from kvd.errors import Corrupt, Unsupported
from kvd.layout import KVLayout

ROW = 256
MASK = 0xFE


class Toy:
    """`level` is "lossy" or None."""

    def __init__(self, level: str | None) -> None:
        self.is_exact = level != "lossy"
        self.name = "toy/1" if self.is_exact else "toy-lossy/1"
        self._mask = 0xFF if self.is_exact else MASK

    def size_bytes_max(self, layout: KVLayout, num_tokens: int) -> int:
        return body_offset(self._header(layout), layout) + layout.num_layers * ROW

    def encode(self, kv: Bytes, layout: KVLayout, span: Span, out: Bytes) -> int:
        layers = kv.reshape(layout.num_layers, -1)
        if layers.shape[1] % ROW:
            raise Unsupported("layers of whole rows expected")
        header = self._header(layout)
        at = body_offset(header, layout)
        for index, layer in enumerate(layers):
            row = layer[:ROW] & self._mask
            assert np.array_equal(_layer(row, index, layer.size) & self._mask, layer & self._mask)
            out[at + index * ROW : at + (index + 1) * ROW] = row
        return write_head(header, layout, span, [ROW] * layout.num_layers, out)

    def decode(
        self, bitstream: Bytes, layout: KVLayout, span: Span, out: Bytes, part: Part = WHOLE
    ) -> None:
        header = read_header(bitstream)
        layers = out.reshape(layout.num_layers, -1)
        for section in read_sections(bitstream, header, layout, span, part):
            if section.content.size != ROW:
                raise Corrupt(f"{ROW} bytes expected, found {section.content.size}")
            index = section.layers.start
            layers[index] = _layer(section.content, index, layers.shape[1]) & self._mask

    def _header(self, layout: KVLayout) -> Header:
        heads = layout.num_kv_heads
        return Header(codec=self.name, is_exact=self.is_exact, section_heads=heads)


@contextmanager
def toy_codecs() -> Iterator[None]:
    """`toy` and `toy:lossy` are among the codecs."""
    makers = {"toy": lambda level, _: Toy(level), "toy-lossy": lambda *_: Toy("lossy")}
    # In the dict itself: a test that puts another one in its place gives this one back.
    with mock.patch.dict(registry._OWN, makers):
        yield


def _layer(row: Bytes, index: int, size: int) -> Bytes:
    """A layer of `tests.crash_client.pattern` by its first row."""
    first = index * (size // ROW)
    marks = (np.arange(first, first + size // ROW, dtype=np.uint32) * 167).astype(np.uint8)
    return (row[None, :] ^ marks[0] ^ marks[:, None]).reshape(-1)
