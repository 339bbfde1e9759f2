"""The daemon's life: arena, populate, listen, serve, drain. Puts the parts together and holds no
logic of its own.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

import uvloop

from kvd.arena import Arena
from kvd.daemon import logs
from kvd.daemon.admin import Facts
from kvd.daemon.coder import Coder, open_coder
from kvd.daemon.config import Config
from kvd.daemon.eviction.registry import make_policy
from kvd.daemon.keeper import keeper_path
from kvd.daemon.local import LocalServer
from kvd.daemon.metrics import serve_http
from kvd.daemon.store import ChunkStore
from kvd.tiers.cpu import CpuTier

if TYPE_CHECKING:
    from kvd.daemon.hot_set import HotSet, KeptArena
    from kvd.daemon.mover import Mover
    from kvd.daemon.packed import PackedMemory

log = logging.getLogger("kvd.server")

EXPIRE_EVERY_S = 1.0
DRAIN_LOOK_EVERY_S = 0.05
SCAN_TELL_EVERY_S = 1.0

# How long a thread may keep the interpreter while another wants it: a thread that comes back from
# the disk must not wait the usual 5 ms, in which 10 MB could have come.
SWITCH_INTERVAL_S = 0.0005


def run(config: Config) -> int:
    """Serve until SIGTERM or SIGINT; the exit code. Raises `ConfigError` where it cannot start."""
    logs.configure(config.log_level, config.log_file)
    # A directory of a million chunks is a million live objects that no cycle collection can free:
    # the default thresholds would walk them again and again, a tenth of a second each time.
    gc.set_threshold(2_000, 10, 1_000_000)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(Daemon(config).serve())


class _StoppedEarlyError(Exception):
    """Told to stop while the arena was being populated."""


class Daemon:
    """One daemon, from its start to its end."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.facts = Facts(pid=os.getpid())
        self.store: ChunkStore | None = None
        self._stop = asyncio.Event()
        self._scan_told = 0.0

    async def serve(self) -> int:
        """Start, serve until told to stop, drain."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        async with AsyncExitStack() as stack:
            if self.config.http != "none":
                http = serve_http(self.config.http, lambda: self.store, self.facts)
                stack.callback(http.close)
                log.info("event=http_listening port=%d", http.port)
            coder = open_coder(self.config)
            stack.callback(coder.close)
            await coder.warm_up()
            try:
                store, hot = await self._open_store()
                mover = await self._open_disk(store, coder)
            except _StoppedEarlyError:
                return 0
            packed = self._open_packed(store, coder)
            if packed is not None:
                stack.push_async_callback(packed.close)
            if hot is not None:
                stack.push_async_callback(hot.close)
                hot.start()
            if mover is not None:
                stack.push_async_callback(mover.close, flush_s=self.config.nvme_flush_s)
                mover.start()
            local = LocalServer(
                self.config.socket,
                store.tier.arena,
                store,
                self.facts,
                group=self.config.socket_group,
            )
            stack.callback(local.close)
            await stack.enter_async_context(self._grpc(store))
            await stack.enter_async_context(self._expire(store))
            # What an earlier daemon left may be over by now.
            while store.expire_chunks(time.monotonic_ns()):
                await asyncio.sleep(0)
            self.store = store
            self.facts.state = "serving"
            log.info(
                "event=ready socket=%s size=%d pid=%d",
                self.config.socket,
                store.tier.size,
                os.getpid(),
            )
            await self._stop.wait()
            await self._drain(store)
        log.info("event=stopped")
        return 0

    async def _open_store(self) -> tuple[ChunkStore, HotSet | None]:
        kept = await self._open_kept()
        arena = (
            kept.arena
            if kept is not None
            else Arena.create(self.config.arena_size, huge_pages=self.config.huge_pages)
        )
        started = time.monotonic()
        await asyncio.to_thread(self._populate, arena)
        self.facts.pages = arena.pages
        log.info("event=populated size=%d seconds=%.1f", arena.size, time.monotonic() - started)
        store = ChunkStore(CpuTier(arena), make_policy(self.config.eviction))
        if kept is None:
            return store, None
        from kvd.daemon.hot_set import HotSet

        hot = HotSet(self.config, store, kept)
        log.info("event=revived chunks=%d size=%d", hot.num_revived, store.tier.used)
        return store, hot

    async def _open_kept(self) -> KeptArena | None:
        # Imported here: a keeper is for those who ask for one, or had one.
        if not self.config.cpu_persist:
            if keeper_path(self.config.socket).exists():
                from kvd.daemon.hot_set import forget_kept

                await asyncio.to_thread(forget_kept, self.config)
            return None
        from kvd.daemon.hot_set import KeptArena

        return await asyncio.to_thread(KeptArena.open, self.config, self.facts.instance)

    async def _open_disk(self, store: ChunkStore, coder: Coder) -> Mover | None:
        if "nvme" not in self.config.tiers:
            return None
        # LMDB and the segment log are only for those who have a disk tier.
        from kvd.daemon.reopen import reopen

        return await reopen(self.config, store, coder, self._scanned)

    def _open_packed(self, store: ChunkStore, coder: Coder) -> PackedMemory | None:
        if not self.config.packed_size:
            return None
        from kvd.daemon.packed import NAME, PackedMemory

        # Pages come as bitstreams do: nobody waits for them.
        arena = Arena.create(self.config.packed_size, huge_pages="never")
        tier = CpuTier(arena, name=NAME)
        policy = make_policy(self.config.eviction)
        store.packed = packed = PackedMemory(store, tier, policy, coder)
        store.is_prefetching = True
        return packed

    def _scanned(self, done: int, size: int) -> None:
        """A segment's headers have been read, of an index that is being rebuilt."""
        now = time.monotonic()
        if now > self._scan_told + SCAN_TELL_EVERY_S or done == size:
            self._scan_told = now
            log.info("event=scanning done=%d size=%d", done, size)
        if self._stop.is_set():
            raise _StoppedEarlyError

    def _populate(self, arena: Arena) -> None:
        if not sys.stderr.isatty():
            arena.populate(self._populated, huge_pages=self.config.huge_pages)
            return
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

        columns = (TextColumn("populating the arena"), BarColumn(), DownloadColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("populate", total=arena.size)

            def show(done: int) -> None:
                self._populated(done)
                progress.update(task, completed=done)

            arena.populate(show, huge_pages=self.config.huge_pages)

    def _populated(self, done: int) -> None:
        log.debug("event=populating done=%d size=%d", done, self.config.cpu_size)
        if self._stop.is_set():
            raise _StoppedEarlyError

    @asynccontextmanager
    async def _grpc(self, store: ChunkStore) -> AsyncIterator[None]:
        if self.config.grpc_socket == "none" and not self.config.listen:
            yield
            return
        # gRPC costs a fifth of a second to import: only those who use it pay.
        from kvd.daemon.rpc import GrpcServer

        server = await GrpcServer.start(self.config, store, self.facts)
        try:
            yield
        finally:
            await server.close()

    @asynccontextmanager
    async def _expire(self, store: ChunkStore) -> AsyncIterator[None]:
        async def forever() -> None:
            while True:
                await asyncio.sleep(EXPIRE_EVERY_S)
                now_ns = time.monotonic_ns()
                store.expire(now_ns)
                while store.expire_chunks(now_ns):
                    await asyncio.sleep(0)

        task = asyncio.create_task(forever())
        try:
            yield
        finally:
            task.cancel()

    async def _drain(self, store: ChunkStore) -> None:
        """Give out no new leases, and let those that are open end, for as long as the config
        allows.
        """
        self.facts.state = "draining"
        log.info("event=draining pinned=%d reserved=%d", store.num_pinned, store.num_reserved)
        give_up = time.monotonic() + self.config.drain_s
        while (store.num_pinned or store.num_reserved) and time.monotonic() < give_up:
            await asyncio.sleep(DRAIN_LOOK_EVERY_S)
        log.info("event=drained pinned=%d reserved=%d", store.num_pinned, store.num_reserved)
