"""Chunk: the values that describe one chunk and one copy of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NewType

from kvd.errors import InvalidRequest
from kvd.keys import ChunkKey, check_key

CATEGORY_SIZE_MAX = 64
# With all else it fits the label of a record on NVMe.
REUSE_SIZE_MAX = 2048

Fingerprint = NewType("Fingerprint", bytes)


@dataclass(frozen=True, slots=True)
class Extent:
    """A piece of a tier: a pointer that survives a process border. `size` is the bytes in use, not
    those rounded up.
    """

    tier: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Placement:
    """One copy of a chunk. `checksum` is XXH3-64 of the stored bytes, or None while the copy never
    left memory.
    """

    extent: Extent
    codec: str = "raw"
    is_exact: bool = True
    checksum: int | None = None


@dataclass(frozen=True, slots=True)
class ChunkMeta:
    """What is known of a chunk wherever its bytes are.

    `parent` is the key of the chunk before it, the layout's fingerprint for the first of a prompt,
    or None for a standalone chunk. `start` is the position of its first token. `prefill_us` is what
    computing it cost the engine.
    """

    key: ChunkKey
    parent: bytes | None
    layout: Fingerprint
    start: int
    num_tokens: int
    category: str = ""
    prefill_us: int = 0
    reuse: bytes = b""

    def __post_init__(self) -> None:
        check_key(self.key)
        if self.parent is not None:
            check_key(self.parent)
        if self.start < 0 or self.num_tokens < 1:
            raise InvalidRequest(
                "a chunk starts at 0 or later and has a token, "
                f"found {self.start}+{self.num_tokens}"
            )
        if len(self.category.encode()) > CATEGORY_SIZE_MAX:
            raise InvalidRequest(f"category is longer than {CATEGORY_SIZE_MAX} bytes")
        if len(self.reuse) > REUSE_SIZE_MAX:
            raise InvalidRequest(
                f"reuse metadata has at most {REUSE_SIZE_MAX} bytes, found {len(self.reuse)}"
            )
