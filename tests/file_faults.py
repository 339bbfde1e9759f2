"""File operations that fail on command, and a disk that forgets what was not synced."""

from __future__ import annotations

import os
import random
import shutil
import threading
from collections import Counter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kvd.tiers.file_ops import FileOps, Vectors

BLOCK = 4096


class FaultyOps(FileOps):
    """`fail` arms one operation; `hold_syncs` makes each fdatasync wait."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.short_size: int | None = None
        self._armed: dict[str, list[int]] = {}
        self._gate: threading.Semaphore | None = None
        self.at_gate = threading.Semaphore(0)

    def fail(self, name: str, code: int, *, times: int = 1, after: int = 0) -> None:
        """The next `times` calls of `name`, after `after` good ones, raise errno `code`."""
        self._armed[name] = [code, times, after]

    def heal(self) -> None:
        self._armed.clear()
        self.short_size = None

    def hold_syncs(self) -> threading.Semaphore:
        """Each fdatasync waits for a `release` of what this returns; `at_gate` tells that it is
        there.
        """
        self._gate = threading.Semaphore(0)
        return self._gate

    def open(self, path: Path, flags: int) -> int:
        self._step("open")
        return super().open(path, flags)

    def pwritev(self, fd: int, vectors: Vectors, offset: int) -> int:
        self._step("pwritev")
        if self.short_size is not None:
            size, self.short_size = self.short_size, None
            whole = np.concatenate(vectors)[:size]
            return os.pwrite(fd, whole.tobytes(), offset) if size else 0
        return super().pwritev(fd, vectors, offset)

    def preadv(self, fd: int, vectors: Vectors, offset: int) -> int:
        self._step("preadv")
        return super().preadv(fd, vectors, offset)

    def fdatasync(self, fd: int) -> None:
        if self._gate is not None:
            self.at_gate.release()
            self._gate.acquire()
        self._step("fdatasync")
        super().fdatasync(fd)

    def fsync(self, fd: int) -> None:
        self._step("fsync")
        super().fsync(fd)

    def fallocate(self, fd: int, size: int) -> bool:
        self._step("fallocate")
        return super().fallocate(fd, size)

    def ftruncate(self, fd: int, size: int) -> None:
        self._step("ftruncate")
        super().ftruncate(fd, size)

    def unlink(self, path: Path) -> None:
        self._step("unlink")
        super().unlink(path)

    def rename(self, source: Path, target: Path) -> None:
        self._step("rename")
        super().rename(source, target)

    def sync_directory(self, path: Path) -> None:
        self._step("sync_directory")
        super().sync_directory(path)

    def free_size(self, path: Path) -> int:
        self._step("free_size")
        return super().free_size(path)

    def _step(self, name: str) -> None:
        self.calls[name] += 1
        armed = self._armed.get(name)
        if armed is None:
            return
        if armed[2]:
            armed[2] -= 1
            return
        armed[1] -= 1
        if not armed[1]:
            del self._armed[name]
        raise OSError(armed[0], os.strerror(armed[0]))


class ForgetfulOps(FileOps):
    """Remembers what stood in each block before it was written, until its file is synced."""

    def __init__(self) -> None:
        self._paths: dict[int, Path] = {}
        self._before: dict[tuple[Path, int], list[bytes]] = {}

    def open(self, path: Path, flags: int) -> int:
        fd = super().open(path, flags)
        self._paths[fd] = path
        return fd

    def pwritev(self, fd: int, vectors: Vectors, offset: int) -> int:
        size = sum(vector.size for vector in vectors)
        for at in range(offset, offset + size, BLOCK):
            before = os.pread(fd, BLOCK, at).ljust(BLOCK, b"\0")
            self._before.setdefault((self._paths[fd], at), []).append(before)
        return super().pwritev(fd, vectors, offset)

    def fdatasync(self, fd: int) -> None:
        super().fdatasync(fd)
        self._settle(self._paths[fd])

    def fsync(self, fd: int) -> None:
        super().fsync(fd)
        self._settle(self._paths[fd])

    def unlink(self, path: Path) -> None:
        super().unlink(path)
        self._settle(path)

    def power_cut(self, folder: Path, target: Path, chance: random.Random) -> None:
        """Copy the folder as a disk might hold it now: of each block that was not synced, any of
        the states since the last sync, each block for itself.
        """
        shutil.copytree(folder, target)
        mode = chance.choice(["all", "none", "some", "some"])
        for (path, at), states in self._before.items():
            kept = {"all": len(states), "none": 0, "some": chance.randint(0, len(states))}[mode]
            copy = target / path.name
            if kept < len(states) and copy.exists():
                with copy.open("r+b") as file:
                    file.seek(at)
                    file.write(states[kept])

    def _settle(self, path: Path) -> None:
        for key in [key for key in self._before if key[0] == path]:
            del self._before[key]


def flip(path: Path, offset: int, mask: int = 0x10) -> None:
    """Change bits of one byte of a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ mask]))


def pattern(seed: int, size: int) -> NDArray[np.uint8]:
    """`uint8 [size]` that no other seed and no shift of this one gives."""
    return np.random.Generator(np.random.PCG64(seed)).integers(0, 256, size, dtype=np.uint8)
