"""What the scheduler's side tells the workers to move in a step.

A *piece* is what is stored under one key: a chunk of a group, or the part of it that is of use. It
is named by the engine's hash of its last block, which stands for all tokens before it as well; each
rank makes its own key of the name.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from kvd.keys import ChunkKey, block_keys
from kvd.layout import KVLayout


class Piece(NamedTuple):
    """Tokens `start` to `end` of a request, in `blocks` of one group."""

    name: bytes
    start: int
    end: int
    blocks: Sequence[int]

    @property
    def num_tokens(self) -> int:
        """Its length."""
        return self.end - self.start


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Pieces of a request to be read into its blocks, by group. Of the first of each group only
    tokens from `first_token` on: the engine has what is before them. With `is_in_step` the step
    itself computes on them, layer by layer; else the request waits.
    """

    request: str
    first_token: int
    pieces: tuple[tuple[Piece, ...], ...]
    is_in_step: bool = False

    def num_skipped(self, piece: Piece) -> int:
        """How many of a piece's blocks are left alone: those that the engine has, for others read
        them too, and 0, which stands for what it does not keep.
        """
        block_size = piece.num_tokens // len(piece.blocks)
        own = max(self.first_token - piece.start, 0) // block_size
        return max(own, sum(block == 0 for block in piece.blocks))

    def filled(self, pieces: Iterable[Piece]) -> set[int]:
        """The blocks that are written for these."""
        return {b for piece in pieces for b in piece.blocks[self.num_skipped(piece) :]}

    @property
    def all_filled(self) -> set[int]:
        """The blocks that are written."""
        return set[int]().union(*(self.filled(pieces) for pieces in self.pieces))


@dataclass(frozen=True, slots=True, kw_only=True)
class Save:
    """Pieces of a request that are computed when the step has ended, by group, and the name of the
    chunk before the first of each.
    """

    request: str
    pieces: tuple[tuple[Piece, ...], ...]
    parents: tuple[bytes | None, ...]
    category: str
    ttl_s: float
    is_exact: bool


@dataclass(slots=True, kw_only=True)
class Plan:
    """A step. `new_blocks` are about to be written: what is still to be read from them has to be
    read first. With `is_idle` nothing is computed.
    """

    loads: list[Load] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)
    new_blocks: set[int] = field(default_factory=set)
    is_idle: bool = False


def key_of(layout: KVLayout, name: bytes) -> ChunkKey:
    """The key of a piece of this layout."""
    return block_keys(layout.fingerprint, [name], blocks_per_chunk=1)[0]
