"""The second door tells engines apart: rows of one that writes others are never found."""

from __future__ import annotations

import importlib
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from kvd.client.connectors import vllm_offloading_layout
from kvd.client.connectors.vllm_options import Options
from tests.vllm.daemon import Daemon
from tests.vllm.offloading_tier import (
    BLOCK_SIZE,
    HIT,
    MISS,
    ROW_SIZE,
    TIER,
    Tier,
    group_config,
    keys_of,
    offloading_config,
)

_hashes: Any = importlib.import_module("vllm.v1.core.kv_cache_utils")


@pytest.mark.parametrize(
    "change",
    [
        {"revision": "v2"},
        {"salt": "tenant"},
        {"config": {"name": "/models/other"}},
        {"config": {"dtype": "fp8_e4m3"}},
        {"config": {"layer_names": ("model.layers.1", "model.layers.0")}},
        pytest.param(
            {"config": {"group_id": 1}},
            marks=pytest.mark.vllm(since="0.30", why="groups have numbers"),
        ),
        {"config": {"tokens_per_hash": 32}},
        {"config": {"tokens_per_block": 32, "blocks_per_chunk": 1}},
        {"config": {"tp_size": 2}},
        {"config": {"pp_size": 2}},
        {"config": {"pcp_size": 2}},
        {"config": {"dcp_size": 2}},
        {"config": {"worker_kv_bytes_per_block": BLOCK_SIZE + 64}},
        {"config": {"kv_cache_layout": "BLHNC"}},
        {"config": {"canonical_layout": True}},
        {"config": {"replicated_layout": True}},
    ],
    ids=str,
)
def test_rows_of_other_engines_are_not_found(node: Daemon, change: dict[str, Any]) -> None:
    keys = keys_of(6)
    with Tier(node) as one:
        one.store(keys)
    with Tier(node, **change) as other, Tier(node) as same:
        assert other.look(keys) == [MISS] * len(keys)
        assert same.look(keys) == [HIT] * len(keys)


def test_another_seed_of_hashes_is_another_name_space(node: Daemon) -> None:
    keys = keys_of(7)
    with Tier(node) as one:
        one.store(keys)
    with Tier(node) as other:
        _hashes.NONE_HASH = bytes(32)
        assert other.look(keys) == [MISS] * len(keys)


def test_without_a_name_for_the_weights_nothing_is_stored(node: Daemon) -> None:
    keys, before = keys_of(8), node.status().num_chunks
    with Tier(node, revision=None) as tier:
        tier.store(keys)
    with Tier(node, revision=None) as other:
        assert other.look(keys) == [MISS] * len(keys)
    assert node.status().num_chunks == before


def test_all_that_is_known_of_an_engine_tells_its_rows_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = offloading_config(TIER)
    told = Options(revision="told")
    apart = vllm_offloading_layout.row_layout(config, ROW_SIZE, told)

    def fingerprint(layout: Any, *, runner: bool = False, backend: str = "A") -> bytes:
        groups = [SimpleNamespace(layouts=(layout,))]
        engine = SimpleNamespace(groups=groups)
        monkeypatch.setattr(vllm_offloading_layout, "engine_of", lambda *_: engine)
        known = SimpleNamespace(use_v2_model_runner=runner, attention_config=backend)
        with vllm_offloading_layout.engine_known(known, None):
            found = vllm_offloading_layout.row_layout(config, ROW_SIZE, Options())
        assert (found.rope, found.revision) == (layout.rope, layout.revision)
        return found.fingerprint

    # Layouts as `engine_of` makes them have a rank, RoPE and more; any of them stands for all.
    ranks = [replace(apart, rank=rank, world_size=2, rope="r") for rank in range(2)]
    found = [
        fingerprint(ranks[0]),
        fingerprint(ranks[1]),
        fingerprint(ranks[0], runner=True),
        fingerprint(ranks[0], backend="B"),
        apart.fingerprint,
    ]
    assert len({*found}) == len(found)
    assert fingerprint(ranks[0]) == found[0]


def test_rows_of_another_version_or_device_or_size_are_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = Options(revision="v1")
    # Rows of groups that differ have no number of tokens, and padding hides a block more.
    groups = tuple(group_config(tokens) for tokens in (16, 32))

    def fingerprint(num_blocks: int = 2, row_size: int = 8192) -> bytes:
        config = offloading_config(TIER, groups=groups, blocks_per_chunk=num_blocks)
        return vllm_offloading_layout.row_layout(config, row_size, options).fingerprint

    found = [fingerprint(), fingerprint(num_blocks=3), fingerprint(row_size=4096)]
    assert fingerprint() == found[0]
    with monkeypatch.context() as patched:
        patched.setattr(vllm_offloading_layout, "vllm_version", "0.0.1")
        found.append(fingerprint())
    device = SimpleNamespace(get_device_name=lambda: "another")
    monkeypatch.setattr(vllm_offloading_layout, "current_platform", device)
    found.append(fingerprint())
    assert len({*found}) == len(found)


def test_a_row_has_its_tokens_where_all_groups_have_as_many() -> None:
    options = Options(revision="v1")
    group = group_config(16)
    longer = group_config(32, 1)
    for groups, tokens in [((group,), 32), ((group, group), 32), ((group, longer), 1)]:
        config = offloading_config(TIER, groups=groups)
        for size in (ROW_SIZE, 4096, 5 << 20, 3 << 30):
            layout = vllm_offloading_layout.row_layout(config, size, options)
            assert (layout.chunk_tokens, layout.size(layout.chunk_tokens)) == (tokens, size)


def test_emptied_caches_find_nothing_of_before(node: Daemon) -> None:
    keys = keys_of(9)
    with Tier(node) as tier, Tier(node) as other:
        tier.store(keys)
        tier.manager.reset_cache()
        assert tier.look(keys) == [MISS] * len(keys)
        tier.store(keys)
        tier.manager.reset_cache()
        assert other.look(keys) == [HIT] * len(keys)
        assert tier.look(keys) == [MISS] * len(keys)
