"""Stories on one `Node`: run in an event loop, and the node is killed after them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from kvd.chunk import ChunkMeta
from kvd.daemon.directory import Entry
from kvd.keys import ChunkKey
from tests.tier_harness import PATIENCE_S, SEGMENT_SIZE, IndexFile, Node, key_of
from tests.tier_harness import keys_of as keys_in


def on(node: Node, story: Callable[[Node], Awaitable[None]]) -> None:
    """Run a story on an open node, and kill the node after it."""

    async def run() -> None:
        await node.open()
        try:
            await story(node)
        finally:
            await node.crash(calls=0, applied=0, cut=None)

    asyncio.run(run())


def small_node(folder: Path, **options: Any) -> Node:
    return Node(folder, size=16 * SEGMENT_SIZE, index_file=IndexFile(), **options)


def entry_of(node: Node, chunk: list[int] | ChunkMeta) -> Entry:
    key = chunk.key if isinstance(chunk, ChunkMeta) else key_of(chunk)
    entry = node.store.directory.get(key)
    assert entry is not None
    return entry


def get(node: Node, key: ChunkKey) -> Entry | None:
    return node.store.directory.get(key)


async def becomes(condition: Callable[[], bool], what: str) -> None:
    give_up = asyncio.get_running_loop().time() + PATIENCE_S
    while not condition():
        assert asyncio.get_running_loop().time() < give_up, what
        await asyncio.sleep(0.002)


async def works(node: Node, first: int) -> None:
    """Chunks go to disk, leave memory and come back."""
    paths = [[first + number, 1, 2] for number in range(8)]
    for path in paths:
        node.put(path)
        await asyncio.sleep(0.002)
    give_up = asyncio.get_running_loop().time() + PATIENCE_S
    while True:
        # Memory may have had to drop some before they were written.
        entries = [e for path in paths for key in keys_in(path) if (e := get(node, key))]
        done = await node.persist(entries)
        if len(entries) > 6 and done.num_durable == len(entries):
            break
        assert asyncio.get_running_loop().time() < give_up, done
        await asyncio.sleep(0.01)
        for path in paths:
            node.put(path)
    for number in range(12):
        node.put([first + 10 + number, 1, 2])
        await asyncio.sleep(0.001)
    for path in paths:
        good, lost = await node.read(keys_in(path))
        assert not lost
        assert len(good) in range(4)
    await node.settle()
    node.audit()
    assert node.mover.failure == ""
