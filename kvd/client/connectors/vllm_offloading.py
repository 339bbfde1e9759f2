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

import json
import logging
import math
import queue
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from contextvars import ContextVar
from hashlib import blake2b
from os import urandom
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.platforms import current_platform
from vllm.v1.kv_offload import base
from vllm.v1.kv_offload.tiering.async_lookup import AsyncLookupManager
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob
from vllm.version import __version__ as vllm_version

from kvd.client.client import split_parts
from kvd.client.connectors.late_client import LateClient
from kvd.client.connectors.vllm_finder import REST_S
from kvd.client.connectors.vllm_identity import engine_of, hash_space
from kvd.client.connectors.vllm_options import (
    Options,
    RequestOptions,
    client_of,
    parse_options,
    request_options,
)
from kvd.client.connectors.vllm_plan import key_of
from kvd.client.connectors.vllm_stats import Tally
from kvd.client.lease import Lease
from kvd.errors import ConfigError, Corrupt, DeadlineExceeded, KvdError, Unsupported
from kvd.keys import ChunkKey
from kvd.layout import KVLayout

log = logging.getLogger("kvd.vllm")

# Stores that wait for their turn pin rows of the primary tier: with more of them the daemon cannot
# follow.
STORES_MAX = 256

# Loads side by side: one waits for a disk while another copies.
LOAD_THREADS = 2

# What a lease lasts longer than the work that it is for.
LEASE_MARGIN_S = 1.0

# Options of the connector that mean nothing here: vLLM decides what is offloaded, in which sizes.
_NOT_HERE = (
    "chunk_tokens",
    "exact_only",
    "layer_by_layer",
    "min_hit_tokens",
    "store_generated",
    "store_tails",
)

# A row's bytes have no heads; these make numbers of any size out of numbers that a layout may have.
_HEAD_DIM_MAX = 4096

# While a connector makes its tiers: what it knows of the engine, `VllmConfig` and `KVCacheConfig`.
_engine_configs: ContextVar[tuple[Any, Any] | None] = ContextVar("engine_configs", default=None)


class KvdOffloadingConnector(OffloadingConnector):  # type: ignore[misc]  # vLLM has no types here
    """vLLM's own connector for native offloading. It lets a `KvdTierManager` look at the engine's
    whole configuration, of which vLLM hands its tiers a part.
    """

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        with _configs(vllm_config, kv_cache_config):
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
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        self._options = _tier_options(options)
        self._tally = Tally(log)
        self._hash_tokens: int = offloading_spec.tokens_per_hash
        self._space = b""
        self._epoch = b""
        self._ended: queue.SimpleQueue[Ended] = queue.SimpleQueue()
        self._loads: set[Future[None]] = set()
        self._stores: set[Future[None]] = set()
        self._rows: Rows | None = None
        try:
            layout = row_layout(offloading_spec.config, self.block_size_bytes, self._options)
        except KvdError as error:
            log.warning("event=not_served reason=%r", str(error))
            return
        self._client = client_of(self._options, "vllm-offloading")
        self._rows = Rows(self._client, layout, self._options, primary_kv_view)
        self._lookups = _Lookups(tier_type, self._present)
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
            self._ended.put(Ended(JobResult(job_id=job.job_id, success=True)))
        elif len(self._stores) >= STORES_MAX:
            self._ended.put(Ended(JobResult(job_id=job.job_id, success=False)))
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
        places = dict(zip(names, map(int, job.chunk_ids), strict=True))
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
        result = JobResult(
            job_id=job.job_id,
            success=not keys,
            successful_keys=tuple(good),
            transfer_time=time.monotonic() - started,
            transfer_bytes=len(good) * self.block_size_bytes,
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
        places = dict(zip(names, map(int, job.chunk_ids), strict=True))
        try:
            size = rows.store(places, wishes, give_up)
        except Exception as error:  # noqa: BLE001  A store that fails is a row less, never more.
            reason = repr(error)
            log.debug("event=store_failed request=%s reason=%r", job.req_context.req_id, reason)
        result = JobResult(
            job_id=job.job_id,
            success=not reason,
            transfer_time=time.monotonic() - started,
            transfer_bytes=size,
        )
        self._ended.put(Ended(result))


class Ended(NamedTuple):
    """A job's end; `lost` are vLLM's keys of rows that were found and could not be loaded."""

    result: JobResult
    lost: Sequence[bytes] = ()


class Rows:
    """The primary tier's rows on their way to kvd and back. Thread-safe.

    Rows go by names of 32 bytes and by their indices in `memory`, `[rows, row_size]`. Each call
    ends by `give_up`, on the monotonic clock. Raises `KvdError`; what was done before counts.
    """

    def __init__(
        self, client: LateClient, layout: KVLayout, options: Options, memory: memoryview
    ) -> None:
        self.layout = layout
        self._client = client
        self._options = options
        self._memory: NDArray[np.uint8] = np.asarray(memory).view(np.uint8)
        self._rest_until = 0.0
        assert self._memory.shape[1] == layout.size(layout.chunk_tokens)

    def present(self, names: Sequence[bytes], give_up: float) -> set[bytes]:
        """Those of `names` that kvd has; what is on disk only is on its way into memory."""
        keys = {key_of(self.layout, name): name for name in names}
        found: set[bytes] = set()
        for part in split_parts(list(keys)):
            with self._pinned(part, give_up) as lease:
                found.update(keys[key] for key in lease.keys)
        return found

    def load(self, places: Mapping[bytes, int], give_up: float) -> Iterator[bytes]:
        """Fill rows, by their names, and yield each name when its row is whole."""
        names = {key_of(self.layout, name): name for name in places}
        for part in split_parts(list(names)):
            with self._pinned(part, give_up) as lease:
                for index, key in enumerate(lease.keys):
                    if self._load_row(lease, index, places[names[key]], give_up):
                        yield names[key]

    def store(self, places: Mapping[bytes, int], wishes: RequestOptions, give_up: float) -> int:
        """Store those of the rows, by their names, that nobody has stored; how many bytes."""
        rows = {key_of(self.layout, name): row for name, row in places.items()}
        parts = split_parts(list(rows))
        return sum(self._store_part(part, rows, wishes, give_up) for part in parts)

    def _load_row(self, lease: Lease, index: int, row: int, give_up: float) -> bool:
        left_s = give_up - time.monotonic()
        if left_s <= 0:
            raise DeadlineExceeded(f"{len(lease) - index} rows did not come in time")
        if not lease.wait(index, timeout_s=left_s):
            return False
        try:
            lease.load(index, self._memory[row])
        except Corrupt:
            return False
        return True

    def _store_part(
        self,
        keys: Sequence[ChunkKey],
        rows: Mapping[ChunkKey, int],
        wishes: RequestOptions,
        give_up: float,
    ) -> int:
        with self._asking(give_up) as left_s:
            reservation = self._client.reserve(
                self.layout,
                keys,
                standalone=True,
                category=wishes.category or self._options.category,
                ttl_s=wishes.ttl_s,
                lease_s=left_s + LEASE_MARGIN_S,
                timeout_s=left_s,
            )
            with reservation:
                for index in reservation:
                    reservation.write(index, self._memory[rows[keys[index]]])
                reservation.commit(timeout_s=max(give_up - time.monotonic(), 0.001))
        return reservation.size

    @contextmanager
    def _pinned(self, keys: Sequence[ChunkKey], give_up: float) -> Iterator[Lease]:
        with (
            self._asking(give_up) as left_s,
            self._client.pin(
                self.layout,
                keys,
                standalone=True,
                # What a row means is not known here: another one that is near it is no use.
                exact=True,
                wait=False,
                wait_s=0.0,
                lease_s=left_s + LEASE_MARGIN_S,
                timeout_s=left_s,
            ) as lease,
        ):
            yield lease

    @contextmanager
    def _asking(self, give_up: float) -> Iterator[float]:
        """How many seconds the daemon has. After an answer that came too late nobody asks for
        `REST_S`.
        """
        now = time.monotonic()
        if now < self._rest_until:
            raise DeadlineExceeded("the daemon was slow a moment ago")
        if now >= give_up:
            raise DeadlineExceeded("other rows took all of the time")
        try:
            yield give_up - now
        except DeadlineExceeded:
            self._rest_until = time.monotonic() + REST_S
            raise


class _Lookups(AsyncLookupManager):  # type: ignore[misc]  # as above
    """Asks what rows there are on a thread of its own, a step's questions together."""

    def __init__(
        self, tier_type: str, present: Callable[[Sequence[bytes], str], list[bool]]
    ) -> None:
        # The thread runs from here on.
        self._present = present
        super().__init__(tier_type)

    def batch_lookup(self, keys: list[bytes], req_context: Any) -> Collection[bool]:
        return self._present(keys, req_context.req_id)


def row_layout(config: Any, row_size: int, options: Options) -> KVLayout:
    """What rows of `row_size` bytes mean, by `OffloadingConfig` and, inside of a
    `KvdOffloadingConnector`, by everything that is known of the engine. Raises `Unsupported` for
    one whose KV cannot be told from that of others.
    """
    known = _engine_configs.get()
    if known is None and not options.revision:
        raise Unsupported(
            "OffloadingConnector does not tell what the engine's weights are: use "
            "KvdOffloadingConnector, or name them by revision"
        )
    told = _row_facts(config)
    rope, revision = "", options.revision
    if known is not None:
        engine = engine_of(*known, options)
        layouts = [layout for group in engine.groups for layout in group.layouts]
        rope, revision = layouts[0].rope, layouts[0].revision
        told["layouts"] = [layout.fingerprint.hex() for layout in layouts]
        told["backend"] = str(getattr(known[0], "attention_config", None))
        told["runner"] = str(getattr(known[0], "use_v2_model_runner", None))
    digest = blake2b(json.dumps(told, sort_keys=True).encode(), digest_size=16).hexdigest()
    tokens = _tokens_of_row(config, row_size)
    head_dim = math.gcd(row_size // tokens, _HEAD_DIM_MAX)
    return KVLayout(
        model=Path(config.model.name).name,
        revision=revision,
        dtype="uint8",
        num_layers=1,
        num_planes=1,
        num_kv_heads=row_size // tokens // head_dim,
        head_dim=head_dim,
        chunk_tokens=tokens,
        axes="opaque",
        rope=rope,
        group=f"vllm offloading row {digest}",
        salt=options.salt,
    )


def _row_facts(config: Any) -> dict[str, Any]:
    """What decides what stands where in a row. Its size, its tokens and the model's name stand in
    its layout by themselves, what hashes mean in its name.
    """
    parallel = config.parallel
    return {
        "vllm": vllm_version,
        "device": current_platform.get_device_name(),
        "dtype": config.model.dtype,
        "block_size": config.worker_kv_bytes_per_block,
        "blocks": config.cache.blocks_per_chunk,
        "groups": [
            [group.group_id, group.tokens_per_block, *group.layer_names] for group in config.groups
        ],
        "ranks": [
            parallel.world_size,
            parallel.tp_size,
            parallel.pp_size,
            parallel.pcp_size,
            parallel.dcp_size,
        ],
        "order": [config.kv_cache_layout, config.canonical_layout, config.replicated_layout],
    }


def _tokens_of_row(config: Any, row_size: int) -> int:
    """How many tokens a row stands for, where that is the same for all groups; else 1."""
    sizes = {group.tokens_per_block * config.cache.blocks_per_chunk for group in config.groups}
    tokens = int(sizes.pop())
    return 1 if sizes or row_size % tokens else tokens


def _tier_options(found: dict[str, Any]) -> Options:
    for name in _NOT_HERE:
        if name in found:
            raise ConfigError(f"{name} means nothing here: vLLM decides what is offloaded")
    return parse_options(found)


def _wishes(req_context: Any) -> RequestOptions:
    found: RequestOptions | None = req_context.get_state(RequestOptions)
    return found or RequestOptions()


@contextmanager
def _configs(vllm_config: Any, kv_cache_config: Any) -> Iterator[None]:
    token = _engine_configs.set((vllm_config, kv_cache_config))
    try:
        yield
    finally:
        _engine_configs.reset(token)
