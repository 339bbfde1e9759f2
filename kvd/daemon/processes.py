"""Processes: who is still there, and in which boot and namespaces that question has an answer.

A process id means something only together with the moment its process started, on one boot, in one
pid namespace. Whatever cannot be known is answered with "it may still be there".
"""

from __future__ import annotations

import os
from pathlib import Path
from uuid import UUID

import xxhash

from kvd.errors import Unavailable

# Fields of /proc/<pid>/stat, proc(5), counted from the third: the second may hold any byte.
_STATE, _NUM_THREADS, _START = 3 - 3, 20 - 3, 22 - 3


def process_start(pid: int) -> int:
    """When `pid` started, in clock ticks since the boot; 0 where it is not there or not visible."""
    fields = _stat_fields(pid)
    return int(fields[_START]) if fields else 0


def is_process_gone(pid: int, start: int) -> bool:
    """Whether the process that had `pid` and started at `start` can touch no memory any more.

    False where that cannot be known: for pid or start 0, or for one that /proc hides.
    """
    if pid <= 0 or start <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        # It lives, and is another user's.
        pass
    fields = _stat_fields(pid)
    if not fields:
        return False
    # A zombie has lost its memory, unless threads of it live on.
    is_zombie = fields[_STATE] in "ZX" and int(fields[_NUM_THREADS]) <= 1
    return int(fields[_START]) != start or is_zombie


def read_boot_id() -> bytes:
    """What this boot of the machine calls itself, 16 bytes. Raises `Unavailable`."""
    try:
        return UUID(Path("/proc/sys/kernel/random/boot_id").read_text().strip()).bytes
    except (OSError, ValueError) as error:
        raise Unavailable(f"this machine does not say which boot it is on: {error}") from error


def read_namespaces() -> int:
    """A number for what process ids and clock readings mean here. Raises `Unavailable`.

    XXH3-64 of the links /proc/self/ns/pid and /proc/self/ns/time, a blank between them. Two
    processes of one boot with the same number mean the same.
    """
    try:
        names = [str(Path("/proc/self/ns", name).readlink()) for name in ("pid", "time")]
    except OSError as error:
        raise Unavailable(f"this machine does not name its namespaces: {error}") from error
    return xxhash.xxh3_64_intdigest(" ".join(names).encode())


def _stat_fields(pid: int) -> list[str]:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return []
    return text.rpartition(")")[2].split()
