"""How close to a plain O_DIRECT stream do durable writes to the segment log and reads from it come?

The answer on the back of an envelope. A 2 MiB record takes 1.2 ms of a device of 1.7 GB/s. On top
come 4 KiB of header in the same call (0.2 %), a checksum (0.1 to 0.25 ms, on another core while the
device works), a hop to a thread and back (0.1 ms) and the fdatasync that the group shares. With
four in flight none of it waits for the device, so 0.95 of the plain stream. A streamed read of
8 MiB ends one stripe's checksum after the plain read does, so 1.03 of its time, and has its first
stripe after a third of that: three others are read at the same time.

Both write into files whose blocks exist and have been written before. The plain stream is four
threads of pwritev or preadv of 2 MiB, for writes with one fdatasync at the end; the log is NvmeTier
from an event loop, each record acknowledged when durable, each read verified. Streamed reads are
the log's own, 16 records by four threads. What encryption costs is CPU time, of one thread.

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
from kvd.tiers.cipher import Cipher
from kvd.tiers.nvme import NvmeTier
from kvd.tiers.segment import BLOCK_SIZE, RecordHeader, checksum, num_pieces, pieces_of
from kvd.tiers.segment_log import SegmentLog

RECORD_SIZE = 2 << 20
LARGE_SIZE = 8 << 20
STREAMS = 16
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
        list(self._pool.map(self.read_one, range(RECORDS)))
        return rate(started)

    def _write_one(self, index: int) -> None:
        at = index * RECORD_SIZE
        assert os.pwritev(self._fd, [self._source[at : at + RECORD_SIZE]], at) == RECORD_SIZE

    def read_one(self, index: int, size: int = RECORD_SIZE) -> None:
        at = index * size
        assert os.preadv(self._fd, [self._target[at : at + size]], at) == size


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


class Streamed:
    """Reads that say how far they are, and plain reads of the same bytes at the same offsets."""

    def __init__(
        self, plain: Plain, folder: Path, source: NDArray[np.uint8], target: NDArray[np.uint8]
    ) -> None:
        self.log = SegmentLog(folder, 2 * SEGMENT_SIZE, segment_size=SEGMENT_SIZE)
        self.shares: list[float] = []
        self._plain, self._target = plain, target
        self._small = self._put(source, RECORD_SIZE, STREAMS)
        self._large = self._put(source, LARGE_SIZE, STREAMS * RECORD_SIZE // LARGE_SIZE)
        self.log.sync()
        self._pool = ThreadPoolExecutor(THREADS)
        self._turn = 0

    def small(self) -> float:
        started = time.perf_counter()
        list(self._pool.map(self._stream, self._small, range(STREAMS)))
        return time.perf_counter() - started

    def plain_small(self) -> float:
        started = time.perf_counter()
        list(self._pool.map(self._plain.read_one, range(STREAMS)))
        return time.perf_counter() - started

    def large(self) -> float:
        self._turn = (self._turn + 1) % len(self._large)
        started = time.perf_counter()
        heard = self._stream(self._large[self._turn], 0)
        taken = time.perf_counter() - started
        self.shares.append((heard[0] - started) / taken)
        return taken

    def plain_large(self) -> float:
        started = time.perf_counter()
        self._plain.read_one(self._turn, LARGE_SIZE)
        return time.perf_counter() - started

    def _put(self, source: NDArray[np.uint8], size: int, count: int) -> list[Extent]:
        parts = (source[index * size : (index + 1) * size] for index in range(count))
        found = [self.log.append(b"record", part) for part in parts]
        return [extent for extent in found if extent is not None]

    def _stream(self, extent: Extent, index: int) -> list[float]:
        heard: list[float] = []
        at = index * extent.size
        self.log.read_stream(
            extent,
            self._target[at : at + extent.size],
            check=lambda header: None,
            progress=lambda _: heard.append(time.perf_counter()),
        )
        return heard


def encryption_costs(source: NDArray[np.uint8], rounds: int) -> tuple[float, float]:
    """CPU seconds a GB: to seal records of 2 MiB, checksums included, and to open them."""
    cipher = Cipher(os.urandom(32))
    payload, out = source[:RECORD_SIZE], aligned_bytes(RECORD_SIZE)
    header = RecordHeader(
        log_id=b"l" * 16,
        life=1,
        sequence=1,
        offset=BLOCK_SIZE,
        payload_size=RECORD_SIZE,
        payload_checksum=0,
        pieces=(0,) * num_pieces(RECORD_SIZE),
        label=b"record",
    )
    taken = [0.0, 0.0]
    for _ in range(rounds):
        started = time.thread_time()
        sealed = cipher.seal(header, payload, out)
        ended = time.thread_time()
        cipher.open_header(sealed)
        for number, piece in enumerate(pieces_of(out)):
            assert checksum(piece) == sealed.pieces[number]
            cipher.open_piece(sealed, number, piece)
        taken[0] += ended - started
        taken[1] += time.thread_time() - ended
    return taken[0] / rounds / RECORD_SIZE * 1e9, taken[1] / rounds / RECORD_SIZE * 1e9


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
        streamed = Streamed(plain, Path(folder) / "streams", source, target)
        small = interleave([streamed.plain_small, streamed.small], 2 * rounds)
        large = interleave([streamed.plain_large, streamed.large], 4 * rounds)
        streamed.log.close()
    seal, unseal = encryption_costs(source, 10 * rounds)
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
        Figure.of(
            "stream_16_2MiB_time_vs_plain", ratio_of(small[1], small[0]), target=1.1, at_least=False
        ),
        Figure.of(
            "stream_8MiB_time_vs_plain", ratio_of(large[1], large[0]), target=1.1, at_least=False
        ),
        Figure.of(
            "first_stripe_share_of_8MiB", median_of(streamed.shares), target=0.5, at_least=False
        ),
    ]
    print_figures(console, figures)
    console.print(f"encryption: seal {seal:.2f}, open {unseal:.2f} CPU seconds a GB")
    console.print(f"write amplification {amplification:.4f}, direct={logged.log.is_direct}")
    write_json(options.json, "nvme_log", figures, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
