"""Promoter: reads chunks from disk into memory, and destroys records that are not what was stored.

    fetch ─► a record is read, stripe by stripe ─► land: in memory
               ├─ the device refuses, thrice    ─► lose: a miss, the record stays
               └─ it is not what was stored     ─► lose, and it is destroyed on disk

Runs on the event loop, beside the `Mover`; bytes move on the tier's threads.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from kvd.chunk import Extent, Placement
from kvd.daemon.arrival import Arrival
from kvd.daemon.codec_rules import RAW
from kvd.daemon.coder import Coder
from kvd.daemon.directory import Entry
from kvd.daemon.labels import check_label
from kvd.daemon.store import ChunkStore
from kvd.errors import Corrupt, TierFailed, Unsupported
from kvd.keys import short
from kvd.tiers.aligned import aligned_bytes
from kvd.tiers.nvme import NvmeTier
from kvd.tiers.segment import RecordHeader
from kvd.tiers.segment_reader import STRIPE_SIZE

log = logging.getLogger("kvd.nvme")

# A chunk up to this comes in one piece. In stripes its first layers would be there half a
# millisecond earlier, and a batch of such chunks 5 % later, for half as much again of the CPU.
WHOLE_SIZE_MAX = 2 << 20

# After these pauses a read that the device refused is tried again; then the chunk is a miss.
READ_AGAIN_S = (0.02, 0.2)


class Promoter:
    """Reads records of `tier` for `store`. `tell_progress` hears of each end, `spawn` runs what
    nobody waits for.
    """

    def __init__(
        self,
        store: ChunkStore,
        tier: NvmeTier,
        coder: Coder,
        *,
        tell_progress: Callable[[], None],
        spawn: Callable[[Coroutine[Any, Any, Any]], None],
    ) -> None:
        self._store = store
        self._tier = tier
        self._coder = coder
        self._tell_progress = tell_progress
        self._spawn = spawn
        self._loop = asyncio.get_running_loop()
        self._reading: dict[int, set[asyncio.Task[None]]] = {}
        # Copies that are being destroyed: their extents are not to be freed a second time.
        self._killed: set[Entry] = set()

    @property
    def tasks(self) -> list[asyncio.Task[None]]:
        """The reads under way."""
        return [task for tasks in self._reading.values() for task in tasks]

    def fetch(self, arrival: Arrival) -> None:
        """As `Lower.fetch`."""
        placement = arrival.source
        slot = placement.extent.offset // self._tier.log.segment_size
        task = self._loop.create_task(self._read(arrival, placement))
        self._reading.setdefault(slot, set()).add(task)
        task.add_done_callback(partial(self._read_ended, slot))

    async def reads_end(self, slot: int) -> None:
        """Wait until nobody reads the segment."""
        if tasks := self._reading.get(slot):
            await asyncio.wait(tasks)

    def is_killing(self, entry: Entry) -> bool:
        """Whether the entry's record is being destroyed."""
        return entry in self._killed

    def quarantine(
        self, entry: Entry, extent: Extent, reason: str, arrival: Arrival | None = None
    ) -> None:
        """A record is not what was stored: nobody gets it, and no later scan meets it again."""
        log.error(
            "event=quarantined chunk=%s offset=%d reason=%r",
            short(entry.meta.key),
            extent.offset,
            reason,
        )
        self._store.counters["quarantine_chunks"] += 1
        is_current = entry.on_disk is not None and entry.on_disk.extent == extent
        if is_current:
            self._killed.add(entry)
        if arrival is not None:
            self._store.lose(arrival)
        elif is_current:
            self._store.unshelve(entry)
        if is_current:
            self._killed.discard(entry)
            self._spawn(self._tier.kill(extent))

    async def _read(self, arrival: Arrival, placement: Placement) -> None:
        entry = arrival.entry
        try:
            await self._read_patiently(arrival, placement)
        except TierFailed as error:
            log.error("event=read_failed chunk=%s reason=%r", short(entry.meta.key), str(error))
            self._store.counters["nvme_read_errors"] += 1
            self._store.lose(arrival)
        except Corrupt as error:
            self.quarantine(entry, placement.extent, str(error), arrival)
        except Unsupported as error:
            # Its codec or profile is not here: what is on disk is of no use.
            log.error("event=not_decoded chunk=%s reason=%r", short(entry.meta.key), str(error))
            self._store.counters["decode_errors"] += 1
            self._store.lose(arrival)
        except BaseException:
            self._store.lose(arrival)
            raise
        else:
            self._store.land(arrival)
        finally:
            arrival.notify()
            self._tell_progress()

    async def _read_patiently(self, arrival: Arrival, placement: Placement) -> None:
        for pause_s in READ_AGAIN_S:
            try:
                await self._read_into(arrival, placement)
            except TierFailed:
                # No descriptor or no memory for a moment; a bad block is bad the next time too.
                await asyncio.sleep(pause_s)
            else:
                return
        await self._read_into(arrival, placement)

    async def _read_into(self, arrival: Arrival, placement: Placement) -> None:
        """Fill the arrival's extent from the record in `placement`: here alone stored bytes become
        the chunk's.
        """
        extent = placement.extent
        out = self._store.tier.view(arrival.extent)
        progress = partial(arrival.reach, loop=self._loop)

        def check(header: RecordHeader) -> None:
            check_label(arrival.entry.meta, header.label)

        if placement.codec == RAW:
            stripe_size = STRIPE_SIZE if extent.size > WHOLE_SIZE_MAX else extent.size
            await self._tier.read_stream(
                extent, out, check=check, progress=progress, stripe_size=stripe_size
            )
            return
        bitstream = aligned_bytes(extent.size)
        await self._tier.read_stream(
            extent, bitstream, check=check, progress=_ignore, stripe_size=STRIPE_SIZE
        )
        meta = arrival.entry.meta
        await self._coder.decode(bitstream, meta, self._store.layouts[meta.layout], out, progress)

    def _read_ended(self, slot: int, task: asyncio.Task[None]) -> None:
        self._reading[slot].discard(task)
        if not self._reading[slot]:
            del self._reading[slot]
        if not task.cancelled() and task.exception() is not None:
            log.error("event=promotion_failed", exc_info=task.exception())


def _ignore(ready: int) -> None:
    """Half a bitstream is of no use yet."""
