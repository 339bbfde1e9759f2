"""An engine's paged KV caches, by their strides: chunks are read from blocks and written into them.

vLLM hands over one tensor for each layer. Versions and backends order their axes differently, and a
block of the manager may be several blocks of the kernel. Here each is seen as

    [layers, blocks, planes, tokens, kv_heads, head_dim]

without a copy, and a chunk, `[layers, planes, tokens, kv_heads, head_dim]`, moves run by run of
neighbouring blocks: one strided copy for all layers where they lie evenly in one storage.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from kvd.client.connectors.vllm_identity import Group
from kvd.errors import Unsupported

# Elements are moved as they are: numpy has no bfloat16.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


class Pages:
    """The blocks of one group. Raises `Unsupported` where the axes cannot be told apart."""

    def __init__(self, group: Group, caches: Mapping[str, torch.Tensor], rank: int) -> None:
        layout = group.layout(rank)
        missing = [name for name in group.layer_names if name not in caches]
        if missing:
            raise Unsupported(f"layer {missing[0]} of KV-cache group {group.index} has no cache")
        found = [caches[name] for name in group.layer_names]
        dtypes = {str(cache.dtype).removeprefix("torch.") for cache in found}
        if dtypes != {layout.dtype}:
            raise Unsupported(
                f"KV of {layout.dtype} expected, found caches of {', '.join(sorted(dtypes))}"
            )
        shape = (layout.num_planes, layout.num_kv_heads, layout.head_dim)
        layers = [_paged(cache, group.block_size, *shape) for cache in found]
        if len({(layer.shape[2], layer.device) for layer in layers}) > 1:
            raise Unsupported(f"layers of KV-cache group {group.index} with blocks of their own")
        self.device = layers[0].device
        # Blocks of the kernel, of so many tokens, and how many of them a block is.
        self._tokens = layers[0].shape[2]
        self._ratio = group.block_size // self._tokens
        self._block_size = group.block_size
        stacked = _stacked(layers)
        # Parts of all layers, each `[layers, blocks, planes, tokens, kv_heads, head_dim]`.
        parts = [layer[None] for layer in layers] if stacked is None else [stacked]
        bits = [part.view(_BITS[part.itemsize]) for part in parts]
        # On the CPU numpy copies, on the thread that asks: torch would start threads of its own.
        self._parts: list[Any] = bits
        if self.device.type == "cpu":
            self._parts = [part.numpy() for part in bits]

    def gather(self, blocks: Sequence[int], out: torch.Tensor) -> None:
        """Fill `out`, a chunk in the host's memory, from whole blocks."""
        for pages, place in self._moves(blocks, out, 0):
            _copy(place, pages)

    def scatter(self, chunk: torch.Tensor, blocks: Sequence[int], *, skip: int = 0) -> None:
        """Write a chunk in the host's memory into the `blocks` that it covers, all but its first
        `skip` tokens, which are whole blocks.
        """
        for pages, place in self._moves(blocks, chunk, skip):
            _copy(pages, place)

    def scatter_by_layer(
        self, moves: Sequence[tuple[torch.Tensor, Sequence[int], int]]
    ) -> Iterator[int]:
        """Write chunks as `scatter` does, all of them layer by layer; `moves` has the arguments of
        each. Yields a layer's number when it is written.
        """
        found: list[list[tuple[Any, Any]]] = []
        for chunk, blocks, skip in moves:
            at = 0
            for pages, place in self._moves(blocks, chunk, skip):
                first = at % chunk.shape[0]
                found += [[] for _ in range(first + len(pages) - len(found))]
                for layer in range(len(pages)):
                    found[first + layer].append((pages[layer], place[layer]))
                at += len(pages)
        for layer, copies in enumerate(found):
            for pages, place in copies:
                _copy(pages, place)
            yield layer

    def _moves(
        self, blocks: Sequence[int], chunk: torch.Tensor, skip: int
    ) -> Iterator[tuple[Any, Any]]:
        """Views of the same tokens: of the caches, and of the chunk."""
        layers, planes, tokens, heads, dim = chunk.shape
        assert tokens == len(blocks) * self._block_size, "a chunk is whole blocks"
        assert skip % self._block_size == 0
        bits = chunk.view(_BITS[chunk.itemsize])
        places: Any = bits.view(layers, planes, -1, self._tokens, heads, dim).movedim(2, 1)
        if self.device.type == "cpu":
            places = places.numpy()
        for first, start, count in _runs(blocks, self._ratio, skip // self._block_size):
            layer = 0
            for part in self._parts:
                end = layer + part.shape[0]
                yield part[:, start : start + count], places[layer:end, first : first + count]
                layer = end


def _copy(target: Any, source: Any) -> None:
    if isinstance(target, np.ndarray):
        np.copyto(target, source)
    else:
        target.copy_(source, non_blocking=True)


def _runs(blocks: Sequence[int], ratio: int, skip: int) -> Iterator[tuple[int, int, int]]:
    """Kernel blocks that are neighbours in the cache: (the first's place in the chunk, its number,
    how many).
    """
    borders = [skip]
    borders += [at + 1 for at in range(skip, len(blocks) - 1) if blocks[at + 1] != blocks[at] + 1]
    borders.append(len(blocks))
    for first, end in pairwise(borders):
        if first < end:
            yield first * ratio, blocks[first] * ratio, (end - first) * ratio


def _paged(cache: torch.Tensor, block_size: int, planes: int, heads: int, dim: int) -> torch.Tensor:
    """One layer's cache as `[blocks, planes, tokens, kv_heads, head_dim]`, without a copy."""
    shape = tuple(cache.shape)
    view = None
    if len(shape) == 3 and (planes, heads, shape[2]) == (1, 1, dim):
        view = cache[:, None, :, None]
    elif len(shape) == 4 and shape[3] == planes * dim:
        # Heads before tokens where both orders would fit: that is what vLLM promises for this form.
        ordered = cache if shape[1] == heads else cache.movedim(2, 1)
        if ordered.shape[1] == heads:
            split = ordered.view(*ordered.shape[:3], planes, dim)
            view = split.permute(0, 3, 2, 1, 4)
    elif len(shape) == 5 and planes == 2 and shape[4] == dim and (shape[0] == 2) != (shape[1] == 2):
        ordered = cache.movedim(0, 1) if shape[0] == 2 else cache
        if heads in ordered.shape[2:4]:
            if ordered.shape[2] == ordered.shape[3]:
                raise Unsupported(f"caches of {list(shape)}: tokens or heads first?")
            view = ordered if ordered.shape[3] == heads else ordered.movedim(2, 3)
    if view is None or not 0 < view.shape[2] <= block_size or block_size % view.shape[2]:
        raise Unsupported(
            f"caches of {list(shape)} for blocks of {block_size} tokens, {planes} planes, "
            f"{heads} heads of {dim}"
        )
    return view


def _stacked(layers: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """All layers in one view with an axis more, where they lie evenly in one storage."""
    first = layers[0]
    if any(
        layer.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
        or (layer.shape, layer.stride(), layer.dtype) != (first.shape, first.stride(), first.dtype)
        for layer in layers
    ):
        return None
    steps = {after.storage_offset() - before.storage_offset() for before, after in pairwise(layers)}
    if len(steps) > 1 or min(steps, default=0) < 0:
        return None
    shape, strides = (len(layers), *first.shape), (*steps, *first.stride())
    if not steps:
        strides = (0, *first.stride())
    return first.as_strided(shape, strides, first.storage_offset())
