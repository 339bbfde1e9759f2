"""What `kvq` computes with: the roles of its kernels, and the values that they share.

A section is numbers `[tokens, channels]`; a channel is (layer, plane, head, dim) in C order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol, cast, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from kvd.codecs.rope import Rotation

# Tokens of a group: each is a lane of the coder, all share one stream of words.
LANES = 32
# The coder's states are 2^16 at least; below, a word comes in.
STATE_BITS = 16
# The largest magnitude of a symbol. What does not fit is kept as a raw token.
SYMBOL_MAX = 32767


@dataclass(frozen=True, slots=True, kw_only=True)
class Scales:
    """How a chunk's elements become numbers of about 1. Arrays float32 [layers, planes, kv_heads,
    head_dim].
    """

    means: NDArray[np.float32]
    steps: NDArray[np.float32]
    rotation: Rotation
    is_half: bool

    @property
    def exponent_mask(self) -> int:
        """The exponent of an element; all ones in what is not finite."""
        return 0x7C00 if self.is_half else 0x7F80


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Layers and heads of a chunk."""

    layers: range
    heads: range


@dataclass(frozen=True, slots=True, kw_only=True)
class Dither:
    """What is added before rounding and subtracted after it: in [-0.5, 0.5), a hash of the
    channel's index in the chunk and of the token's position. `rows`: uint32, the index of the first
    channel of each (layer, plane, head) of a section.
    """

    rows: NDArray[np.uint32]
    start: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Coded:
    """Symbols after entropy coding. `states` uint32 [lanes], `words` uint16, `escapes` int16."""

    states: NDArray[np.uint32]
    words: NDArray[np.uint16]
    escapes: NDArray[np.int16]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A section: where it stands in a bitstream, what it holds, what of that is wanted, and the
    basis behind it, float32 [channels, channels], if its level has one.
    """

    offset: int
    size: int
    section: Window
    wanted: Window
    basis: NDArray[np.float32] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """Tokens of a chunk: how many it has, how many of the first are wanted, and the position of the
    first. With a dither or without.
    """

    count: int
    wanted: int
    start: int
    is_dithered: bool


class Kernels(Protocol):
    """The same numbers from each implementation, bit for bit."""

    def normalise(
        self, kv: NDArray[np.uint16], window: Window, scales: Scales, out: NDArray[np.float32]
    ) -> NDArray[np.bool_]:
        """Un-rotate, subtract means, divide by steps, into `out` [tokens, channels]; which tokens
        are finite. `kv` is a whole chunk. What stands in `out` for the other tokens is 0.
        """
        ...

    def quantise(
        self, numbers: NDArray[np.float32], classes: NDArray[np.uint8], dither: Dither | None
    ) -> NDArray[np.int16]:
        """The symbols; 0 for raw tokens. A token whose symbols do not fit becomes raw, in
        `classes`.
        """
        ...

    def choose_tables(
        self, symbols: NDArray[np.int16], classes: NDArray[np.uint8]
    ) -> NDArray[np.uint8]:
        """The cheapest table of each channel, the lower of equals; 0 where every symbol is 0."""
        ...

    def encode(
        self, symbols: NDArray[np.int16], classes: NDArray[np.uint8], ids: NDArray[np.uint8]
    ) -> Coded:
        """Code the symbols with the tables chosen."""
        ...

    def decode(
        self, coded: Coded, classes: NDArray[np.uint8], ids: NDArray[np.uint8], num_tokens: int
    ) -> NDArray[np.int16]:
        """The symbols of the first tokens. Raises `Corrupt` where the stream does not fit."""
        ...

    def dequantise(
        self, symbols: NDArray[np.int16], classes: NDArray[np.uint8], dither: Dither | None
    ) -> NDArray[np.float32]:
        """What the symbols stand for, as `normalise` gives it."""
        ...

    def restore(
        self,
        numbers: NDArray[np.float32],
        section: Window,
        part: Window,
        scales: Scales,
        raws: dict[int, NDArray[np.uint16]],
        kv: NDArray[np.uint16],
    ) -> None:
        """The inverse of `normalise` for a part of a section, into `kv`. `raws`: what stands in
        the chunk for the tokens that are not coded, by token.
        """
        ...


@runtime_checkable
class SectionKernels(Protocol):
    """Kernels that take sections as they stand, many in a call."""

    def restore_sections(
        self,
        bitstream: NDArray[np.uint8],
        places: Sequence[Place],
        tokens: Tokens,
        scales: Scales,
        kv: NDArray[np.uint16],
    ) -> int | None:
        """What is wanted of sections, verified before, into `kv`; the index of one that is corrupt,
        or None.
        """
        ...


@cache
def kernels() -> Kernels:
    """The fastest that this machine has: Numba's, or numpy's where Numba is not installed."""
    try:
        from kvd.codecs.kernels import numba_kvq as found
    except ImportError:
        from kvd.codecs.kernels import reference as found  # type: ignore[no-redef]
    return cast(Kernels, found)
