"""The second door: vLLM's native offloading with kvd below its host memory.

Native offloading copies between a GPU and host memory on CUDA streams, and refuses to start on a
CPU. `CpuSpec` stands in for that copy alone; connector, scheduler, tiers and the primary tier's
memory are vLLM's. Tests without an engine drive vLLM's tiers as its scheduler does.
"""

from __future__ import annotations

import ctypes
import importlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import numpy as np
import pytest

from kvd.client.connectors import vllm_offloading
from kvd.client.connectors.vllm_options import Options
from kvd.errors import ConfigError
from kvd.keys import ChunkKey
from tests.vllm.daemon import Daemon
from tests.vllm.harness import Answer, Engine, Request, prompt
from tests.vllm.reference import Reference, assert_same

_spec: Any = importlib.import_module("vllm.v1.kv_offload.tiering.spec")
_region: Any = importlib.import_module("vllm.v1.kv_offload.cpu.shared_offload_region")
_base: Any = importlib.import_module("vllm.v1.kv_offload.base")
_config: Any = importlib.import_module("vllm.v1.kv_offload.config")
_gpu_worker: Any = importlib.import_module("vllm.v1.kv_offload.cpu.gpu_worker")
_hashes: Any = importlib.import_module("vllm.v1.core.kv_cache_utils")

HERE = "tests.vllm.test_offloading"
TIER = {"type": "KvdTierManager", "module_path": "kvd.client.connectors.vllm_offloading"}

HIT, MISS = _base.LookupResult.HIT, _base.LookupResult.MISS

PATIENCE_S = 60.0
# None of a tier's methods waits. One that did would take as long as the daemon is given, which is
# twice this and more; a machine that is busy otherwise takes less.
CALL_S_MAX = 1.0

# A row of the tiers that are driven without an engine: two blocks of 16 tokens.
BLOCK_SIZE = 12_000
ROW_SIZE = 24_576
NUM_ROWS = 8

# A row of an engine: 8 layers, K and V, 2 heads of 64, 32 tokens of float32.
ENGINE_ROW_SIZE = 8 * 2 * 2 * 64 * 32 * 4
NEW_TOKENS = 16
NUM_TOKENS = 600
# Whole blocks.
PROMPT_ROWS = NUM_TOKENS // 32


class CpuSpec(_spec.TieringOffloadingSpec):  # type: ignore[misc]
    """Native offloading for an engine whose KV cache is in host memory itself."""

    def get_worker(self, kv_caches: Any) -> Any:
        region = _region.SharedOffloadRegion(
            engine_id=self._engine_id,
            num_chunks=self.num_chunks,
            rank=self.config.parallel.rank,
            kv_bytes_per_chunk=self.kv_bytes_per_chunk,
            cpu_page_size=self.cpu_page_size_per_worker,
        )
        return CpuWorker(kv_caches, region, self.blocks_per_chunk)


class CpuWorker(_base.OffloadingWorker):  # type: ignore[misc]
    """Copies at once what it is told to; pages lie in a row as `CPUOffloadingWorker` lays them."""

    def __init__(self, kv_caches: Any, region: Any, blocks_per_chunk: int) -> None:
        self._region = region
        self._blocks_per_chunk = blocks_per_chunk
        self._refs = kv_caches.group_data_refs
        self._caches = [t.tensor.view(-1, t.page_size_bytes) for t in kv_caches.tensors]
        self._rows = [
            region.create_next_worker_view(t.page_size_bytes * blocks_per_chunk)
            for t in kv_caches.tensors
        ]
        self._finished: list[Any] = []

    def submit_store(self, job_id: int, source: Any, target: Any) -> bool:
        self._copy(job_id, source, target.block_ids, is_store=True)
        return True

    def submit_load(self, job_id: int, source: Any, target: Any) -> bool:
        self._copy(job_id, target, source.block_ids, is_store=False)
        return True

    def get_finished(self) -> list[Any]:
        found, self._finished = self._finished, []
        return found

    def wait(self, job_ids: set[int]) -> None:
        """Copies have ended when they are submitted."""

    def shutdown(self) -> None:
        self._caches.clear()
        self._rows.clear()
        self._region.cleanup()

    def _copy(self, job_id: int, spec: Any, rows: Any, *, is_store: bool) -> None:
        size = block_start = row_start = 0
        for refs, count, first in zip(
            self._refs, spec.group_sizes, spec.block_indices, strict=True
        ):
            skip = first % self._blocks_per_chunk
            num_rows = math.ceil((count + skip) / self._blocks_per_chunk) if count else 0
            blocks = spec.block_ids[block_start : block_start + count]
            for ref in refs if count else ():
                caches = self._pointers(blocks, 1, count, self._caches[ref.tensor_idx], 0)
                places = self._pointers(
                    rows[row_start : row_start + num_rows],
                    self._blocks_per_chunk,
                    count,
                    self._rows[ref.tensor_idx],
                    skip,
                )
                for cache, place in zip(caches, places, strict=True):
                    target, source = (place, cache) if is_store else (cache, place)
                    ctypes.memmove(int(target), int(source), ref.page_size_bytes)
                size += count * ref.page_size_bytes
            block_start, row_start = block_start + count, row_start + num_rows
        assert (block_start, row_start) == (len(spec.block_ids), len(rows))
        self._finished.append(_base.TransferResult(job_id, True, size, 0.0))

    def _pointers(self, ids: Any, per_id: int, count: int, tensor: Any, skip: int) -> Any:
        found = np.empty(count, np.uint64)
        _gpu_worker.compute_sub_block_ptrs(ids, per_id, found, tensor, skip_count=skip)
        return found


class Tier:
    """Eight rows of a primary tier and a `KvdTierManager` below, driven as a scheduler does.

    `config` are fields of `OffloadingConfig`, or of its parts. A context manager.
    """

    def __init__(self, daemon: Daemon, *, config: dict[str, Any] | None = None, **options: Any):
        options = {"socket": str(daemon.socket), "revision": "v1", "lookup_s": 2.0, **options}
        options = {name: value for name, value in options.items() if value is not None}
        self.spec = CpuSpec(offloading_config({**TIER, **options}, **(config or {})))
        self.manager = self.spec.get_manager()
        (self.below,) = self.manager.secondary_tiers
        self.slowest_s = 0.0

    def __enter__(self) -> Tier:
        return self

    def __exit__(self, *_: object) -> None:
        self.manager.shutdown()

    def request(self, **wishes: Any) -> Any:
        """What vLLM's tiers know a request by."""
        found = _base.ReqContext(str(uuid4()), {"kvd": wishes} if wishes else None)
        self.manager.on_new_request(found)
        return found

    def store(self, keys: Sequence[bytes], request: Any = None) -> None:
        """Put contents into rows, as a worker does, and have them stored below."""
        request = request or self.request()
        prepared = self.manager.prepare_store(keys, request)
        rows = prepared.store_spec.chunk_ids
        for key, row in zip(prepared.keys_to_store, rows, strict=True):
            self.memory[row] = contents(key)
        self.timed(self.manager.complete_store, keys, request)
        self.until_done()

    def look(self, keys: Sequence[bytes], request: Any = None) -> list[Any]:
        """What comes of all keys, when nothing is pending any more."""
        request = request or self.request()
        give_up = time.monotonic() + PATIENCE_S
        while True:
            found = [self.timed(self.manager.lookup, key, request) for key in keys]
            if {*found} <= {HIT, MISS}:
                return found
            assert time.monotonic() < give_up, f"it is never known: {found}"
            self.step()

    def rows(self, keys: Sequence[bytes]) -> list[bytes]:
        """The contents of rows that are in the primary tier."""
        request = self.request()
        rows = self.manager.prepare_load(keys, request).chunk_ids
        found = [self.memory[row].tobytes() for row in rows]
        self.manager.complete_load(keys, request)
        return found

    def step(self) -> None:
        self.timed(self.manager.on_schedule_end, _base.ScheduleEndContext((), ()))

    def until_done(self) -> None:
        give_up = time.monotonic() + PATIENCE_S
        while self.manager.has_pending_work():
            assert time.monotonic() < give_up, "a job never ends"
            self.step()

    def timed(self, call: Callable[..., Any], *args: Any) -> Any:
        begun = time.perf_counter()
        found = call(*args)
        self.slowest_s = max(self.slowest_s, time.perf_counter() - begun)
        return found

    @property
    def memory(self) -> Any:
        """`uint8 [rows, row_size]`."""
        return np.asarray(self.manager.primary_tier.get_kv_memoryview()).view(np.uint8)


def offloading_config(tier: dict[str, Any], **changes: Any) -> Any:
    """What vLLM would make of an engine with one worker, by hand."""

    def part(kind: str, **fields: Any) -> Any:
        changed = {name: changes.pop(name) for name in fields if name in changes}
        return getattr(_config, kind)(**{**fields, **changed})

    group = {"tokens_per_block": 16, "layer_names": ("model.layers.0", "model.layers.1")}
    fields = {
        "model": part("OffloadingModelConfig", name="/models/some", dtype="float32"),
        "cache": part("OffloadingCacheConfig", tokens_per_hash=16, blocks_per_chunk=2),
        "groups": (part("OffloadingGroupConfig", group_id=0, **group),),
        "parallel": part(
            "OffloadingParallelConfig",
            rank=0,
            world_size=1,
            tp_size=1,
            pp_size=1,
            pcp_size=1,
            dcp_size=1,
            data_parallel_index=0,
            data_parallel_size=1,
            data_parallel_rank_local=None,
            is_parallelism_agnostic=False,
        ),
        "worker_kv_bytes_per_block": BLOCK_SIZE,
        "enable_kv_cache_events": False,
        "engine_id": str(uuid4()),
        "kv_cache_layout": "LBHNC",
    }
    extra = {"cpu_bytes_to_use": NUM_ROWS * ROW_SIZE, "secondary_tiers": [tier]}
    return _config.OffloadingConfig(**{**fields, **changes, "extra_config": extra})


def keys_of(seed: int, count: int = 5, group: int = 0) -> list[bytes]:
    """Hashes of blocks as vLLM has them, with a group."""
    chance = np.random.default_rng(seed)
    return [_base.make_offload_key(chance.bytes(32), group) for _ in range(count)]


def contents(key: bytes) -> Any:
    """`uint8 [row_size]`, other bytes for another key."""
    return np.frombuffer(np.random.default_rng(list(key)).bytes(ROW_SIZE), np.uint8)


@pytest.fixture(autouse=True)
def _none_hash() -> None:
    """An engine's core does this before its first request."""
    _hashes.init_none_hash(importlib.import_module("vllm.utils.hashing").sha256)


def test_rows_come_back_bit_for_bit(node: Daemon) -> None:
    keys = keys_of(1)
    with Tier(node) as one:
        one.store(keys)
    with Tier(node) as other:
        assert other.look(keys) == [HIT] * len(keys)
        assert other.rows(keys) == [contents(key).tobytes() for key in keys]
    node.until_idle()


def test_rows_that_the_primary_tier_drops_come_back(node: Daemon) -> None:
    first, second = keys_of(2, NUM_ROWS), keys_of(3, NUM_ROWS)
    with Tier(node) as tier:
        tier.store(first)
        tier.store(second)
        assert tier.look(first) == [HIT] * NUM_ROWS
        assert tier.rows(first) == [contents(key).tobytes() for key in first]


def test_what_is_there_already_is_not_stored_again(node: Daemon) -> None:
    keys = keys_of(4)
    with Tier(node) as one, Tier(node) as other:
        one.store(keys[:2])
        before = node.status().num_chunks
        other.store(keys)
        assert node.status().num_chunks == before + 3
        assert other.look(keys) == [HIT] * len(keys)


def test_a_row_that_nobody_stored_is_a_miss_and_others_are_hits(node: Daemon) -> None:
    keys = keys_of(5)
    with Tier(node) as one:
        one.store(keys[1:3])
    with Tier(node) as other:
        assert other.look(keys) == [MISS, HIT, HIT, MISS, MISS]
        # The same hash in another group is other KV.
        assert other.look(keys_of(5, group=1)) == [MISS] * 5


@pytest.mark.parametrize(
    "change",
    [
        {"revision": "v2"},
        {"salt": "tenant"},
        {"config": {"name": "/models/other"}},
        {"config": {"dtype": "fp8_e4m3"}},
        {"config": {"layer_names": ("model.layers.1", "model.layers.0")}},
        {"config": {"group_id": 1}},
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
    _hashes.NONE_HASH = bytes(32)
    with Tier(node) as other:
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
    apart = vllm_offloading.row_layout(config, ROW_SIZE, told)

    def fingerprint(layout: Any, *, runner: bool = False, backend: str = "A") -> bytes:
        groups = [SimpleNamespace(layouts=(layout,))]
        engine = SimpleNamespace(groups=groups)
        monkeypatch.setattr(vllm_offloading, "engine_of", lambda *_: engine)
        known = SimpleNamespace(use_v2_model_runner=runner, attention_config=backend)
        with vllm_offloading._configs(known, None):
            found = vllm_offloading.row_layout(config, ROW_SIZE, Options())
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
    groups = tuple(_config.OffloadingGroupConfig(tokens, ("a",), 0) for tokens in (16, 32))

    def fingerprint(num_blocks: int = 2, row_size: int = 8192) -> bytes:
        config = offloading_config(TIER, groups=groups, blocks_per_chunk=num_blocks)
        return vllm_offloading.row_layout(config, row_size, options).fingerprint

    found = [fingerprint(), fingerprint(num_blocks=3), fingerprint(row_size=4096)]
    assert fingerprint() == found[0]
    with monkeypatch.context() as patched:
        patched.setattr(vllm_offloading, "vllm_version", "0.0.1")
        found.append(fingerprint())
    device = SimpleNamespace(get_device_name=lambda: "another")
    monkeypatch.setattr(vllm_offloading, "current_platform", device)
    found.append(fingerprint())
    assert len({*found}) == len(found)


def test_a_row_has_its_tokens_where_all_groups_have_as_many() -> None:
    options = Options(revision="v1")
    group = _config.OffloadingGroupConfig(16, ("a",), 0)
    longer = _config.OffloadingGroupConfig(32, ("b",), 1)
    for groups, tokens in [((group,), 32), ((group, group), 32), ((group, longer), 1)]:
        config = offloading_config(TIER, groups=groups)
        for size in (ROW_SIZE, 4096, 5 << 20, 3 << 30):
            layout = vllm_offloading.row_layout(config, size, options)
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


def test_a_row_that_is_lost_before_its_load_is_a_miss_from_then_on(tmp_path: Path) -> None:
    keys = keys_of(10)
    with Daemon(tmp_path) as daemon:
        with Tier(daemon) as one:
            one.store(keys)
        with Tier(daemon) as other:
            request = other.request()
            while other.manager.lookup(keys[0], request) is _base.LookupResult.RETRY:
                other.manager.lookup(keys[1], request)
                other.step()
            # Both are wanted now, and their load begins with the end of the step.
            other.manager.lookup(keys[1], request)
            daemon.clear()
            assert other.look(keys, request) == [MISS] * len(keys)
            assert other.look(keys, request) == [MISS] * len(keys)


def test_a_part_of_a_load_that_failed_counts(tmp_path: Path) -> None:
    keys = keys_of(11)
    with Daemon(tmp_path) as daemon:
        with Tier(daemon, verify=True) as one:
            one.store(keys)
        victim = ChunkKey(daemon.chunks()[0].key)
        daemon.overwrite([victim], lambda tensor: tensor.add_(1))
        with Tier(daemon, verify=True) as other:
            found = other.look(keys)
            assert sorted(found, key=str) == [HIT] * 4 + [MISS]
            good = [key for key, result in zip(keys, found, strict=True) if result is HIT]
            assert other.rows(good) == [contents(key).tobytes() for key in good]


@pytest.mark.parametrize("is_paused", [False, True], ids=["killed", "paused"])
def test_a_daemon_that_does_not_answer_costs_misses_and_no_time(
    tmp_path: Path, is_paused: bool
) -> None:
    keys, more = keys_of(12), keys_of(13, 3)
    with Daemon(tmp_path) as daemon, Tier(daemon, lookup_s=2.0, store_s=3.0) as tier:
        tier.store(keys_of(14, 1))
        tier.slowest_s = 0.0
        if is_paused:
            with daemon.paused():
                _serves_alone(tier, keys, more)
        else:
            daemon.kill()
            _serves_alone(tier, keys, more)
            daemon.start()
        tier.until_done()
        # It is found again, though what was stored meanwhile is not in it.
        give_up = time.monotonic() + PATIENCE_S
        for seed in range(100, 1000):
            tier.store(keys_of(seed, 1))
            if daemon.status().num_chunks > 1:
                break
            assert time.monotonic() < give_up, "nothing is stored any more"


def _serves_alone(tier: Tier, keys: list[bytes], more: list[bytes]) -> None:
    begun = time.monotonic()
    assert tier.look(keys) == [MISS] * len(keys)
    tier.store(more)
    assert tier.look(more) == [HIT] * len(more)
    assert tier.slowest_s < CALL_S_MAX
    # A lookup and a store, each with its own deadline.
    assert time.monotonic() - begun < 10


def test_after_an_answer_that_came_too_late_nobody_asks_for_a_while(tmp_path: Path) -> None:
    with Daemon(tmp_path) as daemon, Tier(daemon, lookup_s=0.5) as tier:
        tier.store(keys_of(24, 1))
        with daemon.paused():
            begun = time.monotonic()
            for seed in range(200, 220):
                assert tier.look(keys_of(seed, 1)) == [MISS]
            # Each of them alone would have taken half a second.
            assert time.monotonic() - begun < 5


def test_a_store_that_the_daemon_does_not_follow_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_offloading, "STORES_MAX", 1)
    first, second = keys_of(15, 1), keys_of(16, 1)
    with Daemon(tmp_path) as daemon, Tier(daemon, store_s=30.0) as tier:
        tier.store(keys_of(17, 1))
        with daemon.paused():
            request = tier.request()
            for keys in (first, second):
                tier.manager.prepare_store(keys, request)
                tier.manager.complete_store(keys, request)
        tier.until_done()
        assert daemon.status().num_chunks == 2


def test_an_engine_ends_while_the_daemon_hangs(tmp_path: Path) -> None:
    keys, more = keys_of(18, 2), keys_of(19, 1)
    with Daemon(tmp_path) as daemon:
        tier = Tier(daemon, lookup_s=0.25, store_s=1.0)
        tier.store(more)
        with daemon.paused():
            request = tier.request()
            tier.manager.prepare_store(keys, request)
            tier.manager.complete_store(keys, request)
            tier.manager.lookup(keys_of(25, 1)[0], request)
            tier.step()
            begun = time.monotonic()
            tier.manager.shutdown()
            assert time.monotonic() - begun < 5


def test_a_request_says_whether_it_is_loaded_and_stored(node: Daemon) -> None:
    keys = keys_of(20)
    with Tier(node) as one, Tier(node) as other:
        one.store(keys[:1], one.request(store=False))
        assert other.look(keys[:1]) == [MISS]
        one.store(keys[1:], one.request(category="chat"))
        assert other.look(keys[1:], other.request(load=False)) == [MISS] * 4
        assert other.look(keys[1:], other.request(nonsense=1)) == [MISS] * 4
        assert other.look(keys[1:]) == [HIT] * 4
        assert {chunk.category for chunk in node.chunks()} >= {"chat"}


def test_a_request_says_how_long_its_rows_are_kept(node: Daemon) -> None:
    def stored() -> set[bytes]:
        return {chunk.key for chunk in node.chunks()} - before

    before = {chunk.key for chunk in node.chunks()}
    with Tier(node) as tier:
        tier.store(keys_of(26), tier.request(ttl_s=2.0))
    assert len(stored()) == 5
    node.until(lambda: not stored(), "its rows are kept for ever")


@pytest.mark.parametrize("mode", ["load", "store"])
def test_a_mode_is_kept(node: Daemon, mode: str) -> None:
    stored, new = keys_of(21), keys_of(22)
    with Tier(node, salt=mode) as one:
        one.store(stored)
    with Tier(node, salt=mode, mode=mode) as tier, Tier(node, salt=mode) as other:
        assert tier.look(stored) == [HIT if mode == "load" else MISS] * 5
    with Tier(node, salt=mode, mode=mode) as tier, Tier(node, salt=mode) as other:
        tier.store(new)
        assert other.look(new) == [HIT if mode == "store" else MISS] * 5


@pytest.mark.parametrize("option", [{"chunk_tokens": 32}, {"sokcet": "/x"}, {"mode": "none"}])
def test_options_that_cannot_be_are_refused(node: Daemon, option: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Tier(node, **option)


def test_the_primary_tier_can_be_unmapped_at_the_end(node: Daemon) -> None:
    with Tier(node) as tier:
        tier.store(keys_of(23))
        mapping = tier.spec._scheduler_mmap.mmap_obj
    assert mapping.closed


# With engines.


def offloading(daemon: Daemon, *, size: int = 64 << 20) -> dict[str, Any]:
    """The engine's argument for native offloading into so many bytes, and from there to kvd."""
    config = {
        "kv_connector": "KvdOffloadingConnector",
        "kv_connector_module_path": TIER["module_path"],
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "spec_name": "CpuSpec",
            "spec_module_path": HERE,
            "cpu_bytes_to_use": size,
            "secondary_tiers": [{**TIER, "socket": str(daemon.socket)}],
        },
    }
    return {"kv_transfer_config": config}


def request_of(seed: int) -> Request:
    return {"prompt": prompt(seed, NUM_TOKENS), "new_tokens": NEW_TOKENS}


def moved(engine: Engine, way: str) -> int:
    """Rows that vLLM counted between its primary tier and kvd, `read` or `write`."""
    assert engine.settle()
    found = engine.metrics(f"vllm:kv_offload_tiering_{way}_bytes_total")
    return round(sum(found.values()) / ENGINE_ROW_SIZE)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One that engines of this file share, and that the last test kills."""
    with Daemon(tmp_path_factory.mktemp("daemon")) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def stored(daemon: Daemon, tmp_path_factory: pytest.TempPathFactory) -> list[Answer]:
    """The answers of an engine that stored three prompts in kvd, and is gone."""
    with Engine(tmp_path_factory.mktemp("first"), "qwen3", **offloading(daemon)) as first:
        answers = [first.generate(request_of(seed))[0] for seed in range(3)]
        assert moved(first, "write") == 3 * PROMPT_ROWS
        assert moved(first, "read") == 0
        first.stop()
    daemon.until_stored(3 * PROMPT_ROWS)
    return answers


@pytest.fixture(scope="module")
def second(
    daemon: Daemon, stored: list[Answer], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    """A later engine, whose primary tier has room for one prompt and a little more."""
    folder = tmp_path_factory.mktemp("second")
    size = (PROMPT_ROWS + 4) * ENGINE_ROW_SIZE
    with Engine(folder, "qwen3", **offloading(daemon, size=size)) as second:
        yield second


def test_a_new_engine_loads_what_another_stored(
    second: Engine, stored: list[Answer], daemon: Daemon, reference: Reference
) -> None:
    request, before = request_of(0), moved(second, "read")
    (answer,) = second.generate(request)
    assert moved(second, "read") == before + PROMPT_ROWS
    assert answer.cached_tokens == PROMPT_ROWS * 32
    reference.check(request, answer)
    assert_same(stored[0], answer)
    assert len(set(answer.tokens)) > NEW_TOKENS / 2, "a model that repeats itself proves nothing"
    (layout,) = daemon.layouts().values()
    assert layout.revision, "the connector knows the weights"
    daemon.until_idle()


def test_what_left_host_memory_comes_back(second: Engine, reference: Reference) -> None:
    # The second prompt drives the first out of the primary tier.
    for seed in (20, 21):
        second.generate(request_of(seed))
        assert second.settle()
    second.forget()
    before = moved(second, "read")
    (answer,) = second.generate(request_of(20))
    assert moved(second, "read") == before + PROMPT_ROWS
    reference.check(request_of(20), answer)


def test_the_loaded_kv_is_what_the_answer_comes_from(
    second: Engine, stored: list[Answer], daemon: Daemon
) -> None:
    keys = [ChunkKey(chunk.key) for chunk in daemon.chunks()]
    daemon.overwrite(keys, lambda tensor: tensor.zero_())
    (answer,) = second.generate(request_of(1))
    assert answer.tokens != stored[1].tokens


def test_with_the_daemon_killed_answers_are_right_and_in_time(
    second: Engine, daemon: Daemon, reference: Reference
) -> None:
    # Rows of before are noise, in kvd and in the primary tier: these prompts are new.
    requests = [request_of(seed) for seed in (30, 31, 32)]
    for request in requests:
        reference(request)
    second.ask({"generate": requests})
    daemon.kill()
    begun = time.monotonic()
    answers = second.answers()
    answers += second.generate(request_of(33), request_of(2))
    assert time.monotonic() - begun < 30
    for request, answer in zip([*requests, request_of(33), request_of(2)], answers, strict=True):
        reference.check(request, answer)
    assert second.settle()
    daemon.start()
    before = daemon.status().num_chunks
    second.generate(request_of(34))
    daemon.until_stored(before + PROMPT_ROWS)
    second.stop()
