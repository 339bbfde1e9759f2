"""Warm: let Numba compile what a codec runs, before anybody waits for it. Seconds the first time on
a machine, half of one from the cache of Numba.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from kvd.codecs.base import Codec, Span
from kvd.codecs.profile import Level, Profile, Rope, canonical
from kvd.codecs.registry import open_codec, parse
from kvd.errors import Unsupported
from kvd.layout import KVLayout

# Small, and with all that a chunk may have: two tokens beyond a group, heads, both planes.
_LAYOUT = KVLayout(
    model="warm",
    revision="",
    dtype="bfloat16",
    num_layers=1,
    num_kv_heads=2,
    head_dim=16,
)
_NUM_TOKENS = 34
_LEVELS = (
    Level(name="plain", scale=1.0),
    Level(name="dithered", scale=1.0, is_dithered=True),
    Level(name="head", scale=1.0, transform="head"),
)


def warm(spec: str) -> None:
    """Encode and decode a chunk of no meaning with the codec of a spec, at each kind of level."""
    name, _ = parse(spec)
    specs = [f"{name}:{level.name}" for level in _LEVELS] if name == "kvq" else [spec]
    for each in specs:
        codec = open_codec(each, _Book())
        for dtype in ("bfloat16", "float16"):
            try:
                _run(codec, replace(_LAYOUT, dtype=dtype))
            except Unsupported:
                # It does not keep this dtype, or needs a profile of its own kind.
                continue


def _run(codec: Codec, layout: KVLayout) -> None:
    span = Span(start=0, num_tokens=_NUM_TOKENS)
    chunk = np.zeros(layout.size(_NUM_TOKENS), np.uint8)
    # Numbers that differ, all of them finite.
    chunk.view(np.uint16)[:] = 0x3C00 + np.arange(chunk.size // 2) % 1024
    out = np.empty(codec.size_bytes_max(layout, _NUM_TOKENS), np.uint8)
    size = codec.encode(chunk, layout, span, out)
    codec.decode(out[:size], layout, span, chunk)


class _Book:
    """A profile that says nothing, of whatever layout."""

    def for_layout(self, layout: KVLayout) -> Profile:
        shape = (layout.num_layers, layout.num_planes, layout.num_kv_heads, layout.head_dim)
        channels = layout.num_planes * layout.head_dim
        basis = np.eye(channels, dtype=np.float32)
        groups = (layout.num_layers, layout.num_kv_heads, 1, 1)
        return Profile(
            hash=bytes(32),
            layout=canonical(layout),
            rope=Rope(frequencies=np.ones(layout.head_dim // 2)),
            means=np.zeros(shape, np.float32),
            steps=np.full(shape, 0.125, np.float32),
            levels=_LEVELS,
            bases={"head": np.tile(basis, groups)},
            scores=np.zeros((*shape[:1], *shape[2:3], layout.head_dim + 1), np.float32),
        )

    def by_hash(self, hash: bytes) -> Profile:
        return self.for_layout(_LAYOUT)
