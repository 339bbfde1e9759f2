"""The NVMe tier: the asynchronous rim of a segment log.

Bytes move on a few threads each way, so that neither demotion nor promotion waits for the other;
one more thread syncs: what is appended while an fdatasync runs shares the next one. Another opens
the next segment when the active one is half full.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from kvd.chunk import Extent
from kvd.tiers.segment import RecordHeader
from kvd.tiers.segment_log import SegmentLog, TierFailed

__all__ = ["NvmeTier", "TierFailed"]

# Four in flight take what a device gives; eight measured no better and cost the event loop more.
THREADS = 4

_T = TypeVar("_T")


class NvmeTier:
    """`log` from an event loop. Everything that does not touch the device is the log's own.

    A cancelled call returns only when its thread has let go of the caller's memory.
    """

    def __init__(self, log: SegmentLog) -> None:
        self.log = log
        self._writers = ThreadPoolExecutor(THREADS, "kvd-nvme-write")
        self._readers = ThreadPoolExecutor(THREADS, "kvd-nvme-read")
        self._syncer = ThreadPoolExecutor(1, "kvd-nvme-sync")
        self._opener = ThreadPoolExecutor(1, "kvd-nvme-open")

    async def append(
        self,
        label: bytes,
        payload: NDArray[np.uint8],
        *,
        codec: str = "raw",
        payload_checksum: int | None = None,
    ) -> Extent | None:
        """A durable record, or None where there is no room. Raises as `SegmentLog.append` and
        `sync`; cancelled, it leaves no live record.
        """

        def write() -> Extent | None:
            if self.log.wants_spare:
                self._opener.submit(self.log.prepare)
            return self.log.append(label, payload, codec=codec, payload_checksum=payload_checksum)

        async def story() -> Extent | None:
            extent = await self._run(self._writers, write)
            if extent is not None:
                await self._run(self._syncer, lambda: self.log.sync([extent]))
            return extent

        return await _settled(story(), self._drop)

    async def read(self, extent: Extent, out: NDArray[np.uint8]) -> RecordHeader:
        """`SegmentLog.read`."""
        return await _settled(self._run(self._readers, lambda: self.log.read(extent, out)))

    async def read_header(self, extent: Extent) -> RecordHeader:
        """`SegmentLog.read_header`."""
        return await _settled(self._run(self._readers, lambda: self.log.read_header(extent)))

    async def read_range(
        self,
        extent: Extent,
        offset: int,
        out: NDArray[np.uint8],
        *,
        header: RecordHeader | None = None,
    ) -> RecordHeader:
        """`SegmentLog.read_range`; several ranges of a record may be under way at a time."""

        def read() -> RecordHeader:
            return self.log.read_range(extent, offset, out, header=header)

        return await _settled(self._run(self._readers, read))

    async def reclaim(self, slot: int) -> None:
        """`SegmentLog.reclaim`."""
        await _settled(self._run(self._writers, lambda: self.log.reclaim(slot)))

    def close(self) -> None:
        """Wait for what is under way, then close the log."""
        for pool in (self._writers, self._readers, self._syncer, self._opener):
            pool.shutdown()
        self.log.close()

    def _drop(self, extent: Extent | None) -> None:
        if extent is not None:
            self.log.free(extent)

    async def _run(self, pool: ThreadPoolExecutor, call: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(pool, call)


async def _settled(story: Coroutine[Any, Any, _T], undo: Callable[[_T], None] | None = None) -> _T:
    # A thread cannot be stopped in the middle of a transfer: whoever cancels waits for its end, for
    # only then is the memory the caller's again.
    task = asyncio.ensure_future(story)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            try:
                await asyncio.wait([task])
            except asyncio.CancelledError:
                continue
        if undo is not None and not task.cancelled() and task.exception() is None:
            undo(task.result())
        raise
