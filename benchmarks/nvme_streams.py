"""The streams of nvme.py: durable writes and cold reads, sampled beside a plain stream of the same
bytes.

    plain             threads of pwritev or preadv, O_DIRECT; writes end with one fdatasync
    segment log       NvmeTier from an event loop: acknowledged when durable, verified when read
    LMDB values       a transaction a value, synced; read through its map
    a file per object written, fsynced, renamed, the folder synced; read with the cache dropped
    fio               where it is installed: the same as plain, from C

The log's rivals write one value after the other to disk as it does, and are sampled now and then:
they are here to compare, no figure is made of them.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from benchmarks.common import (
    Figure,
    Row,
    in_turn,
    median_of,
    progress_bar,
    ratio_of,
    significant,
)
from benchmarks.nvme_disk import PlainFile, Records, can_bypass_cache
from benchmarks.nvme_rivals import FilePerObject, LmdbValues, fio_speeds
from kvd.chunk import Extent
from kvd.sizes import format_size
from kvd.tiers.nvme import READERS, WRITERS, NvmeTier
from kvd.tiers.segment import BLOCK_SIZE, record_size
from kvd.tiers.segment_log import SegmentLog

# A label is a chunk's meta: most have about this many bytes.
LABEL = bytes(150)

# Samples of each stream before those that count: files grow, segments are written for the first
# time, threads begin.
WARM_UP_ROUNDS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamScale:
    """How much is measured. A sample is as many records of a size as a segment holds."""

    record_sizes: tuple[int, ...] = (2 << 20, 8 << 20)
    segment_size: int = 64 << 20
    rounds: int = 30
    # The rivals are sampled every so many rounds.
    rival_every: int = 6


@dataclass(slots=True)
class Samples:
    """What one stream took, verb by verb: seconds, and CPU seconds of this process."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: {"write": [], "read": []})
    cpu_s: dict[str, list[float]] = field(default_factory=lambda: {"write": [], "read": []})


class Stream(Protocol):
    """One way of putting the same bytes on a disk and getting them back; each call is a sample."""

    name: str

    def prepare(self, verb: str) -> None:
        """Make the disk ready for the next call of `verb`; not measured."""
        ...

    def write(self) -> None:
        """All records; durable when it returns."""
        ...

    def read(self) -> None:
        """All records, from the disk."""
        ...

    def close(self) -> None:
        """Let files and threads go."""
        ...


class Plain:
    """The device's own speed, with as many threads as the tier has."""

    def __init__(self, folder: Path, records: Records, *, read_threads: int = READERS) -> None:
        self.name = "plain" if read_threads == READERS else f"plain, {read_threads} readers"
        self._read_threads = read_threads
        self._target = records.target
        self._file = PlainFile(
            folder / self.name,
            records.source,
            call_size=records.size,
            is_direct=can_bypass_cache(folder),
        )

    def prepare(self, verb: str) -> None:
        """Nothing: it writes over its own blocks, and reads past the cache."""

    def write(self) -> None:
        self._file.write(WRITERS)

    def read(self) -> None:
        self._file.read(self._target, self._read_threads)

    def close(self) -> None:
        self._file.close()


class Logged:
    """The segment log through its asynchronous rim. Each sample fills a segment; the one of the
    sample before is reclaimed between them.
    """

    name = "segment log"

    def __init__(self, folder: Path, records: Records, *, segment_size: int) -> None:
        self.log = SegmentLog(folder / "log", 3 * segment_size, segment_size=segment_size)
        self._tier = NvmeTier(self.log)
        self._records = records
        self._extents: list[Extent] = []
        self._loop = asyncio.new_event_loop()

    def prepare(self, verb: str) -> None:
        if verb == "read":
            return
        for extent in self._extents:
            self.log.free(extent)
        self._extents = []
        for segment in self.log.segments():
            if segment.status == "full" and not segment.num_extents:
                self.log.reclaim(segment.slot)

    def write(self) -> None:
        self._loop.run_until_complete(self._write())

    def read(self) -> None:
        self._loop.run_until_complete(self._read())

    def close(self) -> None:
        self._tier.close()
        self._loop.close()

    async def _write(self) -> None:
        sources = self._records.sources
        found = await asyncio.gather(*(self._tier.append(LABEL, source) for source in sources))
        self._extents = [extent for extent in found if extent is not None]
        assert len(self._extents) == len(sources)

    async def _read(self) -> None:
        pairs = zip(self._extents, self._records.targets, strict=True)
        await asyncio.gather(*(self._tier.read(extent, out) for extent, out in pairs))


def measure_streams(folder: Path, scale: StreamScale) -> tuple[list[Figure], list[Row]]:
    """Durable writes and cold reads against the plain stream, the worst record size as the figure,
    and a row for each stream and size.
    """
    rows: list[Row] = []
    writes, reads = [], []
    with progress_bar("streams", scale.rounds * len(scale.record_sizes)) as tick:
        for size in scale.record_sizes:
            streams = _measure_size(folder / f"streams-{size}", size, scale, tick)
            plain, log = streams["plain"].seconds, streams["segment log"].seconds
            writes.append(ratio_of(plain["write"], log["write"]))
            reads.append(ratio_of(plain["read"], log["read"]))
            rows += _rows(streams, size, scale)
            rows += _fio_rows(folder, size, scale)
            shutil.rmtree(folder / f"streams-{size}")
    write, read = (min(found, key=lambda ratio: ratio.value) for found in (writes, reads))
    return [
        Figure.of("durable_write_vs_plain", write, target=0.9, at_least=True),
        Figure.of("cold_read_vs_plain", read, target=0.9, at_least=True),
    ], rows


def count_of(size: int, scale: StreamScale) -> int:
    """Records of a size that fill a segment, its header and end mark put aside."""
    return (scale.segment_size - 2 * BLOCK_SIZE) // record_size(size)


def _measure_size(
    folder: Path, size: int, scale: StreamScale, tick: Callable[[], None]
) -> dict[str, Samples]:
    folder.mkdir()
    records = Records(size, count_of(size, scale))
    with ExitStack() as stack:
        logged = Logged(folder, records, segment_size=scale.segment_size)
        main: list[Stream] = [Plain(folder, records), logged]
        rivals: list[Stream] = [
            Plain(folder, records, read_threads=4),
            LmdbValues(folder, records),
            FilePerObject(folder, records),
        ]
        for stream in (*main, *rivals):
            stack.callback(stream.close)
        found = {stream.name: Samples() for stream in (*main, *rivals)}
        for number in range(WARM_UP_ROUNDS):
            _sample_all(main, number, None)
        for number in range(scale.rounds):
            is_rivals_turn = number % scale.rival_every == 0
            _sample_all([*main, *rivals] if is_rivals_turn else main, number, found)
            tick()
        assert (records.target == records.source).all()
    return found


def _sample_all(streams: Sequence[Stream], number: int, found: dict[str, Samples] | None) -> None:
    for verb in ("write", "read"):
        for stream in in_turn(streams, number):
            stream.prepare(verb)
            call: Callable[[], None] = getattr(stream, verb)
            cpu_ns, started = time.process_time_ns(), time.perf_counter()
            call()
            seconds = time.perf_counter() - started
            if found is not None:
                found[stream.name].seconds[verb].append(seconds)
                cpu_s = (time.process_time_ns() - cpu_ns) / 1e9
                found[stream.name].cpu_s[verb].append(cpu_s)


def _rows(streams: dict[str, Samples], size: int, scale: StreamScale) -> list[Row]:
    gigabytes = size * count_of(size, scale) / 1e9
    rows: list[Row] = []
    for verb in ("write", "read"):
        for name, samples in streams.items():
            seconds = samples.seconds[verb]
            step = scale.rival_every if len(seconds) < scale.rounds else 1
            beside = streams["plain"].seconds[verb][::step]
            rows.append(
                {
                    "record": format_size(size),
                    "verb": verb,
                    "stream": name,
                    "GB/s": significant(gigabytes / median_of(seconds).value),
                    "x_plain": significant(ratio_of(beside, seconds).value),
                    "CPU_s/GB": significant(median_of(samples.cpu_s[verb]).value / gigabytes),
                    "samples": len(seconds),
                }
            )
    return rows


def _fio_rows(folder: Path, size: int, scale: StreamScale) -> list[Row]:
    """The same bytes by fio, once a verb; none where it is not installed."""
    speeds = fio_speeds(folder / "fio", size, count_of(size, scale))
    return [
        {
            "record": format_size(size),
            "verb": verb,
            "stream": "fio",
            "GB/s": significant(speed),
            "x_plain": None,
            "CPU_s/GB": None,
            "samples": 1,
        }
        for verb, speed in speeds.items()
    ]
