"""A segment log for tests: small segments, records whose bytes follow from a seed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kvd.chunk import Extent
from kvd.tiers.aligned import aligned_bytes
from kvd.tiers.segment_log import SegmentLog
from tests.file_faults import FaultyOps, pattern

SEGMENT_SIZE = 1 << 20
SIZE = 4 * SEGMENT_SIZE

# What a thread may take on a loaded machine, before the test gives up.
PATIENCE_S = 60

Opener = Callable[..., SegmentLog]


@contextlib.contextmanager
def opener(folder: Path, ops: FaultyOps) -> Iterator[Opener]:
    """Opens logs, in `folder` if not told otherwise; each is closed before the next one."""
    opened: list[SegmentLog] = []

    def open_one(*, path: Path = folder, size: int = SIZE, **options: object) -> SegmentLog:
        if opened:
            opened.pop().close()
        options = {"segment_size": SEGMENT_SIZE, "ops": ops, **options}
        opened.append(SegmentLog(path, size, **options))  # type: ignore[arg-type]
        return opened[0]

    try:
        yield open_one
    finally:
        if opened:
            opened.pop().close()


def aligned(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    out = aligned_bytes(max(data.size, 1))[: data.size]
    out[:] = data
    return out


def append(log: SegmentLog, seed: int, size: int = 10_000) -> Extent:
    """A record that is not durable yet: label and payload follow from the seed."""
    extent = log.append(b"record %d" % seed, aligned(pattern(seed, size)))
    assert extent is not None
    return extent


def put(log: SegmentLog, seed: int, size: int = 10_000) -> Extent:
    """The same, durable."""
    extent = append(log, seed, size)
    log.sync([extent])
    return extent


def assert_holds(log: SegmentLog, extent: Extent, seed: int) -> None:
    out = aligned_bytes(extent.size)
    header = log.read(extent, out)
    assert header.label == b"record %d" % seed
    assert (out == pattern(seed, extent.size)).all()


def fill(log: SegmentLog, size: int = 100_000) -> dict[Extent, int]:
    """Records until the log has no room."""
    held: dict[Extent, int] = {}
    while (extent := log.append(b"record %d" % len(held), pattern(len(held), size))) is not None:
        held[extent] = len(held)
    log.sync()
    return held


def disk_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("segment-*"))


def num_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))
