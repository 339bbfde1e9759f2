"""Arena: one sealed memfd of shared memory, made by the daemon and mapped by every local client.

The seals fix its size, so that no side can shrink it under the other (SIGBUS). The daemon touches
every page before it says ready: a first touch costs a hundred times the copy, and whoever touches
first pays in its memory cgroup.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kvd.errors import ConfigError, Corrupt, Unavailable
from kvd.mapping import HUGE_PAGE_SIZE, Mapping

HugePages = Literal["auto", "never", "require"]

# Huge pages from the kernel's pool, huge pages made of ordinary ones, or (in part) ordinary ones.
Pages = Literal["huge", "transparent", "small"]

# Populated in steps, so that progress can be shown and a signal is answered.
POPULATE_STEP_SIZE = 256 << 20

# linux/mman.h since 5.14; Python has no name for them.
_MADV_POPULATE_WRITE = 23
_MADV_DONTFORK = 10
_MADV_COLLAPSE = 25

# linux/memfd.h since 6.3: memory that can never be run as a program.
_MFD_NOEXEC_SEAL = 8

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Arena:
    """`size` bytes of shared memory behind `fd`, mapped into this process.

    `bytes` is the whole of it as `uint8 [size]`. A view keeps the mapping alive after `close`,
    which only lets go of the descriptor: bytes never vanish under a reader.
    """

    def __init__(self, fd: int, size: int, *, is_huge: bool) -> None:
        self.fd = fd
        self.size = size
        self.pages: Pages = "huge" if is_huge else "small"
        self._map = Mapping(fd, size)
        # A forked child must not hold the arena: the daemon would take its parent's death for the
        # end of all writing.
        self._map.advise(_MADV_DONTFORK, 0, size)
        self.bytes: NDArray[np.uint8] = self._map.bytes
        self._populated = bytearray(-(-size // HUGE_PAGE_SIZE))

    @classmethod
    def create(cls, size: int, *, huge_pages: HugePages = "auto") -> Arena:
        """A new arena of `size` bytes, mode 0600, sealed; its pages are not there before
        `populate`.
        """
        size = -(-size // HUGE_PAGE_SIZE) * HUGE_PAGE_SIZE
        use_huge = huge_pages != "never" and huge_pages_free() * HUGE_PAGE_SIZE >= size
        if huge_pages == "require" and not use_huge:
            raise ConfigError(
                f"huge pages are required: {size // HUGE_PAGE_SIZE} of 2 MiB wanted, "
                f"{huge_pages_free()} free; reserve them with "
                f"`sysctl vm.nr_hugepages={size // HUGE_PAGE_SIZE}` or start with --huge-pages auto"
            )
        fd = make_sealed("kvd-arena", size, os.MFD_HUGETLB if use_huge else 0)
        try:
            return cls(fd, size, is_huge=use_huge)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def attach(cls, fd: int) -> Arena:
        """The arena that another process made; takes `fd` over. One that could shrink under us is
        refused.
        """
        try:
            if not is_sealed(fd):
                raise Unavailable("the daemon's arena is not sealed against shrinking")
            status = os.fstat(fd)
            return cls(fd, status.st_size, is_huge=status.st_blksize >= HUGE_PAGE_SIZE)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def adopt(cls, fd: int) -> Arena:
        """The arena that an earlier daemon made, for the daemon that follows it; takes `fd` over.

        Its bytes are kept, by `populate` too, while clients of the earlier daemon may still write
        some of them. Raises `Corrupt` for what is no arena of this daemon's user.
        """
        try:
            status = os.fstat(fd)
            if not is_sealed(fd):
                raise Corrupt("the arena that was kept is not sealed memory; start a new one")
            if not status.st_size or status.st_size % HUGE_PAGE_SIZE:
                raise Corrupt(
                    f"an arena is whole pages of {HUGE_PAGE_SIZE} bytes, {status.st_size} were kept"
                )
            if status.st_mode & 0o077:
                mode = f"{status.st_mode & 0o777:o}"
                raise Corrupt(f"mode 600 expected of the arena that was kept, found {mode}")
        except BaseException:
            os.close(fd)
            raise
        return cls.attach(fd)

    def view(self, offset: int, size: int) -> NDArray[np.uint8]:
        """`uint8 [size]` at `offset`, without a copy. Raises `Unavailable` beyond the end: the peer
        lied.
        """
        if offset < 0 or size < 0 or offset + size > self.size:
            raise Unavailable(f"extent {offset}+{size} is outside the arena of {self.size} bytes")
        return self.bytes[offset : offset + size]

    def populate(
        self, progress: Callable[[int], None] | None = None, *, huge_pages: HugePages = "auto"
    ) -> None:
        """Give every page its memory, in steps; `progress` hears the bytes done so far.

        Ordinary pages are made into huge ones unless `huge_pages` is "never" or the kernel refuses;
        `pages` says then what they are.
        """
        for start in range(0, self.size, POPULATE_STEP_SIZE):
            end = min(start + POPULATE_STEP_SIZE, self.size)
            if self.pages != "huge" and huge_pages != "never":
                self._collapse(start, end)
            self._touch(start, end)
            if progress:
                progress(end)

    def map_in(self, offset: int, size: int) -> None:
        """Fill this process's page table for the range, once: a bulk call is far cheaper than a
        fault a page.
        """
        first, last = offset // HUGE_PAGE_SIZE, -(-(offset + size) // HUGE_PAGE_SIZE)
        missing = self._populated.find(0, first, last)
        if missing < 0:
            return
        self._touch(missing * HUGE_PAGE_SIZE, min(last * HUGE_PAGE_SIZE, self.size))

    def _collapse(self, start: int, end: int) -> None:
        """Make huge pages of `start` to `end`; what cannot be stays as it is."""
        # The kernel wants a page to begin with: looking at a byte makes one.
        self.bytes[start:end:HUGE_PAGE_SIZE].max()
        try:
            self._map.advise(_MADV_COLLAPSE, start, end - start)
        except OSError:
            # Before Linux 6.1, or no 2 MiB of memory in one piece.
            self.pages = "small"
        else:
            self.pages = "transparent" if start == 0 or self.pages == "transparent" else "small"

    def _touch(self, start: int, end: int) -> None:
        try:
            self._map.advise(_MADV_POPULATE_WRITE, start, end - start)
        except OSError as error:
            if error.errno == errno.ENOMEM:
                raise ConfigError(
                    f"no memory left for the arena at {start} of {self.size} bytes"
                ) from error
            if error.errno != errno.EINVAL:
                raise
            # Before Linux 5.14: look at one byte a page, which makes it too. To write back what was
            # read would undo what another process writes in between.
            self.bytes[start : end : mmap.PAGESIZE].max()
        first, last = start // HUGE_PAGE_SIZE, -(-end // HUGE_PAGE_SIZE)
        self._populated[first:last] = b"\x01" * (last - first)

    def close(self) -> None:
        """Let go of the descriptor; views stay valid, and the memory goes with the last of them."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def is_sealed(fd: int) -> bool:
    """Whether `fd` is memory whose size nobody can change any more."""
    try:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS == _SEALS
    except OSError:
        # A file or a pipe has no seals at all.
        return False


def make_sealed(name: str, size: int, flags: int = 0) -> int:
    """A descriptor of `size` bytes of new memory, mode 0600, sealed; no page of it is there yet."""
    fd = _memfd(name, flags)
    try:
        os.ftruncate(fd, size)
        os.fchmod(fd, 0o600)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _memfd(name: str, flags: int) -> int:
    flags |= os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        return os.memfd_create(name, flags | _MFD_NOEXEC_SEAL)
    except OSError as error:
        # Before Linux 6.3 there is no such flag, and no setting that demands it.
        if error.errno != errno.EINVAL:
            raise
        return os.memfd_create(name, flags)


def huge_pages_free() -> int:
    """How many 2 MiB pages the kernel holds ready; 0 where it has none or does not say."""
    try:
        path = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
        return int(path.read_text())
    except (OSError, ValueError):
        return 0
