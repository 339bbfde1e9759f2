"""Segment files: one a slot, opened when used, a bounded number at a time.

A descriptor with bytes that are not synced yet stays open: the kernel tells a write error to the
descriptors that were open when it happened, and a newly opened one would hear of nothing.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_ISREG

from kvd.tiers.file_ops import FileOps

# Far below the 1024 of a usual `ulimit -n`, and enough for all segments that are read at a time.
FDS_MAX = 128

_NEW = ".new"


class SegmentFiles:
    """`segment-00000000` and so on in `folder`, each `segment_size` bytes. Thread-safe."""

    def __init__(self, folder: Path, segment_size: int, *, is_direct: bool, ops: FileOps) -> None:
        self._folder = folder
        self._segment_size = segment_size
        self._flags = os.O_RDWR | (os.O_DIRECT if is_direct else 0)
        self._ops = ops
        self._lock = threading.Lock()
        # Open descriptors by slot, the one used longest ago first, and who uses them now.
        self._fds: dict[int, int] = {}
        self._users: dict[int, int] = {}

    def path(self, slot: int) -> Path:
        return segment_path(self._folder, slot)

    @contextmanager
    def use(self, slot: int) -> Iterator[int]:
        """The slot's descriptor, open until the end of the block. Raises `OSError`."""
        fd = self.pin(slot)
        try:
            yield fd
        finally:
            self.unpin(slot)

    def pin(self, slot: int) -> int:
        """The slot's descriptor, open until as many `unpin`. Raises `OSError`."""
        with self._lock:
            fd = self._fds.pop(slot, -1)
            if fd < 0:
                self._close_idle(FDS_MAX - 1)
                fd = self._ops.open(self.path(slot), self._flags)
            self._fds[slot] = fd
            self._users[slot] = self._users.get(slot, 0) + 1
            return fd

    def unpin(self, slot: int) -> None:
        """End one `pin`."""
        with self._lock:
            self._users[slot] -= 1
            if not self._users[slot]:
                del self._users[slot]

    def create(self, slot: int) -> None:
        """A new file with all its blocks, durable in its folder. Raises `OSError`; then there is
        none.
        """
        fresh = self.path(slot).with_suffix(_NEW)
        try:
            fd = self._ops.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            try:
                if not self._ops.fallocate(fd, self._segment_size):
                    self._ops.ftruncate(fd, self._segment_size)
                self._ops.fsync(fd)
            finally:
                self._ops.close(fd)
            self._ops.rename(fresh, self.path(slot))
            self._ops.sync_directory(self._folder)
        except OSError:
            for path in (fresh, self.path(slot)):
                with suppress(OSError):
                    self._ops.unlink(path)
            raise

    def remove(self, slot: int) -> bool:
        """Delete a slot's file; False while somebody uses it. Raises `OSError`."""
        with self._lock:
            if slot in self._users:
                return False
            fd = self._fds.pop(slot, -1)
            if fd >= 0:
                self._ops.close(fd)
        with suppress(FileNotFoundError):
            self._ops.unlink(self.path(slot))
        return True

    def close(self) -> None:
        """Close every descriptor."""
        with self._lock:
            for fd in self._fds.values():
                self._ops.close(fd)
            self._fds.clear()
            self._users.clear()

    def _close_idle(self, count: int) -> None:
        for slot in list(self._fds):
            if len(self._fds) <= count:
                return
            if slot not in self._users:
                self._ops.close(self._fds.pop(slot))


def segment_path(folder: Path, slot: int) -> Path:
    """The file of a slot."""
    return folder / f"segment-{slot:08d}"


def find_segments(folder: Path) -> dict[int, int]:
    """Bytes of each segment file in `folder`, by slot. A link is none: nothing outside is ours."""
    found = {slot: segment_path(folder, slot).lstat() for slot in segment_slots(folder)}
    return {slot: status.st_size for slot, status in found.items() if S_ISREG(status.st_mode)}


def segment_slots(folder: Path) -> list[int]:
    """Slots that have a name in `folder`, whatever it is the name of."""
    names = [path.name.removeprefix("segment-") for path in folder.glob("segment-????????")]
    return sorted(int(name) for name in names if name.isascii() and name.isdecimal())


def drop_unfinished(folder: Path, ops: FileOps) -> None:
    """Delete what a creation left behind that did not end."""
    for path in folder.glob(f"*{_NEW}"):
        ops.unlink(path)
