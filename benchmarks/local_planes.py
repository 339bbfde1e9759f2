"""The planes of local.py: store and load of one chunk, sampled route beside route."""

from __future__ import annotations

import multiprocessing
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

import kvd
from benchmarks.common import (
    Daemon,
    Figure,
    Row,
    cpu_ns,
    in_turn,
    median_of,
    progress_bar,
    ratio_of,
    running,
    running_daemon,
    significant,
)
from benchmarks.local_routes import (
    CALL_S_MAX,
    Prepare,
    Ran,
    Run,
    Setup,
    layout_of,
    new_key,
    run_client,
)
from kvd.keys import ChunkKey
from kvd.proto.limits import KEYS_MAX
from kvd.sizes import format_size

# The largest first: it leaves the whole arena in the page tables of its clients.
SIZES = (32 << 20, 8 << 20, 1 << 20, 64 << 10, 4 << 10)
HEADLINE_SIZE = SIZES[0]
CLIENTS_MAX = 2

# A sample is as many calls as fill this time: long beside the waking of a process, short beside
# the swings of the machine.
SAMPLE_NS = 20_000_000
CALLS_MAX = 2000

# Between the order to run and the start, for both clients to begin together.
START_NS = 2_000_000

# The two whose ratio is quoted; they and their like are sampled every round, the others now and
# then.
PAIR = ("kvd local", "memcpy")
FAST_ROUTES = (*PAIR, "memcpy shared")
SLOW_EVERY = 4


@dataclass(slots=True)
class Cell:
    """All samples of one verb on one route, with one size and number of clients."""

    gbps: list[float] = field(default_factory=list)
    cpu_s_per_gb: list[float] = field(default_factory=list)
    calls_ns: list[NDArray[np.int64]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Case:
    """Where a cell stands in the table."""

    verb: str
    size: int
    num_clients: int
    route: str


Cells = dict[Case, Cell]


@dataclass(frozen=True, slots=True, kw_only=True)
class Servers:
    """The processes behind the routes."""

    daemon: Daemon
    cpu_size: int
    redis_socket: str | None
    # Whose CPU time a route's samples carry, beside its clients'.
    pids: dict[str, int]


def measure_planes(
    cpu_size: int, *, headline_rounds: int, rounds: int, console: Console
) -> tuple[list[Figure], list[Row]]:
    """Load and store of 32 MiB against memcpy as figures, and a row for every cell."""
    with _servers(cpu_size, console) as served, _clients(served) as pipes:
        planes = _Planes(served, pipes, console)
        planes.measure(headline_rounds=headline_rounds, rounds=rounds)
    return plane_figures(planes.cells), plane_rows(planes.cells)


class _Planes:
    """Takes the samples of all cells."""

    def __init__(self, served: Servers, pipes: Sequence[Connection], console: Console) -> None:
        self.cells: Cells = defaultdict(Cell)
        self._served = served
        self._pipes = pipes
        self._client = kvd.connect(served.daemon.socket, timeout_s=CALL_S_MAX)
        found: list[tuple[list[str], float]] = [pipe.recv() for pipe in pipes]
        self._routes = found[0][0]
        pages = self._client.status().tiers[0].pages
        share = min(huge_share for _, huge_share in found)
        console.print(
            f"arena {format_size(served.cpu_size)} in {pages} pages; "
            f"each client's private memory {100 * share:.0f} % in 2 MiB pages"
        )

    def measure(self, *, headline_rounds: int, rounds: int) -> None:
        """Fill all cells."""
        combinations = [(size, number + 1) for size in SIZES for number in range(CLIENTS_MAX)]
        is_headline = (HEADLINE_SIZE, 1)
        total = 2 * (rounds * (len(combinations) - 1) + headline_rounds)
        with progress_bar("store and load", total) as tick:
            self._touch_first()
            for size, num_clients in combinations:
                self._prepare(size, num_clients)
                count = headline_rounds if (size, num_clients) == is_headline else rounds
                # Loads first: the stores that follow evict what they loaded.
                for verb in ("load", "store"):
                    self._take(verb, size, num_clients, count, tick)
        self._client.close()

    def _touch_first(self) -> None:
        """Each client's first way through the arena, which maps its pages for what comes after."""
        size = HEADLINE_SIZE
        keys = self._fill(size)
        for index in range(CLIENTS_MAX):
            self._ask(index, Prepare(size=size, keys=keys, num_clients=1))
            for _ in keys:
                self._sample(Case("store", size, 1, "kvd first use"), [index], 1)
                self._sample(Case("store", size, 1, "first touch"), [index], 1)
            for route in self._routes:
                self._ask(index, Run(route=route, verb="check", count=1, start_ns=0))

    def _fill(self, size: int) -> list[ChunkKey]:
        """Empty the arena and fill it with chunks of `size` bytes, by reservations alone."""
        self._client.clear()
        keys = [new_key() for _ in range(self._served.cpu_size // size)]
        layout = layout_of(size)
        for start in range(0, len(keys), KEYS_MAX):
            batch = keys[start : start + KEYS_MAX]
            with self._client.reserve(layout, batch, standalone=True) as reservation:
                assert reservation.commit() == len(batch)
        return keys

    def _prepare(self, size: int, num_clients: int) -> None:
        keys = self._fill(size)
        for index in range(num_clients):
            share = keys[index::num_clients]
            self._ask(index, Prepare(size=size, keys=share, num_clients=num_clients))

    def _take(
        self, verb: str, size: int, num_clients: int, rounds: int, tick: Callable[[], None]
    ) -> None:
        cases = [Case(verb, size, num_clients, route) for route in self._routes]
        counts = {case: self._calls_a_sample(case) for case in cases}
        for number in range(rounds):
            for case in in_turn(cases, number):
                if case.route in FAST_ROUTES or number % SLOW_EVERY == 0:
                    self._sample(case, range(num_clients), counts[case])
            tick()

    def _calls_a_sample(self, case: Case) -> int:
        trial = self._ask(0, Run(route=case.route, verb=case.verb, count=4, start_ns=0))
        assert isinstance(trial, Ran)
        return int(np.clip(SAMPLE_NS // np.median(trial.calls_ns), 1, CALLS_MAX))

    def _sample(self, case: Case, indices: Sequence[int], count: int) -> None:
        start_ns = time.perf_counter_ns() + START_NS if len(indices) > 1 else 0
        order = Run(route=case.route, verb=case.verb, count=count, start_ns=start_ns)
        served_ns = self._served_ns(case.route)
        for index in indices:
            self._pipes[index].send(order)
        ran: list[Ran] = [self._pipes[index].recv() for index in indices]
        served_ns = self._served_ns(case.route) - served_ns
        elapsed_ns = max(each.end_ns for each in ran) - min(each.start_ns for each in ran)
        size = case.size * count * len(indices)
        cell = self.cells[case]
        cell.gbps.append(size / elapsed_ns)
        cell.cpu_s_per_gb.append((served_ns + sum(each.cpu_ns for each in ran)) / size)
        cell.calls_ns.extend(each.calls_ns for each in ran)

    def _served_ns(self, route: str) -> int:
        pid = self._served.pids.get(route)
        return cpu_ns(pid) if pid else 0

    def _ask(self, index: int, order: Prepare | Run) -> object:
        self._pipes[index].send(order)
        return self._pipes[index].recv()


def plane_rows(cells: Cells) -> list[Row]:
    """A row for each cell: sizes upwards, then verbs, clients, and routes as they were taken."""
    rows: list[Row] = []
    for case in sorted(cells, key=lambda case: (case.size, case.verb, case.num_clients)):
        cell = cells[case]
        beside = cells[Case(case.verb, case.size, case.num_clients, "memcpy")]
        calls_us = np.concatenate(cell.calls_ns) / 1e3
        speed = median_of(cell.gbps).value
        rows.append(
            {
                "chunk": format_size(case.size),
                "verb": case.verb,
                "n": case.num_clients,
                "route": case.route,
                "GB/s": significant(speed),
                "x_memcpy": significant(speed / median_of(beside.gbps).value),
                "CPU_s/GB": significant(median_of(cell.cpu_s_per_gb).value),
                "p50_us": significant(float(np.percentile(calls_us, 50))),
                "p99_us": significant(float(np.percentile(calls_us, 99))),
                "samples": len(cell.gbps),
            }
        )
    return rows


def plane_figures(cells: Cells) -> list[Figure]:
    """Load and store of 32 MiB against memcpy, one client, pair by pair."""
    speeds, costs = [], []
    for verb in ("load", "store"):
        found, beside = (cells[Case(verb, HEADLINE_SIZE, 1, route)] for route in PAIR)
        speed = ratio_of(found.gbps, beside.gbps)
        speeds.append(Figure.of(f"{verb}_32MiB_vs_memcpy", speed, target=0.85, at_least=True))
        cost = ratio_of(found.cpu_s_per_gb, beside.cpu_s_per_gb)
        costs.append(Figure.of(f"{verb}_32MiB_cpu_vs_memcpy", cost, target=1.3, at_least=False))
    return speeds + costs


@contextmanager
def _servers(cpu_size: int, console: Console) -> Iterator[Servers]:
    with ExitStack() as stack:
        daemon = stack.enter_context(running_daemon(cpu_size=cpu_size, grpc=True))
        pids = {"kvd local": daemon.pid, "kvd first use": daemon.pid, "kvd gRPC": daemon.pid}
        redis_socket = None
        if reason := _no_redis():
            console.print(f"Redis is left out: {reason}")
        else:
            redis_socket = str(daemon.directory / "redis.sock")
            pids["Redis"] = stack.enter_context(_running_redis(daemon, redis_socket))
        yield Servers(daemon=daemon, cpu_size=cpu_size, redis_socket=redis_socket, pids=pids)


@contextmanager
def _running_redis(daemon: Daemon, redis_socket: str) -> Iterator[int]:
    """A Redis on a Unix socket alone that writes nothing to disk; its pid."""
    import redis

    def is_ready() -> bool:
        with redis.Redis(unix_socket_path=redis_socket) as client:
            try:
                return bool(client.ping())
            except redis.ConnectionError:
                return False

    options = {
        "--port": "0",
        "--unixsocket": redis_socket,
        "--dir": str(daemon.directory),
        "--save": "",
        "--appendonly": "no",
        "--daemonize": "no",
    }
    command = ["redis-server", *(part for option in options.items() for part in option)]
    with running(command, daemon.directory / "redis.log", is_ready) as pid:
        yield pid


def _no_redis() -> str:
    if shutil.which("redis-server") is None:
        return "redis-server is not on PATH"
    try:
        import redis  # noqa: F401
    except ImportError:
        return "the package redis is not installed"
    return ""


@contextmanager
def _clients(served: Servers) -> Iterator[list[Connection]]:
    """The client processes, as the pipes to them."""
    # Spawned, not forked: gRPC does not survive a fork, and a client has its own memory.
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        pipes = []
        for index in range(CLIENTS_MAX):
            pipe, remote_end = context.Pipe()
            setup = Setup(
                index=index,
                pool_size=served.cpu_size,
                size_max=HEADLINE_SIZE,
                local_address=served.daemon.socket,
                grpc_address=served.daemon.grpc_address,
                redis_socket=served.redis_socket,
            )
            process = context.Process(target=run_client, args=(remote_end, setup), daemon=True)
            process.start()
            remote_end.close()
            stack.callback(process.join, CALL_S_MAX)
            # A client ends at the end of its pipe.
            stack.callback(pipe.close)
            pipes.append(pipe)
        yield pipes
