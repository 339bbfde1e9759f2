"""vLLM: a KV connector that loads the longest known prefix of each prompt from kvd and stores what
is computed.

    vllm serve MODEL --kv-transfer-config '{"kv_connector": "KvdConnector", "kv_role": "kv_both",
        "kv_connector_module_path": "kvd.client.connectors.vllm"}'

vLLM makes one of these in its scheduler and one in each worker. Nothing that goes wrong with kvd
reaches a request: what cannot be found or loaded is computed, what cannot be stored is not. An
engine whose KV cannot be served exactly runs as if there were no connector, and the log says why.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

import torch
from vllm.distributed.kv_events import BlockStored
from vllm.distributed.kv_transfer.kv_connector.v1 import base
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

from kvd.client.connectors.vllm_events import EventBook
from kvd.client.connectors.vllm_finder import Finder
from kvd.client.connectors.vllm_identity import Engine, engine_of
from kvd.client.connectors.vllm_loads import Results
from kvd.client.connectors.vllm_metrics import KvdPromMetrics, KvdStats
from kvd.client.connectors.vllm_options import client_of, parse_options
from kvd.client.connectors.vllm_plan import Load, Plan
from kvd.client.connectors.vllm_scheduler import SchedulerSide
from kvd.client.connectors.vllm_stats import Tally
from kvd.client.connectors.vllm_worker import WorkerSide
from kvd.errors import Unsupported

log = logging.getLogger("kvd.vllm")

# Where events say that blocks are.
MEDIUM = "KVD"

# Whether a request can be told to have failed, not only blocks.
_TELLS_FAILED = hasattr(base, "KVConnectorTransferResults")


class KvdMetadata(base.KVConnectorMetadata):  # type: ignore[misc]  # vLLM carries no types here
    """A step's plan, on its way from the scheduler to the workers."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan


class KvdWorkerMetadata(base.KVConnectorWorkerMetadata):  # type: ignore[misc]  # as above
    """How many ranks have committed which pieces since the last step, and have ended the loads of
    which requests in this one.
    """

    def __init__(self, stored: Counter[bytes], loaded: Counter[str]) -> None:
        self.stored = stored
        self.loaded = loaded

    def aggregate(self, other: Any) -> KvdWorkerMetadata:
        return KvdWorkerMetadata(self.stored + other.stored, self.loaded + other.loaded)


class KvdConnector(base.KVConnectorBase_V1, base.SupportsHMA):  # type: ignore[misc]  # as above
    """What vLLM loads. Options: `Options`, as `kv_connector_extra_config`; for a request,
    `RequestOptions` as `kv_transfer_params["kvd"]`. Raises `ConfigError` for options that cannot
    be.
    """

    with suppress(ImportError):
        # By this name vLLM's own metrics tell our hits from others'; before 0.29 they do not.
        from vllm.v1.metrics.cache_hit_source import CacheHitSource

        _cache_hit_source = CacheHitSource.HOST

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        self._options = parse_options(transfer.kv_connector_extra_config, role=transfer.kv_role)
        # vLLM's default ends a request whose load failed. A cache has no right to that.
        transfer.kv_load_failure_policy = "recompute"
        self._tally = Tally(log)
        self._bad_blocks: set[int] = set()
        self._loaded_in_step: set[str] = set()
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        self._engine: Engine | None = None
        self._events: EventBook | None = None
        events = vllm_config.kv_events_config
        self._tells_events = events is not None and events.enable_kv_cache_events
        self._client = client_of(self._options, f"vllm-{role.name.lower()}")
        try:
            self._engine = engine_of(vllm_config, kv_cache_config, self._options)
            if self._engine.fails_as_a_whole and not _TELLS_FAILED:
                raise Unsupported("before vLLM 0.30 a failed load of several groups cannot be told")
        except Unsupported as error:
            log.warning("event=not_served reason=%r", str(error))
            self._engine = None
            return
        if role is base.KVConnectorRole.SCHEDULER:
            if self._tells_events:
                self._events = EventBook(len(self._engine.groups[0].layouts))
            self._scheduler = SchedulerSide(
                self._engine,
                Finder(self._client, self._engine, self._options),
                self._options,
                self._tally,
                events=self._events,
            )

    # The scheduler's side.

    @property
    def requires_kv_delivery(self) -> bool:
        return False

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        if self._scheduler is None:
            return 0, False
        count = self._scheduler.matched(request, num_computed_tokens)
        return count, bool(count) and not self._scheduler.is_in_step(request)

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        super().bind_kv_cache_manager(kv_cache_manager)
        if self._scheduler is not None:
            self._scheduler.allow_in_step(kv_cache_manager.evict_blocks)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if self._scheduler is not None:
            self._scheduler.allocated(request, blocks.get_block_ids(), num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> KvdMetadata:
        if self._scheduler is None:
            return KvdMetadata(Plan())
        return KvdMetadata(self._scheduler.plan(scheduler_output))

    def update_connector_output(self, connector_output: Any) -> None:
        bad_blocks: set[int] = set(connector_output.invalid_block_ids or ())
        if self._scheduler is not None:
            self._scheduler.loaded(
                connector_output.finished_recving or (),
                getattr(connector_output, "failed_recving", None) or (),
                bad_blocks,
            )
        told = getattr(connector_output, "kv_connector_worker_meta", None)
        if self._scheduler is not None and told is not None and told.loaded:
            self._scheduler.loaded_in_step(told.loaded, bad_blocks)
        if self._events is not None and told is not None:
            self._events.committed(told.stored)

    def take_events(self) -> Iterable[Any]:
        if self._events is None or self._engine is None:
            return
        for stored in self._events.take():
            yield BlockStored(
                block_hashes=[maybe_convert_block_hash(each) for each in stored.hashes],
                parent_block_hash=stored.parent and maybe_convert_block_hash(stored.parent),
                token_ids=stored.tokens,
                block_size=self._engine.hash_block_size,
                lora_id=None,
                medium=MEDIUM,
                lora_name=stored.lora_name,
            )

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        if self._scheduler is not None:
            self._scheduler.finished(request)
        return False, None

    def reset_cache(self) -> bool | None:
        # Asked for when weights have changed in place: what is stored is of the old ones.
        if self._scheduler is not None:
            self._scheduler.forget_everything(os.urandom(16))
        return True

    # A worker's side.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        if self._engine is None:
            return
        from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

        rank = get_tensor_model_parallel_rank()
        try:
            self._worker = WorkerSide(
                self._engine, self._client, self._options, self._tally, kv_caches, rank=rank
            )
        except Unsupported as error:
            log.warning("event=not_served rank=%d reason=%r", rank, str(error))

    def handle_preemptions(self, kv_connector_metadata: Any) -> None:
        plan = kv_connector_metadata.plan
        if self._worker is not None and plan.new_blocks:
            self._worker.saves.make_way(plan.new_blocks)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        if self._worker is not None:
            mode = getattr(forward_context, "cudagraph_runtime_mode", None)
            # A graph of the whole model calls nobody between its layers.
            stops_at_layers = getattr(mode, "name", "NONE") != "FULL"
            self._worker.loads.start(self._plan.loads, stops_at_layers=stops_at_layers)

    def wait_for_layer_load(self, layer_name: str) -> None:
        if self._worker is not None:
            self._worker.loads.wait_for_layer(layer_name)

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **_: Any) -> None:
        """Chunks are saved when the step has been launched, all layers together."""

    def wait_for_save(self) -> None:
        if self._worker is not None:
            self._worker.saves.start(self._plan.saves)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        # How versions before `get_transfer_results` ask.
        return None, self._results().ended

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        found = self._results()
        return base.KVConnectorTransferResults(
            finished_recving=found.ended,
            failed_recving=found.failed if self._fails_as_a_whole else set(),
        )

    def get_block_ids_with_load_errors(self) -> set[int]:
        found, self._bad_blocks = self._bad_blocks, set()
        return set() if self._fails_as_a_whole else found

    def build_connector_worker_meta(self) -> KvdWorkerMetadata | None:
        stored: list[bytes] = []
        if self._worker is not None and self._tells_events:
            stored = self._worker.saves.take_stored()
        loaded, self._loaded_in_step = self._loaded_in_step, set()
        if not (stored or loaded):
            return None
        return KvdWorkerMetadata(Counter(stored), Counter(loaded))

    def shutdown(self) -> None:
        if self._scheduler is not None:
            self._scheduler.close()
        if self._worker is not None:
            self._worker.close()
        self._client.close()

    @property
    def _plan(self) -> Plan:
        plan: Plan = self._get_connector_metadata().plan
        return plan

    @property
    def _fails_as_a_whole(self) -> bool:
        return self._engine is not None and self._engine.fails_as_a_whole

    def _results(self) -> Results:
        plan = self._plan
        if self._worker is not None:
            found = self._worker.loads.results(is_idle=plan.is_idle)
        else:
            found = _none_of(plan.loads)
        self._bad_blocks = found.bad_blocks
        self._loaded_in_step |= found.in_step
        return found

    # Either side.

    def get_kv_connector_stats(self) -> KvdStats | None:
        counts = self._tally.take()
        return KvdStats(counts) if counts else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KvdStats:
        return KvdStats(data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KvdPromMetrics:
        return KvdPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)


def _none_of(loads: Sequence[Load]) -> Results:
    """Nobody here can load: the engine must not wait for it."""
    names = {load.request for load in loads if not load.is_in_step}
    in_step = {load.request for load in loads if load.is_in_step}
    bad_blocks = set[int]().union(*(load.all_filled for load in loads))
    return Results(ended=names, failed=set(names), bad_blocks=bad_blocks, in_step=in_step)
