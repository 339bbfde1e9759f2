"""What pieces of an engine's requests are called: the engine's own hash of their last block, which
stands for all tokens before it, in a name space of the engine's hashes and the request's adapter.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from hashlib import blake2b
from typing import Any

from kvd.client.connectors.vllm_identity import Engine, hash_space

# Block hashes of which the KV is known to be approximate, at most.
APPROXIMATE_MAX = 1 << 16


class Names:
    """Those of one engine."""

    def __init__(self, engine: Engine) -> None:
        self._hash_block_size = engine.hash_block_size
        self._space: bytes | None = None
        self._epoch = b""

    def begin_anew(self, epoch: bytes) -> None:
        """From now on everything is called otherwise."""
        self._epoch = epoch
        self._space = None

    def num_tokens(self, request: Any) -> int:
        """How many tokens the engine's hashes stand for; 0 where they are more or fewer than they
        should be, for then they are of other tokens.
        """
        size, count = self._hash_block_size, len(request.block_hashes)
        return count * size if count == request.num_tokens // size else 0

    def name(self, request: Any, adapter: bytes, end: int) -> bytes:
        """The name of the piece that ends at a token."""
        block_hash = request.block_hashes[end // self._hash_block_size - 1]
        return _name(self._known_space + adapter, block_hash)

    def namer(self, request: Any, adapter: bytes) -> Callable[[int], bytes]:
        """As `name`, of the request as it is now; for any thread, whatever becomes of it."""
        space, size = self._known_space + adapter, self._hash_block_size
        hashes = list(request.block_hashes)
        return lambda end: _name(space, hashes[end // size - 1])

    @property
    def _known_space(self) -> bytes:
        if self._space is None:
            # Not before the first request: the engine chooses the seed of its hashes late.
            self._space = hash_space(self._hash_block_size) + self._epoch
        return self._space


class Approximate:
    """The engine's own blocks that hold approximate KV, by their hashes; others come to see them
    through its prefix cache.
    """

    def __init__(self, engine: Engine) -> None:
        self._hash_block_size = engine.hash_block_size
        self._hashes: OrderedDict[bytes, None] = OrderedDict()

    def begins(self, request: Any, start: int) -> None:
        """From token `start` on the request's KV is approximate."""
        self._hashes[bytes(request.block_hashes[start // self._hash_block_size])] = None
        while len(self._hashes) > APPROXIMATE_MAX:
            self._hashes.popitem(last=False)

    def touches(self, request: Any, end: int) -> bool:
        """Whether anything before `end` is approximate, or computed on top of it."""
        if not self._hashes:
            return False
        hashes = request.block_hashes[: end // self._hash_block_size]
        return any(bytes(each) in self._hashes for each in hashes)


def _name(space: bytes, block_hash: bytes) -> bytes:
    return blake2b(space + bytes(block_hash), digest_size=32).digest()
