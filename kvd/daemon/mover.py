"""Mover: what goes between memory and disk, and when. The `Lower` of a store.

    commit ─► the coldest part of memory is written ahead ─► its memory can go at any moment
    pin    ─► an arrival is read (promoter.py)           ─► in memory, or lost
    log nearly full ─► a segment is given back, what was asked for is copied on

Writing ahead of the eviction is what makes eviction instant: a client that stores never waits for
the disk unless it says so. Where the disk cannot follow, the coldest chunks are dropped, counted.
A device that fails costs misses, never more: writes stop and are tried again after a while.

Runs on the event loop; bytes move on the tier's threads.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict, deque
from collections.abc import Coroutine, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvd.chunk import Placement
from kvd.daemon.arrival import Arrival
from kvd.daemon.coder import Coder
from kvd.daemon.directory import Entry
from kvd.daemon.index import ChunkIndex
from kvd.daemon.index_feed import IndexFeed
from kvd.daemon.labels import codec_text
from kvd.daemon.promoter import Promoter
from kvd.daemon.roles import PersistCount, ScrubCount
from kvd.daemon.shelf import Shelf
from kvd.daemon.store import ChunkStore
from kvd.daemon.upkeep import Upkeep
from kvd.errors import Corrupt, TierFailed
from kvd.keys import short
from kvd.tiers.nvme import NvmeTier
from kvd.tiers.segment import payload_size_max, record_size

log = logging.getLogger("kvd.nvme")

# The coldest part of memory that is kept written, so that it can be evicted without a wait.
WRITTEN_AHEAD_FRACTION = 0.25

# Chunks looked at in one search for what to write.
SEARCH_MAX = 4096

# Writes under way: more than the tier has threads, for some wait for their sync meanwhile.
WRITES_MAX = 16

# Of memory, at most about this much is being written at a time.
WRITING_FRACTION_MAX = 0.25

# After a failure of the device, writes rest; each further failure doubles the rest.
REST_S_MIN = 1.0
REST_S_MAX = 60.0

# A tenant at its quota is asked again after this long.
QUOTA_REST_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MoverOptions:
    """What an operator chooses. `quota` is in bytes a tenant, 0 for none; a chunk is written when
    it was asked for `admit_hits` times, its store being the first.
    """

    write: Literal["back", "through"] = "back"
    admit_hits: int = 1
    quota: int = 0
    scrub_rate: int = 0


class Payload(NamedTuple):
    """The bytes of a record, `uint8 [size]`, what they are, and their XXH3-64 where it is known
    already.
    """

    data: NDArray[np.uint8]
    codec: str
    is_exact: bool
    checksum: int | None


class Mover:
    """Moves chunks of `store` to and from `tier`, and keeps `index` in step."""

    def __init__(
        self,
        store: ChunkStore,
        tier: NvmeTier,
        index: ChunkIndex,
        coder: Coder,
        options: MoverOptions,
    ) -> None:
        self.tier = tier
        self.index = index
        self.failure = ""
        self.shelf = Shelf(tier.log.segment_size, quota=options.quota)
        self.demoted_bytes = 0
        self.feed = IndexFeed(store, tier.log, index)
        self.promoter = Promoter(
            store, tier, coder, tell_progress=self._tell_progress, spawn=self._spawn
        )
        self.upkeep = Upkeep(self, store, tier, scrub_rate=options.scrub_rate)
        self._store = store
        self._log = tier.log
        self._coder = coder
        self._options = options
        self._loop = asyncio.get_running_loop()
        # To be written at once, whatever admission says; and candidates of the last search.
        self._urgent: dict[Entry, None] = {}
        self._cold: deque[Entry] = deque()
        self._refusal = ""
        self._rest_s = 0.0
        self._rest_until = 0.0
        # Tenants whose quota is taken by chunks that are in memory as well: they wait a little.
        self._full_until: defaultdict[bytes, float] = defaultdict(float)
        self._wakeup = asyncio.Event()
        self._progress = asyncio.Event()
        self._writing: set[asyncio.Task[None]] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._started = self._loop.time()
        self._is_closing = False

    def start(self) -> None:
        """Begin to write and to watch."""
        forevers = (self._write_forever(), self.feed.commit_forever(), self.upkeep.watch_forever())
        for forever in forevers:
            self._spawn(forever)
        self.wake()

    async def close(self, *, flush_s: float) -> None:
        """Write what is owed for at most `flush_s`, then let everything go."""
        if flush_s > 0 and not self.failure:
            give_up = self._loop.time() + flush_s
            owed = [entry for entry in self._store.directory if self.is_owed(entry)]
            found = await self.persist(owed, flush_s)
            log.info(
                "event=flushed chunks=%d left=%d seconds=%.1f",
                found.num_durable,
                found.num_pending,
                flush_s - (give_up - self._loop.time()),
            )
        self._is_closing = True
        for task in list(self._tasks):
            task.cancel()
        moves = (*self._writing, *self.promoter.tasks)
        await asyncio.gather(*self._tasks, *moves, return_exceptions=True)
        if self.index.failure and flush_s > 0:
            # What it has missed would be on disk, and found by nobody.
            await self.feed.rebuild()
        await self.index.close()
        self.tier.close()

    def adopt(self, entry: Entry, tenant: bytes) -> None:
        """A restored chunk has its copy on disk."""
        self._store.tenants[entry.meta.layout] = tenant
        self.shelf.add(entry, tenant)

    def keep_quotas(self) -> None:
        """What came back at the start may be more than before the end, or the quota less."""
        for tenant in self.shelf.tenants():
            for entry in self.shelf.excess(tenant, 0, is_read=self._store.reads_disk) or ():
                self._store.counters["nvme_quota_chunks"] += 1
                self._store.unshelve(entry)

    # The role that the store sees.

    def is_owed(self, entry: Entry) -> bool:
        if entry.on_disk is not None or entry.in_memory is None or self._is_resting:
            return False
        if self._store.directory.expiries.is_spent(entry):
            return False
        if entry.size > payload_size_max(self._log.segment_size):
            return False
        if self._options.quota:
            tenant = self._store.tenant_of(entry.meta)
            if self._loop.time() < self._full_until[tenant]:
                return False
        return entry.uses >= self._options.admit_hits or self._store.memory.policy.expects_return(
            entry.meta.key, time.monotonic_ns()
        )

    def fetch(self, arrival: Arrival) -> None:
        self.promoter.fetch(arrival)

    def drop(self, entry: Entry) -> None:
        assert entry.on_disk is not None
        self.shelf.remove(entry, self._store.tenant_of(entry.meta))
        if not self.promoter.is_killing(entry):
            self._log.free(entry.on_disk.extent)
        self.feed.forget(entry)

    def wake(self, committed: Sequence[Entry] = ()) -> None:
        if self._options.write == "through":
            self._urgent.update((entry, None) for entry in committed if self.is_owed(entry))
        self._wakeup.set()

    def has_room(self, size: int) -> bool:
        memory = self._store.memory
        size = min(size, memory.tier.size)
        if size <= memory.tier.size - memory.tier.used or self._is_resting:
            return True
        # What goes first has to be written, wherever else there are chunks that are.
        return size <= memory.ready_size and not any(
            map(self.is_owed, memory.owed(size, SEARCH_MAX))
        )

    async def make_room(self, size: int, timeout_s: float) -> None:
        give_up = self._loop.time() + timeout_s
        while not self.has_room(size) and self._loop.time() < give_up:
            if not self._queue_coldest(size) and not self._writing:
                return
            await self._next_progress(give_up)

    async def persist(self, entries: Sequence[Entry], timeout_s: float) -> PersistCount:
        give_up = self._loop.time() + timeout_s
        num_pending = await self._write_now([e for e in entries if e.on_disk is None], give_up)
        self.feed.look()
        while True:
            # What is written while the index commits is not part of that commit.
            written = [(entry, entry.on_disk) for entry in entries if entry.on_disk is not None]
            try:
                async with asyncio.timeout_at(max(give_up, self._loop.time() + 0.01)):
                    await self.index.commit(is_final=not num_pending)
            except TimeoutError:
                return PersistCount(0, len(entries), "")
            except TierFailed as error:
                return PersistCount(0, 0, str(error))
            if self.index.failure:
                # It is being begun anew: what that will hold is not durable yet.
                return PersistCount(0, 0, f"the index keeps nothing: {self.index.failure}")
            num_moved = sum(entry.on_disk not in (None, placement) for entry, placement in written)
            if not num_moved or self._loop.time() >= give_up:
                break
        num_durable = sum(entry.on_disk is placement for entry, placement in written)
        num_pending += num_moved
        reason = ""
        if num_durable + num_pending < len(entries):
            reason = self._reason(entries)
        return PersistCount(num_durable, num_pending, reason)

    async def _write_now(self, wanted: Sequence[Entry], give_up: float) -> int:
        """Write chunks until all are on disk or cannot be; how many are still to come."""
        self._refusal = ""
        self._urgent.update((entry, None) for entry in wanted if self._can_be_written(entry))
        self.wake()
        while self._pending(wanted) and self._loop.time() < give_up and not self._is_resting:
            await self._next_progress(give_up)
        return 0 if self._is_resting else len(self._pending(wanted))

    def _reason(self, entries: Sequence[Entry]) -> str:
        """Why not all of `entries` are on disk."""
        longest = payload_size_max(self._log.segment_size)
        for entry in entries:
            if entry.in_memory is not None and entry.in_memory.extent.size > longest:
                size = entry.in_memory.extent.size
                return f"a chunk has {size} bytes, a segment of this tier holds {longest}"
        return self.failure or self._refusal or "chunks left before they were written"

    def facts(self) -> dict[str, Any]:
        elapsed_s = max(self._loop.time() - self._started, 1.0)
        demoted = self.demoted_bytes
        room = 0
        with suppress(TierFailed):
            room = self.upkeep.room
        return {
            "name": self._log.name,
            "size": self._log.size,
            "used": self._log.used,
            "largest_free": room,
            "num_extents": self._log.num_extents,
            "path": str(self._log.path),
            "failure": self.failure,
            "written": self._log.device_bytes,
            "write_amplification": self._log.device_bytes / demoted if demoted else 1.0,
            "written_a_day": self._log.device_bytes / elapsed_s * 86400,
            "disk_size": self._log.disk_size,
            "reserve": self._log.reserve,
            "is_direct": self._log.is_direct,
            "key_id": self._log.key_id if any(self._log.key_id) else b"",
        }

    def check(self, entries: Iterable[Entry]) -> None:
        self.shelf.check(entries)
        self._log.check()

    def scrub(self, rate: int) -> None:
        if not self.scrubbed.is_running:
            self.upkeep.scrubbed = ScrubCount(is_running=True)
            self._spawn(self.upkeep.scrub(rate or self._options.scrub_rate))

    @property
    def scrubbed(self) -> ScrubCount:
        return self.upkeep.scrubbed

    # Writing.

    async def _write_forever(self) -> None:
        while True:
            await self._wakeup.wait()
            self._wakeup.clear()
            if self._is_resting:
                continue
            while self._may_write:
                entry = self._next_owed()
                if entry is None:
                    break
                if self.upkeep.is_short:
                    self._urgent[entry] = None
                    self._spawn(self.upkeep.reclaim_ahead())
                    break
                self._store.transit.begin_demotion(entry)
                task = self._loop.create_task(self._demote(entry))
                self._writing.add(task)
                task.add_done_callback(self._write_ended)

    @property
    def _is_resting(self) -> bool:
        return self._loop.time() < self._rest_until

    @property
    def _may_write(self) -> bool:
        if self._rest_s:
            # One is enough to find out whether the device works again.
            return not self._writing
        # What is being written cannot be evicted: most of memory must stay of use.
        size_max = self._store.tier.size * WRITING_FRACTION_MAX
        return len(self._writing) < WRITES_MAX and self._store.transit.demoting_size < size_max

    def _next_owed(self) -> Entry | None:
        while self._urgent:
            entry = next(iter(self._urgent))
            del self._urgent[entry]
            if self._can_be_written(entry):
                return entry
        if not self._cold:
            # Of the smaller one: what is written ahead must not push itself out of the log.
            size = min(self._store.tier.size, self._log.size)
            self._queue_coldest(int(size * WRITTEN_AHEAD_FRACTION))
        while self._cold:
            entry = self._cold.popleft()
            if self._can_be_written(entry) and self.is_owed(entry):
                return entry
        return None

    def _queue_coldest(self, size: int) -> bool:
        """Look for what to write, so that `size` bytes can leave memory; whether there is any."""
        if not self._cold:
            self._cold.extend(
                entry
                for entry in self._store.memory.owed(size, SEARCH_MAX)
                if self.is_owed(entry) and not self._store.transit.is_demoting(entry)
            )
            if self._cold:
                self._wakeup.set()
        return bool(self._cold)

    def _can_be_written(self, entry: Entry) -> bool:
        return (
            entry.in_memory is not None
            and entry.on_disk is None
            and not self._store.transit.is_demoting(entry)
            and self._store.directory.get(entry.meta.key) is entry
            and not self._store.directory.expiries.is_spent(entry)
            and entry.size <= payload_size_max(self._log.segment_size)
        )

    def _write_ended(self, task: asyncio.Task[None]) -> None:
        self._writing.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("event=demotion_failed", exc_info=task.exception())
        self._wakeup.set()
        self._tell_progress()

    async def _demote(self, entry: Entry) -> None:
        copy: Placement | None = None
        is_damaged = False
        try:
            if self._keep_quota(entry):
                tenant = self._store.tenant_of(entry.meta)
                with self.shelf.expecting(tenant, record_size(entry.size)):
                    copy = await self._append(entry)
                self._succeeded()
        except TierFailed as error:
            self.failed(error)
        except Corrupt:
            is_damaged = True
        except Exception as error:
            # A bug, not the device: the same rest keeps it from being tried without end.
            log.exception("event=demotion_failed chunk=%s", short(entry.meta.key))
            self.failed(TierFailed(f"a chunk could not be written: {error!r}"))
        finally:
            self._end_demotion(entry, copy)
        if is_damaged:
            # Its bytes are not those that were committed, whoever changed them.
            log.error("event=damaged_in_memory chunk=%s", short(entry.meta.key))
            self._store.counters["damaged_chunks"] += 1
            self._store.discard(entry)

    def _keep_quota(self, entry: Entry) -> bool:
        """Drop what a tenant's new chunk has to push out; False if that is not enough."""
        tenant = self._store.tenant_of(entry.meta)
        victims = self.shelf.excess(tenant, record_size(entry.size), is_read=self._store.reads_disk)
        if victims is None:
            self._refusal = "the tenant's quota is full"
            self._full_until[tenant] = self._loop.time() + QUOTA_REST_S
            self._loop.call_later(QUOTA_REST_S, self._wakeup.set)
            return False
        for victim in victims:
            self._store.counters["nvme_quota_chunks"] += 1
            self._store.unshelve(victim)
        return True

    def _end_demotion(self, entry: Entry, copy: Placement | None) -> None:
        is_wanted = self._store.transit.end_demotion(entry, copy)
        if copy is None:
            return
        if not is_wanted:
            self._log.free(copy.extent)
            return
        self._store.counters["demote_chunks"] += 1
        self._store.counters["demote_bytes"] += copy.extent.size
        self.demoted_bytes += copy.extent.size
        self.shelf.add(entry, self._store.tenant_of(entry.meta))
        self.feed.remember(entry)

    async def _append(self, entry: Entry) -> Placement:
        """A durable copy of the entry."""
        label = self._store.label_of(entry)
        payload = await self._payload_of(entry)
        codec = codec_text(payload.codec, is_exact=payload.is_exact)
        is_refused = False
        while True:
            try:
                extent = await self.tier.append(
                    label, payload.data, codec=codec, payload_checksum=payload.checksum
                )
            except TierFailed as error:
                # The file system gives no more than the log has: it goes on in that, if it can.
                if is_refused or not self.upkeep.is_refused(error, entry.size):
                    raise
                is_refused = True
                if not await self.upkeep.give_back_one():
                    raise
                continue
            if extent is not None:
                if self.upkeep.is_due:
                    self._spawn(self.upkeep.reclaim_ahead())
                return Placement(extent, payload.codec, payload.is_exact, payload.checksum)
            if not await self.upkeep.reclaim(self.upkeep.room + 1):
                raise TierFailed(self.upkeep.fullness)

    async def _payload_of(self, entry: Entry) -> Payload:
        """What is written of a chunk: here alone its bytes become stored ones."""
        placement, meta = entry.in_memory, entry.meta
        assert placement is not None
        packed = entry.packed
        if packed is not None and self._coder.is_kept_as_packed(meta, placement, packed):
            assert self._store.memory.packed is not None
            bitstream = self._store.memory.packed.tier.view(packed.extent).copy()
            return Payload(bitstream, packed.codec, packed.is_exact, None)
        view = self._store.tier.view(placement.extent)
        if self._coder.encodes("nvme", meta, placement):
            layout = self._store.layouts.get(meta.layout)
            encoded = await self._coder.encode("nvme", meta, layout, view, placement)
            if encoded is not None:
                self._store.counters["encode_chunks"] += 1
                self._store.counters["encode_source_bytes"] += view.size
                self._store.counters["encode_bytes"] += encoded.data.size
                return Payload(encoded.data, encoded.codec, encoded.is_exact, None)
        return Payload(view, placement.codec, placement.is_exact, placement.checksum)

    # Failures.

    def failed(self, error: TierFailed) -> None:
        self._store.counters["nvme_write_errors"] += 1
        if not self.failure:
            log.error("event=nvme_failing reason=%r", str(error))
        self.failure = str(error)
        self._rest_s = min(max(2 * self._rest_s, REST_S_MIN), REST_S_MAX)
        self._rest_until = self._loop.time() + self._rest_s
        self._urgent.clear()
        self._loop.call_at(self._rest_until, self._wakeup.set)

    def _succeeded(self) -> None:
        if self._rest_s:
            log.info("event=nvme_works_again")
        self.failure = ""
        self._rest_s = 0.0

    # Small things.

    def _pending(self, wanted: Iterable[Entry]) -> list[Entry]:
        return [e for e in wanted if e in self._urgent or self._store.transit.is_demoting(e)]

    async def _next_progress(self, give_up: float) -> None:
        self._progress.clear()
        try:
            async with asyncio.timeout_at(give_up):
                await self._progress.wait()
        except TimeoutError:
            return

    def _tell_progress(self) -> None:
        self._progress.set()

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        if self._is_closing:
            work.close()
            return
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_ended)

    def _task_ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("event=task_failed", exc_info=task.exception())
