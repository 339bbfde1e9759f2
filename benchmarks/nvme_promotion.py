"""The promotions of nvme.py: what a client waits for chunks that are on disk only, beside plain
reads of as many bytes.

A sample is `pin` of a batch, which returns when all of it is in memory, verified, then a look at a
byte of each page of its raw views, then the release. The plain sample beside it is O_DIRECT preads
of as many bytes, a thread a chunk up to the tier's own number of readers, into memory touched
before. Both walk through as many bytes as are on disk, so that neither finds its own again.

    disk     | batch 0 | batch 1 | ... | batch n |    all chunks, durable
    memory   | a quarter of that |                    the batch promoted longest ago leaves

The first layer: `pin(wait=False)`, then `wait` for a layer of 32, then for all of the first chunk.
An engine computes with the first layer while the others come.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import kvd
from benchmarks.common import (
    Figure,
    Row,
    cpu_ns,
    interleave,
    median_of,
    progress_bar,
    ratio_of,
    significant,
)
from benchmarks.nvme_disk import (
    NUM_LAYERS,
    DiskDaemon,
    PlainFile,
    can_bypass_cache,
    disk_daemon,
    layout_of,
    new_keys,
    random_bytes,
)
from kvd.keys import ChunkKey
from kvd.layout import KVLayout
from kvd.sizes import format_size
from kvd.tiers.aligned import aligned_bytes
from kvd.tiers.nvme import READERS
from kvd.tiers.segment import record_size

PAGE_SIZE = 4096

# A segment takes several records, and the log has a few segments.
CHUNKS_IN_LOG_MIN = 64

# Samples before those that count: the client's page tables, and memory that is full.
WARM_UP_ROUNDS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Chunks of `size` bytes, `count` a batch."""

    size: int
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PromotionScale:
    """What is measured. The last case is asked for its first layer by itself and in batches."""

    cases: tuple[Case, ...] = (
        Case(size=2 << 20, count=32),
        Case(size=8 << 20, count=1),
        Case(size=8 << 20, count=8),
    )
    cpu_size: int = 192 << 20
    disk_size: int = 768 << 20
    rounds: int = 40


@dataclass(slots=True)
class Found:
    """Seconds of the samples of one case, and what they cost. A GB is 10**9 bytes."""

    promoted_s: list[float] = field(default_factory=list)
    plain_s: list[float] = field(default_factory=list)
    cpu_s_per_gb: list[float] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)
    whole_s: list[float] = field(default_factory=list)
    stored_s_per_gb: float = 0.0
    stored_cpu_s_per_gb: float = 0.0


def measure_promotion(folder: Path, scale: PromotionScale) -> tuple[list[Figure], list[Row]]:
    """Promotion against plain reads, the worst batch as the figure; the first layer, the worst of
    one chunk by itself and the first of a batch; and a row for each case.
    """
    found = {}
    with progress_bar("promotion", scale.rounds * len(scale.cases)) as tick:
        for case in scale.cases:
            with _shelf(folder / "promotion", case, scale) as shelf:
                found[case] = shelf.measure(scale.rounds, tick)
    overheads, fractions = [], []
    for case, samples in found.items():
        if case.count > 1:
            overheads.append(median_of(_overheads(samples)))
        if case.size == scale.cases[-1].size:
            fractions.append(ratio_of(samples.first_s, samples.whole_s))
    overhead, fraction = (
        max(medians, key=lambda median: median.value) for medians in (overheads, fractions)
    )
    return [
        Figure.of("promotion_overhead", overhead, target=0.1, at_least=False),
        Figure.of("first_layer_fraction", fraction, target=0.5, at_least=False),
    ], [_row(case, samples) for case, samples in found.items()]


class _Shelf:
    """A daemon whose chunks are all on disk, and a plain file of as many bytes."""

    def __init__(
        self,
        daemon: DiskDaemon,
        client: kvd.Client,
        layout: KVLayout,
        batches: list[list[ChunkKey]],
        plain: PlainFile,
    ) -> None:
        self.found = Found()
        self._daemon = daemon
        self._client = client
        self._layout = layout
        self._batches = batches
        self._plain = plain
        self._batch_size = layout.size(layout.chunk_tokens) * len(batches[0])
        self._target = aligned_bytes(self._batch_size)
        self._target[:] = 1
        # Where each of the two walks is.
        self._promoted = count()
        self._read = count()

    def measure(self, rounds: int, tick: Callable[[], None]) -> Found:
        """Fill `found`."""
        for _ in range(WARM_UP_ROUNDS):
            self._promote()
            self._read_plain()
        promotions = self._client.status().counters["promote_chunks"]
        num_asked = 2 * rounds * len(self._batches[0])
        samples = self.found
        samples.cpu_s_per_gb.clear()
        samples.promoted_s, samples.plain_s = interleave(
            [self._promote, self._read_plain], rounds, tick
        )
        for _ in range(rounds):
            self._first_layer()
        promotions = self._client.status().counters["promote_chunks"] - promotions
        assert promotions == num_asked, "a chunk was in memory that should have been on disk only"
        return samples

    def fill(self, source: NDArray[np.uint8]) -> None:
        """Store all batches and make them durable."""
        size = self._layout.size(self._layout.chunk_tokens)
        started, cpu = time.perf_counter(), cpu_ns(self._daemon.pid)
        for number, batch in enumerate(self._batches):
            start = number * self._batch_size
            parts = source[start : start + self._batch_size].reshape(len(batch), size)
            shape = self._layout.shape(self._layout.chunk_tokens)
            chunks = [part.reshape(shape) for part in parts]
            states = self._client.store(self._layout, batch, chunks, standalone=True, wait_s=60)
            assert states == ["granted"] * len(batch)
        keys = [key for batch in self._batches for key in batch]
        assert self._client.persist(keys) == len(keys)
        gigabytes = source.size / 1e9
        self.found.stored_s_per_gb = (time.perf_counter() - started) / gigabytes
        self.found.stored_cpu_s_per_gb = (cpu_ns(self._daemon.pid) - cpu) / source.size

    def _promote(self) -> float:
        batch = self._next_batch()
        cpu, started = cpu_ns(self._daemon.pid), time.perf_counter()
        with self._client.pin(self._layout, batch, standalone=True) as lease:
            assert len(lease) == len(batch)
            for index in range(len(lease)):
                _touch(lease.raw(index))
        taken = time.perf_counter() - started
        self.found.cpu_s_per_gb.append((cpu_ns(self._daemon.pid) - cpu) / self._batch_size)
        return taken

    def _read_plain(self) -> float:
        offset = next(self._read) % len(self._batches) * self._batch_size
        threads = min(len(self._batches[0]), READERS)
        taken = self._plain.read(self._target, threads, offset=offset)
        started = time.perf_counter()
        _touch(self._target)
        return taken + time.perf_counter() - started

    def _first_layer(self) -> None:
        batch = self._next_batch()
        size = self._layout.size(self._layout.chunk_tokens)
        started = time.perf_counter()
        with self._client.pin(self._layout, batch, standalone=True, wait=False) as lease:
            assert lease.wait(0, size // NUM_LAYERS)
            self.found.first_s.append(time.perf_counter() - started)
            assert lease.wait(0)
            self.found.whole_s.append(time.perf_counter() - started)
            for index in range(len(lease)):
                assert lease.wait(index)

    def _next_batch(self) -> list[ChunkKey]:
        return self._batches[next(self._promoted) % len(self._batches)]


@contextmanager
def _shelf(folder: Path, case: Case, scale: PromotionScale) -> Iterator[_Shelf]:
    batch_size = case.size * case.count
    batches = [new_keys(case.count) for _ in range(scale.disk_size // batch_size)]
    source = random_bytes(batch_size * len(batches))
    num_chunks = len(batches) * case.count
    nvme_size = max(2 * num_chunks, CHUNKS_IN_LOG_MIN) * record_size(case.size)
    folder.mkdir()
    try:
        plain = PlainFile(
            folder / "plain", source, call_size=case.size, is_direct=can_bypass_cache(folder)
        )
        with (
            disk_daemon(folder / "nvme", cpu_size=scale.cpu_size, nvme_size=nvme_size) as daemon,
            daemon.connect() as client,
        ):
            shelf = _Shelf(daemon, client, layout_of(case.size), batches, plain)
            shelf.fill(source)
            yield shelf
        plain.close()
    finally:
        shutil.rmtree(folder)


def _touch(raw: NDArray[np.uint8]) -> None:
    raw[::PAGE_SIZE].max()


def _overheads(samples: Found) -> list[float]:
    pairs = zip(samples.promoted_s, samples.plain_s, strict=True)
    return [(promoted - plain) / plain for promoted, plain in pairs]


def _row(case: Case, samples: Found) -> Row:
    gigabytes = case.size * case.count / 1e9
    first = ratio_of(samples.first_s, samples.whole_s)
    return {
        "batch": f"{case.count} x {format_size(case.size)}",
        "GB/s": significant(gigabytes / median_of(samples.promoted_s).value),
        "plain": significant(gigabytes / median_of(samples.plain_s).value),
        "overhead": significant(median_of(_overheads(samples)).value),
        "first_ms": significant(1e3 * median_of(samples.first_s).value),
        "chunk_ms": significant(1e3 * median_of(samples.whole_s).value),
        "fraction": significant(first.value),
        "CPU_s/GB": significant(median_of(samples.cpu_s_per_gb).value),
        "demoted": significant(1 / samples.stored_s_per_gb),
        "demotion_CPU": significant(samples.stored_cpu_s_per_gb),
        "samples": len(samples.promoted_s),
    }
