"""raw: the chunk's own bytes, without a container, so that a client can map them.

What keeps them keeps their checksum too: only their size can be wrong here.
"""

from __future__ import annotations

import numpy as np

from kvd.codecs.base import WHOLE, Bytes, Part, Span
from kvd.codecs.values import as_layers
from kvd.errors import Corrupt
from kvd.layout import KVLayout


class Raw:
    """The codec that changes nothing."""

    name = "raw"
    is_exact = True

    def size_bytes_max(self, layout: KVLayout, num_tokens: int) -> int:
        return layout.size(num_tokens)

    def encode(self, kv: Bytes, layout: KVLayout, span: Span, out: Bytes) -> int:
        assert kv.size == layout.size(span.num_tokens)
        out[: kv.size] = kv
        return kv.size

    def decode(
        self, bitstream: Bytes, layout: KVLayout, span: Span, out: Bytes, part: Part = WHOLE
    ) -> None:
        size = layout.size(span.num_tokens)
        if bitstream.size < size:
            raise Corrupt(f"a chunk of {size} bytes, found {bitstream.size}")
        layers, heads, tokens = part.within(layout, span.num_tokens)
        wanted = np.s_[layers.start : layers.stop, :, :tokens, heads.start : heads.stop, :]
        dtype = f"V{layout.itemsize}"
        source = as_layers(bitstream[:size], layout, span.num_tokens, dtype)
        as_layers(out, layout, span.num_tokens, dtype)[wanted] = source[wanted]
