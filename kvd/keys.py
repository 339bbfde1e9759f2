"""Keys: what a chunk is called, on every machine and in every version alike.

A key is 32 bytes of BLAKE2b over a domain word and length-free fixed-order fields
(docs/formats/keys.md):

    chained      BLAKE2b("kvd.chain.1"  | parent key | tokens as uint32 little-endian)   root
    parent: the layout's fingerprint standalone   BLAKE2b("kvd.alone.1"  | layout fingerprint |
    tokens)                   reuse anywhere in a prompt blocks       BLAKE2b("kvd.block.1"  |
    layout fingerprint | the engine's hash of the chunk's last block)

A chained key commits to every token before it, so one equal key means one equal prefix. An engine's
block hash already is such a chain; it only lacks the layout.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import NewType

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvd.errors import InvalidRequest

ChunkKey = NewType("ChunkKey", bytes)

KEY_SIZE = 32

_CHAIN = b"kvd.chain.1"
_ALONE = b"kvd.alone.1"
_BLOCK = b"kvd.block.1"


def chain_keys(root: bytes, tokens: ArrayLike, *, chunk_tokens: int) -> list[ChunkKey]:
    """One chained key for each whole chunk of `tokens`; a tail shorter than a chunk has none.

    `root` is a layout's fingerprint, or the key of the chunk before `tokens[0]` to go on from
    there.
    """
    packed = _pack(tokens)
    size = chunk_tokens * 4
    keys = []
    parent = check_key(root)
    for offset in range(0, len(packed) - size + 1, size):
        digest = blake2b(_CHAIN + parent, digest_size=32)
        digest.update(packed[offset : offset + size])
        parent = ChunkKey(digest.digest())
        keys.append(parent)
    return keys


def chained_key(parent: bytes, tokens: ArrayLike) -> ChunkKey:
    """The key of one chunk of any length, whole or partial, behind `parent`."""
    digest = blake2b(_CHAIN + check_key(parent) + pack_tokens(tokens), digest_size=32)
    return ChunkKey(digest.digest())


def standalone_key(fingerprint: bytes, tokens: ArrayLike) -> ChunkKey:
    """The key of a chunk by its own tokens alone, whatever stands before it."""
    digest = blake2b(_ALONE + check_key(fingerprint) + pack_tokens(tokens), digest_size=32)
    return ChunkKey(digest.digest())


def block_keys(
    fingerprint: bytes, block_hashes: Sequence[bytes], *, blocks_per_chunk: int
) -> list[ChunkKey]:
    """Keys from an engine's chained block hashes: the last block of a chunk names the chunk."""
    root = check_key(fingerprint)
    ends = range(blocks_per_chunk - 1, len(block_hashes), blocks_per_chunk)
    return [
        ChunkKey(blake2b(_BLOCK + root + block_hashes[end], digest_size=32).digest())
        for end in ends
    ]


def pack_tokens(tokens: ArrayLike) -> bytes:
    """Token ids as uint32 little-endian, the form in which they are hashed.

    Raises `InvalidRequest` for anything that is not a flat row of integers in [0, 2**32).
    """
    return bytes(_pack(tokens))


def _pack(tokens: ArrayLike) -> memoryview:
    array: NDArray[np.generic] = np.asarray(tokens)
    if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
        raise InvalidRequest(
            f"tokens must be one row of integers, found {array.dtype} {list(array.shape)}"
        )
    if array.size and (int(array.min()) < 0 or int(array.max()) >= 1 << 32):
        raise InvalidRequest(f"token ids must be in [0, 2**32), found {array.min()}..{array.max()}")
    # No copy where the tokens are 32 bits wide already.
    is_wide = array.dtype.str in ("<i4", "<u4")
    narrow = array.view("<u4") if is_wide else array.astype("<u4")
    return memoryview(np.ascontiguousarray(narrow)).cast("B")


def check_key(key: bytes) -> bytes:
    """`key` itself if it has the size of one, else `InvalidRequest`."""
    if len(key) != KEY_SIZE:
        raise InvalidRequest(f"a key has {KEY_SIZE} bytes, found {len(key)}")
    return key


def join_keys(keys: Iterable[bytes]) -> bytes:
    """Keys end to end, the form in which a message carries them."""
    return b"".join(keys)


def split_keys(packed: bytes) -> list[ChunkKey]:
    """The inverse of `join_keys`; `InvalidRequest` if the length is no multiple of a key's."""
    if len(packed) % KEY_SIZE:
        raise InvalidRequest(
            f"packed keys must be a multiple of {KEY_SIZE} bytes, found {len(packed)}"
        )
    return [ChunkKey(packed[at : at + KEY_SIZE]) for at in range(0, len(packed), KEY_SIZE)]


class PackedKeys:
    """Joined keys, cut off one by one as they are asked for: a bisection wants ten of 512."""

    def __init__(self, packed: bytes) -> None:
        if len(packed) % KEY_SIZE:
            raise InvalidRequest(
                f"packed keys must be a multiple of {KEY_SIZE} bytes, found {len(packed)}"
            )
        self._packed = packed

    def __len__(self) -> int:
        return len(self._packed) // KEY_SIZE

    def __getitem__(self, index: int) -> ChunkKey:
        return ChunkKey(self._packed[index * KEY_SIZE : (index + 1) * KEY_SIZE])


def parse_key(text: str) -> ChunkKey:
    """A key from its 64 hexadecimal digits, as people type it."""
    if len(text) == 2 * KEY_SIZE:
        try:
            return ChunkKey(bytes.fromhex(text))
        except ValueError:
            pass
    raise InvalidRequest(f"a key is {2 * KEY_SIZE} hexadecimal digits, found {text!r}")


def short(key: bytes) -> str:
    """Eight hexadecimal digits, for logs and messages."""
    return key[:4].hex()
