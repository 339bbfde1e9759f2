"""kvd's tier below vLLM's, without an engine: driven as a scheduler does it."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any
from uuid import uuid4

import numpy as np

from tests.vllm.daemon import Daemon
from tests.vllm.offloading_spec import CpuSpec

_base: Any = importlib.import_module("vllm.v1.kv_offload.base")
_config: Any = importlib.import_module("vllm.v1.kv_offload.config")
_hashes: Any = importlib.import_module("vllm.v1.core.kv_cache_utils")
_hashing: Any = importlib.import_module("vllm.utils.hashing")

TIER = {"type": "KvdTierManager", "module_path": "kvd.client.connectors.vllm_offloading"}

HIT, MISS, RETRY = _base.LookupResult.HIT, _base.LookupResult.MISS, _base.LookupResult.RETRY

PATIENCE_S = 60.0

# A row: two blocks of 16 tokens.
BLOCK_SIZE = 12_000
ROW_SIZE = 24_576
NUM_ROWS = 8


class Tier:
    """Eight rows of a primary tier and a `KvdTierManager` below, driven as a scheduler does.

    `config` are fields of `OffloadingConfig`, or of its parts. A context manager.
    """

    def __init__(self, daemon: Daemon, *, config: dict[str, Any] | None = None, **options: Any):
        options = {"socket": str(daemon.socket), "revision": "v1", "lookup_s": 2.0, **options}
        options = {name: value for name, value in options.items() if value is not None}
        # An engine's core does this before its first request.
        _hashes.init_none_hash(_hashing.sha256)
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
        rows = prepared.store_spec.block_ids
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
        rows = self.manager.prepare_load(keys, request).block_ids
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

    def part(kind: str, **told: Any) -> Any:
        changed = {name: changes.pop(name) for name in told if name in changes}
        return config_part(kind, **{**told, **changed})

    group = {"tokens_per_block": 16, "layer_names": ("model.layers.0", "model.layers.1")}
    told = {
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
    return _config.OffloadingConfig(**{**told, **changes, "extra_config": extra})


def config_part(kind: str, **told: Any) -> Any:
    """A part of `OffloadingConfig`, with the fields that this version has."""
    made = getattr(_config, kind)
    known = {field.name for field in fields(made)}
    return made(**{name: value for name, value in told.items() if name in known})


def group_config(tokens: int, number: int = 0) -> Any:
    """A group of one layer, with so many tokens in a block."""
    layers = (f"model.layers.{number}",)
    told = {"tokens_per_block": tokens, "layer_names": layers, "group_id": number}
    return config_part("OffloadingGroupConfig", **told)


def keys_of(seed: int, count: int = 5, group: int = 0) -> list[bytes]:
    """Hashes of blocks as vLLM has them, with a group."""
    chance = np.random.default_rng(seed)
    return [_base.make_offload_key(chance.bytes(32), group) for _ in range(count)]


def contents(key: bytes) -> Any:
    """`uint8 [row_size]`, other bytes for another key."""
    return np.frombuffer(np.random.default_rng(list(key)).bytes(ROW_SIZE), np.uint8)
