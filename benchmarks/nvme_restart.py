"""The restarts of nvme.py: how soon is a daemon ready that finds a hundred thousand records, and
how fast does it rebuild an index that is lost?

A start is taken from the daemon's command to the first session that it lets in, with a small arena:
an arena's own population is counted elsewhere. The page cache holds nothing of the folder then.

    empty     a folder with nothing in it: interpreter, imports, arena, index process
    indexed   the folder, its index whole: what is above `empty` is the index being read
    lost      the folder without its index: what is above `empty` is every header being read and
              the index being written anew

A rebuild is the start without an index, less the start with an empty folder. Beside it stands how
long the device takes to read the same files, as far as they are used, sequentially. A scan reads
headers only, so with large records it should be faster than the device, and with small ones every
second block is a header. The index is on the disk in either case: the rebuild writes it.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from benchmarks.common import Figure, Median, Row, median_of, progress_bar, significant
from benchmarks.nvme_disk import (
    can_bypass_cache,
    disk_daemon,
    drop_cache,
    layout_of,
    new_keys,
    random_bytes,
    read_files,
)
from kvd.chunk import ChunkMeta, Extent, Fingerprint
from kvd.daemon.index import ChunkIndex, IndexRecord
from kvd.daemon.labels import encode_label, tenant_of
from kvd.daemon.reopen import segment_size_for
from kvd.layout import KVLayout
from kvd.proto.convert import layout_to_message
from kvd.sizes import format_size
from kvd.tiers.segment import record_size
from kvd.tiers.segment_log import SegmentLog

# The least arena: its population is not what is asked for here.
CPU_SIZE = 2 << 20

# Threads that write records when a folder is made, and that read its files beside a rebuild: the
# device gives no more to more.
THREADS = 4

# Records that the figure's name speaks of.
NAMED_COUNT = 100_000

# Records are made durable in groups as large as this.
GROUP_COUNT = 2048

# Starts are seen to the nearest look at the socket, every 20 ms, and processes start a little
# slower or faster: a rebuild of less cannot be told from nothing.
RESOLUTION_S = 0.02


class Rebuilt(NamedTuple):
    """What is on the disk when an index is lost."""

    num_records: int
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartScale:
    """How much is on the disk, and how often it is opened."""

    count: int = NAMED_COUNT
    size: int = 4 << 10
    rounds: int = 7
    # The figure is the worse of the first and the last.
    rebuilds: tuple[Rebuilt, ...] = (
        Rebuilt(20_000, 4 << 10),
        Rebuilt(8_000, 128 << 10),
        Rebuilt(1_000, 2 << 20),
    )
    rebuild_rounds: int = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Stock:
    """A folder with `count` records of `size` bytes; `filled` is what is used of each segment."""

    folder: Path
    nvme_size: int
    count: int
    size: int
    filled: dict[Path, int]

    @property
    def bytes_on_disk(self) -> int:
        """Bytes of the segments, as far as they are used."""
        return sum(self.filled.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Rebuild:
    """Seconds of starts without an index, and of the device's own read of the segments."""

    stock: Stock
    lost: Median
    read: Median

    def ratio(self, empty: Median) -> Median:
        """How often the rebuild goes through the segments while the device reads them once."""
        value, low, high = (
            self.read.value / max(seconds - empty.value, RESOLUTION_S)
            for seconds in (self.lost.value, self.lost.high, self.lost.low)
        )
        return Median(value=value, low=low, high=high, samples=self.lost.samples)


def measure_restart(folder: Path, scale: RestartScale) -> tuple[list[Figure], list[Row]]:
    """The start with an index as one figure, the rebuild without as the other, and their rows."""
    total = 1 + scale.rounds + len(scale.rebuilds) * (1 + scale.rebuild_rounds)
    with progress_bar("restarts", total) as tick:
        empty, restart, rows = _measure_starts(folder, scale, tick)
        rebuilds = [_rebuild(folder / "lost", what, scale, tick) for what in scale.rebuilds]
    ratios = [rebuild.ratio(empty) for rebuild in rebuilds]
    for rebuild, ratio in zip(rebuilds, ratios, strict=True):
        lost = _row("lost", rebuild.stock, rebuild.lost)
        rows += [lost | {"x_device": significant(ratio.value)}]
        rows += [_row("device", rebuild.stock, rebuild.read)]
    worst = min(ratios[0], ratios[-1], key=lambda ratio: ratio.value)
    figure = Figure.of("rebuild_vs_device", worst, target=0.5, at_least=True)
    return [restart, figure], list(rows)


def _measure_starts(
    folder: Path, scale: RestartScale, tick: Callable[[], None]
) -> tuple[Median, Figure, list[dict[str, object]]]:
    stock = make_stock(folder / "indexed", scale.count, scale.size)
    tick()
    empty_s, indexed_s = [], []
    for _ in range(scale.rounds):
        empty_s.append(_start_empty(folder / "empty"))
        indexed_s.append(_start(stock))
        tick()
    shutil.rmtree(stock.folder)
    empty, indexed = median_of(empty_s), median_of(indexed_s)
    figure = Figure.of("restart_100k_s", indexed, target=2.0, at_least=False, unit="s")
    note = "" if stock.count == NAMED_COUNT else f"{stock.count} records"
    rows = [_row("empty", None, empty), _row("indexed", stock, indexed)]
    return empty, replace(figure, note=note), rows


def make_stock(folder: Path, count: int, size: int) -> Stock:
    """A folder as a daemon leaves it: records that the segment log wrote, an index of them all."""
    nvme_size = _nvme_size(count, size)
    segment_size = segment_size_for(nvme_size)
    log = SegmentLog(folder, nvme_size, segment_size=segment_size)
    layout = layout_of(size)
    records = _write(log, layout, count, size)
    filled = {
        folder / f"segment-{info.slot:08d}": segment_size - info.free_size
        for info in log.segments()
        if info.num_extents
    }
    asyncio.run(_index(folder, log.log_id, layout, records))
    log.close()
    return Stock(folder=folder, nvme_size=nvme_size, count=count, size=size, filled=filled)


def _nvme_size(count: int, size: int) -> int:
    # Room to spare: what does not fit at a segment's end, and segments that are given back ahead.
    return max(2 * count * record_size(size), 64 << 20)


def _write(log: SegmentLog, layout: KVLayout, count: int, size: int) -> list[IndexRecord]:
    payload = random_bytes(size)
    keys = iter(new_keys(count))
    fingerprint = Fingerprint(layout.fingerprint)
    tenant = tenant_of(layout.salt)

    def write_one(meta: ChunkMeta) -> IndexRecord:
        label = encode_label(meta, tenant)
        extent = log.append(label, payload)
        assert extent is not None
        return _record(meta, extent, label, life=log.life(extent))

    metas = (ChunkMeta(key, None, fingerprint, 0, layout.chunk_tokens) for key in keys)
    found: list[IndexRecord] = []
    with ThreadPoolExecutor(THREADS) as pool:
        for group in _groups(metas):
            found += pool.map(write_one, group)
            log.sync()
    return found


def _groups(metas: Iterator[ChunkMeta]) -> Iterator[list[ChunkMeta]]:
    while group := list(islice(metas, GROUP_COUNT)):
        yield group


def _record(meta: ChunkMeta, extent: Extent, label: bytes, *, life: int) -> IndexRecord:
    return IndexRecord(
        key=meta.key,
        offset=extent.offset,
        size=extent.size,
        life=life,
        checksum=0,
        codec="raw",
        label=label,
    )


async def _index(folder: Path, log_id: bytes, layout: KVLayout, records: list[IndexRecord]) -> None:
    index, _ = await ChunkIndex.open(folder, log_id)
    encoded = layout_to_message(layout).SerializeToString()
    await index.reset(records, {layout.fingerprint: encoded})
    await index.close()


def _start_empty(folder: Path) -> float:
    folder.mkdir()
    with disk_daemon(folder, cpu_size=CPU_SIZE, nvme_size=64 << 20) as daemon:
        taken = daemon.ready_s
    shutil.rmtree(folder)
    return taken


def _start(stock: Stock) -> float:
    drop_cache([stock.folder])
    with disk_daemon(stock.folder, cpu_size=CPU_SIZE, nvme_size=stock.nvme_size) as daemon:
        with daemon.connect() as client:
            assert client.status().num_chunks == stock.count
        return daemon.ready_s


def _rebuild(folder: Path, what: Rebuilt, scale: RestartScale, tick: Callable[[], None]) -> Rebuild:
    stock = make_stock(folder, what.num_records, what.size)
    is_direct = can_bypass_cache(folder)
    tick()
    lost_s, read_s = [], []
    for _ in range(scale.rebuild_rounds):
        read_s.append(read_files(stock.filled, threads=THREADS, is_direct=is_direct))
        shutil.rmtree(stock.folder / "index")
        lost_s.append(_start(stock))
        tick()
    shutil.rmtree(stock.folder)
    return Rebuild(stock=stock, lost=median_of(lost_s), read=median_of(read_s))


def _row(start: str, stock: Stock | None, seconds: Median) -> dict[str, object]:
    return {
        "start": start,
        "records": stock.count if stock else 0,
        "of": format_size(stock.size) if stock else None,
        "on_disk": format_size(stock.bytes_on_disk) if stock else None,
        "seconds": significant(seconds.value),
        "x_device": None,
        "samples": seconds.samples,
    }
