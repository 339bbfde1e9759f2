"""What CacheGen learns of a model offline: how far deltas spread, and how often each symbol comes,
for each layer and channel (arXiv 2310.07240, section 5.2).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from kvd.codecs.base import Bytes
from kvd.codecs.kernels.reference_cachegen import NUM_SYMBOLS, TOTAL
from kvd.codecs.profile import canonical
from kvd.codecs.values import as_stored, largest_finite, scale_bits, to_int8, widen
from kvd.errors import InvalidRequest
from kvd.layout import KVLayout

# Tokens that share an anchor.
GROUP_TOKENS = 10

# Of a delta's standard deviation, for each third of the layers: early ones are kept finer.
BINS = (0.5, 1.0, 1.5)

# An int8 as a symbol.
SYMBOL_ZERO = 128

# Kinds of tokens: their tables differ.
DELTA = 0
ANCHOR = 1

Floats = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class CachegenProfile:
    """Steps of deltas, float32 [layers, planes, kv_heads, head_dim], and counts of symbols out of
    2^14, uint16 [2, layers, planes, kv_heads, head_dim, 256], none 0.
    """

    layout: KVLayout
    steps: Floats
    frequencies: NDArray[np.uint16]

    def __post_init__(self) -> None:
        shape = self.layout.shape(1)
        channels = (*shape[:2], *shape[3:])
        if self.steps.shape != channels or self.steps.dtype != np.float32:
            raise InvalidRequest(f"steps float32 {channels} expected, found {self.steps.shape}")
        if not np.all(np.isfinite(self.steps) & (self.steps >= 0)):
            raise InvalidRequest("a step is no positive number")
        if self.frequencies.shape != (2, *channels, NUM_SYMBOLS):
            raise InvalidRequest(f"tables of {channels} expected, found {self.frequencies.shape}")
        if np.any(self.frequencies == 0) or np.any(self.frequencies.sum(-1, np.int64) != TOTAL):
            raise InvalidRequest(f"counts of symbols from 1 up, {TOTAL} in all, expected")

    @cached_property
    def hash(self) -> bytes:
        """32 bytes of BLAKE2b over all that decoding depends on."""
        digest = blake2b(b"kvd.cachegen.1", digest_size=32)
        digest.update(canonical(self.layout).fingerprint)
        digest.update(self.steps.astype("<f4").tobytes())
        digest.update(self.frequencies.astype("<u2").tobytes())
        return digest.digest()

    def cumulative(self, layer: int) -> NDArray[np.uint16]:
        """What comes before each symbol: uint16 [2, channels, 257] of a layer's channels."""
        counts = self.frequencies[:, layer].reshape(2, -1, NUM_SYMBOLS)
        sums = np.zeros((*counts.shape[:2], NUM_SYMBOLS + 1), np.uint16)
        np.cumsum(counts, axis=-1, out=sums[..., 1:])
        return sums


def anchors(numbers: Floats) -> tuple[NDArray[np.uint16], NDArray[np.int8], Floats]:
    """The first token of each group, in 8 bits by its largest magnitude in each head: scales as
    they are stored, multiples, and what they stand for. `numbers`: [planes, tokens, heads, dim].
    """
    first = numbers[:, ::GROUP_TOKENS]
    bits = scale_bits(largest_finite(first, axis=(-1,)))
    multiples = to_int8(first, widen(bits)[..., None])
    return bits, multiples, multiples.astype(np.float32) * widen(bits)[..., None]


def deltas(numbers: Floats, anchored: Floats) -> Floats:
    """What is left of each token when its group's anchor is subtracted."""
    groups = np.arange(numbers.shape[1]) // GROUP_TOKENS
    with np.errstate(over="ignore"):
        left: Floats = numbers - anchored[:, groups]
    return left


def calibrate(
    chunks: Iterable[Bytes], layout: KVLayout, *, bins: Sequence[float] = BINS
) -> CachegenProfile:
    """The profile of a model from chunks of real text, each a whole number of tokens."""
    numbers = [
        np.nan_to_num(widen(as_stored(chunk, layout, chunk.size // layout.token_size)))
        for chunk in chunks
    ]
    thirds = np.arange(layout.num_layers) * len(bins) // layout.num_layers
    shape = layout.shape(1)
    steps = np.zeros((*shape[:2], *shape[3:]), np.float32)
    frequencies = np.zeros((2, *steps.shape, NUM_SYMBOLS), np.uint16)
    for layer in range(layout.num_layers):
        coarse = [anchors(chunk[layer]) for chunk in numbers]
        left = [
            deltas(chunk[layer], found[2]) for chunk, found in zip(numbers, coarse, strict=True)
        ]
        deviations = np.concatenate(left, axis=1).astype(np.float64).std(axis=1)
        steps[layer] = deviations * bins[thirds[layer]]
        symbols = [to_int8(delta, steps[layer][:, None]) for delta in left]
        frequencies[DELTA, layer] = _frequencies(symbols)
        frequencies[ANCHOR, layer] = _frequencies([found[1] for found in coarse])
    return CachegenProfile(layout=canonical(layout), steps=steps, frequencies=frequencies)


def _frequencies(symbols: Sequence[NDArray[np.int8]]) -> NDArray[np.uint16]:
    """Counts out of 2^14 for each channel of int8 [planes, tokens, heads, dim]. Neighbours share a
    little, so that what calibration missed by chance is not dear.
    """
    joined = np.concatenate(symbols, axis=1)
    planes, tokens, heads, dim = joined.shape
    channels = np.moveaxis(joined, 1, -1).reshape(-1, tokens).astype(np.int64) + SYMBOL_ZERO
    rows = np.arange(len(channels))[:, None] * NUM_SYMBOLS
    counts = np.bincount((rows + channels).ravel(), minlength=len(channels) * NUM_SYMBOLS)
    counts = counts.reshape(-1, NUM_SYMBOLS)
    padded = np.pad(counts, ((0, 0), (2, 2)))
    smooth = np.zeros_like(counts)
    for shift, weight in enumerate((1, 2, 8, 2, 1)):
        smooth += weight * padded[:, shift : shift + NUM_SYMBOLS]
    room = TOTAL - NUM_SYMBOLS
    shares: NDArray[np.int64] = 1 + smooth * room // smooth.sum(1, keepdims=True)
    shares[np.arange(len(shares)), shares.argmax(1)] += TOTAL - shares.sum(1)
    frequencies: NDArray[np.uint16] = shares.astype(np.uint16)
    return frequencies.reshape(planes, heads, dim, NUM_SYMBOLS)
