"""Room in mapped memory, as what lies below can make it without losing a chunk that is wanted."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from kvd.daemon.roles import Lower, Packed


def has_room(below: Sequence[Lower | Packed], size: int) -> bool:
    """Whether `size` bytes can be had at once, or waiting would be of no use."""
    return all(each.has_room(size) for each in below)


async def make_room(below: Sequence[Lower | Packed], size: int, timeout_s: float) -> None:
    """Wait until `has_room`, or as long as `timeout_s`."""
    loop = asyncio.get_running_loop()
    give_up = loop.time() + timeout_s
    for each in below:
        await each.make_room(size, max(give_up - loop.time(), 0.0))
