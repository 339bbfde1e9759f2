"""Rotary position encoding as codecs see it: sines and cosines of a chunk's positions.

Keys are un-rotated before they are quantised: a rotated channel has no mean to subtract and no
scale of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from kvd.codecs.base import Span
from kvd.codecs.profile import Rope


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotation:
    """A rope at the tokens of a chunk. `cos`, `sin`: float32 [tokens, pairs]; pair i is of dims
    `offset + i * stride` and that `reach` further.
    """

    cos: NDArray[np.float32]
    sin: NDArray[np.float32]
    offset: int
    stride: int
    reach: int

    @property
    def num_pairs(self) -> int:
        return int(self.cos.shape[1])

    def first(self, num_tokens: int) -> Rotation:
        """The rope at the first tokens."""
        return replace(self, cos=self.cos[:num_tokens], sin=self.sin[:num_tokens])

    def pairs(self) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """The dims that turn together."""
        first = self.offset + self.stride * np.arange(self.num_pairs)
        return first, first + self.reach


def rotation(rope: Rope, span: Span) -> Rotation:
    """Angles in float64, their sines rounded once to float32."""
    num_pairs = len(rope.frequencies)
    positions = span.start + np.arange(span.num_tokens, dtype=np.float64)
    angles = positions[:, None] * rope.frequencies[None, :]
    is_half = rope.style == "half"
    return Rotation(
        cos=np.cos(angles).astype(np.float32),
        sin=np.sin(angles).astype(np.float32),
        offset=rope.offset,
        stride=1 if is_half else 2,
        reach=num_pairs if is_half else 1,
    )


def rotate(keys: NDArray[np.float32], by: Rotation) -> NDArray[np.float32]:
    """`float32 [..., tokens, heads, head_dim]` at their positions. Products are rounded before they
    are added: a fused multiply would give other bits.
    """
    return _turned(keys, by, by.sin)


def unrotate(keys: NDArray[np.float32], by: Rotation) -> NDArray[np.float32]:
    """The inverse of `rotate`, but for rounding."""
    return _turned(keys, by, -by.sin)


def _turned(
    keys: NDArray[np.float32], by: Rotation, sine: NDArray[np.float32]
) -> NDArray[np.float32]:
    first, second = by.pairs()
    cos, sin = by.cos[:, None, :], sine[:, None, :]
    turned = keys.copy()
    turned[..., first] = keys[..., first] * cos - keys[..., second] * sin
    turned[..., second] = keys[..., second] * cos + keys[..., first] * sin
    return turned
