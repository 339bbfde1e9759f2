"""Hugging Face transformers: a `model.generate` that loads the longest known prefix of a prompt
from kvd, computes the rest and stores what is new.

    connector = attach(model, kvd.connect())
    model.generate(**inputs, max_new_tokens=100)

A prompt is prefilled chunk by chunk, whether or not anything was found:

    0        256       512       768  800
    | chunk 0 | chunk 1 | chunk 2 | 32 |      each chunk by a forward of its own over 256 tokens,
    └────── loaded or computed ───┘  └── generate computes the rest and everything after it

so a chunk's KV always comes from a forward of one shape, and its bits do not depend on whether the
chunks before it were loaded or computed. Nothing that goes wrong with kvd reaches the caller: what
cannot be loaded is computed, what cannot be stored is not.
"""

from __future__ import annotations

import functools
import inspect
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from kvd.client.client import Client, split_parts
from kvd.client.connectors.stats import Recorder, Stats
from kvd.client.connectors.transformers_cache import Planes, make_room
from kvd.client.connectors.transformers_call import bypass_reason, prompt_of
from kvd.client.connectors.transformers_model import (
    Model,
    empty_cache,
    extend,
    layout_of,
    state_of,
)
from kvd.client.lease import Lease
from kvd.errors import InvalidRequest, KvdError
from kvd.keys import ChunkKey, chain_keys
from kvd.layout import CHUNK_TOKENS, KVLayout

__all__ = ["Connector", "Stats", "attach"]

TIMEOUT_S_DEFAULT = 2.0
FLUSH_S_DEFAULT = 60.0

# Stores that wait for the one before them. Each holds the KV of a whole prompt.
STORES_MAX = 4

# Bytes reserved at once: little enough to fit small tiers and be found soon, enough to make the
# round trips cheap.
RESERVE_SIZE_MAX = 64 << 20

log = logging.getLogger("kvd.transformers")


def attach(
    model: Model,
    client: Client,
    *,
    chunk_tokens: int = CHUNK_TOKENS,
    category: str = "",
    salt: str = "",
    revision: str | None = None,
    timeout_s: float = TIMEOUT_S_DEFAULT,
    store_generated: bool = True,
    exact_only: bool = False,
) -> Connector:
    """Have `model.generate` load from and store to `client`'s daemon, until `detach`.

    `revision` names the weights, and adapters if there are any; by default it is a digest of all of
    them. `salt` keeps tenants apart, `category` names the chunks' kind for eviction. Each call of
    the daemon may take `timeout_s`. With `store_generated`, chunks that generated tokens have
    completed are stored as well: the KV of the conversation as it was computed, token by token,
    where a prefill of the same text may differ in the last bits.

    What is computed on top of approximate KV (of a lossy codec) is stored as approximate. With
    `exact_only` no approximate KV is loaded.

    Raises `Unsupported` with the reason for a model that cannot be served exactly, and
    `InvalidRequest` for one that kvd is attached to already.
    """
    generate = getattr(model, "generate", None)
    if isinstance(getattr(generate, "kvd_connector", None), Connector):
        raise InvalidRequest("kvd is attached to this model already; detach it first")
    layout = layout_of(model, chunk_tokens=chunk_tokens, salt=salt, revision=revision)
    return Connector(
        model,
        client,
        layout,
        category=category,
        timeout_s=timeout_s,
        store_generated=store_generated,
        exact_only=exact_only,
    )


class Connector:
    """What `attach` returns. As a context manager it detaches at the end of the block."""

    def __init__(
        self,
        model: Model,
        client: Client,
        layout: KVLayout,
        *,
        category: str,
        timeout_s: float,
        store_generated: bool,
        exact_only: bool,
    ) -> None:
        self.layout = layout
        self.is_attached = True
        self._model = model
        self._client = client
        self._category = category
        self._timeout_s = timeout_s
        self._store_generated = store_generated
        self._exact_only = exact_only
        self._device: torch.device = model.device
        self._state = state_of(model)
        self._recorder = Recorder(log)
        self._stores = _StoreQueue()
        self._replaced = model.__dict__.get("generate")
        self._original: Callable[..., Any] = model.generate
        self._wrapper = self._wrap(self._original)
        model.generate = self._wrapper

    @property
    def stats(self) -> Stats:
        """What was done so far."""
        return self._recorder.snapshot()

    def flush(self, timeout_s: float = FLUSH_S_DEFAULT) -> bool:
        """Wait until what was given to be stored is stored, or has failed; whether that came in
        time.
        """
        return self._stores.flush(timeout_s)

    def detach(self) -> None:
        """Give the model its own `generate` back, and end the stores under way. Twice is once."""
        if not self.is_attached:
            return
        self.is_attached = False
        # Somebody may have wrapped our wrapper: it stays, and only passes calls on.
        if self._model.__dict__.get("generate") is self._wrapper:
            if self._replaced is None:
                del self._model.generate
            else:
                self._model.generate = self._replaced
        self._stores.close()

    def __enter__(self) -> Connector:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def _wrap(self, original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        @functools.wraps(original)
        def generate(*args: Any, **kwargs: Any) -> Any:
            if not self.is_attached:
                return original(*args, **kwargs)
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError:
                # The call has arguments that cannot be: the model's own generate says so.
                return original(*args, **kwargs)
            arguments = dict(bound.arguments)
            arguments |= arguments.pop("kwargs", {})
            reason = self._bypass_reason(arguments)
            if reason is not None:
                self._recorder.bypass(reason)
                return original(*args, **kwargs)
            return self._generate(arguments)

        generate.kvd_connector = self  # type: ignore[attr-defined]  # marks an attached model
        return generate

    def _bypass_reason(self, arguments: dict[str, Any]) -> str | None:
        chunk_tokens = self.layout.chunk_tokens
        reason = bypass_reason(self._model, arguments, chunk_tokens=chunk_tokens)
        if reason is None and state_of(self._model) != self._state:
            return "model_changed"
        return reason

    def _generate(self, arguments: dict[str, Any]) -> Any:
        """The model's own generate over a cache that holds the prompt's chunks already."""
        prompt: torch.Tensor = prompt_of(arguments)
        keys = self._keys(prompt[0])
        cache = empty_cache(self._model)
        num_loaded, is_exact = self._load(cache, keys, prompt.shape[1])
        started_s = time.perf_counter()
        self._prefill(cache, prompt)
        job = _Store(keys=keys, first=num_loaded, prefill_us=0, is_exact=is_exact)

        def at_first_token() -> None:
            # The prompt is computed, its first token chosen: from here on nobody waits for it.
            elapsed_us = (time.perf_counter() - started_s) * 1e6
            num_computed = prompt.shape[1] / self.layout.chunk_tokens - num_loaded
            job.prefill_us = int(elapsed_us / max(num_computed, 1))
            self._submit(job, cache)

        criteria = [*(arguments.get("stopping_criteria") or []), _FirstToken(at_first_token)]
        own = {"past_key_values": cache, "stopping_criteria": StoppingCriteriaList(criteria)}
        result = self._original(**arguments | own)
        if self._store_generated:
            sequence = result if isinstance(result, torch.Tensor) else result.sequences
            keys_now = self._keys(sequence[0, : cache.get_seq_length()])
            rest = replace(job, keys=keys_now, first=len(keys))
            self._submit(rest, cache)
        return result

    def _keys(self, tokens: torch.Tensor) -> list[ChunkKey]:
        """The keys of the whole chunks of `tokens`, integers [tokens]."""
        chunk_tokens = self.layout.chunk_tokens
        return chain_keys(self.layout.fingerprint, tokens.cpu().numpy(), chunk_tokens=chunk_tokens)

    def _prefill(self, cache: Any, prompt: torch.Tensor) -> None:
        """Compute the prompt's chunks that `cache` lacks, all but the last: generate does that."""
        input_ids, step = prompt.to(self._device), self.layout.chunk_tokens
        end = _num_prefilled(prompt.shape[1], step) * step
        for start in range(cache.get_seq_length(), end, step):
            extend(self._model, cache, input_ids[:, start : start + step])

    def _load(self, cache: Any, keys: Sequence[ChunkKey], num_tokens: int) -> tuple[int, bool]:
        """Fill `cache`, which is empty, with the leading chunks of a prompt of `num_tokens` tokens
        that are in kvd; how many, and whether all of them are exact.

        After a failure the cache is empty and the answer 0.
        """
        started_s = time.perf_counter()
        wanted = keys[: _num_prefilled(num_tokens, self.layout.chunk_tokens)]
        planes: list[Planes] = []
        num_loaded, is_exact = 0, True
        try:
            if wanted:
                num_loaded, is_exact, planes = self._read_prefix(wanted, num_tokens)
        except KvdError as error:
            # Nothing was put into the cache.
            self._recorder.fail("load", error)
        num_reused = num_loaded * self.layout.chunk_tokens
        for layer, room in zip(cache.layers, planes, strict=False):
            layer.load(room, num_reused)
        self._recorder.add(
            requests=1,
            prompt_tokens=num_tokens,
            reused_tokens=num_reused,
            loaded_size=self.layout.size(num_reused),
            load_s=time.perf_counter() - started_s,
        )
        return num_loaded, is_exact

    def _read_prefix(
        self, keys: Sequence[ChunkKey], num_tokens: int
    ) -> tuple[int, bool, list[Planes]]:
        """How many leading `keys` are in kvd, whether they are exact, and their K and V of each
        layer.
        """
        # What this very process is storing comes sooner than it can be computed again.
        self._stores.wait_for(keys, self._timeout_s)
        with ExitStack() as stack:
            leases: list[Lease] = []
            for part in split_parts(keys):
                lease = self._client.pin(
                    self.layout, part, exact=self._exact_only, timeout_s=self._timeout_s
                )
                leases.append(stack.enter_context(lease))
                if len(lease) < len(part):
                    break
            num_loaded = sum(map(len, leases))
            is_exact = all(lease.all_exact for lease in leases)
            planes = self._read(leases, num_tokens) if num_loaded else []
        # Leaving the block has checked the leases: what was read are the chunks' bytes.
        return num_loaded, is_exact, planes

    def _read(self, leases: Sequence[Lease], num_tokens: int) -> list[Planes]:
        """K and V of each layer with room for `num_tokens` tokens and more, the pinned chunks
        copied to their beginning: one copy.
        """
        chunks = [lease.tensor(index) for lease in leases for index in range(len(lease))]
        chunk_tokens = self.layout.chunk_tokens
        like = torch.empty(
            (1, self.layout.num_kv_heads, 0, self.layout.head_dim),
            dtype=chunks[0].dtype,
            device=self._device,
        )
        planes = []
        for layer in range(self.layout.num_layers):
            room = make_room(like, num_tokens), make_room(like, num_tokens)
            for plane, target in enumerate(room):
                for index, chunk in enumerate(chunks):
                    span = slice(index * chunk_tokens, (index + 1) * chunk_tokens)
                    target[0, :, span] = chunk[layer, plane].transpose(0, 1)
            planes.append(room)
        if self._client.verify:
            for lease in leases:
                for index in range(len(lease)):
                    lease.verify(index)
        return planes

    def _submit(self, job: _Store, cache: Any) -> None:
        """Have the chunks from `job.first` on stored from the cache as it is now.

        Its tensors are final: a `RoomyLayer` writes no token twice.
        """
        if job.first >= len(job.keys):
            return
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        job.planes = [(layer.keys, layer.values) for layer in cache.layers]
        if not self._stores.submit(functools.partial(self._store, job), job.keys[job.first]):
            self._recorder.add(stores_dropped=1)

    def _store(self, job: _Store) -> None:
        started_s = time.perf_counter()
        try:
            step = max(1, RESERVE_SIZE_MAX // self.layout.size(self.layout.chunk_tokens))
            for start in range(job.first, len(job.keys), step):
                if not self._store_part(job, start, min(start + step, len(job.keys))):
                    break
        except Exception as error:  # noqa: BLE001  A store that fails is a chunk less, never more.
            self._recorder.fail("store", error)
        self._recorder.add(store_s=time.perf_counter() - started_s)

    def _store_part(self, job: _Store, start: int, end: int) -> bool:
        """Store chunks `start` to `end`; whether there was room for all of them."""
        chunk_tokens = self.layout.chunk_tokens
        reservation = self._client.reserve(
            self.layout,
            job.keys[start:end],
            parent=job.keys[start - 1] if start else None,
            start=start * chunk_tokens,
            category=self._category,
            prefill_us=job.prefill_us,
            exact=job.is_exact,
            timeout_s=self._timeout_s,
        )
        with reservation:
            for index in reservation:
                reservation.write(index, self._gather(job.planes, start + index))
            reservation.commit(timeout_s=self._timeout_s)
        self._recorder.add(stored_chunks=len(reservation), stored_size=reservation.size)
        return "full" not in reservation.states

    def _gather(self, planes: Sequence[Planes], index: int) -> torch.Tensor:
        """Chunk `index` of a cache: `dtype [layers, planes, tokens, kv_heads, head_dim]`."""
        chunk_tokens = self.layout.chunk_tokens
        span = slice(index * chunk_tokens, (index + 1) * chunk_tokens)
        parts = [plane[0, :, span].transpose(0, 1) for pair in planes for plane in pair]
        return torch.stack(parts).view(self.layout.shape(chunk_tokens))


def _num_prefilled(num_tokens: int, chunk_tokens: int) -> int:
    """How many of a prompt's chunks come before generate: it needs a token to compute."""
    return (num_tokens - 1) // chunk_tokens


@dataclass(slots=True)
class _Store:
    """Chunks `first` to the last of `keys`, to be cut out of `planes`; `is_exact` unless something
    before them is approximate.
    """

    keys: Sequence[ChunkKey]
    first: int
    prefill_us: int
    is_exact: bool
    planes: list[Planes] = field(default_factory=list)


class _FirstToken(StoppingCriteria):  # type: ignore[misc]  # the base class carries no types
    """Never stops anything; it is how `generate` says that the first token is there."""

    def __init__(self, tell: Callable[[], None]) -> None:
        self._tell: Callable[[], None] | None = tell

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """bool [batch], all False. `input_ids` is int64 [batch, tokens]."""
        tell, self._tell = self._tell, None
        if tell is not None:
            tell()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class _StoreQueue:
    """Stores one after the other on a thread; at the interpreter's end it finishes what it has."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kvd-store")
        self._lock = threading.Lock()
        # With the first key that each of them stores.
        self._pending: dict[Future[None], ChunkKey] = {}
        self._is_closed = False

    def submit(self, job: Callable[[], None], key: ChunkKey) -> bool:
        """Whether there was room for the job, in a queue that is not closed."""
        with self._lock:
            pending = self._pending.items()
            self._pending = {future: first for future, first in pending if not future.done()}
            if self._is_closed or len(self._pending) >= STORES_MAX:
                return False
            self._pending[self._thread.submit(job)] = key
            return True

    def wait_for(self, keys: Sequence[ChunkKey], timeout_s: float) -> None:
        """Wait until no job stores any of `keys`, a chain in order, any more, or give up."""
        with self._lock:
            pending = dict(self._pending)
        wanted = set(keys) if pending else set()
        wait([future for future, first in pending.items() if first in wanted], timeout_s)

    def flush(self, timeout_s: float) -> bool:
        """Wait until all jobs have ended; whether they have."""
        with self._lock:
            pending = list(self._pending)
        return not wait(pending, timeout_s).not_done

    def close(self) -> None:
        """Take no more jobs, and wait for those that it has."""
        with self._lock:
            self._is_closed = True
        self._thread.shutdown(wait=True)
