"""KV caches of which every byte is known: a pure function of all tokens before it, of its layer,
plane and head. Eight bytes a head tell any two of them apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tests.vllm_fakes import HEAD_DIM, Model, layer_name

VOCABULARY = 50

# What block 0 is full of: it stands for none, and nobody may ever write to it.
NOBODY = 0xA5

_ODD = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1

TokenHashes = NDArray[np.uint64]


def next_hash(before: int, token: int) -> int:
    """What stands for a token and all before it."""
    mixed = (before ^ (token + 1) * _ODD) & _MASK
    mixed = ((mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    return mixed ^ mixed >> 27


def token_after(token_hash: int) -> int:
    """What the model says next."""
    return token_hash % VOCABULARY


def content(
    hashes: TokenHashes, *, layers: Sequence[int], planes: int, heads: Sequence[int]
) -> NDArray[np.uint8]:
    """`uint8 [layers, planes, tokens, kv_heads, head_dim]` for tokens with these hashes."""
    layer = np.array(layers, dtype=np.uint64)[:, None, None, None]
    plane = np.arange(planes, dtype=np.uint64)[:, None, None]
    head = np.array(heads, dtype=np.uint64)
    place = (layer * np.uint64(64) + plane * np.uint64(32) + head + np.uint64(1)) * np.uint64(_ODD)
    mixed = hashes[:, None] ^ place
    mixed = (mixed ^ mixed >> np.uint64(31)) * np.uint64(0x94D049BB133111EB)
    return np.ascontiguousarray(mixed)[..., None].view(np.uint8)


class Caches:
    """One rank's. Groups lie on top of each other, as vLLM lays them."""

    def __init__(self, model: Model, num_blocks: int, rank: int) -> None:
        self.model, self.rank = model, rank
        dim = model.num_planes * HEAD_DIM
        shape = (model.layers_per_group, num_blocks, model.num_kv_heads, model.block_size, dim)
        self._storage = torch.zeros(shape, dtype=torch.uint8)
        self._bytes = self._storage.numpy()
        self._bytes[:, 0] = NOBODY

    def by_layer(self) -> dict[str, torch.Tensor]:
        """As `register_kv_caches` gets them."""
        views = [view[:, 0] if self.model.is_mla else view for view in self._storage]
        return {
            layer_name(number): views[place]
            for group in range(len(self.model.windows))
            for place, number in enumerate(self.model.layers(group))
        }

    def write(self, group: int, table: Sequence[int], start: int, hashes: TokenHashes) -> None:
        """Compute tokens from `start` on."""
        blocks, slots = self._places(table, start, len(hashes))
        self._bytes[:, blocks, :, slots] = self._expected(group, hashes).swapaxes(0, 1)

    def assert_holds(
        self, group: int, table: Sequence[int], start: int, hashes: TokenHashes, *, why: str
    ) -> None:
        """Tokens from `start` on are in their blocks, every byte of them."""
        wrong = self._wrong(group, table, start, hashes).any(axis=0).nonzero()[0]
        blocks, _ = self._places(table, start, len(hashes))
        assert not len(wrong), (
            f"{why}: rank {self.rank} group {group} has other bytes for tokens "
            f"{start + wrong[0]}..{start + wrong[-1]} in blocks {sorted(set(blocks[wrong]))}"
        )

    def has_layer(
        self, place: int, group: int, table: Sequence[int], start: int, hashes: TokenHashes
    ) -> bool:
        """Whether tokens from `start` on are in their blocks, in one of the group's layers."""
        return not self._wrong(group, table, start, hashes)[place].any()

    def _wrong(
        self, group: int, table: Sequence[int], start: int, hashes: TokenHashes
    ) -> NDArray[np.bool_]:
        """`bool [layers, tokens]`: where it is not what it should be."""
        blocks, slots = self._places(table, start, len(hashes))
        found = self._bytes[:, blocks, :, slots].swapaxes(0, 1)
        wrong: NDArray[np.bool_] = (found != self._expected(group, hashes)).any(axis=(2, 3))
        return wrong

    def assert_nobody_wrote_to_none(self) -> None:
        assert (self._bytes[:, 0] == NOBODY).all(), "somebody wrote to block 0"

    def _places(self, table: Sequence[int], start: int, count: int) -> tuple[Any, Any]:
        tokens = np.arange(start, start + count)
        blocks = np.array(table, dtype=np.int64)[tokens // self.model.block_size]
        assert blocks.all(), "block 0 has no tokens"
        return blocks, tokens % self.model.block_size

    def _expected(self, group: int, hashes: TokenHashes) -> NDArray[np.uint8]:
        """`uint8 [layers, tokens, kv_heads, planes * head_dim]`."""
        model = self.model
        layers, heads = model.layers(group), model.heads(self.rank)
        found = content(hashes, layers=layers, planes=model.num_planes, heads=heads)
        joined = model.num_planes * HEAD_DIM
        shape = (model.layers_per_group, len(hashes), model.num_kv_heads, joined)
        return found.transpose(0, 2, 3, 1, 4).reshape(shape)
