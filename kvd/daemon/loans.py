"""Loans: bitstreams in the memory that clients map, each in an extent of one lease's own.

    lend ─► copied from packed memory        ─► land: the lease has it
        └─► read from disk, and verified    ─► lose: a miss
    the lease ends ─► the extent is free; while it is still being filled, when that has ended

A client that decodes by itself pins a chunk as the bitstream that it is kept as: fewer bytes, and
no work for the daemon. Nobody else finds it there; the next lease has a copy of its own.

Runs on the event loop; bytes move on threads.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from kvd.chunk import Extent, Placement
from kvd.daemon.directory import Directory, Entry
from kvd.daemon.leases import Loan
from kvd.daemon.memory import Memory
from kvd.tiers.settled import settled


class Loans:
    """The loans of a store, over `memory`. `make_room` gives an extent of so many bytes at a time,
    or None; `remove` unlists a chunk.
    """

    def __init__(
        self,
        memory: Memory,
        directory: Directory,
        counters: Counter[str],
        *,
        make_room: Callable[[int, int], Extent | None],
        remove: Callable[[Entry], None],
    ) -> None:
        # Those that have an extent.
        self.open: set[Loan] = set()
        self._memory = memory
        self._directory = directory
        self._counters = counters
        self._make_room = make_room
        self._remove = remove
        self._copying: set[asyncio.Task[None]] = set()

    def lend(self, entry: Entry, copy: Placement, now_ns: int) -> Loan | None:
        """Let a pinned chunk's `copy`, packed or on disk, begin to come as it is; None where there
        is no room for it.
        """
        extent = self._make_room(copy.extent.size, now_ns)
        if extent is None:
            return None
        loan = Loan(entry, extent, copy)
        self._memory.reserve(extent)
        self.open.add(loan)
        if copy is entry.packed:
            task = asyncio.get_running_loop().create_task(self._copy_packed(loan))
            self._copying.add(task)
            task.add_done_callback(self._copying.discard)
        else:
            assert copy is entry.on_disk
            assert self._memory.lower is not None
            self._memory.lower.fetch(loan)
        return loan

    def land(self, loan: Loan) -> None:
        """All of the bitstream is there, as it was stored."""
        loan.state = "here"
        loan.ready = loan.extent.size
        self._counters["lend_chunks"] += 1
        self._counters["lend_bytes"] += loan.extent.size
        if not loan.is_wanted:
            self._free(loan)

    def lose(self, loan: Loan) -> None:
        """It could not be had: a miss for the lease, and what was read is no copy any more."""
        loan.state = "lost"
        entry, disk = loan.entry, loan.entry.on_disk
        is_listed = self._directory.get(entry.meta.key) is entry
        if is_listed and disk is not None and disk.extent == loan.copy.extent:
            if entry.in_memory is None and entry.packed is None:
                self._remove(entry)
            else:
                assert self._memory.lower is not None
                self._memory.lower.drop(entry)
                self._memory.unshelve(entry)
        if not loan.is_wanted:
            self._free(loan)

    def end(self, loan: Loan) -> None:
        """Its lease has ended."""
        loan.is_wanted = False
        if loan.state != "coming":
            self._free(loan)

    def _free(self, loan: Loan) -> None:
        self.open.remove(loan)
        self._memory.unreserve(loan.extent)
        self._memory.free(loan.extent)

    async def _copy_packed(self, loan: Loan) -> None:
        entry, packed = loan.entry, self._memory.packed
        assert packed is not None
        out = self._memory.tier.view(loan.extent)
        bitstream = packed.tier.view(loan.copy.extent)
        try:
            loop = asyncio.get_running_loop()
            await settled(loop.run_in_executor(None, _copy, out, bitstream))
        except BaseException:
            self.lose(loan)
            raise
        else:
            # What is not the chunk's copy any more may have been another's before the last byte.
            (self.land if entry.packed is loan.copy else self.lose)(loan)
        finally:
            loan.notify()


def _copy(target: NDArray[np.uint8], source: NDArray[np.uint8]) -> None:
    """No GIL is held meanwhile."""
    np.copyto(target, source)
