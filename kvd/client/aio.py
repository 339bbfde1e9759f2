"""The asynchronous face: each call runs on a thread, so that no copy and no daemon ever holds up an
event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from numpy.typing import ArrayLike

from kvd.client.client import Client, connect
from kvd.client.lease import Lease, Reservation
from kvd.keys import ChunkKey
from kvd.layout import KVLayout
from kvd.proto import kvd_pb2 as pb


async def connect_async(address: str | Path | None = None, **options: Any) -> AsyncClient:
    """`connect` for asyncio, with the same options."""
    return AsyncClient(await asyncio.to_thread(connect, address, **options))


class AsyncClient:
    """`Client` for asyncio: the same calls and errors. What a cancelled call is granted is given
    back when it comes.
    """

    def __init__(self, client: Client) -> None:
        self.client = client

    async def lookup(self, keys: Sequence[ChunkKey], **options: Any) -> int:
        """See `Client.lookup`."""
        return await asyncio.to_thread(self.client.lookup, keys, **options)

    async def lookup_tokens(self, layout: KVLayout, tokens: ArrayLike, **options: Any) -> int:
        """See `Client.lookup_tokens`."""
        return await asyncio.to_thread(self.client.lookup_tokens, layout, tokens, **options)

    async def pin(self, layout: KVLayout, keys: Sequence[ChunkKey], **options: Any) -> Lease:
        """See `Client.pin`."""
        return await asyncio.to_thread(self.client.pin, layout, keys, **options)

    async def reserve(
        self, layout: KVLayout, keys: Sequence[ChunkKey], **options: Any
    ) -> Reservation:
        """See `Client.reserve`."""
        return await asyncio.to_thread(self.client.reserve, layout, keys, **options)

    async def store(
        self, layout: KVLayout, keys: Sequence[ChunkKey], chunks: Sequence[Any], **options: Any
    ) -> list[str]:
        """See `Client.store`. A cancelled store may still end, whole."""
        return await asyncio.to_thread(self.client.store, layout, keys, chunks, **options)

    async def load(
        self, layout: KVLayout, keys: Sequence[ChunkKey], outs: Sequence[Any], **options: Any
    ) -> int:
        """See `Client.load`. After a cancelled load `outs` may still be written to for a moment."""
        return await asyncio.to_thread(self.client.load, layout, keys, outs, **options)

    async def persist(self, keys: Sequence[ChunkKey] | None = None, **options: Any) -> int:
        """See `Client.persist`. A cancelled persist may still end."""
        return await asyncio.to_thread(self.client.persist, keys, **options)

    async def status(self, **options: Any) -> pb.StatusReply:
        """See `Client.status`."""
        return await asyncio.to_thread(self.client.status, **options)

    async def close(self) -> None:
        """See `Client.close`."""
        await asyncio.to_thread(self.client.close)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
