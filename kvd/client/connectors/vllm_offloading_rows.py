"""Rows of vLLM's primary tier on their way between host memory and kvd."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from kvd.client.client import split_parts
from kvd.client.connectors.late_answers import Rest
from kvd.client.connectors.late_client import LateClient
from kvd.client.connectors.vllm_options import Options, RequestOptions
from kvd.client.connectors.vllm_plan import key_of
from kvd.client.lease import Lease
from kvd.errors import Corrupt, DeadlineExceeded
from kvd.keys import ChunkKey
from kvd.layout import KVLayout

# What a lease lasts longer than the work that it is for.
LEASE_MARGIN_S = 1.0


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
        self._rest = Rest()
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
        """How many seconds the daemon has."""
        left_s = give_up - time.monotonic()
        if left_s <= 0:
            raise DeadlineExceeded("other rows took all of the time")
        with self._rest.asking():
            yield left_s
