"""Copies between a client's memory and the arena. Large ones are shared among a few threads.

One core does not fill a memory bus: two copy up to twice as fast, where cores are idle. The
caller's thread takes pieces as the helpers do, so it waits for nobody who has not begun.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Threads beside the caller's: more than a few gain nothing, and the engine wants its cores.
HELPERS_MAX = 3

# Below this a copy ends before a helper has woken up (50 us at 10 GB/s are half a megabyte).
SHARED_SIZE_MIN = 4 << 20

# Small enough that nobody waits long for another's last piece, large enough for its overhead.
PIECE_SIZE = 2 << 20

_pool: ThreadPoolExecutor | None = None


def copy(target: NDArray[Any], source: NDArray[Any]) -> None:
    """Copy `source` over `target`, of the same shape and dtype. No GIL is held meanwhile."""
    is_plain = target.flags.c_contiguous and source.flags.c_contiguous
    is_large = target.nbytes >= SHARED_SIZE_MIN
    num_helpers = _num_idle_cores() if is_plain and is_large else 0
    if not num_helpers:
        np.copyto(target, source)
        return
    flat_target = target.reshape(-1).view(np.uint8)
    flat_source = source.reshape(-1).view(np.uint8)
    # Several threads may draw from a range's iterator: each start goes to one of them.
    starts = iter(range(0, flat_target.size, PIECE_SIZE))
    pool = _helpers()
    futures = [
        pool.submit(_copy_pieces, flat_target, flat_source, starts) for _ in range(num_helpers)
    ]
    _copy_pieces(flat_target, flat_source, starts)
    for future in futures:
        if not future.cancel():
            future.result()


def _copy_pieces(
    target: NDArray[np.uint8], source: NDArray[np.uint8], starts: Iterator[int]
) -> None:
    for start in starts:
        np.copyto(target[start : start + PIECE_SIZE], source[start : start + PIECE_SIZE])


def _num_idle_cores() -> int:
    """How many cores have nothing to do now and are ours to use, at most `HELPERS_MAX`.

    A helper that shares its core keeps the caller waiting for its last piece: worse than none.
    """
    try:
        with open("/proc/loadavg", "rb") as file:  # noqa: PTH123  A third of what a Path costs.
            num_running = int(file.read().split()[3].split(b"/")[0])
    except (OSError, ValueError, IndexError):
        return 0
    num_idle = (os.cpu_count() or 1) - num_running
    return max(0, min(num_idle, len(os.sched_getaffinity(0)) - 1, HELPERS_MAX))


def _helpers() -> ThreadPoolExecutor:
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(HELPERS_MAX, thread_name_prefix="kvd-copy")
    return _pool


def _forget_after_fork() -> None:
    global _pool
    _pool = None


os.register_at_fork(after_in_child=_forget_after_fork)
