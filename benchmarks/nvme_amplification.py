"""The write amplification of nvme.py: how many bytes does the device get for each byte of a chunk
that came from memory for the first time?

The prompts of coding agents go through a real store, mover and segment log, in this process, as a
session of the daemon would have them: look up, pin and wait for what is on disk, release, wait for
room, reserve and commit the rest.

Payloads are scaled down to fit a benchmark's minute. A header of 4 KiB and some pages of index come
on top of each whatever its size, so they would count 16 times at 128 KiB what they count at 2 MiB,
the least chunk that the other figures are about. The figure is what was measured, with payloads as
large as that; the column `measured` has it with those that were written.

    device bytes    the segment log's writes, headers and padding included, and what the kernel
                    counts for the process of the index
    first bytes     of each committed chunk, once, when its first copy is durable

Whatever else is written counts as amplification: second chances, and chunks that are written again
because their copy was given up while they were in memory.

70 % fill: the log is a queue that keeps what it has until the room is wanted, so its fill is not
chosen, it is found: bytes of live records by bytes of the log, the mean since the log was full for
the first time. The figure is taken where that is at least 70 %, with the log overwritten in steady
state. A fuller log leaves less dead room to gain, which makes it the harder case.

Beside it stands the same without second chances (a plain queue): what they cost in writes, and what
they give in hits. A size of the memory or the disk is a part of all bytes that the trace stores.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

from benchmarks.common import Figure, Median, Row, progress_bar, significant
from benchmarks.nvme_disk import child_pids, layout_of, written_bytes
from benchmarks.nvme_trace import Prompt, read_prompts
from kvd.arena import Arena
from kvd.chunk import ChunkMeta, Fingerprint
from kvd.daemon import upkeep
from kvd.daemon.coder import open_coder
from kvd.daemon.config import Config
from kvd.daemon.directory import Entry
from kvd.daemon.eviction.registry import make_policy
from kvd.daemon.mover import SEARCH_MAX, Mover
from kvd.daemon.reopen import reopen
from kvd.daemon.shelf import Shelf
from kvd.daemon.store import ChunkStore
from kvd.keys import ChunkKey
from kvd.layout import KVLayout
from kvd.sizes import format_size
from kvd.tiers.cpu import CpuTier

# Payloads that the figure is about.
PAYLOAD_SIZE = 2 << 20

LEASE_NS = 10**9

# Memory and disk are whole multiples of this: the least that a daemon takes for either.
STEP = 2 << 20

# Chunks that an engine stores at a time, as it computes them.
BATCH_COUNT = 64

# The disk gets so long at most to write what the next chunks take the place of, and is looked at
# every so often.
ROOM_S = 10.0
WAIT_S = 0.002


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayScale:
    """What is replayed, and into how much: parts of all bytes that the trace stores. `plain_parts`
    are disks without second chances.
    """

    num_sessions: int = 24
    chunk_size: int = 128 << 10
    memory_part: float = 0.1
    disk_parts: tuple[float, ...] = (0.3, 0.5)
    plain_parts: tuple[float, ...] = (0.3,)


@dataclass(frozen=True, slots=True)
class Written:
    """Bytes so far, by what they are."""

    first: int
    again: int
    copied: int
    log: int
    index: int

    def __sub__(self, other: Written) -> Written:
        return Written(
            self.first - other.first,
            self.again - other.again,
            self.copied - other.copied,
            self.log - other.log,
            self.index - other.index,
        )

    @property
    def amplification(self) -> float:
        """Bytes given to the device for each that came for the first time."""
        return (self.log + self.index) / self.first if self.first else 1.0

    def with_payloads(self, size: int, *, measured: int) -> float:
        """The amplification, had payloads `size` bytes instead of those `measured`: what comes with
        each chunk, header and index, stays as it is.
        """
        if not self.first:
            return 1.0
        payloads = self.first + self.again + self.copied
        beside = self.log + self.index - payloads
        return (payloads + beside * measured / size) / self.first


class CountingShelf(Shelf):
    """A shelf that knows which chunks have been on it before."""

    def __init__(self, segment_size: int) -> None:
        super().__init__(segment_size)
        self.first_bytes = 0
        self._known: set[Entry] = set()

    def add(self, entry: Entry, tenant: bytes) -> None:
        super().add(entry, tenant)
        if entry not in self._known:
            self._known.add(entry)
            self.first_bytes += entry.size


def measure_amplification(
    folder: Path, trace: Path | None, scale: ReplayScale
) -> tuple[list[Figure], list[Row]]:
    """The write amplification with second chances, the worst size of the disk as the figure, and a
    row for each run. Without a trace the figure is missing.
    """
    if trace is None:
        note = "no trace: name the file with --trace"
        return [Figure.missing("write_amplification", note, target=1.2, at_least=False)], []
    layout = layout_of(scale.chunk_size)
    prompts = list(read_prompts(trace, layout.fingerprint, num_sessions=scale.num_sessions))
    size_all = len({key for prompt in prompts for key in prompt.keys}) * scale.chunk_size
    runs = [(part, True) for part in scale.disk_parts]
    runs += [(part, False) for part in scale.plain_parts]
    replays = []
    with progress_bar("trace", len(runs) * len(prompts)) as tick:
        for disk_part, has_copies in runs:
            replay = Replay(
                layout,
                folder / "trace",
                cpu_size=_whole(scale.memory_part * size_all, STEP),
                nvme_size=_whole(disk_part * size_all, STEP),
                has_copies=has_copies,
            )
            asyncio.run(replay.run(prompts, tick))
            replays.append(replay)
    found = [replay.amplification for replay in replays if replay.has_copies]
    worst = Median(value=max(found), low=min(found), high=max(found), samples=len(found))
    figure = Figure.of("write_amplification", worst, target=1.2, at_least=False)
    measured = max(replay.steady.amplification for replay in replays if replay.has_copies)
    note = f"payloads of {format_size(PAYLOAD_SIZE)}; {measured:.2f} with those measured"
    return [replace(figure, note=note)], [replay.row(size_all) for replay in replays]


class Replay:
    """One way of the trace through a store with `cpu_size` bytes of memory and `nvme_size` of disk.

    `steady` is what was written since the first segment was given back.
    """

    def __init__(
        self, layout: KVLayout, folder: Path, *, cpu_size: int, nvme_size: int, has_copies: bool
    ) -> None:
        self.has_copies = has_copies
        self.steady = Written(0, 0, 0, 0, 0)
        self._layout = layout
        self._size = layout.size(layout.chunk_tokens)
        self._folder = folder
        self._config = Config(
            tiers=("cpu", "nvme"),
            cpu_size=cpu_size,
            nvme_path=str(folder),
            nvme_size=nvme_size,
            nvme_reserve=0,
            nvme_scrub_rate=0,
        )
        self._fills: list[float] = []
        self._num_asked = self._num_in_memory = self._num_on_disk = 0
        self._missed = 0
        self._seconds = 0.0

    @property
    def amplification(self) -> float:
        """With payloads of `PAYLOAD_SIZE`."""
        return self.steady.with_payloads(PAYLOAD_SIZE, measured=self._size)

    async def run(self, prompts: Sequence[Prompt], tick: Callable[[], None]) -> None:
        """All prompts, one after the other."""
        started = time.perf_counter()
        with ExitStack() as stack:
            if not self.has_copies:
                for name in ("COPY_FRACTION", "COPY_FRACTION_OF_ONE"):
                    stack.enter_context(patch.object(upkeep, name, 0.0))
            arena = Arena.create(self._config.cpu_size, huge_pages="never")
            stack.callback(arena.close)
            stack.callback(shutil.rmtree, self._folder)
            await self._run(arena, prompts, tick)
        self._seconds = time.perf_counter() - started

    async def _run(self, arena: Arena, prompts: Sequence[Prompt], tick: Callable[[], None]) -> None:
        store = ChunkStore(CpuTier(arena), make_policy(self._config.eviction))
        store.declare(self._layout)
        others = set(child_pids(os.getpid()))
        mover = await reopen(self._config, store, open_coder(self._config))
        (index_pid,) = set(child_pids(os.getpid())) - others
        shelf = mover.shelf = CountingShelf(mover.tier.log.segment_size)
        mover.start()

        def written() -> Written:
            return Written(
                first=shelf.first_bytes,
                again=store.counters["demote_bytes"] - shelf.first_bytes,
                copied=store.counters["nvme_copy_bytes"],
                log=mover.tier.log.device_bytes,
                index=written_bytes(index_pid),
            )

        before: Written | None = None
        for prompt in prompts:
            await self._ask(store, mover, prompt)
            if before is None and _has_given_back(store):
                before = written()
            if before is not None:
                self._fills.append(mover.tier.log.used / mover.tier.log.size)
            tick()
        self.steady = written() - before if before is not None else written()
        self._missed = store.counters["demote_missed_chunks"]
        self._fills = self._fills or [mover.tier.log.used / mover.tier.log.size]
        await mover.close(flush_s=0)

    async def _ask(self, store: ChunkStore, mover: Mover, prompt: Prompt) -> None:
        """What an engine does with a prompt: load what is there, compute and store the rest."""
        now_ns = int(prompt.at_s * 1e9)
        found = await self._load(store, prompt.keys, now_ns)
        for start in range(found, len(prompt.keys), BATCH_COUNT):
            metas = self._metas(prompt.keys, start)
            await self._catch_up(store, mover, store.missing_size(metas))
            lease, states = store.reserve(metas, lease_ns=LEASE_NS, now_ns=now_ns)
            if lease is not None:
                store.commit(lease.id, (), now_ns=now_ns)
            await asyncio.sleep(0)
            if "full" in states:
                break

    async def _catch_up(self, store: ChunkStore, mover: Mover, size: int) -> None:
        """Wait as the trace does: hours are replayed in a minute, and in hours the disk follows."""
        give_up = time.monotonic() + ROOM_S
        while store.memory.owed(size, SEARCH_MAX) and time.monotonic() < give_up:
            mover.wake()
            await asyncio.sleep(WAIT_S)

    async def _load(self, store: ChunkStore, keys: Sequence[ChunkKey], now_ns: int) -> int:
        """Pin what is there, wait for it, let it go; how many chunks that was."""
        self._num_asked += len(keys)
        known = keys[: store.lookup(keys)]
        in_memory = sum(_is_in_memory(store, key) for key in known)
        fingerprint = Fingerprint(self._layout.fingerprint)
        lease, _ = store.pin(known, fingerprint, standalone=False, lease_ns=LEASE_NS, now_ns=now_ns)
        if lease is None:
            return 0
        count = len(lease.entries)
        self._num_in_memory += min(in_memory, count)
        self._num_on_disk += max(count - in_memory, 0)
        for entry in lease.entries:
            while (arrival := store.arrival(entry)) is not None:
                told = asyncio.Event()
                arrival.watch(told.set)
                await told.wait()
        store.release(lease.id)
        return count

    def _metas(self, keys: Sequence[ChunkKey], start: int) -> list[ChunkMeta]:
        tokens = self._layout.chunk_tokens
        root = self._layout.fingerprint
        return [
            ChunkMeta(
                key=keys[index],
                parent=keys[index - 1] if index else root,
                layout=Fingerprint(root),
                start=index * tokens,
                num_tokens=tokens,
            )
            for index in range(start, min(start + BATCH_COUNT, len(keys)))
        ]

    def row(self, size_all: int) -> Row:
        """The run in numbers; parts are of the bytes of chunks that came for the first time."""
        steady, first = self.steady, max(self.steady.first, 1)
        stored = steady.first + steady.again + steady.copied
        return {
            "chance": "yes" if self.has_copies else "no",
            "memory": format_size(self._config.cpu_size),
            "disk": format_size(self._config.nvme_size),
            "of_all": significant(self._config.nvme_size / size_all, 2),
            "fill": significant(sum(self._fills) / len(self._fills), 3),
            "amplified": significant(self.amplification),
            "measured": significant(steady.amplification),
            "copies": significant(steady.copied / first, 3),
            "again": significant(steady.again / first, 3),
            "headers": significant((steady.log - stored) / first, 3),
            "index": significant(steady.index / first, 3),
            "first": format_size(steady.first),
            "hit_mem": significant(self._num_in_memory / self._num_asked, 3),
            "hit_disk": significant(self._num_on_disk / self._num_asked, 3),
            "missed": self._missed,
            "seconds_replayed": significant(self._seconds, 3),
        }


def _has_given_back(store: ChunkStore) -> bool:
    return bool(store.counters["nvme_evict_chunks"] or store.counters["nvme_copy_chunks"])


def _is_in_memory(store: ChunkStore, key: ChunkKey) -> bool:
    entry = store.directory.get(key)
    return entry is not None and entry.in_memory is not None


def _whole(size: float, step: int) -> int:
    # Memory and disk have a least size that they can have.
    return max(int(size) // step, 2) * step
