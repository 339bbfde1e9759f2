"""PackedMemory: chunks as bitstreams, in memory of the daemon's own that no client maps.

    commit ─► encode, in the background ─► packed as well: the mapped copy can go at any moment
    pin    ─► decode, first layers first ─► in mapped memory, or lost
    no room for another ─► the coldest go; who has no other copy is gone

A client's memory holds the hot chunks raw, this holds several times as many. Runs on the event
loop; codecs work on the coder's threads.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from kvd.chunk import Extent, Placement
from kvd.daemon.arrival import Arrival
from kvd.daemon.coder import Coder, Encoded
from kvd.daemon.directory import Entry
from kvd.daemon.eviction.base import EvictionPolicy
from kvd.daemon.store import ChunkStore
from kvd.errors import Corrupt, KvdError
from kvd.keys import short
from kvd.tiers.cpu import CpuTier

log = logging.getLogger("kvd.packed")

NAME = "packed"

# Chunks being encoded: more than there are threads, so that none waits for the event loop.
PACKS_MAX = 16

# Of the mapped memory, at most about this much is being encoded at a time.
PACKING_FRACTION_MAX = 0.25

# Chunks looked at in one search for what to encode.
SEARCH_MAX = 4096

# Chunks that cannot be encoded are looked through for those that are gone, when there are more.
PLAIN_MIN = 1024

# For a bitstream of one byte at most so many are evicted: more, and the room is in pieces.
EVICTED_FACTOR_MAX = 8


class PackedMemory:
    """The `Packed` of `store`: bitstreams in `tier`, ranked by `policy`."""

    def __init__(
        self, store: ChunkStore, tier: CpuTier, policy: EvictionPolicy, coder: Coder
    ) -> None:
        self.tier = tier
        self._store = store
        self._policy = policy
        self._coder = coder
        self._loop = asyncio.get_running_loop()
        self._new: deque[Entry] = deque()
        self._packing: dict[Entry, asyncio.Task[None]] = {}
        self._reading: dict[Entry, asyncio.Task[None]] = {}
        # Extents that are read, of chunks that are gone.
        self._doomed: dict[Entry, Extent] = {}
        # Chunks that cannot be encoded: they stay as they are.
        self._plain: set[Entry] = set()
        self._plain_max = PLAIN_MIN
        self._progress = asyncio.Event()

    async def close(self) -> None:
        """Let everything go that is under way."""
        self._new.clear()
        tasks = [*self._packing.values(), *self._reading.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # The role that the store sees.

    def is_owed(self, entry: Entry) -> bool:
        return (
            entry.packed is None
            and entry.in_memory is not None
            and entry not in self._plain
            and not self._store.directory.expiries.is_spent(entry)
            and self._coder.encodes("cpu", entry.meta, entry.in_memory)
        )

    def fetch(self, arrival: Arrival) -> None:
        entry = arrival.entry
        task = self._loop.create_task(self._unpack(arrival))
        self._reading[entry] = task
        task.add_done_callback(partial(self._read_ended, entry))

    def drop(self, entry: Entry) -> None:
        assert entry.packed is not None
        self._policy.remove(entry.meta.key)
        if entry in self._reading:
            self._doomed[entry] = entry.packed.extent
        else:
            self.tier.free(entry.packed.extent)

    def touch(self, entry: Entry) -> None:
        self._policy.touch(entry.meta.key, time.monotonic_ns())

    def wake(self, committed: Sequence[Entry] = ()) -> None:
        if len(self._plain) > self._plain_max:
            self._plain = {entry for entry in self._plain if self._is_listed(entry)}
            self._plain_max = max(2 * len(self._plain), PLAIN_MIN)
        # The head first: it is what most prompts share.
        self._new.extend(entry for entry in reversed(committed) if self.is_owed(entry))
        self._pack_more()

    def has_room(self, size: int) -> bool:
        memory = self._store.memory
        size = min(size, memory.tier.size)
        if size <= memory.tier.size - memory.tier.used:
            return True
        return size <= memory.ready_size and not any(
            map(self.is_owed, memory.owed(size, SEARCH_MAX))
        )

    async def make_room(self, size: int, timeout_s: float) -> None:
        give_up = self._loop.time() + timeout_s
        while not self.has_room(size) and self._loop.time() < give_up:
            self._new.extendleft(filter(self.is_owed, self._store.memory.owed(size, SEARCH_MAX)))
            self._pack_more()
            if not self._packing:
                return
            self._progress.clear()
            try:
                async with asyncio.timeout_at(give_up):
                    await self._progress.wait()
            except TimeoutError:
                return

    def facts(self) -> dict[str, Any]:
        return {
            "name": NAME,
            "size": self.tier.size,
            "used": self.tier.used,
            "largest_free": self.tier.largest_free,
            "num_extents": self.tier.num_extents,
        }

    def check(self, entries: Iterable[Entry]) -> None:
        packed = [entry for entry in entries if entry.packed is not None]
        extents = [entry.packed.extent for entry in packed if entry.packed is not None]
        extents += self._doomed.values()
        assert len({extent.offset for extent in extents}) == len(extents), "bitstreams overlap"
        assert len(extents) == self.tier.num_extents, "a bitstream is leaked"
        assert sum(map(self.tier.allocated_size, extents)) == self.tier.used
        assert {entry.meta.key for entry in packed} == set(self._policy.victims())
        assert self._doomed.keys() <= self._reading.keys()
        self.tier.check()

    # Encoding.

    def _pack_more(self) -> None:
        memory = self._store.memory
        size_max = memory.tier.size * PACKING_FRACTION_MAX
        while len(self._packing) < PACKS_MAX:
            if self._store.transit.packing_size > size_max:
                return
            entry = self._next_new()
            if entry is None:
                return
            self._store.transit.begin_packing(entry)
            task = self._loop.create_task(self._pack(entry))
            self._packing[entry] = task
            task.add_done_callback(partial(self._pack_ended, entry))

    def _next_new(self) -> Entry | None:
        while self._new:
            entry = self._new.popleft()
            if entry not in self._packing and self._is_listed(entry) and self.is_owed(entry):
                return entry
        return None

    async def _pack(self, entry: Entry) -> None:
        encoded: Encoded | None = None
        is_damaged = False
        try:
            placement, meta = entry.in_memory, entry.meta
            assert placement is not None
            layout = self._store.layouts.get(meta.layout)
            view = self._store.tier.view(placement.extent)
            encoded = await self._coder.encode("cpu", meta, layout, view, placement)
        except Corrupt:
            is_damaged = True
        except Exception:
            # A bug, not the chunk's: it stays as it is.
            log.exception("event=packing_failed chunk=%s", short(entry.meta.key))
        finally:
            is_listed = self._store.transit.end_packing(entry)
        if is_damaged:
            # Its bytes are not those that were committed, whoever changed them.
            log.error("event=damaged_in_memory chunk=%s", short(entry.meta.key))
            self._store.counters["damaged_chunks"] += 1
            self._store.discard(entry)
        elif is_listed and not (encoded is not None and self._keep(entry, encoded)):
            self._plain.add(entry)

    def _keep(self, entry: Entry, encoded: Encoded) -> bool:
        """Give the bitstream a place; False where there is none."""
        extent = self._make_room(encoded.data.size)
        if extent is None or not self._is_listed(entry):
            if extent is not None:
                self.tier.free(extent)
            self._store.counters["pack_full"] += 1
            return False
        self.tier.view(extent)[:] = encoded.data
        self._store.transit.pack(entry, Placement(extent, encoded.codec, encoded.is_exact))
        self._policy.insert(entry.meta, time.monotonic_ns())
        self._store.counters["pack_chunks"] += 1
        self._store.counters["encode_bytes"] += encoded.data.size
        if entry.in_memory is not None:
            self._store.counters["encode_source_bytes"] += entry.in_memory.extent.size
        return True

    def _make_room(self, size: int) -> Extent | None:
        extent = self.tier.allocate(size)
        evicted_size = 0
        for entry in self._evictable() if extent is None else ():
            assert entry.packed is not None
            evicted_size += entry.packed.extent.size
            self._store.counters["pack_evict_chunks"] += 1
            self._store.transit.unpack(entry)
            extent = self.tier.allocate(size)
            if extent is not None or evicted_size > EVICTED_FACTOR_MAX * size:
                break
        return extent

    def _evictable(self) -> Iterator[Entry]:
        for key in self._policy.victims():
            entry = self._store.directory.get(key)
            assert entry is not None
            if entry in self._reading or entry.is_held:
                continue
            if entry.in_memory is None and entry.on_disk is None and not entry.is_leaf:
                # What continues it needs it: it is as young as that is.
                self._policy.touch(key, time.monotonic_ns())
                continue
            yield entry

    def _pack_ended(self, entry: Entry, task: asyncio.Task[None]) -> None:
        del self._packing[entry]
        if not task.cancelled() and task.exception() is not None:
            log.error("event=packing_failed", exc_info=task.exception())
        self._progress.set()
        if not task.cancelled():
            self._pack_more()

    # Decoding.

    async def _unpack(self, arrival: Arrival) -> None:
        meta = arrival.entry.meta
        out = self._store.tier.view(arrival.extent)
        layout = self._store.layouts[meta.layout]
        progress = partial(arrival.reach, loop=self._loop)
        try:
            bitstream = self.tier.view(arrival.source.extent)
            await self._coder.decode(bitstream, meta, layout, out, progress)
        except KvdError as error:
            log.error("event=not_decoded chunk=%s reason=%r", short(meta.key), str(error))
            self._store.counters["decode_errors"] += 1
            self._store.lose(arrival)
        except BaseException:
            self._store.lose(arrival)
            raise
        else:
            self._store.counters["unpack_chunks"] += 1
            self._store.land(arrival)
        finally:
            arrival.notify()
            self._progress.set()

    def _read_ended(self, entry: Entry, task: asyncio.Task[None]) -> None:
        del self._reading[entry]
        extent = self._doomed.pop(entry, None)
        if extent is not None:
            self.tier.free(extent)
        if not task.cancelled() and task.exception() is not None:
            log.error("event=unpacking_failed", exc_info=task.exception())

    def _is_listed(self, entry: Entry) -> bool:
        return self._store.directory.get(entry.meta.key) is entry
