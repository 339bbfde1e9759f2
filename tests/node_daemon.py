"""A two-tier node of `tier_harness` behind real sockets: clients attach to it, and a test looks
into the store and moves chunks about between two requests.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import kvd
from kvd.daemon.admin import Facts
from kvd.daemon.directory import Entry
from kvd.daemon.local import LocalServer
from kvd.daemon.rpc import GrpcServer
from kvd.daemon.store import ChunkStore
from kvd.keys import ChunkKey
from tests.crash_client import pattern
from tests.daemon_in_thread import PATIENCE_S, shared_loop
from tests.tier_harness import LAYOUT, Node, S, keys_of, meta_of
from tests.tier_stories import becomes, entry_of, small_node


class NodeDaemon:
    """`options` are those of `Config`. A context manager: the node is killed at its end."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.loop = shared_loop()
        self.node = small_node(folder / "nvme", socket=folder / "kvd.sock", **options)
        self.facts = Facts(pid=os.getpid(), state="serving")
        self.loop.run(self._open())

    def __enter__(self) -> NodeDaemon:
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.run(self._close())

    @property
    def store(self) -> ChunkStore:
        return self.node.store

    def connect(self, **options: Any) -> kvd.Client:
        return kvd.connect(self.node.config.socket, **{"timeout_s": PATIENCE_S, **options})

    def connect_remote(self, **options: Any) -> kvd.Client:
        address = f"grpc+unix://{self.node.config.grpc_socket_path}"
        return kvd.connect(address, **{"timeout_s": PATIENCE_S, **options})

    def put_on_disk(self, path: list[int]) -> list[ChunkKey]:
        """Store a prompt, and push it out of memory when it is on disk."""
        self.loop.run(self._put_on_disk(path))
        return keys_of(path)

    def put_packed(self, path: list[int]) -> list[ChunkKey]:
        """Store a prompt, and push it out of mapped memory when it is packed."""
        self.loop.run(self._put_packed(path))
        return keys_of(path)

    def settle(self) -> None:
        self.loop.run(self.node.settle())

    def audit(self) -> None:
        self.loop.call(self.store.check)

    def entries(self, path: list[int]) -> list[Entry]:
        return [entry_of(self.node, path[:end]) for end in range(1, len(path) + 1)]

    @contextmanager
    def stalled_disk(self) -> Iterator[None]:
        """No read of the disk begins before the end of the block."""
        go_on = threading.Event()

        def stall(name: str) -> None:
            if name == "preadv":
                assert go_on.wait(PATIENCE_S)

        self.node.ops.fault = stall
        try:
            yield
        finally:
            self.node.ops.fault = lambda _: None
            go_on.set()

    def until_lent(self, count: int) -> None:
        """Return when so many bitstreams have a place."""
        self.loop.until(lambda: len(self.store.loans.open) == count)

    async def _put_on_disk(self, path: list[int]) -> None:
        self.node.put(path)
        await self.node.persist(self.entries(path))
        await self.node.settle()
        for entry in self.entries(path)[::-1]:
            assert entry.on_disk is not None
            self.store._evict(entry)

    async def _put_packed(self, path: list[int]) -> None:
        self.node.put(path)
        await becomes(lambda: all(e.packed for e in self.entries(path)), "it is never packed")
        for entry in self.entries(path)[::-1]:
            self.store._evict(entry)

    async def _open(self) -> None:
        await self.node.open()
        self._local = LocalServer(self.node.config.socket, self.node.arena, self.store, self.facts)
        self._grpc = await GrpcServer.start(self.node.config, self.store, self.facts)

    async def _close(self) -> None:
        await self._grpc.close()
        self._local.close()
        await self.node.close(flush_s=0)


def put_last(node: Node, path: list[int]) -> None:
    """Store the last chunk of a prompt alone: what comes before it stays as it is."""
    meta = meta_of(path)
    lease, _ = node.store.reserve([meta], lease_ns=S, now_ns=node.now_ns)
    assert lease is not None
    node.store.tier.view(lease.extents[0])[:] = stored(meta.key, meta.num_tokens)
    node.store.commit(lease.id, (), now_ns=node.now_ns)


def stored(key: ChunkKey, num_tokens: int) -> NDArray[np.uint8]:
    """The bytes of a chunk of `LAYOUT`, `uint8 [size]`."""
    return pattern(key, LAYOUT.size(num_tokens))
