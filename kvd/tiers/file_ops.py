"""File operations: the one door to the disk, so that a test can stand in it and fail any call.

Each method is one system call and raises what it raises; whoever calls decides what that means.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Vectors = Sequence[NDArray[np.uint8]]

# What a file system says that has no preallocation.
_NO_FALLOCATE = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


class FileOps:
    """The real ones."""

    def open(self, path: Path, flags: int) -> int:
        """A descriptor that no child process inherits; a new file is the owner's alone."""
        return os.open(path, flags | os.O_CLOEXEC, 0o600)

    def close(self, fd: int) -> None:
        os.close(fd)

    def pwritev(self, fd: int, vectors: Vectors, offset: int) -> int:
        """Bytes written, which may be fewer than given."""
        return os.pwritev(fd, vectors, offset)

    def preadv(self, fd: int, vectors: Vectors, offset: int) -> int:
        """Bytes read, fewer at the end of the file."""
        return os.preadv(fd, vectors, offset)

    def fdatasync(self, fd: int) -> None:
        os.fdatasync(fd)

    def fsync(self, fd: int) -> None:
        os.fsync(fd)

    def fallocate(self, fd: int, size: int) -> bool:
        """Give a file its blocks and its length; False where the file system cannot."""
        try:
            os.posix_fallocate(fd, 0, size)
        except OSError as error:
            if error.errno in _NO_FALLOCATE:
                return False
            raise
        return True

    def ftruncate(self, fd: int, size: int) -> None:
        os.ftruncate(fd, size)

    def unlink(self, path: Path) -> None:
        path.unlink()

    def rename(self, source: Path, target: Path) -> None:
        source.replace(target)

    def sync_directory(self, path: Path) -> None:
        """Make names that were created, renamed or removed in `path` durable."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def free_size(self, path: Path) -> int:
        """Bytes that an ordinary user could still write on the file system of `path`."""
        status = os.statvfs(path)
        return status.f_bavail * status.f_frsize


FILE_OPS = FileOps()
