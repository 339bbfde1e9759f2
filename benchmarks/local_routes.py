"""Routes: the ways of a chunk between a client's own memory and a store, and the clients that go
them, each a process of its own.

Every route moves the same bytes: `store` copies the client's source buffer to a place that was not
used for long, `load` copies such a place into the client's other buffer. The places are many (an
arena full), so that no route works out of a processor's cache where another has to go to memory.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import cycle
from multiprocessing.connection import Connection
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

import kvd
from benchmarks.common import huge_share
from kvd.client.copies import copy as copy_shared
from kvd.keys import ChunkKey

# 256 tokens a chunk, as engines of kvd use it: the layouts below differ in bytes a token.
CHUNK_TOKENS = 256
CALL_S_MAX = 60.0

# Redis keeps whole values of its own; a few of them are enough to go round.
REDIS_VALUES = 4

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What a client process is started with."""

    index: int
    pool_size: int
    size_max: int
    local_address: str
    grpc_address: str
    redis_socket: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepare:
    """Get ready for chunks of `size` bytes; `keys` are stored already, to be loaded in turn."""

    size: int
    keys: Sequence[ChunkKey]
    # The clients that take part: each uses its share of the pool, so that together they touch as
    # many bytes as there are in the arena.
    num_clients: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Do one verb `count` times, beginning at `start_ns` on the host's monotonic clock."""

    route: str
    verb: str
    count: int
    start_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """What a `Run` took."""

    start_ns: int
    end_ns: int
    cpu_ns: int
    # int64 [count]: nanoseconds of each call.
    calls_ns: NDArray[np.int64]


class Route(Protocol):
    """One way to move chunks as `prepare` was told last."""

    def prepare(self, order: Prepare) -> None:
        """Chunks of another size from now on."""

    def store(self) -> None:
        """One chunk out of `source`."""

    def load(self) -> None:
        """One chunk into `target`."""

    def check(self) -> None:
        """Store a chunk, load it, and see that the bytes are the same."""


class Memcpy:
    """A copy between prefaulted private memory: the speed of light. `copy(target, source)`."""

    def __init__(
        self, source: Bytes, target: Bytes, pool: Bytes, copy: Callable[[Bytes, Bytes], None]
    ) -> None:
        self._source, self._target, self._pool, self._copy = source, target, pool, copy

    def prepare(self, order: Prepare) -> None:
        size = order.size
        self._from, self._to = self._source[:size], self._target[:size]
        places = range(0, self._pool.size // order.num_clients - size + 1, size)
        self._places = cycle([self._pool[at : at + size] for at in places])

    def store(self) -> None:
        self._copy(next(self._places), self._from)

    def load(self) -> None:
        self._copy(self._to, next(self._places))

    def check(self) -> None:
        self._to[:] = 0
        place = next(self._places)
        self._copy(place, self._from)
        self._copy(self._to, place)
        assert np.array_equal(self._from, self._to)


class FirstTouch(Memcpy):
    """The same copy into memory that nobody has touched: the kernel finds and clears each page."""

    def store(self) -> None:
        self._copy(np.empty_like(self._from), self._from)

    def load(self) -> None:
        self._copy(np.empty_like(self._to), next(self._places))


class Kvd:
    """`client.store` and `client.load` of one chunk, whichever plane the address names."""

    def __init__(self, source: Bytes, target: Bytes, address: str) -> None:
        self._source, self._target = source, target
        self._client = kvd.connect(address, timeout_s=CALL_S_MAX, name="benchmark")

    def prepare(self, order: Prepare) -> None:
        self._layout = layout_of(order.size)
        self._from, self._to = self._source[: order.size], self._target[: order.size]
        self._keys = cycle(order.keys)

    def store(self) -> None:
        states = self._client.store(self._layout, [new_key()], [self._from])
        assert states == ["granted"]

    def load(self) -> None:
        assert self._client.load(self._layout, [next(self._keys)], [self._to]) == 1

    def check(self) -> None:
        key = new_key()
        self._to[:] = 0
        self._client.store(self._layout, [key], [self._from])
        self._client.load(self._layout, [key], [self._to])
        assert np.array_equal(self._from, self._to)


class Redis:
    """SET and GET. GET returns fresh bytes: a copy into the engine's memory is not counted."""

    def __init__(self, source: Bytes, socket: str, index: int) -> None:
        import redis

        self._source, self._index = source, index
        self._client = redis.Redis(unix_socket_path=socket, socket_timeout=CALL_S_MAX)
        self._names: list[str] = []

    def prepare(self, order: Prepare) -> None:
        if self._names:
            self._client.delete(*self._names)
        self._value = self._source[: order.size].tobytes()
        self._names = [f"{self._index}.{number}" for number in range(REDIS_VALUES)]
        self._turn = cycle(self._names)
        for _ in self._names:
            self.store()

    def store(self) -> None:
        self._client.set(next(self._turn), self._value)

    def load(self) -> None:
        found = self._client.get(next(self._turn))
        assert isinstance(found, bytes)
        assert len(found) == len(self._value)

    def check(self) -> None:
        assert self._client.get(self._names[0]) == self._value


def run_client(pipe: Connection, setup: Setup) -> None:
    """A client process: prepares and runs as the pipe tells it, until the pipe ends."""
    client = _Client(setup)
    pipe.send((client.names, client.huge_share))
    with suppress(EOFError, KeyboardInterrupt):
        while True:
            order = pipe.recv()
            pipe.send(client.run(order) if isinstance(order, Run) else client.prepare(order))


class _Client:
    def __init__(self, setup: Setup) -> None:
        random = np.random.default_rng(setup.index)
        source = random.integers(256, size=setup.size_max, dtype=np.uint8)
        target, pool = (np.empty(size, np.uint8) for size in (setup.size_max, setup.pool_size))
        target.fill(1)
        pool.fill(1)
        self.huge_share = huge_share(source.size + target.size + pool.size)
        local = Kvd(source, target, setup.local_address)
        routes: dict[str, Route] = {
            "memcpy": Memcpy(source, target, pool, np.copyto),
            "kvd local": local,
            "memcpy shared": Memcpy(source, target, pool, copy_shared),
            "kvd gRPC": Kvd(source, target, setup.grpc_address),
        }
        if setup.redis_socket is not None:
            routes["Redis"] = Redis(source, setup.redis_socket, setup.index)
        # What is sampled in every cell; the other two are one-time costs.
        self.names = list(routes)
        self._routes: dict[str, Route] = {
            **routes,
            "kvd first use": local,
            "first touch": FirstTouch(source, target, pool, np.copyto),
        }

    def prepare(self, order: Prepare) -> str:
        for route in self._routes.values():
            route.prepare(order)
        return "ready"

    def run(self, order: Run) -> Ran:
        call: Callable[[], None] = getattr(self._routes[order.route], order.verb)
        clock = time.perf_counter_ns
        while (early_ns := order.start_ns - clock()) > 0:
            time.sleep(early_ns / 1e9)
        calls_ns = np.empty(order.count, np.int64)
        cpu_ns = time.process_time_ns()
        start = before = clock()
        for number in range(order.count):
            call()
            now = clock()
            calls_ns[number] = now - before
            before = now
        return Ran(
            start_ns=start,
            end_ns=before,
            cpu_ns=time.process_time_ns() - cpu_ns,
            calls_ns=calls_ns,
        )


def layout_of(size: int) -> kvd.KVLayout:
    """A layout whose whole chunk has `size` bytes; 32 MiB are 256 tokens of an 8B model."""
    per_token, rest = divmod(size, CHUNK_TOKENS)
    assert not rest
    return kvd.KVLayout(
        model="benchmark",
        revision="1",
        dtype="uint8",
        num_layers=1,
        num_planes=1,
        num_kv_heads=1,
        head_dim=per_token,
    )


def new_key() -> ChunkKey:
    """A key that nothing else has."""
    return ChunkKey(os.urandom(32))
