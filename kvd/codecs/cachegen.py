"""cachegen/1: the codec of CacheGen (arXiv 2310.07240, section 5), for comparison.

Ten tokens share an anchor, their first, kept in 8 bits; the others are differences from it, in
steps that grow with the layer; both are entropy-coded by tables for each layer and channel from a
profile. Not from the paper: rANS instead of an arithmetic coder (the same rate), symbols of 8 bits
with larger ones cut off, scales of anchors in bfloat16 for each head. NaNs become 0.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kvd.codecs.base import WHOLE, Bytes, Part, Span
from kvd.codecs.bitstream import (
    Header,
    Section,
    read_header,
    read_sections,
    total_size,
    write_bitstream,
)
from kvd.codecs.cachegen_profile import (
    GROUP_TOKENS,
    SYMBOL_ZERO,
    CachegenProfile,
    anchors,
    deltas,
)
from kvd.codecs.kernels import reference_cachegen as reference
from kvd.codecs.kernels.reference_cachegen import NUM_LANES, STATE_MIN
from kvd.codecs.values import as_stored, narrow, to_int8, widen
from kvd.errors import Corrupt, Unsupported
from kvd.layout import KVLayout

NAME = "cachegen/1"

_INFINITY_BITS = 0x7F80


class Profiles(Protocol):
    """Where profiles are found; those of other codecs may stand there too."""

    def for_layout(self, layout: KVLayout) -> Any:
        """What is used to encode chunks of `layout`, None if there is nothing."""
        ...

    def by_hash(self, profile_hash: bytes) -> Any:
        """The profile that a bitstream names, None if it is not here."""
        ...


class Cachegen:
    """The codec with the profiles it needs. A part of the heads costs all of them."""

    name = NAME
    is_exact = False

    def __init__(self, profiles: Profiles, *, with_numba: bool = True) -> None:
        self._profiles = profiles
        self._kernels = fastest_kernels() if with_numba else reference

    def size_bytes_max(self, layout: KVLayout, num_tokens: int) -> int:
        channels = layout.num_planes * layout.num_kv_heads * layout.head_dim
        scales = layout.num_planes * _num_groups(num_tokens) * layout.num_kv_heads
        # A symbol gives one word at most.
        section = 2 * scales + 4 * min(NUM_LANES, channels) + 2 * channels * num_tokens
        header = _header(layout, bytes(32))
        return total_size(header, layout, [section] * layout.num_layers)

    def encode(self, kv: Bytes, layout: KVLayout, span: Span, out: Bytes) -> int:
        chunk = as_stored(kv, layout, span.num_tokens)
        assert out.size >= self.size_bytes_max(layout, span.num_tokens)
        profile = _checked(self._profiles.for_layout(layout), layout)

        def write_section(layers: range, _heads: range, target: Bytes) -> int:
            content = self._encode_layer(chunk[layers.start], profile, layers.start)
            target[: content.size] = content
            return content.size

        return write_bitstream(_header(layout, profile.hash), layout, span, out, write_section)

    def decode(
        self, bitstream: Bytes, layout: KVLayout, span: Span, out: Bytes, part: Part = WHOLE
    ) -> None:
        chunk = as_stored(out, layout, span.num_tokens)
        header = read_header(bitstream)
        if header != _header(layout, header.profile):
            raise Corrupt(f"{NAME} expected, the bitstream is of {header.codec} or another shape")
        profile = _checked(self._profiles.by_hash(header.profile), layout)
        _, heads, tokens = part.within(layout, span.num_tokens)
        for section in read_sections(bitstream, header, layout, span, part):
            numbers = self._decode_layer(section, profile, span.num_tokens, tokens)
            wanted = np.s_[:, :tokens, heads.start : heads.stop]
            chunk[section.layers.start][wanted] = narrow(numbers[wanted], chunk.dtype)

    def _encode_layer(self, values: NDArray[Any], profile: CachegenProfile, layer: int) -> Bytes:
        numbers = np.nan_to_num(widen(values))
        scales, multiples, anchored = anchors(numbers)
        quantised = to_int8(deltas(numbers, anchored), profile.steps[layer][:, None])
        quantised[:, ::GROUP_TOKENS] = multiples
        by_token = np.moveaxis(quantised, 1, 0).reshape(numbers.shape[1], -1)
        symbols = (by_token.astype(np.int16) + SYMBOL_ZERO).astype(np.uint8)
        states, words = self._kernels.encode(
            symbols, _kinds(numbers.shape[1]), profile.cumulative(layer)
        )
        parts = (scales.astype("<u2"), states.astype("<u4"), words.astype("<u2"))
        return np.concatenate([part.reshape(-1).view(np.uint8) for part in parts])

    def _decode_layer(
        self, section: Section, profile: CachegenProfile, num_tokens: int, wanted: int
    ) -> NDArray[np.float32]:
        """The numbers of the first `wanted` of `num_tokens` tokens."""
        layer = section.layers.start
        steps = profile.steps[layer]
        planes, heads, dim = steps.shape
        scales, states, words = _parse(section.content, steps.shape, num_tokens)
        symbols = self._kernels.decode(
            states,
            words,
            _kinds(wanted),
            profile.cumulative(layer),
            is_whole=wanted == num_tokens,
        )
        multiples = np.moveaxis(symbols.reshape(wanted, planes, heads, dim), 0, 1)
        quantised = multiples.astype(np.float32) - np.float32(SYMBOL_ZERO)
        groups = np.arange(wanted) // GROUP_TOKENS
        anchored = quantised[:, ::GROUP_TOKENS] * widen(scales)[:, : _num_groups(wanted), :, None]
        with np.errstate(over="ignore", invalid="ignore"):
            numbers: NDArray[np.float32] = anchored[:, groups] + quantised * steps[:, None]
        numbers[:, ::GROUP_TOKENS] = anchored
        return numbers


@cache
def fastest_kernels() -> ModuleType:
    """Numba's, or numpy's where Numba is not installed."""
    try:
        from kvd.codecs.kernels import numba_cachegen as found
    except ImportError:
        return reference
    return found


def _parse(
    content: Bytes, shape: tuple[int, ...], num_tokens: int
) -> tuple[NDArray[np.uint16], NDArray[np.uint64], NDArray[np.uint16]]:
    """Scales uint16 [planes, groups, heads], states and words of a section. Raises `Corrupt`."""
    planes, heads, dim = shape
    groups = _num_groups(num_tokens)
    scales_end = 2 * planes * groups * heads
    states_end = scales_end + 4 * min(NUM_LANES, planes * heads * dim)
    if content.size < states_end or (content.size - states_end) % 2:
        raise Corrupt(f"a section of {content.size} bytes, {states_end} and whole words expected")
    scales = content[:scales_end].view("<u2").reshape(planes, groups, heads)
    if scales.max() >= _INFINITY_BITS:
        raise Corrupt(f"a scale of bits {scales.max():#x} is no positive number")
    states = content[scales_end:states_end].view("<u4").astype(np.uint64)
    if states.min() < STATE_MIN:
        raise Corrupt(f"a state of {states.min()}, at least {STATE_MIN} expected")
    return scales, states, content[states_end:].view("<u2")


def _kinds(num_tokens: int) -> Bytes:
    """Which tokens are anchors."""
    kinds: Bytes = (np.arange(num_tokens) % GROUP_TOKENS == 0).astype(np.uint8)
    return kinds


def _num_groups(num_tokens: int) -> int:
    return -(-num_tokens // GROUP_TOKENS)


def _header(layout: KVLayout, profile: bytes) -> Header:
    return Header(codec=NAME, is_exact=False, profile=profile, section_heads=layout.num_kv_heads)


def _checked(profile: object, layout: KVLayout) -> CachegenProfile:
    if not isinstance(profile, CachegenProfile):
        raise Unsupported(f"no profile of {NAME} for model {layout.model!r}")
    shape = layout.shape(1)
    if profile.steps.shape != (*shape[:2], *shape[3:]):
        raise Unsupported(f"the profile of {NAME} is of another shape than the layout")
    return profile
