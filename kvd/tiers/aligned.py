"""Aligned memory and whole transfers: what O_DIRECT asks of an address, a length and an offset.

Blocks of 4 KiB throughout, the largest logical block that disks have. Payloads in an arena begin at
such an address, so that only a header and a payload's last, partial block pass through scratch.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading

import numpy as np
from numpy.typing import NDArray

from kvd.tiers.file_ops import FileOps, Vectors
from kvd.tiers.segment import BLOCK_SIZE, Buffer, padded

# What a thread keeps for the payload it works on. Most are smaller; fresh memory for each would
# cost a page fault a block, as much as the work itself.
SCRATCH_SIZE_MAX = 16 << 20

_scratch = threading.local()


def aligned_bytes(size: int) -> NDArray[np.uint8]:
    """`uint8 [size]` of zeros at a page's start, in whole pages."""
    return np.frombuffer(mmap.mmap(-1, padded(size)), dtype=np.uint8)[:size]


def scratch_bytes(size: int) -> NDArray[np.uint8]:
    """`uint8 [size]` at a page's start, the calling thread's until it asks again; not cleared."""
    if size > SCRATCH_SIZE_MAX:
        return aligned_bytes(size)
    if not hasattr(_scratch, "payload") or _scratch.payload.size < size:
        _scratch.payload = aligned_bytes(min(2 * padded(size), SCRATCH_SIZE_MAX))
    payload: NDArray[np.uint8] = _scratch.payload
    return payload[:size]


class Frame:
    """A header block and a payload as one run of aligned vectors.

    `vectors` lie in the payload's own memory but for the last partial block, or in a copy of it
    where its memory is not aligned. The scratch is the thread's: one frame at a time.
    """

    def __init__(self, payload: NDArray[np.uint8], *, has_header: bool = True) -> None:
        assert payload.ndim == 1
        assert payload.flags.c_contiguous
        if not hasattr(_scratch, "blocks"):
            _scratch.blocks = aligned_bytes(2 * BLOCK_SIZE)
        blocks: NDArray[np.uint8] = _scratch.blocks
        self.header = blocks[:BLOCK_SIZE]
        self._payload = payload
        self._whole = payload.size // BLOCK_SIZE * BLOCK_SIZE
        is_aligned = not self._whole or payload.ctypes.data % BLOCK_SIZE == 0
        self._body = payload[: self._whole] if is_aligned else aligned_bytes(self._whole)
        self._is_copy = not is_aligned
        self._tail = blocks[BLOCK_SIZE:] if payload.size > self._whole else blocks[:0]
        vectors = [self.header if has_header else blocks[:0], self._body, self._tail]
        self.vectors = [vector for vector in vectors if vector.size]

    def load(self, header: bytes) -> None:
        """Before a write: the header, and what of the payload does not go from its own place."""
        self.header[:] = np.frombuffer(header, dtype=np.uint8)
        if self._is_copy:
            self._body[:] = self._payload[: self._whole]
        rest = self._payload.size - self._whole
        if rest:
            self._tail[:rest] = self._payload[self._whole :]
            self._tail[rest:] = 0

    def unload(self) -> None:
        """After a read: the payload's memory holds what was read."""
        if self._is_copy:
            self._payload[: self._whole] = self._body
        rest = self._payload.size - self._whole
        if rest:
            self._payload[self._whole :] = self._tail[:rest]


def write_all(ops: FileOps, fd: int, vectors: Vectors, offset: int) -> None:
    """Write every byte, going on after a short write. Raises `OSError`; EIO where nothing moves."""
    rest = [vector for vector in vectors if vector.size]
    while rest:
        moved = ops.pwritev(fd, rest, offset)
        # A short write may end within a block; the next has to start with one.
        moved -= moved % BLOCK_SIZE
        if moved <= 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rest = _behind(rest, moved)
        offset += moved


def read_all(ops: FileOps, fd: int, vectors: Vectors, offset: int) -> bool:
    """Fill every vector; False where the file ends before. Raises `OSError`."""
    rest = [vector for vector in vectors if vector.size]
    while rest:
        moved = ops.preadv(fd, rest, offset)
        moved -= moved % BLOCK_SIZE
        if moved <= 0:
            return False
        rest = _behind(rest, moved)
        offset += moved
    return True


def read_bytes(ops: FileOps, fd: int, size: int, offset: int) -> Buffer | None:
    """`size` bytes, whole blocks, in memory of their own; None where the file ends before."""
    out = aligned_bytes(size)
    return memoryview(out) if read_all(ops, fd, [out], offset) else None


def _behind(vectors: Vectors, size: int) -> list[NDArray[np.uint8]]:
    rest = list(vectors)
    while rest and size >= rest[0].size:
        size -= rest[0].size
        del rest[0]
    if rest and size:
        rest[0] = rest[0][size:]
    return rest
