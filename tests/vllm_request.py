"""A request of the small engine, with the fields that vLLM's has, and the pool of blocks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from tests.vllm_caches import TokenHashes, next_hash, token_after

Status = Literal["waiting", "loading", "running", "finished"]

# Block ids of a request, by group.
Tables = list[list[int]]


@dataclass(eq=False, kw_only=True)
class Request:
    """As vLLM's. It also knows the hashes of its tokens, even of those to come."""

    request_id: str
    tokens: list[int]
    num_prompt_tokens: int
    max_tokens: int
    block_size: int
    kv_transfer_params: Mapping[str, Any] | None = None
    lora_request: Any = None
    # Asked for, and not taken: vLLM does so for log-probabilities of the prompt.
    skip_reading_prefix_cache: bool = False
    num_computed_tokens: int = 0
    block_hashes: list[bytes] = field(default_factory=list)
    tables: Tables = field(default_factory=list)
    # Of each group, how many blocks the workers were told of.
    num_told: list[int] = field(default_factory=list)
    status: Status = "waiting"
    is_resumed: bool = False
    # Tokens that the workers know; the scheduler may know fewer yet.
    num_promised: int = 0

    def __post_init__(self) -> None:
        self._hashes: list[int] = []
        self.hash_blocks()

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_known(self) -> int:
        return max(self.num_tokens, self.num_promised)

    def hashes(self, start: int, end: int) -> TokenHashes:
        """Of tokens `start` to `end`."""
        for at in range(len(self._hashes), end):
            before = self._hashes[-1] if self._hashes else 0
            token = self.tokens[at] if at < self.num_prompt_tokens else token_after(before)
            self._hashes.append(next_hash(before, token))
        return np.array(self._hashes[start:end], dtype=np.uint64)

    def say(self, count: int) -> None:
        """Append what the model says."""
        for at in range(self.num_tokens, self.num_tokens + count):
            self.tokens.append(token_after(int(self.hashes(at - 1, at)[0])))
        self.hash_blocks()

    def go_on(self, tokens: list[int]) -> None:
        """A session goes on: its last token is taken back, for it was not computed."""
        del self.tokens[-1], self._hashes[self.num_tokens - 1 :]
        del self.block_hashes[self.num_tokens // self.block_size :]
        self.tokens += tokens
        self.num_prompt_tokens = self.num_tokens
        self.hash_blocks()

    def hash_blocks(self) -> None:
        """Bring the hashes of whole blocks up to date."""
        size = self.block_size
        for end in range((len(self.block_hashes) + 1) * size, self.num_tokens + 1, size):
            self.block_hashes.append(int(self.hashes(end - 1, end)[0]).to_bytes(16, "little"))


class Pool:
    """Blocks from 1 on; 0 stands for none. Freed ones are used again, the first freed first; until
    then a prefix may be found in them.
    """

    def __init__(self, num_blocks: int) -> None:
        self.free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))
        self._users = [0] * num_blocks
        # By group and the hash of the block's last token.
        self.cached: dict[tuple[int, bytes], int] = {}
        self._names: dict[int, tuple[int, bytes]] = {}

    def take(self) -> int:
        block, _ = self.free.popitem(last=False)
        self.cached.pop(self._names.pop(block, (-1, b"")), None)
        self._users[block] = 1
        return block

    def touch(self, block: int) -> None:
        """One more uses it."""
        if block:
            self.free.pop(block, None)
            self._users[block] += 1

    def give_back(self, block: int) -> None:
        if block:
            self._users[block] -= 1
            if not self._users[block]:
                self.free[block] = None

    def forget(self, blocks: set[int]) -> None:
        """Nobody finds these any more; whoever has them keeps them."""
        for block in blocks:
            self.cached.pop(self._names.pop(block, (-1, b"")), None)

    def remember(self, group: int, name: bytes, block: int) -> None:
        """A whole block can be found."""
        if block and block not in self._names and (group, name) not in self.cached:
            self.cached[group, name] = block
            self._names[block] = group, name
