"""Hot set: the memory tier survives the daemon. `kvd start --cpu-persist`.

A keeper process holds the arena and a ledger of what lies where in it. A daemon that starts on the
same socket finds both, lists the chunks again, and verifies each when it is first used.

    extent allocated ─► writing: who   a writer of before keeps it until it has stopped or is gone
    chunk committed  ─► committed      free at the next start: nobody knows its checksum
      └─ hashed, soon ─► kept          listed at the next start
    extent free      ─► erased before

Readers of before need no care: when their copy has ended they look whether their session still
stands, and it does not.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from hashlib import blake2b

import numpy as np
import xxhash
from numpy.typing import NDArray

from kvd.arena import Arena
from kvd.chunk import Extent, Placement
from kvd.daemon.arrival import Arrival
from kvd.daemon.config import Config
from kvd.daemon.directory import Entry
from kvd.daemon.expiries import expiry_of
from kvd.daemon.keeper import Keeper, drop_kept, facts_here
from kvd.daemon.labels import LABEL_VERSION, decode_label
from kvd.daemon.leases import Writer
from kvd.daemon.ledger import Ledger
from kvd.daemon.ledger_format import LedgerContents, WritingSlot, num_slots_for
from kvd.daemon.processes import is_process_gone, process_start
from kvd.daemon.store import ChunkStore
from kvd.errors import ConfigError, Corrupt, Unavailable
from kvd.keys import short

log = logging.getLogger("kvd.hot")

# How often writers of before and the keeper are looked at.
WATCH_EVERY_S = 1.0


class KeptArena:
    """An arena and its ledger, new or found with what an earlier daemon left in it."""

    def __init__(
        self, keeper: Keeper, arena: Arena, ledger: Ledger, contents: LedgerContents | None
    ) -> None:
        self.keeper = keeper
        self.arena = arena
        self.ledger = ledger
        self.contents = contents

    def find_keeper(self, config: Config) -> None:
        """The keeper has ended: another one takes what it held. Raises as `Keeper.attach`."""
        self.keeper = _attach(config)
        facts = facts_here(self.arena.size, self.ledger.size)
        self.keeper.deposit(self.arena.fd, self.ledger.fd, facts)

    @classmethod
    def open(cls, config: Config, instance: str) -> KeptArena | None:
        """Find or make them; None where there can be no keeper: the daemon then goes without.

        Blocks for seconds at most. Raises `ConfigError` where no arena can be made.
        """
        try:
            keeper = _attach(config)
        except (Unavailable, ConfigError) as error:
            log.warning("event=no_keeper reason=%r", str(error))
            return None
        try:
            found = cls._adopt(keeper)
            if found is not None:
                return found
            if keeper.reason:
                log.info("event=nothing_kept reason=%r", keeper.reason)
            return cls._create(keeper, config, instance)
        except Unavailable as error:
            keeper.close()
            log.warning("event=no_keeper reason=%r", str(error))
            return None
        except BaseException:
            keeper.close()
            raise

    @classmethod
    def _adopt(cls, keeper: Keeper) -> KeptArena | None:
        kept = keeper.kept()
        if kept is None:
            return None
        try:
            ledger = Ledger.adopt(kept.ledger_fd, arena_size=kept.facts.arena_size)
        except Corrupt as error:
            os.close(kept.arena_fd)
            log.warning("event=kept_arena_dropped reason=%r", str(error))
            keeper.drop()
            return None
        try:
            arena = Arena.adopt(kept.arena_fd)
        except Corrupt as error:
            ledger.close()
            log.warning("event=kept_arena_dropped reason=%r", str(error))
            keeper.drop()
            return None
        contents = ledger.entries()
        if not contents.is_sound:
            log.warning("event=kept_arena_dropped reason='its ledger contradicts itself'")
            ledger.close()
            arena.close()
            keeper.drop()
            return None
        return cls(keeper, arena, ledger, contents)

    @classmethod
    def _create(cls, keeper: Keeper, config: Config, instance: str) -> KeptArena:
        arena = Arena.create(config.cpu_size, huge_pages=config.huge_pages)
        ledger = Ledger.create(
            num_slots_for(arena.size), arena_size=arena.size, instance=bytes.fromhex(instance)
        )
        keeper.deposit(arena.fd, ledger.fd, facts_here(arena.size, ledger.size))
        return cls(keeper, arena, ledger, None)


class HotSet:
    """Keeps the ledger in step with `store`; the `HotSet` that the store sees."""

    def __init__(self, config: Config, store: ChunkStore, kept: KeptArena) -> None:
        self.num_revived = 0
        self._config = config
        self._store = store
        self._kept = kept
        self._ledger = kept.ledger
        self._own = Writer(os.getpid(), process_start(os.getpid()), 0)
        self._strays: dict[Extent, WritingSlot] = {}
        self._unhashed: deque[Entry] = deque()
        self._wakeup = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        store.hot = self
        if kept.contents is not None:
            self._restore(kept.contents)

    def start(self) -> None:
        """Begin to hash and to watch."""
        for forever in (self._hash_forever(), self._watch_forever()):
            self._tasks.add(self._loop.create_task(forever))

    async def close(self) -> None:
        """Leave everything to the keeper."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._kept.keeper.close()

    # The role that the store sees.

    def write(self, extent: Extent, writer: Writer | None) -> bool:
        pid, start, token = writer or self._own
        return self._ledger.write(extent.offset, extent.size, pid, start, token)

    def keep(self, entry: Entry) -> None:
        assert entry.in_memory is not None
        if entry.in_memory.checksum is not None:
            self._keep(entry, entry.in_memory, entry.in_memory.checksum)
            return
        self._ledger.commit(entry.in_memory.extent.offset)
        self._unhashed.append(entry)
        self._wakeup.set()

    def erase(self, extent: Extent) -> None:
        self._ledger.erase(extent.offset)

    def stopped(self, tokens: Iterable[int]) -> None:
        if not self._strays:
            return
        gone = set(tokens)
        for extent, slot in list(self._strays.items()):
            if slot.token in gone:
                self._free(extent)

    def verify(self, arrival: Arrival) -> None:
        task = self._loop.create_task(self._verify(arrival))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def check(self, num_extents: int) -> None:
        assert self._ledger.num_entries == num_extents, "the ledger does not match the arena"

    def _restore(self, contents: LedgerContents) -> None:
        tier = self._store.tier
        places = [(slot.offset, slot.size) for slot in contents.kept]
        places += [(slot.offset, slot.size) for slot in contents.committed]
        places += [(slot.offset, slot.size) for slot in contents.writing]
        # In order each takes a moment; in any other, a search each.
        places.sort()
        extents = {offset: tier.allocate_at(offset, size) for offset, size in places}
        now_ns, wall_now_ns = time.monotonic_ns(), time.time_ns()
        for slot in contents.kept:
            extent = extents[slot.offset]
            assert extent is not None, "the ledger was sound"
            try:
                meta, tenant, stamp = decode_label(slot.label)
                self._store.tenants[meta.layout] = tenant
                # Also one that is over: what continues it goes with it.
                expiry = expiry_of(stamp, now_ns=now_ns, wall_now_ns=wall_now_ns)
                placement = Placement(extent, checksum=slot.checksum)
                is_listed = self._store.inherited.revive(meta, placement, now_ns, expiry)
            except Corrupt:
                is_listed = False
            if is_listed:
                self.num_revived += 1
            else:
                self._ledger.erase(slot.offset)
                tier.free(extent)
        for plain in contents.committed:
            extent = extents[plain.offset]
            assert extent is not None
            self._ledger.erase(plain.offset)
            tier.free(extent)
        for writing in contents.writing:
            extent = extents[writing.offset]
            assert extent is not None
            self._strays[extent] = writing
            self._store.inherited.hold_stray(extent)
        self._free_gone()

    def _keep(self, entry: Entry, placement: Placement, digest: int) -> None:
        label = self._store.label_of(entry)
        extent = placement.extent
        if not self._ledger.keep(extent.offset, extent.size, digest, label):
            # No room for the label: it counts as never hashed.
            self._ledger.commit(extent.offset)

    async def _hash_forever(self) -> None:
        while True:
            await self._wakeup.wait()
            self._wakeup.clear()
            while self._unhashed:
                await self._hash(self._unhashed.popleft())

    async def _hash(self, entry: Entry) -> None:
        placement = entry.in_memory
        if placement is None or placement.checksum is not None:
            return
        view = self._store.tier.view(placement.extent)
        digest = await asyncio.to_thread(_digest, view)
        # Whoever wrote these bytes in the meantime was not this chunk, if it has left.
        is_here = self._store.directory.get(entry.meta.key) is entry
        if is_here and entry.in_memory is placement:
            entry.in_memory = replace(placement, checksum=digest or None)
            self._keep(entry, placement, digest)

    async def _verify(self, arrival: Arrival) -> None:
        entry = arrival.entry
        placement = entry.in_memory
        if placement is not None:
            view = self._store.tier.view(placement.extent)
            is_good = await asyncio.to_thread(_digest, view) == (placement.checksum or 0)
            # Who wanted it may be gone, and then the chunk too: its place is another's by now.
            if self._store.arrival(entry) is arrival:
                if not is_good:
                    log.error("event=damaged_in_memory chunk=%s", short(entry.meta.key))
                self._store.inherited.verified(arrival, is_good=is_good)
                arrival.ready = placement.extent.size if is_good else 0
        arrival.notify()

    async def _watch_forever(self) -> None:
        while True:
            await asyncio.sleep(WATCH_EVERY_S)
            self._free_gone()
            if not self._kept.keeper.is_alive:
                await asyncio.to_thread(self._find_keeper)

    def _free_gone(self) -> None:
        for extent, slot in list(self._strays.items()):
            if is_process_gone(slot.pid, slot.start):
                self._free(extent)

    def _free(self, extent: Extent) -> None:
        del self._strays[extent]
        self._store.inherited.free_stray(extent)

    def _find_keeper(self) -> None:
        with suppress(Unavailable, ConfigError):
            self._kept.find_keeper(self._config)
            log.info("event=keeper_replaced pid=%d", self._kept.keeper.pid)


def _digest(view: NDArray[np.uint8]) -> int:
    """XXH3-64. The one-shot function keeps the GIL, and the event loop waiting."""
    running = xxhash.xxh3_64()
    running.update(view)
    return running.intdigest()


def _attach(config: Config) -> Keeper:
    keep_s = max(int(config.cpu_persist_s), 1)
    return Keeper.attach(config.socket, keep_s=keep_s, fingerprint=_fingerprint(config))


def forget_kept(config: Config) -> None:
    """A daemon without `cpu_persist` starts: what an earlier one left is in its way."""
    with suppress(Unavailable, ConfigError):
        if drop_kept(config.socket):
            log.info("event=kept_arena_dropped reason='started without cpu_persist'")


def _fingerprint(config: Config) -> bytes:
    """Of what the kept memory depends on."""
    facts = f"{config.cpu_size} {config.huge_pages} {LABEL_VERSION}"
    return blake2b(facts.encode(), digest_size=32).digest()
