"""Paged KV caches of every form that engines have, against loops that read and write one token at a
time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from kvd.client.connectors.vllm_identity import Group
from kvd.client.connectors.vllm_pages import Pages
from kvd.errors import Unsupported
from kvd.layout import KVLayout

LAYERS, BLOCKS, TOKENS, HEADS, DIM = 3, 10, 4, 2, 8

# Runs of neighbours, forwards only; scattered ones; one alone.
TABLES = ([1, 2, 3, 4], [7, 3, 9, 2], [4, 5, 9, 8, 1, 2], [6], [9, 8, 7])

At = Callable[[Any, int, int, int, int], Any]


@dataclass(frozen=True)
class Form:
    """How a version lays out a layer: the shape for so many blocks, and where a head's channels
    are.
    """

    shape: Callable[[int, int], tuple[int, ...]]
    at: At
    is_mla: bool = False

    @property
    def num_planes(self) -> int:
        return 1 if self.is_mla else 2

    @property
    def num_heads(self) -> int:
        return 1 if self.is_mla else HEADS


def _joined(plane: int) -> slice:
    return slice(plane * DIM, (plane + 1) * DIM)


FORMS = {
    "[B,H,N,2D]": Form(
        lambda b, n: (b, HEADS, n, 2 * DIM), lambda c, b, p, t, h: c[b, h, t, _joined(p)]
    ),
    "[B,N,H,2D]": Form(
        lambda b, n: (b, n, HEADS, 2 * DIM), lambda c, b, p, t, h: c[b, t, h, _joined(p)]
    ),
    "[2,B,N,H,D]": Form(lambda b, n: (2, b, n, HEADS, DIM), lambda c, b, p, t, h: c[p, b, t, h]),
    "[B,2,N,H,D]": Form(lambda b, n: (b, 2, n, HEADS, DIM), lambda c, b, p, t, h: c[b, p, t, h]),
    "[2,B,H,N,D]": Form(lambda b, n: (2, b, HEADS, n, DIM), lambda c, b, p, t, h: c[p, b, h, t]),
    "[B,2,H,N,D]": Form(lambda b, n: (b, 2, HEADS, n, DIM), lambda c, b, p, t, h: c[b, p, h, t]),
    "[B,N,C]": Form(lambda b, n: (b, n, DIM), lambda c, b, p, t, h: c[b, t], is_mla=True),
    "[B,1,N,C]": Form(lambda b, n: (b, 1, n, DIM), lambda c, b, p, t, h: c[b, 0, t], is_mla=True),
}

forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def random(shape: Sequence[int], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Any bytes, so also numbers that are none."""
    found = np.random.default_rng(seed).integers(0, 256, (*shape, dtype.itemsize), dtype=np.uint8)
    return torch.from_numpy(found).view(dtype)[..., 0]


def own_storages(shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    return [random(shape, dtype, layer) for layer in range(LAYERS)]


def layers_outermost(shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    return list(random((LAYERS, *shape), dtype))


def layers_inside(shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    """Layers next to each other in each block."""
    return list(random((shape[0], LAYERS, *shape[1:]), dtype).movedim(1, 0))


def unevenly(shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    """In one storage, at distances that differ."""
    storage = random((LAYERS + 2, *shape), dtype)
    return [storage[0], storage[1], storage[4]]


def backwards(shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    """In one storage, the last layer first."""
    return list(random((LAYERS, *shape), dtype))[::-1]


def permuted(shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    """In memory the axes come in another order than in the shape."""
    order = [*range(1, len(shape) - 1), 0]
    turned = tuple(shape[axis] for axis in order)
    back = [order.index(axis) for axis in range(len(shape) - 1)]
    return [each.permute(*back, -1) for each in random((LAYERS, *turned, shape[-1]), dtype)]


STORAGES = [own_storages, layers_outermost, layers_inside, unevenly, backwards, permuted]


def new_group(form: Form, dtype: torch.dtype, *, tokens: int = TOKENS) -> Group:
    layout = KVLayout(
        model="m",
        revision="r",
        dtype=str(dtype).removeprefix("torch."),
        num_layers=LAYERS,
        num_planes=form.num_planes,
        num_kv_heads=form.num_heads,
        head_dim=DIM,
        chunk_tokens=tokens * 4,
    )
    return Group(
        index=0,
        kind="full",
        window=0,
        block_size=tokens,
        layer_names=tuple(f"layers.{layer}" for layer in range(LAYERS)),
        num_planes=form.num_planes,
        layouts=(layout,),
    )


def named(layers: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"layers.{number}": layer for number, layer in enumerate(layers)}


def bits(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """A view of the bytes, one axis more."""
    return tensor[..., None].view(torch.uint8).numpy()


def places(
    form: Form, blocks: Sequence[int], *, tokens: int = TOKENS, ratio: int = 1, skip: int = 0
) -> Iterator[tuple[int, int, int, int, int]]:
    """(plane, token of the chunk, head, block of the cache, token in it), one by one."""
    size = tokens // ratio
    for plane in range(form.num_planes):
        for token in range(skip, len(blocks) * tokens):
            within = token % tokens
            block = blocks[token // tokens] * ratio + within // size
            for head in range(form.num_heads):
                yield plane, token, head, block, within % size


def check(group: Group, form: Form, layers: list[torch.Tensor], *, ratio: int = 1) -> None:
    """All tables are gathered and scattered as the loops do it, and nothing else is touched."""
    pages = Pages(group, named(layers), 0)
    tokens, layout = group.block_size, group.layouts[0]
    caches = [bits(layer) for layer in layers]
    for seed, blocks in enumerate(TABLES):
        shape = layout.shape(len(blocks) * tokens)
        out, expected = random(shape, layers[0].dtype, 77), random(shape, layers[0].dtype, 78)
        for layer, (p, t, h, b, n) in itertools.product(
            range(LAYERS), places(form, blocks, tokens=tokens, ratio=ratio)
        ):
            bits(expected)[layer, p, t, h] = form.at(caches[layer], b, p, n, h)
        pages.gather(blocks, out)
        assert (bits(out) == bits(expected)).all()

        chunk, skip = random(shape, layers[0].dtype, seed), tokens * (seed % 2)
        wanted = [cache.copy() for cache in caches]
        for layer, (p, t, h, b, n) in itertools.product(
            range(LAYERS), places(form, blocks, tokens=tokens, ratio=ratio, skip=skip)
        ):
            form.at(wanted[layer], b, p, n, h)[:] = bits(chunk)[layer, p, t, h]
        pages.scatter(chunk, blocks, skip=skip)
        for cache, want in zip(caches, wanted, strict=True):
            assert (cache == want).all()


@forms
@pytest.mark.parametrize("storage", STORAGES)
def test_blocks_are_read_and_written_as_the_loops_do_it(form: Form, storage: Any) -> None:
    layers = storage(form.shape(BLOCKS, TOKENS), torch.bfloat16)
    check(new_group(form, torch.bfloat16), form, layers)


@forms
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8]
)
def test_elements_of_every_size_are_moved_as_they_are(form: Form, dtype: torch.dtype) -> None:
    layers = layers_outermost(form.shape(BLOCKS, TOKENS), dtype)
    check(new_group(form, dtype), form, layers)


@forms
@pytest.mark.parametrize("ratio", [2, 4])
def test_a_block_may_be_several_of_the_kernels(form: Form, ratio: int) -> None:
    size = 3
    layers = layers_outermost(form.shape(BLOCKS * ratio, size), torch.bfloat16)
    group = new_group(form, torch.bfloat16, tokens=size * ratio)
    check(group, form, layers, ratio=ratio)


def test_one_layer_is_a_group_too() -> None:
    form = FORMS["[B,H,N,2D]"]
    group = new_group(form, torch.float32)
    (layer,) = layers_outermost(form.shape(BLOCKS, TOKENS), torch.float32)[:1]
    layout = KVLayout(
        model="m", revision="r", dtype="float32", num_layers=1, num_kv_heads=HEADS, head_dim=DIM
    )
    one = Group(
        index=0,
        kind="full",
        window=0,
        block_size=TOKENS,
        layer_names=group.layer_names[:1],
        num_planes=2,
        layouts=(layout,),
    )
    pages = Pages(one, named([layer]), 0)
    out = torch.zeros(layout.shape(2 * TOKENS))
    pages.gather([3, 4], out)
    assert (bits(out[0, 1, TOKENS:, 1]) == bits(layer[4, 1, :, DIM:])).all()


def test_groups_that_lie_on_each_other_are_told_apart_by_their_blocks() -> None:
    form = FORMS["[B,H,N,2D]"]
    layers = layers_outermost(form.shape(BLOCKS, TOKENS), torch.float16)
    # Two groups see the same bytes; each has blocks of its own.
    groups = [new_group(form, torch.float16) for _ in range(2)]
    pages = [Pages(group, named(layers), 0) for group in groups]
    shape = groups[0].layouts[0].shape(2 * TOKENS)
    chunks = [random(shape, torch.float16, seed) for seed in (1, 2)]
    pages[0].scatter(chunks[0], [1, 4])
    pages[1].scatter(chunks[1], [2, 3])
    for page, blocks, chunk in zip(pages, ([1, 4], [2, 3]), chunks, strict=True):
        out = torch.zeros_like(chunk)
        page.gather(blocks, out)
        assert (bits(out) == bits(chunk)).all()


@pytest.mark.parametrize("is_even", [True, False])
def test_chunks_are_written_layer_by_layer(is_even: bool) -> None:
    form = FORMS["[B,H,N,2D]"]
    layers = layers_outermost(form.shape(BLOCKS, TOKENS), torch.float16)
    if not is_even:
        # Storages of their own: no view has all layers.
        layers = [layer.clone() for layer in layers]
    group = new_group(form, torch.float16)
    pages = Pages(group, named(layers), 0)
    chunks = [random(group.layouts[0].shape(2 * TOKENS), torch.float16, seed) for seed in (1, 2)]
    moves = [(chunks[0], [1, 4], 0), (chunks[1], [3, 2], TOKENS)]
    untouched = [layer.clone() for layer in layers]
    written = 0
    for number in pages.scatter_by_layer(moves):
        assert number == written
        written += 1
        for at, (layer, before) in enumerate(zip(layers, untouched, strict=True)):
            assert (bits(layer) == bits(before)).all() == (at > number)
    assert written == LAYERS
    for chunk, blocks, skip in moves:
        out = torch.zeros_like(chunk)
        pages.gather(blocks, out)
        assert (bits(out)[:, :, skip:] == bits(chunk)[:, :, skip:]).all()
    # What is skipped is left alone.
    for layer, before in zip(layers, untouched, strict=True):
        assert (bits(layer[3]) == bits(before[3])).all()


@pytest.mark.parametrize(
    "shape",
    [
        # Tokens or heads first?
        (2, BLOCKS, HEADS, HEADS, DIM),
        # Planes or blocks first?
        (2, 2, TOKENS, HEADS, DIM),
        (BLOCKS, HEADS, TOKENS, DIM),
        (BLOCKS, HEADS, TOKENS, 3 * DIM),
        (BLOCKS, HEADS + 1, TOKENS, 2 * DIM),
        (BLOCKS, HEADS, TOKENS + 1, 2 * DIM),
        (BLOCKS, HEADS, TOKENS * 2, 2 * DIM),
        (3, BLOCKS, TOKENS, HEADS, DIM),
        (2, BLOCKS, TOKENS, HEADS + 1, DIM),
        (2, BLOCKS, TOKENS, HEADS, DIM + 1),
        (BLOCKS, TOKENS, DIM),
        (BLOCKS, TOKENS * HEADS * 2 * DIM),
        (0, HEADS, 0, 2 * DIM),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(shape: tuple[int, ...]) -> None:
    layers = [torch.zeros(shape) for _ in range(LAYERS)]
    with pytest.raises(Unsupported):
        Pages(new_group(FORMS["[B,H,N,2D]"], torch.float32), named(layers), 0)


def test_a_cache_of_another_dtype_or_none_is_refused() -> None:
    form = FORMS["[B,H,N,2D]"]
    layers = named(layers_outermost(form.shape(BLOCKS, TOKENS), torch.float16))
    with pytest.raises(Unsupported, match="bfloat16 expected"):
        Pages(new_group(form, torch.bfloat16), layers, 0)
    del layers["layers.1"]
    with pytest.raises(Unsupported, match=r"layers\.1"):
        Pages(new_group(form, torch.float16), layers, 0)


def test_a_cache_that_differs_from_the_first_is_refused() -> None:
    form = FORMS["[B,H,N,2D]"]
    layers = layers_outermost(form.shape(BLOCKS, TOKENS), torch.float16)
    for other in (layers[1].float(), layers[1][:, :, :2]):
        with pytest.raises(Unsupported):
            Pages(new_group(form, torch.float16), named([layers[0], other, layers[2]]), 0)
