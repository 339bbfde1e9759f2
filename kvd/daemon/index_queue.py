"""The changes that wait for the index's process, and the callers that wait for the changes.

    add ─► waiting ── take ─► flying (one body) ── landed ─► durable, its callers wake

The one idea: while a body flies, all that comes in gathers for the next. So commits share
transactions, the more of them the slower the disk.
"""

from __future__ import annotations

import asyncio
from collections import deque

from kvd.daemon.index_frames import BODY_SIZE
from kvd.errors import TierFailed


class ChangeQueue:
    """In the order of `add`. Of one event loop."""

    def __init__(self) -> None:
        # Bytes of the changes that wait.
        self.size = 0
        # Changes that fly; while there are any, `take` gives none.
        self.num_flying = 0
        self._changes: deque[bytes] = deque()
        self._num_added = 0
        self._num_durable = 0
        # Who waits, each for a count of durable changes; rising.
        self._waiters: deque[tuple[int, asyncio.Future[None]]] = deque()

    def __len__(self) -> int:
        return len(self._changes)

    def add(self, change: bytes) -> None:
        self._changes.append(change)
        self._num_added += 1
        self.size += len(change)

    def take(self) -> bytes:
        """Changes to send, end to end, about `BODY_SIZE` bytes at most; empty if there are none or
        others fly.
        """
        if self.num_flying:
            return b""
        taken: list[bytes] = []
        size = 0
        while self._changes and size < BODY_SIZE:
            taken.append(self._changes.popleft())
            size += len(taken[-1])
        self.size -= size
        self.num_flying = len(taken)
        return b"".join(taken)

    def landed(self) -> None:
        """What flew is durable."""
        self._num_durable += self.num_flying
        self.num_flying = 0
        while self._waiters and self._waiters[0][0] <= self._num_durable:
            waiter = self._waiters.popleft()[1]
            if not waiter.done():
                waiter.set_result(None)

    async def wait(self) -> None:
        """Return when all that was added before is durable. Raises what `fail` is told."""
        if self._num_durable == self._num_added:
            return
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append((self._num_added, waiter))
        await waiter

    def fail(self, reason: str) -> None:
        """Forget all changes, and raise `TierFailed` for all who wait."""
        self._changes.clear()
        self.size = self.num_flying = 0
        self._num_durable = self._num_added
        for _, waiter in self._waiters:
            if not waiter.done():
                waiter.set_exception(TierFailed(f"the index keeps nothing: {reason}"))
        self._waiters.clear()
