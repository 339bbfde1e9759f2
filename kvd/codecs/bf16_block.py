"""The blocks of bf16/1: a plane of a layer. docs/formats/bitstream.md."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from kvd.codecs.base import Bytes
from kvd.codecs.kernels import reference_bf16 as reference
from kvd.codecs.kernels.reference_bf16 import CODE_BITS_MAX, NUM_LANES, NUM_SYMBOLS
from kvd.errors import Corrupt

Values = NDArray[np.uint16]

_VERBATIM = 0
_CODED = 1
# Kind; base of the offsets; first symbol with a code, and the last; bytes of the lanes.
_BLOCK = struct.Struct("<4B4I")

# What a code of so many bits takes of all windows; too much where it has too many bits.
_SHARES = np.array(
    [0, *(1 << (CODE_BITS_MAX - bits) for bits in range(1, CODE_BITS_MAX + 1)), *4 * [1 << 20]]
)
_NIBBLES = np.array([(byte & 15, byte >> 4) for byte in range(256)], np.uint8)


@cache
def fastest_kernels() -> ModuleType:
    """Numba's, or numpy's where Numba is not installed."""
    try:
        from kvd.codecs.kernels import numba_bf16 as found
    except ImportError:
        return reference
    return found


@cache
def fastest_sections() -> Callable[..., int] | None:
    """Numba's loop over whole sections, if Numba is installed."""
    try:
        from kvd.codecs.kernels.numba_bf16_sections import restore_sections as found
    except ImportError:
        return None
    return found


@cache
def fastest_writer() -> Callable[..., None] | None:
    """Numba's loop that writes them, if Numba is installed."""
    try:
        from kvd.codecs.kernels.numba_bf16_encode import write_sections as found
    except ImportError:
        return None
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A plane of a layer as it stands in a section. Without code lengths: `lows` are the values,
    uint8 [tokens, 2 * channels].
    """

    lows: Bytes
    lengths: Bytes | None = None
    base: int = 0
    offsets: Bytes | None = None
    content: Bytes | None = None
    sizes: tuple[int, ...] = ()


def write_block(values: Values, shift: int, out: Bytes) -> int:
    """Write a block of `values`, uint16 [tokens, channels]; its size, that of the values and 1 at
    most.
    """
    base, offsets, symbols, lows, counts = reference.split(values, shift)
    lengths = reference.code_lengths(counts)
    used = np.flatnonzero(lengths)
    first, last = int(used[0]), int(used[-1])
    side = _pack_nibbles(offsets), _pack_nibbles(lengths[first : last + 1])
    start = _BLOCK.size + side[0].size + side[1].size + lows.size
    # Bits round up to bytes in each lane.
    lanes_max = int(counts @ lengths.astype(np.int64)) // 8 + NUM_LANES
    if start + lanes_max >= 2 * values.size:
        out[0] = _VERBATIM
        out[1 : 1 + 2 * values.size] = values.reshape(-1).view(np.uint8)
        return 1 + 2 * values.size
    lanes = np.empty(lanes_max + reference.SLACK, np.uint8)
    sizes = reference.encode(symbols, lengths, lanes)
    head = _BLOCK.pack(_CODED, base, first, last, *sizes.tolist())
    parts = (np.frombuffer(head, np.uint8), *side, lows.reshape(-1), lanes[: sizes.sum()])
    at = 0
    for part in parts:
        out[at : at + part.size] = part
        at += part.size
    return at


def read_block(content: Bytes, tokens: int, channels: int) -> tuple[Block, Bytes]:
    """The block that `content` begins with, and what is behind it. Raises `Corrupt`."""
    kind = int(content[0]) if content.size else -1
    if kind == _VERBATIM:
        lows, rest = _take(content[1:], 2 * tokens * channels)
        return Block(lows=lows.reshape(tokens, -1)), rest
    if kind != _CODED:
        raise Corrupt(f"a block of kind {kind}, if any")
    head, rest = _take(content, _BLOCK.size)
    _, base, first, last, *sizes = _BLOCK.unpack(head.tobytes())
    packed_offsets, rest = _take(rest, -(-channels // 2))
    if first > last:
        raise Corrupt(f"symbols from {first} to {last} have codes")
    packed_lengths, rest = _take(rest, (last - first + 2) // 2)
    lows, rest = _take(rest, tokens * channels)
    lanes, rest = _take(rest, sum(sizes))
    lengths = np.zeros(NUM_SYMBOLS, np.uint8)
    lengths[first : last + 1] = _unpack_nibbles(packed_lengths, last - first + 1)
    if _SHARES[lengths].sum() != 1 << CODE_BITS_MAX:
        raise Corrupt("code lengths that make no complete prefix code")
    return Block(
        lows=lows.reshape(tokens, channels),
        lengths=lengths,
        base=base,
        offsets=_unpack_nibbles(packed_offsets, channels),
        content=lanes,
        sizes=tuple(sizes),
    ), rest


def decode_block(kernels: ModuleType, block: Block, shift: int, first: int, target: Values) -> None:
    """Fill `target`, uint16 [tokens, heads, dim], from channel `first` on."""
    tokens, heads, dim = target.shape
    width = heads * dim
    if block.lengths is None:
        wanted = block.lows[:tokens, 2 * first : 2 * (first + width)]
        target[:] = np.ascontiguousarray(wanted).view(np.uint16).reshape(target.shape)
        return
    # A view: the heads of a token lie side by side.
    out = target.reshape(tokens, width)
    centers = kernels.centers_of(block.base, block.offsets, shift)
    bounds = np.array([*accumulate(block.sizes, initial=0)])
    bits = kernels.decode(block.content, bounds, block.lengths, block.lows, centers, first, out)
    is_whole = tokens == len(block.lows)
    for found, size in zip(bits.tolist(), block.sizes, strict=True):
        if found > 8 * size or (is_whole and (found + 7) // 8 != size):
            raise Corrupt(f"a lane of {size} bytes whose codes have {found} bits")


def _take(content: Bytes, size: int) -> tuple[Bytes, Bytes]:
    if size > content.size:
        raise Corrupt(f"{size} bytes expected in a section, {content.size} are left")
    return content[:size], content[size:]


def _pack_nibbles(values: Bytes) -> Bytes:
    """Two values a byte, the first one below."""
    pairs = np.zeros(values.size + values.size % 2, np.uint8)
    pairs[: values.size] = values
    packed: Bytes = pairs[::2] | (pairs[1::2] << np.uint8(4))
    return packed


def _unpack_nibbles(packed: Bytes, count: int) -> Bytes:
    return _NIBBLES[packed].reshape(-1)[:count]
