"""A cache of transformers that loaded KV is copied into, and that grows without being copied.

A `DynamicLayer` makes room for each step by concatenating everything into new tensors: right after
a load that would be a second copy of it, into memory never touched before.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

# Tokens of room behind the last one when a tensor is made: a copy of everything for 256 tokens.
ROOM_TOKENS = 256

# Room is made in whole steps, so that each head begins at a multiple of 64 bytes whatever the
# prompt's length: matrix kernels may round by alignment.
STEP_TOKENS = 64

Planes = tuple[torch.Tensor, torch.Tensor]


class RoomyLayer(DynamicLayer):  # type: ignore[misc]  # the base class carries no types
    """A `DynamicLayer` that keeps K and V in tensors with room behind them.

    What is written once is never written again, so a tensor that it has given out keeps its values.
    When somebody else has put other tensors in its place (a crop, a reordering), it goes on from a
    copy of those.
    """

    def __init__(self) -> None:
        super().__init__()
        self._room: Planes | None = None
        self._given: Planes | None = None

    def load(self, room: Planes, num_tokens: int) -> None:
        """Take over `room`, K and V `dtype [1, kv_heads, capacity, head_dim]`, of which the first
        `num_tokens` tokens are there already.
        """
        self.lazy_initialization(*room)
        self._room = room
        self._give(num_tokens)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """Append K and V, `dtype [batch, kv_heads, tokens, head_dim]`, and return all of them."""
        if key_states.requires_grad:
            # Autograd wants tensors that nobody writes into.
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if not self._is_free(end):
            self._room = self._move(key_states, value_states, end)
        assert self._room is not None
        k, v = self._room
        k[:, :, start:end] = key_states
        v[:, :, start:end] = value_states
        self._give(end)
        return self.keys, self.values

    def _is_free(self, end: int) -> bool:
        """Whether the tokens up to `end` may be written where they belong."""
        if self._room is None or self._given is None or end > self._room[0].shape[-2]:
            return False
        is_ours = self.keys is self._given[0] and self.values is self._given[1]
        # A tensor made in inference mode can only be written to there.
        is_locked = self._room[0].is_inference() and not torch.is_inference_mode_enabled()
        return is_ours and not is_locked

    def _move(self, key_states: torch.Tensor, value_states: torch.Tensor, end: int) -> Planes:
        """New room for `end` tokens and more, with what the layer holds at its beginning."""
        k, v = make_room(key_states, end), make_room(value_states, end)
        start = self.get_seq_length()
        for room, held in ((k, self.keys), (v, self.values)):
            if start and held is not None:
                room[:, :, :start] = held
        return k, v

    def _give(self, end: int) -> None:
        assert self._room is not None
        self._given = (self._room[0][:, :, :end], self._room[1][:, :, :end])
        self.keys, self.values = self._given


def make_room(like: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """An uninitialised tensor as `like`, `dtype [batch, kv_heads, tokens, head_dim]`, but for
    `num_tokens` tokens and more.
    """
    capacity = -(-(num_tokens + ROOM_TOKENS) // STEP_TOKENS) * STEP_TOKENS
    return torch.empty(
        (*like.shape[:2], capacity, like.shape[3]), dtype=like.dtype, device=like.device
    )
