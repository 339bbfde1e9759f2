"""The questions of local.py: what a view and a lookup take, beside a bare echo of the same bytes,
and what a million chunks change.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice

import numpy as np
from numpy.typing import NDArray

import kvd
from benchmarks.common import (
    Daemon,
    Figure,
    Median,
    Row,
    interleave,
    memory_available,
    on_cores,
    private_size,
    progress_bar,
    ratio_of,
    running_daemon,
    significant,
)
from benchmarks.local_routes import CALL_S_MAX, layout_of, new_key
from kvd.client import Client
from kvd.keys import ChunkKey
from kvd.proto import kvd_pb2 as pb
from kvd.proto.limits import MESSAGE_SIZE_MAX

# The directory's chunks: the smallest extents there are, 16 bytes a token.
LAYOUT = layout_of(4096)
CHUNK_SIZE = LAYOUT.size(LAYOUT.chunk_tokens)
CHAIN_CHUNKS = 512
FEW_CHUNKS, MANY_CHUNKS = 1_000, 1_000_000

# Room for the chunks and a bit; then the daemon's own memory at its target, twice over.
SPARE_SIZE = 64 << 20
ENTRY_SIZE_MAX = 1400

# Chains that the lookups walk through, so that a big directory cannot answer out of a cache.
CHAINS_KEPT = 64

Keys = list[ChunkKey]


@dataclass(frozen=True, slots=True)
class Asked:
    """A daemon with chains in its directory, and a client that asks for them."""

    client: Client
    daemon: Daemon
    chains: list[Keys]


def measure_questions(*, rounds: int, calls: int) -> tuple[list[Figure], list[Row]]:
    """The figures of view, lookups and directory, and a row for everything timed.

    A sample is the median of a block of `calls`, and blocks alternate: `rounds` of each. Client and
    server have a core each, as an engine that works and a daemon that waits have.
    """
    timed = Timed(calls)
    with running_daemon(cpu_size=FEW_CHUNKS * CHUNK_SIZE + SPARE_SIZE) as daemon:
        client = kvd.connect(daemon.socket, timeout_s=CALL_S_MAX)
        tokens = np.random.default_rng(0).integers(1 << 17, size=CHAIN_CHUNKS * LAYOUT.chunk_tokens)
        first = kvd.chain_keys(LAYOUT.fingerprint, tokens, chunk_tokens=LAYOUT.chunk_tokens)
        few = Asked(client, daemon, fill(client, FEW_CHUNKS, first=first))
        figures = measure_echoes(few, tokens, timed, rounds)
        figures += measure_many(few, timed, rounds)
        client.close()
    return figures, timed.rows()


def measure_echoes(
    asked: Asked, tokens: NDArray[np.int64], timed: Timed, rounds: int
) -> list[Figure]:
    """View and lookups of one chain against a blocking echo with messages of the same sizes.

    The same with both ends on one core goes into the table alone: there no sleeping core hides
    what the software costs.
    """
    client, keys = asked.client, asked.chains[0]

    def view() -> None:
        with client.pin(LAYOUT, keys[:1]) as lease:
            lease.raw(0)

    def lookup() -> None:
        assert client.lookup(keys) == len(keys)

    def lookup_tokens() -> None:
        assert client.lookup_tokens(LAYOUT, tokens) == tokens.size

    def measure(cores: str, client_core: int, server_core: int) -> list[list[float]]:
        measures = [
            timed.block("echo, bytes of a view", cores, of_view.ask),
            timed.block("view", cores, view),
            timed.block("echo, bytes of a lookup", cores, of_lookup.ask),
            timed.block("lookup of 512 keys", cores, lookup),
            timed.block("lookup of 131,072 tokens", cores, lookup_tokens, share=10),
        ]
        pids = (asked.daemon.pid, of_view.pid, of_lookup.pid)
        with (
            on_cores(client_core, server_core, pids),
            progress_bar(f"view and lookup, cores: {cores}", rounds) as tick,
        ):
            return interleave(measures, rounds, tick)

    with echo(view_sizes()) as of_view, echo(lookup_sizes()) as of_lookup:
        view_echo, views, lookup_echo, lookups, token_lookups = measure("two", *two_cores())
        measure("one", two_cores()[0], two_cores()[0])
    return [
        _at_most("view_vs_echo", ratio_of(views, view_echo), 2.0),
        _at_most("lookup_512_keys_vs_echo", ratio_of(lookups, lookup_echo), 6.0),
        _at_most("lookup_512_tokens_vs_echo", ratio_of(token_lookups, lookup_echo), 25.0),
    ]


def measure_many(few: Asked, timed: Timed, rounds: int) -> list[Figure]:
    """A lookup among a million chunks against one among a thousand, and a chunk's private bytes."""
    arena_size = MANY_CHUNKS * CHUNK_SIZE + SPARE_SIZE
    wanted = arena_size + MANY_CHUNKS * ENTRY_SIZE_MAX
    if memory_available() < wanted:
        note = f"{wanted >> 20} MiB of memory wanted, {memory_available() >> 20} MiB available"
        return [
            Figure.missing("lookup_1M_vs_1k", note, target=1.2, at_least=False),
            Figure.missing("bytes_per_chunk", note, target=700, at_least=False, unit="bytes"),
        ]
    with running_daemon(cpu_size=arena_size) as daemon:
        client = kvd.connect(daemon.socket, timeout_s=CALL_S_MAX)
        chains, per_chunk = _fill_many(client, daemon)
        measures = [
            timed.block("lookup of 512 keys among 1,000", "two", _lookups(few.client, few.chains)),
            timed.block("lookup of 512 keys among 1,000,000", "two", _lookups(client, chains)),
        ]
        with (
            on_cores(*two_cores(), (few.daemon.pid, daemon.pid)),
            progress_bar("lookup among a million", rounds) as tick,
        ):
            in_few, in_many = interleave(measures, rounds, tick)
        client.close()
    bytes_per_chunk = Median(value=per_chunk, low=per_chunk, high=per_chunk, samples=1)
    return [
        _at_most("lookup_1M_vs_1k", ratio_of(in_many, in_few), 1.2),
        Figure.of("bytes_per_chunk", bytes_per_chunk, target=700, at_least=False, unit="bytes"),
    ]


def fill(
    client: Client, count: int, *, first: Keys | None = None, tick: Callable[[], None] | None = None
) -> list[Keys]:
    """List `count` chunks in chains of 512, with whatever bytes are there; the chains' keys."""
    chains = []
    for start in range(0, count, CHAIN_CHUNKS):
        keys = first or [new_key() for _ in range(min(CHAIN_CHUNKS, count - start))]
        first = None
        with client.reserve(LAYOUT, keys) as reservation:
            assert reservation.commit() == len(keys)
        chains.append(keys)
        if tick:
            tick()
    return chains


def _fill_many(client: Client, daemon: Daemon) -> tuple[list[Keys], float]:
    """Some of the chains, evenly spread, and the bytes of private memory that a chunk costs."""
    before = private_size(daemon.pid)
    with progress_bar("a million chunks", -(-MANY_CHUNKS // CHAIN_CHUNKS)) as tick:
        chains = fill(client, MANY_CHUNKS, tick=tick)
    assert client.status().num_chunks == MANY_CHUNKS
    per_chunk = (private_size(daemon.pid) - before) / MANY_CHUNKS
    return chains[:: len(chains) // CHAINS_KEPT], per_chunk


def _lookups(client: Client, chains: Sequence[Keys]) -> Callable[[], None]:
    """A lookup of the next whole chain with each call, from as many lists of keys however many
    chains there are: the client's own cache misses are not the directory's.
    """
    whole = [keys for keys in chains if len(keys) == CHAIN_CHUNKS]
    lists = [
        [ChunkKey(bytes(bytearray(key))) for key in keys]
        for keys in islice(cycle(whole), CHAINS_KEPT)
    ]
    turn = cycle(lists)

    def lookup() -> None:
        assert client.lookup(next(turn)) == CHAIN_CHUNKS

    return lookup


class Timed:
    """Times calls in blocks, and keeps every time for the table."""

    def __init__(self, calls: int) -> None:
        self._calls = calls
        self._times_us: dict[tuple[str, str], list[float]] = {}

    def block(
        self, label: str, cores: str, call: Callable[[], None], *, share: int = 1
    ) -> Callable[[], float]:
        """What measures the median ns of one block of calls; of a `share`-th of them if slow."""
        times_us = self._times_us.setdefault((label, cores), [])

        def measure() -> float:
            clock = time.perf_counter_ns
            found = []
            for _ in range(self._calls // share):
                before = clock()
                call()
                found.append(clock() - before)
            times_us.extend(each / 1e3 for each in found)
            return float(np.median(found))

        return measure

    def rows(self) -> list[Row]:
        """A row for each label."""
        return [
            {
                "question": label,
                "cores": cores,
                "p50_us": significant(float(np.percentile(times_us, 50))),
                "p99_us": significant(float(np.percentile(times_us, 99))),
                "calls": len(times_us),
            }
            for (label, cores), times_us in self._times_us.items()
        ]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of a request and of its answer."""

    request: int
    answer: int


def view_sizes() -> Sizes:
    """Of a pin of one chunk."""
    pin = pb.PinRequest(keys=bytes(32), layout=bytes(32), lease_ns=30 * 10**9)
    granted = pb.PinReply(
        lease=10**4, deadline_ns=time.monotonic_ns(), offsets=[4096], sizes=[4096], num_tokens=[256]
    )
    request, answer = pb.Request(id=10**4, pin=pin), pb.Response(id=10**4, pin=granted)
    return Sizes(request.ByteSize(), answer.ByteSize())


def lookup_sizes() -> Sizes:
    """Of a lookup of one chain."""
    request = pb.Request(id=10**4, lookup=pb.LookupRequest(keys=bytes(32 * CHAIN_CHUNKS)))
    answer = pb.Response(id=10**4, lookup=pb.LookupReply(count=CHAIN_CHUNKS))
    return Sizes(request.ByteSize(), answer.ByteSize())


@dataclass(frozen=True, slots=True)
class Echo:
    """A process that answers at once and does nothing else; `ask` waits for one answer."""

    ask: Callable[[], None]
    pid: int


@contextmanager
def echo(sizes: Sizes) -> Iterator[Echo]:
    """An echo whose messages have these sizes."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_answer, args=(theirs, sizes.answer), daemon=True)
    process.start()
    theirs.close()
    request = bytes(sizes.request)

    def ask() -> None:
        ours.send(request)
        ours.recv(MESSAGE_SIZE_MAX)

    try:
        ours.send(request)
        assert len(ours.recv(MESSAGE_SIZE_MAX)) == sizes.answer
        assert process.pid is not None
        yield Echo(ask, process.pid)
    finally:
        ours.close()
        process.join()


def _answer(peer: socket.socket, size: int) -> None:
    answer = bytes(size)
    while peer.recv(MESSAGE_SIZE_MAX):
        peer.send(answer)


def two_cores() -> tuple[int, int]:
    """A core for the client and one for the server; the same one where there is no other."""
    cores = sorted(os.sched_getaffinity(0))
    return cores[0], cores[-1]


def _at_most(name: str, median: Median, target: float) -> Figure:
    return Figure.of(name, median, target=target, at_least=False)
