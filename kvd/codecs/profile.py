"""Profile: what a lossy codec knows of a model, calibrated once, named by its hash.

Means, steps, bases and the position encoding never stand in a bitstream; the hash of their profile
does, so that bytes are decoded with what they were encoded with or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kvd.layout import CHUNK_TOKENS, KVLayout

Transform = Literal["none", "head", "layer", "cross"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """A rotary position encoding: frequencies `float64 [rotary_dim / 2]` in radians a token, on
    dims `offset` to `offset + rotary_dim` of each key head. Pairs are (i, i + rotary_dim / 2) in
    `half` style (neox) and (2 i, 2 i + 1) in `pairs` style (gptj). Empty: keys are not rotated.
    """

    frequencies: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    style: Literal["half", "pairs"] = "half"
    offset: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """How finely a chunk is kept: steps are the profile's times `scale`."""

    name: str
    scale: float
    transform: Transform = "none"
    is_dithered: bool = False
    section_layers: int = 1


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What is known of a model. Arrays by `[layers, planes, kv_heads, head_dim]`, keys un-rotated.

    means     float32, what is subtracted before quantisation
    steps     float32, of a level of scale 1
    bases     by transform: float32 [layer groups, head groups, channels, channels], orthonormal
              rows; a channel is (layer, plane, head, dim) of its section in C order, after
              subtraction of its mean and division by its step
    scores    float32 [layers, kv_heads, head_dim + 1], how much a token matters by its key: weights
              and a constant (attention_score.py); empty where nothing is known
    """

    hash: bytes
    layout: KVLayout
    rope: Rope
    means: NDArray[np.float32]
    steps: NDArray[np.float32]
    levels: tuple[Level, ...]
    bases: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    scores: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))


def canonical(layout: KVLayout) -> KVLayout:
    """The layout that a profile is filed under: tenants, groups and chunk sizes share it, and
    dtypes of 16 bits and more too.
    """
    return replace(layout, salt="", group="", dtype="bfloat16", chunk_tokens=CHUNK_TOKENS)
