"""Upkeep: the tier on disk stays within its bounds and its records stay good.

    nearly full       a segment is given back; what was asked for since it was written is copied on
    disk nearly full  segments are deleted until the reserve is free again, whoever filled it
    day after day     a pass reads every record; one that is bad is destroyed before it is needed

Runs on the event loop, beside the `Mover` that it serves.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from kvd.chunk import Placement
from kvd.daemon.directory import Entry
from kvd.daemon.labels import check_label
from kvd.daemon.roles import ScrubCount
from kvd.daemon.shelf import (
    COPY_FRACTION,
    COPY_FRACTION_OF_ONE,
    choose_segment,
    worth_a_copy,
)
from kvd.daemon.store import ChunkStore
from kvd.errors import Corrupt, InvalidRequest, TierFailed
from kvd.tiers.aligned import aligned_bytes
from kvd.tiers.nvme import NvmeTier
from kvd.tiers.segment import record_size
from kvd.tiers.segment_state import SegmentInfo

if TYPE_CHECKING:
    from kvd.daemon.mover import Mover

log = logging.getLogger("kvd.nvme")

# What a file system says that has no place left, whatever it said was free.
NO_SPACE = {errno.ENOSPC, errno.EDQUOT}

# How often the reserve and a due pass are looked at.
WATCH_EVERY_S = 5.0

# The first pass leaves a new daemon's engines alone.
SCRUB_FIRST_S = 3600.0

# From the beginning of one pass to that of the next.
SCRUB_EVERY_S = 86400.0


class Upkeep:
    """Room, reserve and scrubbing of `tier`. `scrub_rate` is in bytes a second, 0 for no passes of
    its own.
    """

    def __init__(self, mover: Mover, store: ChunkStore, tier: NvmeTier, *, scrub_rate: int) -> None:
        self.scrubbed = ScrubCount()
        self._mover = mover
        self._store = store
        self._tier = tier
        self._log = tier.log
        self._scrub_rate = scrub_rate
        self._reclaiming = asyncio.Lock()
        self._is_ahead = False
        # There was nothing to give back when it was last wanted.
        self._is_stuck = False
        # Bytes that may be copied on.
        self._copy_size_max = int(self._log.segment_size * COPY_FRACTION_OF_ONE)
        self._copy_size = self._copy_size_max

    @property
    def room(self) -> int:
        """Bytes that records can still take. Raises `TierFailed` where the file system does not
        say.
        """
        try:
            return self._log.room
        except OSError as error:
            raise TierFailed(f"nobody knows what is free in {self._log.path}: {error}") from error

    @property
    def is_due(self) -> bool:
        """Whether segments should be given back before the log is full: what is copied on then has
        a place.
        """
        return not self._is_ahead and self._has_less_than(self._room_wanted)

    @property
    def is_short(self) -> bool:
        """Whether new writes should wait: beside those under way, the room that is left is for what
        is copied on. Not where nothing can be given back.
        """
        size = self._copy_size_max + self._store.transit.demoting_size
        return not self._is_stuck and self._has_less_than(size)

    def _has_less_than(self, size: int) -> bool:
        # An append that needs the file system says better what is wrong with it.
        try:
            return self.room < size
        except TierFailed:
            return False

    @property
    def _room_wanted(self) -> int:
        # Half for what is copied on, half for what is written in the meantime.
        return self._log.segment_size

    async def reclaim_ahead(self) -> None:
        """Give segments back until there is room for the next ones; once at a time."""
        if self._is_ahead:
            return
        self._is_ahead = True
        try:
            await self.reclaim(self._room_wanted)
        except TierFailed as error:
            self._mover.failed(error)
        finally:
            self._is_ahead = False

    async def reclaim(self, room: int) -> bool:
        """Give segments back until there is `room`; False if there is none left to give."""
        try:
            async with self._reclaiming:
                while self.room < room:
                    self._is_stuck = not await self._reclaim_one()
                    if self._is_stuck:
                        return False
                return True
        finally:
            self._mover.wake()

    async def give_back_one(self) -> bool:
        """Give one segment back, whatever room there is; False if there is none to give."""
        async with self._reclaiming:
            return await self._reclaim_one()

    def is_refused(self, error: TierFailed, size: int) -> bool:
        """Whether a write failed because the file system has no place for another segment."""
        cause = error.__cause__
        if not isinstance(cause, OSError) or cause.errno not in NO_SPACE:
            return False
        whole = record_size(size)
        return not any(s.status == "active" and s.free_size >= whole for s in self._log.segments())

    @property
    def fullness(self) -> str:
        """Why nothing can be written though nothing has failed."""
        return (
            f"the tier is full: it has {self._log.disk_size} bytes of {self._log.size}, none of "
            f"which can be given back, and a reserve of {self._log.reserve} has to stay free in "
            f"{self._log.path}"
        )

    async def _reclaim_one(self) -> bool:
        """Give the segment back that costs least; False if there is none."""
        segments = self._log.segments()
        while (info := choose_segment(segments)) is not None:
            if await self._give_back(info):
                return True
            segments = [segment for segment in segments if segment.slot != info.slot]
        return False

    async def _give_back(self, info: SegmentInfo) -> bool:
        """Empty a segment and begin its next life; False if something in it is held that has no
        place anywhere else, or the device fails.
        """
        credit = int(self._log.segment_size * COPY_FRACTION)
        self._copy_size = min(self._copy_size + credit, self._copy_size_max)
        for entry in self._mover.shelf.on(info.slot):
            # Before anything is waited for: while it has a copy here, it may leave memory.
            if entry.in_memory is not None and not entry.is_held:
                self._store.unshelve(entry)
        copied = worth_a_copy(self._mover.shelf.on(info.slot), self._copy_size)
        for entry in copied:
            await self._copy_on(entry)
        if copied:
            # The segment's next life ends what the index still says of them.
            with suppress(TierFailed):
                await self._mover.index.commit()
        for entry in self._mover.shelf.on(info.slot):
            # Held, and no room for its copy: memory keeps it, if it can.
            if entry.is_held and not self._store.bring(entry, time.monotonic_ns()):
                return False
        while entries := self._mover.shelf.on(info.slot):
            for entry in entries:
                if not self._store.reads_disk(entry):
                    self._store.counters["nvme_evict_chunks"] += entry.in_memory is None
                    self._store.unshelve(entry)
            await self._mover.promoter.reads_end(info.slot)
            # One of them may be read where it was before.
            await asyncio.sleep(0)
        await self._mover.promoter.reads_end(info.slot)
        try:
            await self._tier.reclaim(info.slot)
        except InvalidRequest:
            # A record of it was written a moment ago, and is not on the shelf yet.
            await asyncio.sleep(0.01)
        except TierFailed as error:
            self._mover.failed(error)
            return False
        return True

    async def _copy_on(self, entry: Entry) -> None:
        """Write a chunk's copy once more, at the log's end."""
        placement = entry.on_disk
        if self._store.directory.expiries.is_spent(entry):
            # Over, and here only for those who read it.
            return
        if placement is None or self.room < record_size(placement.extent.size):
            return
        out = aligned_bytes(placement.extent.size)
        try:
            header = await self._tier.read(placement.extent, out)
            check_label(entry.meta, header.label)
            extent = await self._tier.append(
                header.label,
                out,
                codec=header.codec,
                payload_checksum=header.payload_checksum or None,
            )
        except Corrupt as error:
            if entry.on_disk is placement and not self._store.reads_disk(entry):
                self._mover.promoter.quarantine(entry, placement.extent, str(error))
            return
        except TierFailed as error:
            self._mover.failed(error)
            return
        if extent is None:
            return
        if entry.on_disk is not placement:
            # Dropped in the meantime.
            self._log.free(extent)
            return
        self._copy_size = max(self._copy_size - record_size(extent.size), 0)
        self._store.counters["nvme_copy_chunks"] += 1
        self._store.counters["nvme_copy_bytes"] += extent.size
        tenant = self._store.tenant_of(entry.meta)
        self._mover.shelf.remove(entry, tenant)
        self._log.free(placement.extent)
        entry.on_disk = Placement(extent, placement.codec, placement.is_exact, placement.checksum)
        entry.is_recent = False
        self._mover.shelf.add(entry, tenant)
        self._mover.feed.remember(entry)

    async def watch_forever(self) -> None:
        """Keep the reserve, and begin a pass when one is due."""
        due_s = time.monotonic() + SCRUB_FIRST_S
        while True:
            await asyncio.sleep(WATCH_EVERY_S)
            if self._scrub_rate and time.monotonic() > due_s:
                due_s += SCRUB_EVERY_S
                self._mover.scrub(self._scrub_rate)
            try:
                await self._keep_reserve()
            except TierFailed as error:
                self._mover.failed(error)
            except OSError as error:
                self._mover.failed(TierFailed(f"the reserve cannot be kept: {error}"))
            except InvalidRequest:
                # Somebody reads what is to be deleted: the next time, then.
                continue

    async def _keep_reserve(self) -> None:
        """Others have filled the file system: give back what is theirs by the operator's word."""
        while self._log.lacks_reserve:
            if not await asyncio.to_thread(self._log.trim):
                async with self._reclaiming:
                    is_given = await self._reclaim_one()
                self._mover.wake()
                if not is_given:
                    return

    async def scrub(self, rate: int) -> None:
        """Verify every record, at `rate` bytes a second (0 for no bound)."""
        everything = [
            entry for slot in self._mover.shelf.slots() for entry in self._mover.shelf.on(slot)
        ]
        size_all = sum(entry.on_disk.extent.size for entry in everything if entry.on_disk)
        done = size = bad = 0
        started = time.monotonic()
        try:
            for entry in everything:
                placement = entry.on_disk
                if placement is not None:
                    bad += not await self._scrub_one(entry, placement)
                    size += placement.extent.size
                done += 1
                self.scrubbed = ScrubCount(True, done, len(everything), bad, size, size_all)
                if rate:
                    await asyncio.sleep(max(started + size / rate - time.monotonic(), 0))
        finally:
            self.scrubbed = self.scrubbed._replace(is_running=False)
        log.info("event=scrubbed chunks=%d size=%d bad=%d", done, size, bad)

    async def _scrub_one(self, entry: Entry, placement: Placement) -> bool:
        out = aligned_bytes(placement.extent.size)
        try:
            header = await self._tier.read(placement.extent, out)
            check_label(entry.meta, header.label)
        except Corrupt as error:
            if entry.on_disk is not placement:
                return True
            if not self._store.reads_disk(entry):
                self._mover.promoter.quarantine(entry, placement.extent, str(error))
            return False
        except TierFailed as error:
            log.error("event=scrub_failed offset=%d reason=%r", placement.extent.offset, str(error))
            return False
        self._store.counters["scrub_chunks"] += 1
        self._store.counters["scrub_bytes"] += placement.extent.size
        return True
