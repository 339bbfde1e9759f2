"""A block device that forgets in a power cut what it was not told to flush.

    ext4 ─► loop device ─► a file that this process serves over /dev/fuse ─► memory
                             write: kept, and noted as unflushed
                             fsync: after a while, all that was noted before it is there for good

The one idea: the loop device turns each flush of the file system into an fsync of its file, so who
serves the file sees every write and every flush, and can say what a disk with a volatile cache may
hold at any moment: all that was flushed, and of each later write any of its sectors or none.

It speaks the kernel's FUSE protocol itself (include/uapi/linux/fuse.h): one file, no names. Needs
root, /dev/fuse and loop devices; `find_obstacle` says what is missing.
"""

from __future__ import annotations

import ctypes
import errno
import os
import random
import struct
import subprocess
import threading
from collections import deque
from contextlib import suppress
from pathlib import Path

SECTOR = 512
NODE = 1

# The kernel sends no write larger than this.
WRITE_SIZE_MAX = 1 << 20

# A flush takes as long as on a slow disk: more comes meanwhile, and is not part of it.
FLUSH_S = 0.004

_IN = struct.Struct("<IIQQIIIHH")
_OUT = struct.Struct("<IiQ")
_ATTRIBUTES = struct.Struct("<QQQQQQIIIIIIIIII")
_INIT = struct.Struct("<IIIIHHIIHHI28x")
_TRANSFER = struct.Struct("<QQIIQII")

GETATTR, SETATTR, OPEN, READ, WRITE, STATFS, RELEASE, FSYNC = 3, 4, 14, 15, 16, 17, 18, 20
FLUSH, INIT, INTERRUPT, DESTROY, FORGET, BATCH_FORGET = 25, 26, 36, 38, 2, 42
WITHOUT_ANSWER = (INTERRUPT, FORGET, BATCH_FORGET)

_DIRECT_IO = 1
_MAX_PAGES = 1 << 22
_UMOUNT_LAZILY = 2


class ForgetfulDevice:
    """The content of a disk, as a file at `path` while it is served."""

    def __init__(self, path: Path, content: bytes) -> None:
        self.path = path
        # What the disk would answer, and what stands there for good.
        self._now = bytearray(content)
        self._flushed = bytearray(content)
        self._unflushed: deque[tuple[int, bytes]] = deque()
        self._num_written = 0
        self._num_flushed = 0
        # Transfers in this direction fail from now on.
        self.failing: frozenset[int] = frozenset()
        self._lock = threading.Lock()
        self._fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        path.write_bytes(b"")
        options = f"fd={self._fd},rootmode=100600,user_id=0,group_id=0".encode()
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mount(b"kvd-test", os.fsencode(path), b"fuse", 0, options):
            os.close(self._fd)
            raise OSError(ctypes.get_errno(), "no FUSE file can be mounted")
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def power_cut(self, chance: random.Random) -> tuple[bytes, int]:
        """What the disk may hold if the power goes now, and how many writes it has lost."""
        with self._lock:
            held = bytearray(self._flushed)
            unflushed = list(self._unflushed)
        mode = chance.choice(["none", "some", "some", "most", "torn"])
        kept = {"none": 0.0, "some": chance.random(), "most": 0.9, "torn": 0.5}[mode]
        num_lost = 0
        for offset, data in unflushed:
            step = SECTOR if mode == "torn" else max(len(data), 1)
            num_lost += mode == "torn" or chance.random() >= kept
            for at in range(0, len(data), step):
                if chance.random() < kept:
                    part = data[at : at + step]
                    held[offset + at : offset + at + len(part)] = part
        return bytes(held), num_lost

    @property
    def content_flushed(self) -> bytes:
        """The least that the disk holds if the power goes now."""
        with self._lock:
            return bytes(self._flushed)

    def close(self) -> None:
        """End the service: whoever still uses the file gets errors."""
        ctypes.CDLL(None).umount2(os.fsencode(self.path), _UMOUNT_LAZILY)
        self._thread.join()
        with self._lock:
            os.close(self._fd)
            self._fd = -1

    def _serve(self) -> None:
        size_max = WRITE_SIZE_MAX + 4096
        while True:
            try:
                request = os.read(self._fd, size_max)
            except OSError as error:
                if error.errno in (errno.EINTR, errno.EAGAIN, errno.ENOENT):
                    continue
                return
            _, code, unique, *_ = _IN.unpack_from(request)
            if code in WITHOUT_ANSWER:
                continue
            try:
                answer = self._answer(code, memoryview(request)[_IN.size :])
            except OSError as error:
                self._reply(unique, error=error.errno or errno.EIO)
                continue
            if code == FSYNC:
                timer = threading.Timer(FLUSH_S, self._flush, (unique, self._num_written))
                timer.daemon = True
                timer.start()
            else:
                self._reply(unique, answer)

    def _reply(self, unique: int, answer: bytes = b"", *, error: int = 0) -> None:
        # Who asked may be gone, and so may be the file.
        with suppress(OSError), self._lock:
            os.write(self._fd, _OUT.pack(_OUT.size + len(answer), -error, unique) + answer)

    def _answer(self, code: int, body: memoryview) -> bytes:
        if code in self.failing:
            raise OSError(errno.EIO, "told to fail")
        if code == INIT:
            pages = WRITE_SIZE_MAX // 4096
            return _INIT.pack(7, 31, 0, _MAX_PAGES, 64, 48, WRITE_SIZE_MAX, 1, pages, 0, 0)
        if code in (GETATTR, SETATTR):
            return struct.pack("<QII", 3600, 0, 0) + self._attributes()
        if code == OPEN:
            return struct.pack("<QII", 1, _DIRECT_IO, 0)
        if code == READ:
            _, offset, size, *_ = _TRANSFER.unpack_from(body)
            return bytes(self._now[offset : offset + size])
        if code == WRITE:
            return self._write(body)
        if code in (FSYNC, FLUSH, RELEASE, DESTROY):
            return b""
        raise OSError(errno.ENOSYS, "not needed")

    def _write(self, body: memoryview) -> bytes:
        _, offset, size, *_ = _TRANSFER.unpack_from(body)
        data = bytes(body[_TRANSFER.size : _TRANSFER.size + size])
        with self._lock:
            self._now[offset : offset + size] = data
            self._unflushed.append((offset, data))
            self._num_written += 1
        return struct.pack("<II", size, 0)

    def _flush(self, unique: int, mark: int) -> None:
        """The first `mark` of all writes ever are there for good."""
        with self._lock:
            while self._num_flushed < mark:
                offset, data = self._unflushed.popleft()
                self._flushed[offset : offset + len(data)] = data
                self._num_flushed += 1
        self._reply(unique)

    def _attributes(self) -> bytes:
        size = len(self._now)
        blocks = size // SECTOR
        return _ATTRIBUTES.pack(NODE, size, blocks, 0, 0, 0, 0, 0, 0, 0o100600, 1, 0, 0, 0, 4096, 0)


class Disk:
    """A forgetful device with an ext4 in it, mounted at `folder`."""

    def __init__(self, folder: Path, content: bytes) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.device = ForgetfulDevice(folder.with_suffix(".device"), content)
        try:
            _run("mount", "-o", "loop", str(self.device.path), str(folder))
        except OSError:
            self.device.close()
            raise

    def close(self) -> None:
        """Unmount. Nobody may use the folder any more."""
        subprocess.run(["umount", "-l", str(self.folder)], check=False)
        self.device.close()


def empty_disk(folder: Path, size: int) -> bytes:
    """The content of a device of `size` bytes with an empty ext4."""
    image = folder / "empty.image"
    with image.open("wb") as file:
        file.truncate(size)
    _run("mkfs.ext4", "-q", "-F", "-m", "0", "-E", "lazy_itable_init=0,nodiscard", str(image))
    content = image.read_bytes()
    image.unlink()
    return content


def find_obstacle(folder: Path) -> str:
    """Why there can be no forgetful device here; empty if there can."""
    if os.geteuid() != 0:
        return "power cuts need root: they mount file systems"
    try:
        Disk(folder / "probe", empty_disk(folder, 8 << 20)).close()
    except OSError as error:
        return f"power cuts need FUSE, loop devices and ext4: {error}"
    return ""


def _run(*command: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        raise OSError(errno.ENODEV, f"{command[0]}: {error.stderr.strip()}") from error
