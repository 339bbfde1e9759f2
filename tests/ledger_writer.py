"""Uses a ledger and its arena as a daemon does, at random, until it is killed.

    python -m tests.ledger_writer ARENA_FD LEDGER_FD JOURNAL

For each seed on its input it forks a worker, says its pid, and says "ended" when that was killed.
The worker adopts what the one before left and goes on. In JOURNAL it says `kept N` when a chunk is
kept and `drop N` before it is erased. Chunk N's bytes, size and label follow from N.
"""

from __future__ import annotations

import os
import random
import sys

import numpy as np
from numpy.typing import NDArray

from kvd.arena import Arena
from kvd.daemon.ledger import Ledger
from kvd.daemon.ledger_format import checksum
from kvd.tiers.cpu import CpuTier

ARENA_SIZE = 2 << 20
NUM_SLOTS = 24


def size_of(number: int) -> int:
    """Bytes of chunk `number`."""
    return 1 + number * 7919 % 150_000


def pattern(number: int) -> NDArray[np.uint8]:
    """All bytes of chunk `number`."""
    size = size_of(number)
    words = np.arange(size // 8 + 1, dtype=np.uint64) * np.uint64(2654435761) + np.uint64(number)
    return words.view(np.uint8)[:size]


class Worker:
    """What the store will do, in the order it must."""

    def __init__(self, arena_fd: int, ledger_fd: int, journal: int) -> None:
        self.tier = CpuTier(Arena.adopt(arena_fd))
        self.ledger = Ledger.adopt(ledger_fd, arena_size=ARENA_SIZE)
        self.journal = journal
        self.kept: dict[int, int] = {}
        contents = self.ledger.entries()
        assert contents.is_sound
        for slot in sorted(
            [*contents.kept, *contents.writing, *contents.committed], key=lambda slot: slot.offset
        ):
            assert self.tier.allocate_at(slot.offset, slot.size)
        for kept in contents.kept:
            self.kept[int(kept.label)] = kept.offset
        # All earlier writers and readers are dead.
        for slot in [*contents.writing, *contents.committed]:
            self.drop(slot.offset, slot.size)

    def tell(self, word: str, number: int) -> None:
        os.write(self.journal, f"{word} {number}\n".encode())

    def drop(self, offset: int, size: int) -> None:
        self.ledger.erase(offset)
        # From here on the bytes may be anybody's.
        self.tier.arena.view(offset, size)[:] = 0xEE
        self.tier._allocator.free(offset)

    def store(self, number: int, chance: random.Random) -> bool:
        extent = self.tier.allocate(size_of(number))
        if extent is None:
            return False
        if not self.ledger.write(extent.offset, extent.size, os.getpid(), 1, number):
            self.tier.free(extent)
            return False
        data = pattern(number)
        self.tier.view(extent)[:] = data
        if chance.random() < 0.1:
            # The writer gave up.
            self.drop(extent.offset, extent.size)
            return True
        if chance.random() < 0.5:
            assert self.ledger.commit(extent.offset)
        label = b"%d" % number
        assert self.ledger.keep(extent.offset, extent.size, checksum(data.data), label)
        self.tell("kept", number)
        self.kept[number] = extent.offset
        return True

    def run(self, first: int, chance: random.Random) -> None:
        number = first
        while True:
            number += 1
            while not self.store(number, chance) or chance.random() < 0.3:
                if not self.kept:
                    break
                victim = chance.choice(list(self.kept))
                self.tell("drop", victim)
                self.drop(self.kept.pop(victim), size_of(victim))


def main() -> None:
    arena_fd, ledger_fd, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            journal = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            Worker(arena_fd, ledger_fd, journal).run(int(line), random.Random(int(line)))
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
