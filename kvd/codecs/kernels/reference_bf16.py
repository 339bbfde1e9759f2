"""The reference of bf16/1: one plane of one layer, in numpy. docs/formats/bitstream.md.

A value rotated left by one bit is two bytes: the high one holds the exponent, which is worth coding
(about 2.6 bits), the low one the mantissa and the sign, which are noise. The exponents of a channel
lie around the channel's scale, so its mean is subtracted; then one Huffman table serves a plane.
Tokens are dealt to four lanes, coded apart, so that four of them can be decoded side by side.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

NUM_LANES = 4
CODE_BITS_MAX = 11
NUM_SYMBOLS = 256

# What subtracting a channel's offset leaves is around this.
CENTER = 128
OFFSET_MAX = 15

# What `encode` writes behind its last byte.
SLACK = 0

U8 = NDArray[np.uint8]
U16 = NDArray[np.uint16]
I64 = NDArray[np.int64]


def split(values: U16, shift: int) -> tuple[int, U8, U8, U8, I64]:
    """What a plane, uint16 [tokens, channels], is coded as: base and offsets of its channels in
    steps of `1 << shift`, symbols and low bytes, uint8 [tokens, channels], and how often each
    symbol comes.
    """
    rotated = (values << 1) | (values >> 15)
    highs = (rotated >> 8).astype(np.uint8)
    base, offsets = _channel_offsets(highs, shift)
    symbols = highs - centers_of(base, offsets, shift)
    counts = np.bincount(symbols.ravel(), minlength=NUM_SYMBOLS).astype(np.int64)
    return base, offsets, symbols, rotated.astype(np.uint8), counts


def _channel_offsets(highs: U8, shift: int) -> tuple[int, U8]:
    """A base and offsets whose sum is close to the mean of each channel's high bytes."""
    tokens = len(highs)
    means = (2 * highs.sum(0, dtype=np.int64) + tokens) // (2 * tokens)
    base = max(0, int(means.max()) - (OFFSET_MAX << shift))
    offsets = (np.maximum(means - base, 0) + ((1 << shift) >> 1)) >> shift
    return base, np.minimum(offsets, OFFSET_MAX).astype(np.uint8)


def centers_of(base: int, offsets: U8, shift: int) -> U8:
    """What is subtracted from the high bytes of each channel, modulo 256."""
    return ((base - CENTER + (offsets.astype(np.int64) << shift)) & 255).astype(np.uint8)


def code_lengths(counts: I64) -> U8:
    """The lengths of an optimal prefix code for `counts` without a code above `CODE_BITS_MAX`
    bits: package-merge (Larmore, Hirschberg 1990). Symbols that never occur have 0. There are two
    codes or more: where one symbol occurs, its neighbour has a code as well.
    """
    lengths = np.zeros(NUM_SYMBOLS, np.uint8)
    used = 0
    for symbol in range(NUM_SYMBOLS):
        used += counts[symbol] > 0
    order = np.argsort(counts, kind="mergesort")[NUM_SYMBOLS - used :]
    if used == 1:
        lengths[order[0]] = 1
        lengths[order[0] ^ 1] = 1
        return lengths
    # Of each round: how heavy its coins are, and which of them are symbols. The other coins are
    # pairs of the round before.
    weights = np.zeros(2 * used, np.int64)
    merged = np.zeros(2 * used, np.int64)
    is_symbol = np.zeros((CODE_BITS_MAX, 2 * used), np.bool_)
    size = 0
    for depth in range(CODE_BITS_MAX):
        pairs = size // 2
        leaf = pair = 0
        while leaf < used or pair < pairs:
            heavy = weights[2 * pair] + weights[2 * pair + 1] if pair < pairs else -1
            takes_leaf = leaf < used and (pair == pairs or counts[order[leaf]] <= heavy)
            is_symbol[depth, leaf + pair] = takes_leaf
            merged[leaf + pair] = counts[order[leaf]] if takes_leaf else heavy
            leaf += takes_leaf
            pair += not takes_leaf
        size = leaf + pair
        weights[:size] = merged[:size]
    # The lightest 2 n - 2 coins of the last round, and what they are made of.
    wanted = 2 * used - 2
    for depth in range(CODE_BITS_MAX - 1, -1, -1):
        leaves = 0
        for coin in range(wanted):
            leaves += is_symbol[depth, coin]
        for leaf in range(leaves):
            lengths[order[leaf]] += 1
        wanted = 2 * (wanted - leaves)
    return lengths


def codes_of(lengths: U8) -> U16:
    """Canonical codes, shorter ones first, then by symbol; bits reversed, as a stream that is read
    from its lowest bit wants them.
    """
    codes = np.zeros(NUM_SYMBOLS, np.uint16)
    code = 0
    for bits in range(1, CODE_BITS_MAX + 1):
        for symbol in range(NUM_SYMBOLS):
            if lengths[symbol] == bits:
                reverse = 0
                for bit in range(bits):
                    reverse |= ((code >> bit) & 1) << (bits - 1 - bit)
                codes[symbol] = reverse
                code += 1
        code <<= 1
    return codes


def encode(symbols: U8, lengths: U8, out: U8) -> I64:
    """Write the lanes, one after another, to the beginning of `out`; their sizes."""
    codes = codes_of(lengths)
    lanes = [_encode_lane(symbols[lane::NUM_LANES].ravel(), lengths, codes) for lane in range(4)]
    content = np.concatenate(lanes)
    out[: content.size] = content
    return np.array([lane.size for lane in lanes], np.int64)


def decode(
    content: U8, bounds: I64, lengths: U8, lows: U8, centers: U8, first: int, out: U16
) -> I64:
    """Fill `out`, uint16 [tokens, channels], with the values of the first tokens and the channels
    from `first` on. `bounds` says where in `content` the lanes stand, one after another; `lows` has
    all low bytes, uint8 [tokens, channels]. How many bits each lane took; where one took more than
    it has, `out` is as it was.
    """
    tokens, width = out.shape
    symbols = np.zeros((tokens, centers.size), np.uint8)
    bits = np.zeros(NUM_LANES, np.int64)
    for lane in range(NUM_LANES):
        rows = symbols[lane::NUM_LANES]
        found, bits[lane] = _decode_lane(
            content[bounds[lane] : bounds[lane + 1]], rows.size, lengths
        )
        rows[:] = found.reshape(rows.shape)
    if np.any(bits > 8 * np.diff(bounds)):
        return bits
    highs = (symbols + centers)[:, first : first + width]
    rotated = (highs.astype(np.uint16) << 8) | lows[:tokens, first : first + width]
    out[:] = (rotated >> 1) | (rotated << 15)
    return bits


def _encode_lane(symbols: U8, lengths: U8, codes: U16) -> U8:
    """The codes one after another, from the lowest bit of each byte up; the last bits are 0."""
    sizes = lengths[symbols].astype(np.int64)
    starts = np.cumsum(sizes) - sizes
    bits = np.zeros(int(sizes.sum()), np.uint8)
    for bit in range(CODE_BITS_MAX):
        has = sizes > bit
        bits[starts[has] + bit] = (codes[symbols[has]] >> bit) & 1
    return np.packbits(bits, bitorder="little")


def _decode_lane(lane: U8, count: int, lengths: U8) -> tuple[U8, int]:
    """`count` symbols, and how many bits they took, at least one more than there are where the lane
    ends too soon.
    """
    codes = codes_of(lengths)
    table = np.zeros(1 << CODE_BITS_MAX, np.uint8)
    for symbol in np.nonzero(lengths)[0]:
        table[codes[symbol] :: 1 << int(lengths[symbol])] = symbol
    bits = np.unpackbits(lane, bitorder="little")
    bits = np.concatenate([bits, np.zeros(2 * CODE_BITS_MAX, np.uint8)])
    windows = np.zeros(8 * lane.size + CODE_BITS_MAX, np.int64)
    for bit in range(CODE_BITS_MAX):
        windows |= bits[bit : bit + windows.size].astype(np.int64) << bit
    symbols = table[windows].tolist()
    steps = lengths[table[windows]].tolist()
    found = np.zeros(count, np.uint8)
    at = 0
    for index in range(count):
        if at > 8 * lane.size:
            break
        found[index] = symbols[at]
        at += steps[at]
    return found, at
