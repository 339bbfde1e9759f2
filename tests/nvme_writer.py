"""A process that fills a segment log until it is killed. tests/test_nvme_crash.py judges it.

    python -m tests.nvme_writer FOLDER JOURNAL FIRST_SEED

The journal stands outside the log: `begin SEED` before a record is appended, `done SEED` when it is
durable, `drop SEED` before it is freed.
"""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kvd.chunk import Extent
from kvd.tiers.aligned import aligned_bytes
from kvd.tiers.segment_log import SegmentLog
from tests.file_faults import pattern

SEGMENT_SIZE = 1 << 20
SIZE = 6 * SEGMENT_SIZE
THREADS = 4


def payload_size(seed: int) -> int:
    """A record's size follows from its seed."""
    return 1 + seed * 7919 % 150_000


def main() -> None:
    folder, journal, first = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    fd = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def tell(word: str, seed: int) -> None:
        os.write(fd, f"{word} {seed}\n".encode())

    log = SegmentLog(folder, SIZE, segment_size=SEGMENT_SIZE)
    held: dict[Extent, int] = {}
    for record in log.scan():
        assert log.adopt(record.extent)
        held[record.extent] = int(record.header.label)

    def make_room() -> None:
        oldest = min(
            (s for s in log.segments() if s.status == "full"), key=lambda segment: segment.sequence
        )
        for extent in [e for e in held if e.offset // SEGMENT_SIZE == oldest.slot]:
            tell("drop", held.pop(extent))
            log.free(extent)
        log.reclaim(oldest.slot)

    def store(seed: int) -> tuple[int, Extent | None]:
        data = aligned_bytes(payload_size(seed))
        data[:] = pattern(seed, data.size)
        tell("begin", seed)
        extent = log.append(b"%d" % seed, data)
        if extent is not None:
            log.sync([extent])
            tell("done", seed)
        return seed, extent

    with ThreadPoolExecutor(THREADS) as pool:
        seed = first
        while True:
            for stored, extent in pool.map(store, range(seed, seed + 16)):
                if extent is not None:
                    held[extent] = stored
            if len([s for s in log.segments() if s.status == "full"]) >= 4:
                make_room()
            seed += 16


if __name__ == "__main__":
    main()
