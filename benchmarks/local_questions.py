"""The questions of local.py: what a view and a lookup take, beside a bare echo of the same bytes,
and what a million chunks change.
"""

from __future__ import annotations

import multiprocessing
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle

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
    private_size,
    progress_bar,
    ratio_of,
    running_daemon,
    significant,
)
from benchmarks.local_routes import CALL_S_MAX, layout_of, new_key
from kvd.client import Client
from kvd.keys import ChunkKey
from kvd.layout import KVLayout
from kvd.proto import kvd_pb2 as pb
from kvd.proto.limits import MESSAGE_SIZE_MAX

# The directory's chunks: the smallest extents there are, 16 bytes a token.
LAYOUT: KVLayout = layout_of(4096)
CHAIN_CHUNKS = 512
FEW_CHUNKS, MANY_CHUNKS = 1_000, 1_000_000

# Room for the chunks and a bit; then the daemon's own memory at its target, twice over.
SPARE_SIZE = 64 << 20
ENTRY_SIZE_MAX = 1400

# Chains that the lookups walk through, so that a big directory cannot answer out of a cache.
CHAINS_KEPT = 64

Keys = list[ChunkKey]


def measure_questions(*, rounds: int, calls: int) -> tuple[list[Figure], list[Row]]:
    """The figures of view, lookups and directory, and a row for everything timed.

    A sample is the median of a block of `calls`, and blocks alternate: `rounds` of each.
    """
    with running_daemon(
        cpu_size=FEW_CHUNKS * LAYOUT.size(LAYOUT.chunk_tokens) + SPARE_SIZE
    ) as few_daemon:
        few = kvd.connect(few_daemon.socket, timeout_s=CALL_S_MAX)
        tokens = np.random.default_rng(0).integers(1 << 17, size=CHAIN_CHUNKS * LAYOUT.chunk_tokens)
        first = kvd.chain_keys(LAYOUT.fingerprint, tokens, chunk_tokens=LAYOUT.chunk_tokens)
        chains = fill(few, FEW_CHUNKS, first=first)
        timed = Timed(calls)
        figures = measure_echoes(few, tokens, first, timed, rounds)
        figures += measure_many(few, chains, timed, rounds)
        few.close()
    return figures, timed.rows()


def measure_echoes(
    client: Client, tokens: NDArray[np.int64], keys: Keys, timed: Timed, rounds: int
) -> list[Figure]:
    """View and lookups of one chain against a blocking echo with messages of the same sizes."""

    def view() -> None:
        with client.pin(LAYOUT, keys[:1]) as lease:
            lease.raw(0)

    def lookup() -> None:
        assert client.lookup(keys) == len(keys)

    def lookup_tokens() -> None:
        assert client.lookup_tokens(LAYOUT, tokens) == tokens.size

    with echo(view_sizes()) as bare_view, echo(lookup_sizes()) as bare_lookup:
        measures = [
            timed.block("echo, bytes of a view", bare_view),
            timed.block("view", view),
            timed.block("echo, bytes of a lookup", bare_lookup),
            timed.block("lookup of 512 keys", lookup),
            timed.block("lookup of 131,072 tokens", lookup_tokens, share=10),
        ]
        with progress_bar("view and lookup", rounds) as tick:
            of_view, view_ns, of_lookup, lookup_ns, tokens_ns = interleave(measures, rounds, tick)
    return [
        _at_most("view_vs_echo", ratio_of(view_ns, of_view), 2.0),
        _at_most("lookup_512_keys_vs_echo", ratio_of(lookup_ns, of_lookup), 6.0),
        _at_most("lookup_512_tokens_vs_echo", ratio_of(tokens_ns, of_lookup), 25.0),
    ]


def measure_many(few: Client, chains: Sequence[Keys], timed: Timed, rounds: int) -> list[Figure]:
    """A lookup among a million chunks against one among a thousand, and a chunk's private bytes."""
    arena_size = MANY_CHUNKS * LAYOUT.size(LAYOUT.chunk_tokens) + SPARE_SIZE
    wanted = arena_size + MANY_CHUNKS * ENTRY_SIZE_MAX
    if memory_available() < wanted:
        note = f"{wanted >> 20} MiB of memory wanted, {memory_available() >> 20} MiB available"
        return [
            Figure.missing("lookup_1M_vs_1k", note, target=1.2, at_least=False),
            Figure.missing("bytes_per_chunk", note, target=700, at_least=False, unit="bytes"),
        ]
    with running_daemon(cpu_size=arena_size) as daemon:
        many = kvd.connect(daemon.socket, timeout_s=CALL_S_MAX)
        kept, per_chunk = _fill_many(many, daemon)
        in_few, in_many = _lookups(few, chains), _lookups(many, kept)
        measures = [
            timed.block("lookup of 512 keys among 1,000 chunks", in_few),
            timed.block("lookup of 512 keys among 1,000,000", in_many),
        ]
        with progress_bar("lookup among a million", rounds) as tick:
            few_ns, many_ns = interleave(measures, rounds, tick)
        many.close()
    bytes_per_chunk = Median(value=per_chunk, low=per_chunk, high=per_chunk, samples=1)
    return [
        _at_most("lookup_1M_vs_1k", ratio_of(many_ns, few_ns), 1.2),
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
    """A lookup of the next whole chain with each call."""
    turn = cycle([keys for keys in chains if len(keys) == CHAIN_CHUNKS])

    def lookup() -> None:
        assert client.lookup(next(turn)) == CHAIN_CHUNKS

    return lookup


class Timed:
    """Times calls in blocks, and keeps every time for the table."""

    def __init__(self, calls: int) -> None:
        self._calls = calls
        self._times_us: dict[str, list[float]] = {}

    def block(self, label: str, call: Callable[[], None], *, share: int = 1) -> Callable[[], float]:
        """What measures the median ns of one block of calls; of a `share`-th of them if slow."""
        times_us = self._times_us.setdefault(label, [])

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
                "p50_us": significant(float(np.percentile(times_us, 50))),
                "p99_us": significant(float(np.percentile(times_us, 99))),
                "calls": len(times_us),
            }
            for label, times_us in self._times_us.items()
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


@contextmanager
def echo(sizes: Sizes) -> Iterator[Callable[[], None]]:
    """A process that answers at once and does nothing else; yields what asks it once."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_answer, args=(theirs, sizes.answer), daemon=True)
    process.start()
    request = bytes(sizes.request)

    def ask() -> None:
        ours.send(request)
        ours.recv(MESSAGE_SIZE_MAX)

    try:
        ask()
        yield ask
    finally:
        theirs.close()
        ours.close()
        process.join()


def _answer(peer: socket.socket, size: int) -> None:
    answer = bytes(size)
    while peer.recv(MESSAGE_SIZE_MAX):
        peer.send(answer)


def _at_most(name: str, median: Median, target: float) -> Figure:
    return Figure.of(name, median, target=target, at_least=False)
