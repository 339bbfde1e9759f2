"""The process of the index: it alone maps the database, and may die of it.

    python -m kvd.daemon.index_process FOLDER LOG_ID LOCK_S

FOLDER holds `data.mdb`, and `lock`, held while the process lives; it waits LOCK_S seconds for
another that has the lock. Standard input is its end of a socket pair; what is said there is in
index_frames.py. The process ends at the end of its input, with the thread that started it, or after
it said FAILED. Ctrl-C and SIGTERM are the daemon's to answer.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import resource
import select
import shutil
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

import lmdb

from kvd.daemon import index_frames as frames
from kvd.daemon.index_database import FRESH_NAME, Database, OldDatabase
from kvd.errors import ConfigError, Corrupt, KvdError

LOCK_POLL_S = 0.05

# LMDB makes the last transaction safe from a power cut with the next one. After so much quiet there
# will not soon be a next one.
SETTLE_S = 1.0

_PR_SET_PDEATHSIG = 1

_FAILURES = (lmdb.Error, OSError, KvdError)


class IndexProcess:
    """Answers one frame after the other."""

    def __init__(self, folder: Path, log_id: bytes, channel: socket.socket) -> None:
        self._folder = folder
        self._log_id = log_id
        self._channel = channel
        self._database: Database | None = None
        self._is_settled = True

    def run(self) -> None:
        """Until the input ends. Raises what the database and the disk raise."""
        while True:
            self._settle()
            head = self._receive(frames.HEAD.size)
            if len(head) < frames.HEAD.size:
                break
            kind, size = frames.parse_head(head)
            body = self._receive(size)
            if len(body) < size:
                break
            self._answer(kind, body)
            self._send(frames.DONE)
        if self._database is not None:
            self._database.sync()
            self._database.close()

    def _answer(self, kind: bytes, body: bytes) -> None:
        if kind == frames.LOOK:
            self._look()
        elif kind == frames.BEGIN:
            self._database = Database(self._folder, self._log_id)
        elif kind == frames.WRITE and self._database is not None:
            self._database.write(body)
            self._is_settled = False
        elif kind == frames.PLACE and self._database is not None:
            self._database.place(is_complete=body == b"\1")
        else:
            raise Corrupt(f"a frame of kind {kind!r} was not expected now")

    def _look(self) -> None:
        """Say what is there, all of it, even where no copy can be made; then the copy's fate."""
        old = OldDatabase(self._folder, self._log_id)
        failure: Exception | None = None
        try:
            self._database = Database(self._folder, self._log_id)
        except _FAILURES as error:
            failure = error
        for batch in old.batches():
            self._send(frames.ENTRIES, b"".join(map(frames.pack_put, batch)))
            try:
                if self._database is not None and failure is None:
                    self._database.append(batch)
            except _FAILURES as error:
                failure = error
        self._send(frames.WALKED, old.reason.encode())
        if self._database is None or failure is not None:
            raise failure or OSError("no database")
        self._database.place(is_complete=not old.reason)

    def _settle(self) -> None:
        if self._is_settled or self._database is None:
            return
        if not select.select([self._channel], [], [], SETTLE_S)[0]:
            self._database.sync()
            self._is_settled = True

    def _send(self, kind: bytes, body: bytes = b"") -> None:
        self._channel.sendall(frames.pack_frame(kind, body))

    def _receive(self, size: int) -> bytes:
        """`size` bytes, or fewer where the input ends."""
        parts = []
        while size:
            try:
                part = self._channel.recv(size)
            except ConnectionError:
                break
            if not part:
                break
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


def main() -> int:
    """The exit code: 0 at the end of the input, 1 after a failure."""
    _stay_small_and_die_with_the_daemon()
    folder, log_id, lock_s = Path(sys.argv[1]), bytes.fromhex(sys.argv[2]), float(sys.argv[3])
    channel = socket.socket(fileno=os.dup(0))
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = _lock(folder / "lock", lock_s)
        try:
            IndexProcess(folder, log_id, channel).run()
        finally:
            # What is not in place by now is nothing, and takes room on a disk that may have none.
            with suppress(OSError):
                (folder / FRESH_NAME).unlink()
            os.close(lock)
    except BrokenPipeError:
        return 0
    except _FAILURES as error:
        with suppress(OSError):
            channel.sendall(frames.pack_frame(frames.FAILED, _describe(error, folder).encode()))
        return 1
    return 0


def _describe(error: Exception, folder: Path) -> str:
    if isinstance(error, KvdError):
        return str(error)
    # LMDB calls a write that a full disk cut short an input/output error.
    with suppress(OSError):
        return f"{error}; {shutil.disk_usage(folder).free} bytes are free in {folder}"
    return str(error)


def _stay_small_and_die_with_the_daemon() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # A core file would hold the whole map.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _lock(path: Path, lock_s: float) -> int:
    """The lock's descriptor. Raises `ConfigError` where another process keeps it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    give_up = time.monotonic() + lock_s
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() >= give_up:
                owner = os.pread(fd, 32, 0).decode("ascii", "replace").strip() or "unknown"
                raise ConfigError(
                    f"{path.parent} is in use by process {owner}; one index a folder"
                ) from None
            time.sleep(LOCK_POLL_S)
    # For people only; a full disk may refuse it.
    with suppress(OSError):
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


if __name__ == "__main__":
    sys.exit(main())
