"""Layout: everything that fixes a chunk's shape and meaning. Two KV caches are interchangeable iff
their layouts are equal.

The fingerprint is the root of every key chain, so KV of another model, revision, dtype, rank or
tenant can never be found by accident: it has other keys.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from hashlib import blake2b

from kvd.errors import InvalidRequest

DTYPE_SIZES = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int8": 1,
    "uint8": 1,
}

CHUNK_TOKENS = 256

# Bounds on what a layout may claim: far above any model, low enough that no product below overflows
# a u64.
DIMENSION_MAX = 1 << 20
TEXT_SIZE_MAX = 4096

_DOMAIN = b"kvd.layout.1"


@dataclass(frozen=True, kw_only=True)
class KVLayout:
    """The shape and meaning of a chunk: `dtype [layers, planes, tokens, kv_heads, head_dim]` in C
    order.

    `revision` names the weights (a commit, a digest), `rope` the position encoding with all its
    parameters, `rank` and `world_size` the tensor-parallel shard, `group` the engine's KV-cache
    group, `salt` the tenant.
    """

    model: str
    revision: str
    dtype: str
    num_layers: int
    num_planes: int = 2
    num_kv_heads: int
    head_dim: int
    chunk_tokens: int = CHUNK_TOKENS
    axes: str = "layer,plane,token,head,dim"
    rope: str = ""
    rank: int = 0
    world_size: int = 1
    group: str = ""
    salt: str = ""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_SIZES:
            raise InvalidRequest(
                f"dtype must be one of {', '.join(DTYPE_SIZES)}, found {self.dtype!r}"
            )
        for name in ("num_layers", "num_planes", "num_kv_heads", "head_dim", "chunk_tokens"):
            if not 1 <= getattr(self, name) <= DIMENSION_MAX:
                raise InvalidRequest(
                    f"{name} must be in 1..{DIMENSION_MAX}, found {getattr(self, name)}"
                )
        if not 0 <= self.rank < self.world_size <= DIMENSION_MAX:
            raise InvalidRequest(
                f"rank must be below world_size, found {self.rank} of {self.world_size}"
            )
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, str) and len(value.encode()) > TEXT_SIZE_MAX:
                raise InvalidRequest(f"{field.name} is longer than {TEXT_SIZE_MAX} bytes")

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return DTYPE_SIZES[self.dtype]

    @property
    def token_size(self) -> int:
        """Bytes of one token: all layers, planes and heads."""
        return self.num_layers * self.num_planes * self.num_kv_heads * self.head_dim * self.itemsize

    def size(self, num_tokens: int) -> int:
        """Bytes of a chunk of `num_tokens` tokens."""
        return self.token_size * num_tokens

    def shape(self, num_tokens: int) -> tuple[int, int, int, int, int]:
        """`[layers, planes, tokens, kv_heads, head_dim]`."""
        return (self.num_layers, self.num_planes, num_tokens, self.num_kv_heads, self.head_dim)

    @cached_property
    def fingerprint(self) -> bytes:
        """32 bytes of BLAKE2b over every field, each as length-prefixed UTF-8
        (docs/formats/keys.md).
        """
        digest = blake2b(_DOMAIN, digest_size=32)
        for field in fields(self):
            for text in (field.name, str(getattr(self, field.name))):
                raw = text.encode()
                digest.update(len(raw).to_bytes(4, "little") + raw)
        return digest.digest()
