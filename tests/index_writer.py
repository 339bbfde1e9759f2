"""A process that changes an index until it is killed. tests/test_index_faults.py judges it.

    python -m tests.index_writer FOLDER JOURNAL FIRST

The journal stands outside the index: `put N` or `delete N` before a change is queued, `done N`
when all changes up to N are committed. Change N is about key N % 500, at offset 4096 * N.
"""

from __future__ import annotations

import asyncio
import os
import sys
from hashlib import blake2b
from pathlib import Path

from kvd.daemon.index import ChunkIndex, IndexRecord
from kvd.keys import ChunkKey

LOG_ID = b"an index for all"
NUM_KEYS = 500


def key_of(number: int) -> ChunkKey:
    return ChunkKey(blake2b(b"%d" % (number % NUM_KEYS), digest_size=32).digest())


def record_of(number: int, *, label_size: int = 150) -> IndexRecord:
    """All of a record follows from its number."""
    return IndexRecord(
        key=key_of(number),
        offset=4096 * number,
        size=1 + number * 7919 % 1_000_000,
        life=number % 7 + 1,
        checksum=number * 0x9E3779B97F4A7C15 % 2**64,
        label=(b"label %d " % number * label_size)[:label_size],
        codec="raw" if number % 3 else "bf16/1",
    )


async def change_for_ever(folder: Path, journal: int, first: int) -> None:
    index, found = await ChunkIndex.open(folder, LOG_ID)
    if found.reason:
        await index.reset([], {})
    there = {key_of(record.offset // 4096): record.offset for record in found.records}
    number = first
    while True:
        for _ in range(20):
            at = there.get(key_of(number))
            if number % 4 == 0 and at is not None:
                os.write(journal, f"delete {number}\n".encode())
                index.delete(key_of(number), at)
                del there[key_of(number)]
            else:
                os.write(journal, f"put {number}\n".encode())
                index.put(record_of(number))
                there[key_of(number)] = 4096 * number
            number += 1
        await index.commit()
        os.write(journal, f"done {number - 1}\n".encode())


def main() -> None:
    folder, path, first = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    journal = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    asyncio.run(change_for_ever(folder, journal, first))


if __name__ == "__main__":
    main()
