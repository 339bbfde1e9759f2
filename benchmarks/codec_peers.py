"""Published codecs as functions of KV: what they would give back, and at how many bits a value.

Written from the papers' descriptions, for comparison with ours; nothing is stored. `kv` is float32
`[layers, 2, tokens, kv_heads, head_dim]`, keys and values as the engine caches them; all side
information is counted.

    lmcache_cachegen   CacheGen as LMCache ships it: no deltas, a table in every chunk
    kivi               KIVI, arXiv 2402.02750: keys by channel, values by token
    turboquant         TurboQuant, arXiv 2504.19874, its scalar part: rotate, then Lloyd-Max
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Outcome = tuple[Floats, float]

CHUNK_TOKENS = 256
HALF_BITS = 16

# LMCache: 32 levels in the first layers of keys and of values, 16 in the others.
FINE_LAYERS = (10, 2)
FINE_BINS, COARSE_BINS = 32, 16
# A table of 33 entries of 16 bits and the length of its stream, for each layer and channel.
TABLE_ENTRIES = 33
TABLE_BITS = TABLE_ENTRIES * 16 + 32

KIVI_GROUP = 32

LLOYD_ROUNDS = 500


def lmcache_cachegen(kv: Floats) -> Outcome:
    """Each token of a layer by its largest magnitude over all channels, in 31 or 15 steps; symbols
    entropy-coded by the chunk's own counts for each layer and channel.
    """
    found = np.empty_like(kv)
    bits = 0.0
    for start in range(0, kv.shape[2], CHUNK_TOKENS):
        for layer in range(kv.shape[0]):
            for plane in range(2):
                where = np.s_[layer, plane, start : start + CHUNK_TOKENS]
                bins = FINE_BINS if layer < FINE_LAYERS[plane] else COARSE_BINS
                found[where], cost = _lmcache_plane(kv[where], bins)
                bits += cost
    return found, bits / kv.size


def _lmcache_plane(values: Floats, bins: int) -> tuple[Floats, float]:
    tokens = len(values)
    flat = values.reshape(tokens, -1)
    steps = bins // 2 - 1
    largest = _half(np.abs(flat).max(1, keepdims=True))
    scales = np.where(largest > 0, largest, 1) / steps
    symbols = np.clip(np.rint(flat / scales), -steps, steps)
    bits = float(HALF_BITS * tokens)
    for channel in symbols.T.astype(np.int64) + steps:
        counts = np.bincount(channel, minlength=TABLE_ENTRIES - 1)
        # Out of 2^16, no symbol below 1.
        shares = 1 + counts * (65536 - TABLE_ENTRIES) // tokens
        cost = float(counts @ (16 - np.log2(shares)))
        bits += 8 * math.ceil(cost / 8) + TABLE_BITS
    return (symbols * scales).reshape(values.shape).astype(np.float32), bits


def kivi(kv: Floats, num_bits: int) -> Outcome:
    """Keys in groups of 32 tokens of one channel, values in groups of 32 channels of one token;
    each group has a scale and a zero in float16.
    """
    layers, _, tokens, heads, dim = kv.shape
    keys = np.empty_like(kv[:, 0])
    bits = 0.0
    for start in range(0, tokens, KIVI_GROUP):
        where = np.s_[:, start : start + KIVI_GROUP]
        keys[where] = _asymmetric(kv[:, 0][where], 1, num_bits)
        bits += layers * heads * dim * 2 * HALF_BITS
    values = np.empty_like(kv[:, 1])
    flat, target = kv[:, 1].reshape(layers, tokens, -1), values.reshape(layers, tokens, -1)
    for start in range(0, heads * dim, KIVI_GROUP):
        group = np.s_[:, :, start : start + KIVI_GROUP]
        target[group] = _asymmetric(flat[group], 2, num_bits)
        bits += layers * tokens * 2 * HALF_BITS
    return np.stack([keys, values], axis=1), num_bits + bits / kv.size


def _asymmetric(values: Floats, axis: int, num_bits: int) -> Floats:
    low = values.min(axis, keepdims=True)
    steps = (1 << num_bits) - 1
    scales = _half((values.max(axis, keepdims=True) - low) / steps)
    zeros = _half(low)
    symbols = np.clip(np.rint((values - zeros) / np.where(scales > 0, scales, 1)), 0, steps)
    return (symbols * scales + zeros).astype(np.float32)


def turboquant(kv: Floats, num_bits: int) -> Outcome:
    """Each vector by its norm, in float16, and a rotation that all share: a Hadamard matrix with
    random signs. Its coordinates are nearly normal, and quantised as if they were.
    """
    dim = kv.shape[-1]
    rotation = _rotation(dim)
    norms = _half(np.linalg.norm(kv, axis=-1, keepdims=True))
    unit = kv / np.where(norms > 0, norms, 1) * np.float32(math.sqrt(dim))
    levels = lloyd_max(1 << num_bits)
    borders = ((levels[1:] + levels[:-1]) / 2).astype(np.float32)
    quantised = levels.astype(np.float32)[np.searchsorted(borders, unit @ rotation.T)]
    found = quantised @ rotation * norms / np.float32(math.sqrt(dim))
    return found.astype(np.float32), num_bits + HALF_BITS / dim


@cache
def lloyd_max(count: int) -> NDArray[np.float64]:
    """The levels that quantise a standard normal number with the least mean square error (Max
    1960): each the mean of what lies closest to it.
    """
    levels = np.linspace(-2, 2, count)
    for _ in range(LLOYD_ROUNDS):
        borders = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
        densities = np.exp(-(borders**2) / 2) / math.sqrt(2 * math.pi)
        below = np.array([0.5 * (1 + math.erf(border / math.sqrt(2))) for border in borders])
        levels = -np.diff(densities) / np.diff(below)
    return levels


@cache
def _rotation(dim: int) -> Floats:
    assert dim & (dim - 1) == 0, f"a head dim that is a power of two expected, found {dim}"
    matrix = np.ones((1, 1))
    while len(matrix) < dim:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    signs = np.random.default_rng(0).choice([-1.0, 1.0], dim)
    return (matrix * signs / math.sqrt(dim)).astype(np.float32)


def _half(numbers: Floats) -> Floats:
    """Numbers as they come back from float16, the largest finite one at most."""
    largest = float(np.finfo(np.float16).max)
    halves: NDArray[np.float16] = np.clip(numbers, -largest, largest).astype(np.float16)
    return halves.astype(np.float32)
