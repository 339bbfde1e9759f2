"""What the parts of nvme.py share: records, a plain file that threads stream through, a daemon with
a disk tier, and what the kernel counts.

A plain stream is the device's own speed as Python can have it: threads that do nothing but pwritev
or preadv with O_DIRECT, into blocks that exist and have been written before.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import kvd
from benchmarks.common import daemon_command, running
from kvd.errors import Unavailable
from kvd.keys import ChunkKey
from kvd.tiers.aligned import aligned_bytes

# Layers, planes and tokens of every chunk here; the head dimension makes up the size.
NUM_LAYERS = 32
CHUNK_TOKENS = 16
CHUNK_SIZE_MIN = NUM_LAYERS * 2 * CHUNK_TOKENS

# What one call of a plain sequential read asks for: more gains nothing.
SCAN_SIZE = 4 << 20

# Calls of a daemon that a busy machine may keep waiting: writes of gigabytes are among them.
CALL_S_MAX = 300.0


def layout_of(size: int, *, model: str = "benchmark") -> kvd.KVLayout:
    """A layout of 32 layers whose whole chunk has `size` bytes."""
    per_head, rest = divmod(size, CHUNK_SIZE_MIN)
    assert not rest
    return kvd.KVLayout(
        model=model,
        revision="1",
        dtype="uint8",
        num_layers=NUM_LAYERS,
        num_kv_heads=1,
        head_dim=per_head,
        chunk_tokens=CHUNK_TOKENS,
    )


def new_keys(count: int) -> list[ChunkKey]:
    """Keys that nothing else has."""
    return [ChunkKey(os.urandom(32)) for _ in range(count)]


def random_bytes(size: int, seed: int = 1) -> NDArray[np.uint8]:
    """`uint8 [size]` at a page's start that no device can compress."""
    out = aligned_bytes(size)
    out[:] = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
    return out


class Records:
    """`count` records of `size` bytes, and memory to read them into."""

    def __init__(self, size: int, count: int) -> None:
        self.size = size
        self.source = random_bytes(size * count)
        self.target = aligned_bytes(size * count)
        # First touch is not part of any sample.
        self.target[:] = 1
        places = [slice(at, at + size) for at in range(0, size * count, size)]
        self.sources = [self.source[place] for place in places]
        self.targets = [self.target[place] for place in places]


class PlainFile:
    """`source.size` bytes in a preallocated file, written and read in calls of `call_size` bytes.

    Its blocks are written once when it is made. Every call returns seconds.
    """

    def __init__(
        self, path: Path, source: NDArray[np.uint8], *, call_size: int, is_direct: bool
    ) -> None:
        assert source.size % call_size == 0
        flags = os.O_RDWR | os.O_CREAT | (os.O_DIRECT if is_direct else 0)
        self._fd = os.open(path, flags, 0o600)
        self._is_direct = is_direct
        self._source = source
        self._call_size = call_size
        os.posix_fallocate(self._fd, 0, source.size)
        self.write(1)

    def write(self, threads: int) -> float:
        """All bytes, then one fdatasync."""
        started = time.perf_counter()
        self._each(self._write_one, 0, self._source.size, threads)
        os.fdatasync(self._fd)
        return time.perf_counter() - started

    def read(self, out: NDArray[np.uint8], threads: int, *, offset: int = 0) -> float:
        """`out.size` bytes from `offset` on."""
        if not self._is_direct:
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

        def read_one(at: int) -> None:
            part = out[at - offset : at - offset + self._call_size]
            assert os.preadv(self._fd, [part], at) == part.size

        started = time.perf_counter()
        self._each(read_one, offset, offset + out.size, threads)
        return time.perf_counter() - started

    def close(self) -> None:
        os.close(self._fd)

    def _write_one(self, at: int) -> None:
        part = self._source[at : at + self._call_size]
        assert os.pwritev(self._fd, [part], at) == part.size

    def _each(self, call: Callable[[int], None], start: int, end: int, threads: int) -> None:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(call, range(start, end, self._call_size)))


def read_files(sizes: dict[Path, int], *, threads: int, is_direct: bool) -> float:
    """Seconds of a sequential read of the first `sizes[path]` bytes of each file, from the disk."""
    drop_cache(list(sizes))
    places = [
        (path, at, min(SCAN_SIZE, size - at))
        for path, size in sorted(sizes.items())
        for at in range(0, size, SCAN_SIZE)
    ]
    flags = os.O_RDONLY | (os.O_DIRECT if is_direct else 0)
    opened = {path: os.open(path, flags) for path in sizes}
    outs = [aligned_bytes(SCAN_SIZE) for _ in range(threads)]

    def read_some(index: int) -> None:
        for path, at, size in places[index::threads]:
            assert os.preadv(opened[path], [outs[index][:size]], at) == size

    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read_some, range(threads)))
    taken = time.perf_counter() - started
    for fd in opened.values():
        os.close(fd)
    return taken


def drop_cache(paths: list[Path]) -> None:
    """Take files out of the page cache; those in folders too."""
    for path in paths:
        for file in path.rglob("*") if path.is_dir() else [path]:
            if file.is_file():
                fd = os.open(file, os.O_RDONLY)
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(fd)


def can_bypass_cache(folder: Path) -> bool:
    """Whether the file system of `folder` takes O_DIRECT."""
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        try:
            os.close(os.open(file.name, os.O_RDWR | os.O_DIRECT))
        except OSError:
            return False
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskDaemon:
    """A daemon with an nvme tier in `folder`; `ready_s` is what it took from its start to the first
    session that it let in.
    """

    pid: int
    socket: Path
    ready_s: float

    def connect(self) -> kvd.Client:
        return kvd.connect(self.socket, timeout_s=CALL_S_MAX)


@contextmanager
def disk_daemon(folder: Path, *, cpu_size: int, nvme_size: int) -> Iterator[DiskDaemon]:
    """A daemon with `folder` as its nvme tier, up to `nvme_size` bytes; stopped at the end."""
    with tempfile.TemporaryDirectory(prefix="kvd-bench-") as name:
        socket = Path(name) / "kvd.sock"
        command = daemon_command(socket=socket, grpc_socket=None, cpu_size=cpu_size)
        # The last of two equal flags counts.
        command += ["--tiers", "cpu,nvme", "--nvme-path", str(folder), "--nvme-scrub-rate", "0"]
        command += ["--nvme-size", str(nvme_size), "--nvme-reserve", "0"]
        started = time.perf_counter()
        with running(command, Path(name) / "log", lambda: _answers(socket)) as pid:
            yield DiskDaemon(pid=pid, socket=socket, ready_s=time.perf_counter() - started)


def child_pids(pid: int) -> list[int]:
    """The processes that a process has begun and that are still there."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            # It ended while we looked.
            continue
        if int(fields[1]) == pid:
            found.append(int(stat.parent.name))
    return found


def written_bytes(pid: int) -> int:
    """Bytes that a process has caused to be written to devices, as the kernel counts them."""
    for line in Path(f"/proc/{pid}/io").read_text().splitlines():
        if line.startswith("write_bytes:"):
            return int(line.split()[1])
    return 0


def _answers(socket: Path) -> bool:
    try:
        kvd.connect(socket).close()
    except Unavailable:
        return False
    return True
