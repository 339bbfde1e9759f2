"""Mapping: shared memory of a descriptor at an address that huge pages can have.

Python's own mmap starts at any page. A mapping that starts at a multiple of 2 MiB can be held in
huge pages, which the kernel makes of ordinary ones when asked (MADV_COLLAPSE, Linux 6.1), whatever
the machine's settings say: a copy then spends no time on translating addresses (6 to 8 % of a load
where this was measured), and mapping the arena into another process costs next to nothing.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref

import numpy as np
from numpy.typing import NDArray

HUGE_PAGE_SIZE = 2 << 20

_MAP_NORESERVE = 0x4000
_MAP_FIXED = 0x10
_MAP_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class Mapping:
    """`size` bytes of `fd`, shared, readable and writable, at a multiple of 2 MiB.

    `bytes` is the whole of it as `uint8 [size]`. It stays mapped as long as an array of it lives.
    """

    def __init__(self, fd: int, size: int) -> None:
        # Reserve addresses with room to choose a start in, then put the file over a part of them.
        no_memory = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        start = _map(None, size + HUGE_PAGE_SIZE, 0, no_memory, -1)
        end = start + size + HUGE_PAGE_SIZE
        address = -(-start // HUGE_PAGE_SIZE) * HUGE_PAGE_SIZE
        try:
            access = mmap.PROT_READ | mmap.PROT_WRITE
            _map(address, size, access, mmap.MAP_SHARED | _MAP_FIXED, fd)
        except OSError:
            _libc.munmap(start, end - start)
            raise
        for low, high in ((start, address), (address + size, end)):
            if high > low:
                _libc.munmap(low, high - low)
        self._address = address
        owner = (ctypes.c_uint8 * size).from_address(address)
        # At exit the process goes, and nobody's view before it.
        weakref.finalize(owner, _libc.munmap, address, size).atexit = False
        self.bytes: NDArray[np.uint8] = np.frombuffer(owner, dtype=np.uint8)

    def advise(self, advice: int, start: int, size: int) -> None:
        """madvise(2) for `size` bytes at `start`. Raises `OSError`."""
        assert 0 <= start <= start + size <= self.bytes.size
        if _libc.madvise(self._address + start, size, advice):
            raise _last_error()


def _map(address: int | None, size: int, access: int, flags: int, fd: int) -> int:
    found = _libc.mmap(address, size, access, flags, fd, 0)
    if found == _MAP_FAILED or found is None:
        raise _last_error()
    return int(found)


def _last_error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))
