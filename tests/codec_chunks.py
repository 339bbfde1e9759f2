"""Chunks for the tests of codecs, the same on every machine and with every numpy; bitstreams that
are damaged and sealed again.
"""

from __future__ import annotations

import struct

import numpy as np
import xxhash
from numpy.typing import NDArray

from kvd.codecs.base import Bytes, Codec, Span
from kvd.codecs.bitstream import HEADER_SIZE, SECTION_ALIGN
from kvd.layout import KVLayout

ENTRY_SIZE = 8
DIRECTORY_CHECKSUM_AT = HEADER_SIZE - 16
HEADER_CHECKSUM_AT = HEADER_SIZE - 8


def layout_of(*shape: int, dtype: str = "bfloat16", model: str = "tiny") -> KVLayout:
    """Of `shape`: layers, planes, kv_heads, head_dim."""
    layers, planes, heads, dim = shape
    return KVLayout(
        model=model,
        revision="1",
        dtype=dtype,
        num_layers=layers,
        num_planes=planes,
        num_kv_heads=heads,
        head_dim=dim,
    )


def noise(count: int, seed: int) -> NDArray[np.uint64]:
    """Well mixed numbers of 64 bits: splitmix64."""
    x = (np.arange(1, count + 1, dtype=np.uint64) + np.uint64(seed << 32)) * np.uint64(
        0x9E3779B97F4A7C15
    )
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(31))


def bell(count: int, seed: int) -> NDArray[np.float32]:
    """About normal, mean 0, deviation 1, exact sums of integers."""
    bits = noise(count, seed)
    parts = np.zeros(count, np.int64)
    for part in range(4):
        parts += (bits >> np.uint64(16 * part)).astype(np.int64) & 0xFFFF
    return ((parts - 2 * 65535) / 37837).astype(np.float32)


def real_chunk(layout: KVLayout, num_tokens: int, seed: int = 1) -> Bytes:
    """Like KV: each channel has a scale, some have a large mean, whatever the seed."""
    shape = layout.shape(num_tokens)
    numbers = bell(int(np.prod(shape)), seed).reshape(shape)
    channels = noise(layout.num_layers * layout.num_planes * shape[3] * shape[4], 1000)
    channels = channels.reshape(*shape[:2], 1, *shape[3:])
    scales = np.ldexp(np.float32(1), (channels % np.uint64(7)).astype(np.int32) - 3)
    means = np.where(channels >> np.uint64(61) == 0, np.float32(9), np.float32(0))
    return stored((numbers + means) * scales.astype(np.float32), layout.dtype)


def stored(numbers: NDArray[np.float32], dtype: str) -> Bytes:
    """The bytes of numbers in `dtype`; bfloat16 by cutting bits off."""
    if dtype == "bfloat16":
        return (numbers.view(np.uint32) >> 16).astype(np.uint16).reshape(-1).view(np.uint8)
    return numbers.astype(dtype).reshape(-1).view(np.uint8)


def numbers_of(chunk: Bytes, layout: KVLayout) -> NDArray[np.float32]:
    """The numbers of a chunk, in its shape."""
    shape = layout.shape(chunk.size // layout.token_size)
    if layout.dtype == "bfloat16":
        return (chunk.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(shape)
    return chunk.view(layout.dtype).astype(np.float32).reshape(shape)


def encoded(codec: Codec, chunk: Bytes, layout: KVLayout, *, start: int = 0) -> Bytes:
    """The bitstream of a chunk, in a buffer of its own size."""
    num_tokens = chunk.size // layout.token_size
    out = np.full(codec.size_bytes_max(layout, num_tokens), 0xEE, np.uint8)
    size = codec.encode(chunk, layout, Span(start=start, num_tokens=num_tokens), out)
    return out[:size].copy()


def sealed(bitstream: Bytes, num_sections: int) -> Bytes:
    """A copy with all checksums right for what stands in it."""
    image = bytearray(bitstream.tobytes())
    directory_end = HEADER_SIZE + ENTRY_SIZE * num_sections
    at = -(-directory_end // SECTION_ALIGN) * SECTION_ALIGN
    for entry in range(HEADER_SIZE, directory_end, ENTRY_SIZE):
        (size,) = struct.unpack_from("<I", image, entry)
        checksum = xxhash.xxh3_64_intdigest(bytes(image[at : at + size])) & 0xFFFFFFFF
        struct.pack_into("<I", image, entry + 4, checksum)
        at += -(-size // SECTION_ALIGN) * SECTION_ALIGN
    checksum = xxhash.xxh3_64_intdigest(bytes(image[HEADER_SIZE:directory_end]))
    struct.pack_into("<Q", image, DIRECTORY_CHECKSUM_AT, checksum)
    checksum = xxhash.xxh3_64_intdigest(bytes(image[:HEADER_CHECKSUM_AT]))
    struct.pack_into("<Q", image, HEADER_CHECKSUM_AT, checksum)
    return np.frombuffer(bytes(image), np.uint8)
