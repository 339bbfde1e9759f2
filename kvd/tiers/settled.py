"""Settled: a thread's work, awaited until it has let go of the caller's memory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")


async def settled(story: asyncio.Future[_T], undo: Callable[[_T], None] | None = None) -> _T:
    """What the work of a thread brings; `undo` is given it if nobody waits for it any more.

    A thread cannot be stopped in the middle of a transfer: whoever cancels waits for its end, for
    only then is the memory the caller's again.
    """
    try:
        return await asyncio.shield(story)
    except asyncio.CancelledError:
        while not story.done():
            try:
                await asyncio.wait([story])
            except asyncio.CancelledError:
                continue
        if undo is not None and not story.cancelled() and story.exception() is None:
            undo(story.result())
        raise
