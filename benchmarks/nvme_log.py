"""How close to a plain O_DIRECT stream do durable writes to the segment log and cold reads come?

The answer on the back of an envelope. A 2 MiB record takes 1.2 ms of a device of 1.7 GB/s. On top
come 4 KiB of header in the same call (0.2 %), two checksums (0.1 ms each, on another core while the
device works), two hops between threads (0.1 ms) and the fdatasync that the group shares. With
four in flight none of it waits for the device, so 0.95 of the plain stream.

Both write into files whose blocks exist and have been written before. The plain stream is four
threads of pwritev or preadv of 2 MiB, for writes with one fdatasync at the end; the log is NvmeTier
from an event loop, each record acknowledged when durable, each read verified.

    python -m benchmarks.nvme_log [--quick] [--json FILE] [--folder FOLDER]
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import (
    Figure,
    arguments,
    console_for,
    host_facts,
    interleave,
    median_of,
    print_figures,
    print_rows,
    ratio_of,
    write_json,
)
from kvd.chunk import Extent
from kvd.tiers.aligned import aligned_bytes
from kvd.tiers.nvme import NvmeTier
from kvd.tiers.segment_log import SegmentLog

RECORD_SIZE = 2 << 20
RECORDS = 31
SEGMENT_SIZE = 64 << 20
THREADS = 4


class Plain:
    """One preallocated file, written and read by threads."""

    def __init__(self, path: Path, source: NDArray[np.uint8], target: NDArray[np.uint8]) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
        os.posix_fallocate(self._fd, 0, RECORDS * RECORD_SIZE)
        self._pool = ThreadPoolExecutor(THREADS)
        self._source, self._target = source, target

    def write(self) -> float:
        started = time.perf_counter()
        list(self._pool.map(self._write_one, range(RECORDS)))
        os.fdatasync(self._fd)
        return rate(started)

    def read(self) -> float:
        started = time.perf_counter()
        list(self._pool.map(self._read_one, range(RECORDS)))
        return rate(started)

    def _write_one(self, index: int) -> None:
        at = index * RECORD_SIZE
        assert os.pwritev(self._fd, [self._source[at : at + RECORD_SIZE]], at) == RECORD_SIZE

    def _read_one(self, index: int) -> None:
        at = index * RECORD_SIZE
        assert os.preadv(self._fd, [self._target[at : at + RECORD_SIZE]], at) == RECORD_SIZE


class Logged:
    """The same bytes through the log; each sample fills a segment, and the one of the sample before
    is reclaimed between them.
    """

    def __init__(self, folder: Path, source: NDArray[np.uint8], target: NDArray[np.uint8]) -> None:
        self.log = SegmentLog(folder, 3 * SEGMENT_SIZE, segment_size=SEGMENT_SIZE)
        self.tier = NvmeTier(self.log)
        self._source, self._target = source, target
        self._extents: list[Extent] = []
        self.loop = asyncio.new_event_loop()

    def write(self) -> float:
        for extent in self._extents:
            self.log.free(extent)
        for segment in self.log.segments():
            if segment.status == "full" and not segment.num_extents:
                self.log.reclaim(segment.slot)
        return self.loop.run_until_complete(self._write())

    def read(self) -> float:
        return self.loop.run_until_complete(self._read())

    async def _write(self) -> float:
        started = time.perf_counter()
        found = await asyncio.gather(
            *(
                self.tier.append(b"record", self._source[at : at + RECORD_SIZE])
                for at in range(0, self._source.size, RECORD_SIZE)
            )
        )
        taken = rate(started)
        self._extents = [extent for extent in found if extent is not None]
        assert len(self._extents) == RECORDS
        return taken

    async def _read(self) -> float:
        started = time.perf_counter()
        await asyncio.gather(
            *(
                self.tier.read(extent, self._target[at : at + RECORD_SIZE])
                for extent, at in zip(
                    self._extents, range(0, self._target.size, RECORD_SIZE), strict=True
                )
            )
        )
        return rate(started)


def rate(started: float) -> float:
    """GB/s of one sample."""
    return RECORDS * RECORD_SIZE / (time.perf_counter() - started) / 1e9


def main() -> int:
    """Measure, print, write the JSON."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to measure")
    options = parser.parse_args()
    console = console_for(options.json)
    console.print(" | ".join(f"{name} {value}" for name, value in host_facts().items()))
    source, target = aligned_bytes(RECORDS * RECORD_SIZE), aligned_bytes(RECORDS * RECORD_SIZE)
    source[:] = np.random.default_rng(1).integers(0, 256, source.size, dtype=np.uint8)
    target[:] = 1
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        plain = Plain(Path(folder) / "plain", source, target)
        logged = Logged(Path(folder) / "log", source, target)
        # Three times: each of the log's segments has been written once.
        for measure in 3 * (plain.write, logged.write, plain.read, logged.read):
            measure()
        rounds = 10 if options.quick else 40
        writes = interleave([plain.write, logged.write], rounds)
        reads = interleave([plain.read, logged.read], rounds)
        amplification = logged.log.write_amplification
        logged.tier.close()
        logged.loop.close()
    rows = [
        {"what": name, "GB/s": f"{median_of(values).value:.2f}", "samples": len(values)}
        for name, values in [
            ("plain write", writes[0]),
            ("durable write", writes[1]),
            ("plain read", reads[0]),
            ("cold read", reads[1]),
        ]
    ]
    print_rows(console, f"{RECORDS} records of 2 MiB a sample", rows)
    figures = [
        Figure.of(
            "durable_write_vs_plain", ratio_of(writes[1], writes[0]), target=0.9, at_least=True
        ),
        Figure.of("cold_read_vs_plain", ratio_of(reads[1], reads[0]), target=0.9, at_least=True),
    ]
    print_figures(console, figures)
    console.print(f"write amplification {amplification:.4f}, direct={logged.log.is_direct}")
    write_json(options.json, "nvme_log", figures, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
