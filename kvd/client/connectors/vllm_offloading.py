"""vLLM's native offloading with kvd below it: a secondary tier for what it has in host memory.

    vllm serve MODEL --kv-transfer-config '{"kv_connector": "KvdOffloadingConnector",
        "kv_connector_module_path": "kvd.client.connectors.vllm_offloading", "kv_role": "kv_both",
        "kv_connector_extra_config": {"spec_name": "TieringOffloadingSpec",
            "cpu_bytes_to_use": 17179869184, "secondary_tiers": [{"type": "KvdTierManager",
                "module_path": "kvd.client.connectors.vllm_offloading"}]}}'

The primary tier is rows of host memory. A *row* holds some blocks of one KV-cache group as all
workers wrote them, side by side, in whatever order their backend has. It goes to kvd as it is,
under a layout that says so: engines that write the same rows share them, and nobody else does, not
even kvd's own connector with the same model.

All methods run on the scheduler's thread, and none of them waits. Nothing that goes wrong with kvd
reaches a request: what cannot be found or loaded is computed, what cannot be stored is not.
"""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from hashlib import blake2b
from os import urandom
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.v1.kv_offload import base
from vllm.v1.kv_offload.tiering.base import SecondaryTierManager

from kvd.client.connectors.vllm_identity import hash_space
from kvd.client.connectors.vllm_offloading_layout import engine_known, row_layout
from kvd.client.connectors.vllm_offloading_lookups import Lookups
from kvd.client.connectors.vllm_offloading_rows import Rows
from kvd.client.connectors.vllm_offloading_versions import known_arguments, result_of, rows_of
from kvd.client.connectors.vllm_options import (
    Options,
    RequestOptions,
    client_of,
    parse_options,
    request_options,
)
from kvd.client.connectors.vllm_stats import Tally
from kvd.errors import ConfigError, DeadlineExceeded, KvdError

if TYPE_CHECKING:
    from vllm.v1.kv_offload.tiering.base import JobResult, TransferJob

log = logging.getLogger("kvd.vllm")

# Stores that wait for their turn pin rows of the primary tier: with more of them the daemon cannot
# follow.
STORES_MAX = 256

# Loads side by side: one waits for a disk while another copies.
LOAD_THREADS = 2

# Options of the connector that mean nothing here: vLLM decides what is offloaded, in which sizes.
_NOT_HERE = (
    "chunk_tokens",
    "exact_only",
    "layer_by_layer",
    "min_hit_tokens",
    "store_generated",
    "store_tails",
)


class KvdOffloadingConnector(OffloadingConnector):  # type: ignore[misc]  # vLLM has no types here
    """vLLM's own connector for native offloading. It lets a `KvdTierManager` look at the engine's
    whole configuration, of which vLLM hands its tiers a part.
    """

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        with engine_known(vllm_config, kv_cache_config):
            super().__init__(vllm_config, role, kv_cache_config)


class KvdTierManager(SecondaryTierManager):  # type: ignore[misc]  # as above
    """The tier. Options: `Options`, beside `type` and `module_path`, but for those in `_NOT_HERE`;
    for a request, `RequestOptions` as `kv_transfer_params["kvd"]`. Raises `ConfigError` for options
    that cannot be.

    Below vLLM's own `OffloadingConnector` it cannot see weights, quantisation, overrides of the
    model's configuration or the attention backend. There it works only if `revision` is given, and
    whoever gives it answers for all of these: another value for each combination.

    When the engine empties its caches, as it does when its weights change in place, nothing that
    was stored before is found any more.
    """

    medium = base.Medium.CPU

    def __init__(
        self,
        offloading_spec: Any,
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: Any = None,
        **options: Any,
    ) -> None:
        known = known_arguments(backpressure_detector)
        super().__init__(offloading_spec, primary_kv_view, tier_type, **known)
        self._options = _tier_options(options)
        self._tally = Tally(log)
        self._hash_tokens: int = offloading_spec.tokens_per_hash
        self._space = b""
        self._epoch = b""
        self._ended: queue.SimpleQueue[Ended] = queue.SimpleQueue()
        self._loads: set[Future[None]] = set()
        self._stores: set[Future[None]] = set()
        self._rows: Rows | None = None
        strides = primary_kv_view.strides
        assert strides is not None
        self._row_size = strides[0]
        try:
            layout = row_layout(offloading_spec.config, self._row_size, self._options)
        except KvdError as error:
            log.warning("event=not_served reason=%r", str(error))
            return
        self._client = client_of(self._options, "vllm-offloading")
        self._rows = Rows(self._client, layout, self._options, primary_kv_view)
        self._lookups = Lookups(tier_type, self._present)
        self._loading = ThreadPoolExecutor(LOAD_THREADS, thread_name_prefix="kvd-tier-load")
        self._storing = ThreadPoolExecutor(1, thread_name_prefix="kvd-tier-store")

    def on_new_request(self, req_context: Any) -> Any:
        req_context.set_state(request_options(req_context.kv_transfer_params))
        return base.RequestOffloadingContext()

    def lookup(self, key: bytes, req_context: Any) -> Any:
        is_wanted = self._options.loads and _wishes(req_context).load
        if self._rows is None or not is_wanted:
            return base.LookupResult.MISS
        found = self._lookups.lookup(key, req_context)
        if found is None:
            return base.LookupResult.RETRY
        return base.LookupResult.HIT if found else base.LookupResult.MISS

    def submit_store(self, job_metadata: TransferJob) -> None:
        job = job_metadata
        wishes = _wishes(job.req_context)
        self._stores = {future for future in self._stores if not future.done()}
        if self._rows is None or not (self._options.stores and wishes.store):
            self._ended.put(Ended(result_of(job, success=True)))
        elif len(self._stores) >= STORES_MAX:
            self._ended.put(Ended(result_of(job, success=False)))
        else:
            give_up = time.monotonic() + self._options.store_s
            args = (self._rows, job, self._names(job), wishes, give_up)
            self._stores.add(self._storing.submit(self._store, *args))

    def submit_load(self, job_metadata: TransferJob) -> None:
        job = job_metadata
        assert self._rows is not None, "what is not served has no hits"
        self._loads = {future for future in self._loads if not future.done()}
        give_up = time.monotonic() + self._options.load_s
        args = (self._rows, job, self._names(job), give_up)
        self._loads.add(self._loading.submit(self._load, *args))

    def get_finished_jobs(self) -> Iterable[JobResult]:
        results = []
        while not self._ended.empty():
            ended = self._ended.get()
            # Else vLLM would find them and ask for them for ever.
            if ended.lost:
                self._lookups.mark_miss(ended.lost)
            results.append(ended.result)
        return results

    def on_request_finished(self, req_context: Any) -> None:
        if self._rows is not None:
            self._lookups.cleanup(req_context.req_id)

    def on_schedule_end(self, context: Any) -> None:
        if self._rows is not None:
            self._lookups.flush()

    def drain_jobs(self) -> None:
        # Each job ends by its own deadline.
        wait(self._loads | self._stores)
        # This is how a tier hears that the caches are emptied: weights may be others from here on.
        self._epoch = urandom(16)

    def shutdown(self) -> None:
        if self._rows is None:
            return
        self._lookups.shutdown()
        self._loading.shutdown(cancel_futures=True)
        self._storing.shutdown()
        self._client.close()
        # vLLM unmaps the primary tier next, which it cannot while there are views of it.
        self._rows = None

    def _name(self, key: bytes) -> bytes:
        """The name of a row: vLLM's hash of its last tokens and its group, in a name space."""
        # The seed is known when the first request is there.
        self._space = self._space or hash_space(self._hash_tokens)
        return blake2b(self._space + self._epoch + key, digest_size=32).digest()

    def _names(self, job: TransferJob) -> list[bytes]:
        return [self._name(key) for key in job.keys]

    # On other threads.

    def _present(self, keys: Sequence[bytes], request: str) -> list[bool]:
        """Which rows kvd has."""
        assert self._rows is not None
        names = [self._name(key) for key in keys]
        try:
            found = self._rows.present(names, time.monotonic() + self._options.lookup_s)
        except KvdError as error:
            is_slow = isinstance(error, DeadlineExceeded)
            self._tally.miss("slow" if is_slow else "unavailable", request, str(error))
            return [False] * len(keys)
        return [name in found for name in names]

    def _load(self, rows: Rows, job: TransferJob, names: Sequence[bytes], give_up: float) -> None:
        started = time.monotonic()
        keys = dict(zip(names, job.keys, strict=True))
        places = dict(zip(names, rows_of(job), strict=True))
        good: list[bytes] = []
        detail = ""
        try:
            for name in rows.load(places, give_up):
                good.append(keys.pop(name))
        except Exception as error:  # noqa: BLE001  The engine waits for an answer, whatever it is.
            detail = repr(error)
        if keys:
            request = job.req_context.req_id
            self._tally.miss("failed" if detail else "lost", request, detail)
        result = result_of(
            job,
            success=not keys,
            successful_keys=tuple(good),
            transfer_time=time.monotonic() - started,
            transfer_bytes=len(good) * self._row_size,
        )
        self._ended.put(Ended(result, tuple(keys.values())))

    def _store(
        self,
        rows: Rows,
        job: TransferJob,
        names: Sequence[bytes],
        wishes: RequestOptions,
        give_up: float,
    ) -> None:
        started = time.monotonic()
        size, reason = 0, ""
        places = dict(zip(names, rows_of(job), strict=True))
        try:
            size = rows.store(places, wishes, give_up)
        except Exception as error:  # noqa: BLE001  A store that fails is a row less, never more.
            reason = repr(error)
            log.debug("event=store_failed request=%s reason=%r", job.req_context.req_id, reason)
        result = result_of(
            job,
            success=not reason,
            transfer_time=time.monotonic() - started,
            transfer_bytes=size,
        )
        self._ended.put(Ended(result))


class Ended(NamedTuple):
    """A job's end; `lost` are vLLM's keys of rows that were found and could not be loaded."""

    result: JobResult
    lost: Sequence[bytes] = ()


def _tier_options(found: dict[str, Any]) -> Options:
    for name in _NOT_HERE:
        if name in found:
            raise ConfigError(f"{name} means nothing here: vLLM decides what is offloaded")
    return parse_options(found)


def _wishes(req_context: Any) -> RequestOptions:
    found: RequestOptions | None = req_context.get_state(RequestOptions)
    return found or RequestOptions()
