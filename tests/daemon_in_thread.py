"""A daemon inside the test: the real store, local socket and gRPC server, on a loop of their own.

Unlike a process it lets a test look into the store, and act between two requests.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Awaitable, Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import kvd
from kvd.arena import Arena
from kvd.daemon.admin import Facts
from kvd.daemon.config import Config
from kvd.daemon.eviction.lru import Lru
from kvd.daemon.local import LocalServer
from kvd.daemon.rpc import GrpcServer
from kvd.daemon.store import ChunkStore
from kvd.tiers.cpu import CpuTier

T = TypeVar("T")

# What a test waits for anything before it fails: generous, for machines under load.
PATIENCE_S = 30.0


class Loop:
    """An event loop on a thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    def run(self, work: Awaitable[T]) -> T:
        """What `work` comes to, on the loop."""

        async def whole() -> T:
            return await work

        return asyncio.run_coroutine_threadsafe(whole(), self._loop).result(PATIENCE_S)

    def call(self, function: Callable[..., T], *args: Any) -> T:
        """What a plain function returns on the loop, between two requests."""

        async def whole() -> T:
            return function(*args)

        return self.run(whole())

    def until(self, condition: Callable[[], bool]) -> None:
        """Return when `condition` holds between two requests."""
        give_up = time.monotonic() + PATIENCE_S
        while not self.call(condition):
            assert time.monotonic() < give_up, "it did not come to pass"


@cache
def shared_loop() -> Loop:
    """The loop of all tests: gRPC's asyncio wants one in a process."""
    return Loop()


class DaemonInThread:
    """A daemon on sockets below `folder`; `options` are those of `Config`."""

    def __init__(self, folder: Path, **options: Any) -> None:
        options = {"cpu_size": 64 << 20, "huge_pages": "never", "http": "none", **options}
        self.config = Config(socket=folder / "kvd.sock", **options)
        self.loop = shared_loop()
        self.port = 0
        self._is_running = False
        self.start()

    @property
    def local(self) -> Path:
        return self.config.socket

    @property
    def unix(self) -> str:
        return f"grpc+unix://{self.config.grpc_socket_path}"

    @property
    def tcp(self) -> str:
        return f"{'grpcs' if self.config.has_tls else 'grpc'}://127.0.0.1:{self.port}"

    def start(self) -> None:
        """A new run: another instance, an empty store, the same sockets."""
        self._arena = Arena.create(self.config.cpu_size, huge_pages="never")
        self.store = ChunkStore(CpuTier(self._arena), Lru())
        self.facts = Facts(pid=os.getpid(), state="serving")
        try:
            self.loop.run(self._listen())
        except BaseException:
            self._arena.close()
            raise
        self._is_running = True

    async def _listen(self) -> None:
        self._local = LocalServer(self.config.socket, self._arena, self.store, self.facts)
        try:
            self._grpc = await GrpcServer.start(self.config, self.store, self.facts)
        except BaseException:
            self._local.close()
            raise
        self.port = self._grpc.port

    async def _unlisten(self) -> None:
        await self._grpc.close()
        self._local.close()

    def stop(self) -> None:
        if self._is_running:
            self._is_running = False
            self.loop.run(self._unlisten())
            self._arena.close()

    def connect(self, address: str | Path = "", **options: Any) -> kvd.Client:
        return kvd.connect(address or self.unix, **{"timeout_s": PATIENCE_S, **options})

    def is_empty(self) -> bool:
        """Whether nothing is stored, reserved or pinned; asserts all invariants."""
        self.loop.call(self.store.check)
        return not (self.store.tier.num_extents or self.store.num_reserved or self.store.num_pinned)

    def until_sessions(self, count: int) -> None:
        """Return when `count` sessions are open."""
        self.loop.until(lambda: self.facts.num_sessions == count)
