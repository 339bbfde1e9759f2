"""Scan: which records a segment holds, from their headers alone. docs/formats/segment.md.

A scan believes a header if it names this life and its own place, and what comes before it in the
segment was written before it. No I/O here: `scan` is given a function that reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from kvd.errors import Corrupt, Unsupported
from kvd.tiers.segment import (
    BLOCK_SIZE,
    MAGIC_RECORD,
    Buffer,
    RecordHeader,
    SegmentHeader,
    belongs,
    parse_header,
)

# Bytes that the search for a lost record's successor reads at once.
PROBE_SIZE = 1 << 20


def scan(
    segment: SegmentHeader, read: Callable[[int, int], Buffer | None], *, start: int = BLOCK_SIZE
) -> Iterator[RecordHeader]:
    """Every record of this life, in order, then the end mark if there is one; payloads unread.

    `read(offset, size)` returns the bytes, or None where they cannot be read. A block that is no
    header of this life is searched past, block by block: one lost record does not hide those behind
    it. Sequences rise along a segment: what an earlier run left behind its last record is not taken
    up again when a later run has written before it.
    """
    at, sequence = start, segment.sequence
    find = partial(_find, segment, read)
    while at + BLOCK_SIZE <= segment.segment_size:
        record = _parse_at(segment, at, read(at, BLOCK_SIZE))
        if record is None or record.sequence <= sequence:
            candidate = find(at + BLOCK_SIZE)
            if candidate is None:
                return
            at = candidate
            continue
        yield record
        if record.is_end:
            return
        at, sequence = record.end, record.sequence


def _find(
    segment: SegmentHeader, read: Callable[[int, int], Buffer | None], start: int
) -> int | None:
    # The next block that begins like a record's header. Payloads cannot imitate one: the life is
    # drawn at random and never told.
    magic = int.from_bytes(MAGIC_RECORD, "little")
    for at in range(start, segment.segment_size, PROBE_SIZE):
        size = min(PROBE_SIZE, segment.segment_size - at)
        window = read(at, size)
        if window is None:
            # One bad block must not hide its neighbours.
            for block in range(at, at + size, BLOCK_SIZE):
                if _parse_at(segment, block, read(block, BLOCK_SIZE)):
                    return block
            continue
        words = np.frombuffer(window, dtype="<u8")[:: BLOCK_SIZE // 8]
        for index in np.flatnonzero(words == magic):
            block = at + int(index) * BLOCK_SIZE
            first = int(index) * BLOCK_SIZE
            if _parse_at(segment, block, memoryview(window)[first : first + BLOCK_SIZE]):
                return block
    return None


def _parse_at(segment: SegmentHeader, offset: int, block: Buffer | None) -> RecordHeader | None:
    if block is None:
        return None
    try:
        record = parse_header(block)
    except (Corrupt, Unsupported):
        return None
    return record if belongs(record, segment, offset) else None
