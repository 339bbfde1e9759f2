"""The directory of a segment log: who owns it, and the header of the log as a whole.

lock       held (flock) by the one process that has the log open; its pid
log        the log's header, replaced whole each time the log is opened
segment-*  the segments
"""

from __future__ import annotations

import fcntl
import os
import secrets
from dataclasses import replace
from pathlib import Path

from kvd.errors import ConfigError, Corrupt, KvdError, Unsupported
from kvd.tiers.aligned import aligned_bytes, read_all, read_bytes, write_all
from kvd.tiers.file_ops import FileOps
from kvd.tiers.segment import (
    BLOCK_SIZE,
    NO_KEY,
    RUN_MAX,
    RUN_SHIFT,
    LogHeader,
    SegmentHeader,
    check_segment_size,
    pack_log,
    parse_log,
    parse_segment,
)
from kvd.tiers.segment_files import drop_unfinished, find_segments, segment_path


class LogDirectory:
    """`path`, locked, with a header of this run. Raises `ConfigError` where that cannot be.

    `key_id` is that of the key given, `NO_KEY` without one; a log keeps the one that it began with.
    """

    def __init__(
        self, path: Path, segment_size: int, *, key_id: bytes = NO_KEY, ops: FileOps
    ) -> None:
        self.path = path
        self._ops = ops
        try:
            check_segment_size(segment_size)
        except Corrupt as error:
            raise ConfigError(f"no segment can have {segment_size} bytes") from error
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock_fd = lock_folder(path, ops)
        except OSError as error:
            raise ConfigError(f"{path} cannot hold a segment log: {error}") from error
        try:
            drop_unfinished(path, ops)
            found = find_log_header(path, ops)
            if found is not None and found.segment_size != segment_size:
                raise ConfigError(
                    f"{path} has segments of {found.segment_size} bytes, {segment_size} asked for"
                )
            if found is not None:
                check_key(path, found.key_id, key_id)
            self.header = _next_run(found, segment_size, key_id)
            self._write_header()
            # Some file systems refuse O_DIRECT when opening, some only when reading.
            self.direct_error = try_direct(path / "log", ops)
        except OSError as error:
            self.close()
            raise ConfigError(f"{path} cannot hold a segment log: {error}") from error
        except KvdError:
            self.close()
            raise

    def close(self) -> None:
        """Let the next one have it."""
        if self._lock_fd >= 0:
            self._ops.close(self._lock_fd)
            self._lock_fd = -1

    def _write_header(self) -> None:
        fresh = self.path / "log.new"
        fd = self._ops.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        try:
            block = aligned_bytes(BLOCK_SIZE)
            memoryview(block)[:] = pack_log(self.header)
            write_all(self._ops, fd, [block], 0)
            self._ops.fsync(fd)
        finally:
            self._ops.close(fd)
        self._ops.rename(fresh, self.path / "log")
        self._ops.sync_directory(self.path)


def lock_folder(path: Path, ops: FileOps) -> int:
    """The descriptor that holds the folder until it is closed. Raises `OSError`, and `ConfigError`
    that names the process where another holds it.
    """
    fd = ops.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
        ops.close(fd)
        raise ConfigError(
            f"{path} is in use by process {owner or 'unknown'}; one daemon a path"
        ) from error
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def find_log_header(path: Path, ops: FileOps) -> LogHeader | None:
    """The header of the log in `path`, from its segments if its own is lost; None where there is no
    log. Raises `OSError`, and `ConfigError` for another version's or for segments of several logs.
    """
    try:
        fd = ops.open(path / "log", os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return _header_from_segments(path, ops)
    try:
        block = read_bytes(ops, fd, BLOCK_SIZE, 0)
    finally:
        ops.close(fd)
    try:
        return parse_log(block or b"")
    except Unsupported as error:
        raise ConfigError(f"{path} was written by another kvd: {error}") from error
    except Corrupt:
        return _header_from_segments(path, ops)


def try_direct(path: Path, ops: FileOps) -> OSError | None:
    """Why the file `path` cannot be read with O_DIRECT; None where it can."""
    try:
        fd = ops.open(path, os.O_RDONLY | os.O_DIRECT)
        try:
            read_all(ops, fd, [aligned_bytes(BLOCK_SIZE)], 0)
        finally:
            ops.close(fd)
    except OSError as error:
        return error
    return None


def read_segment_header(path: Path, ops: FileOps) -> SegmentHeader | None:
    """A segment's header, or None where there is none. Raises `OSError`, and `ConfigError` for one
    of another version.
    """
    fd = ops.open(path, os.O_RDONLY)
    try:
        block = read_bytes(ops, fd, BLOCK_SIZE, 0)
    finally:
        ops.close(fd)
    try:
        return parse_segment(block) if block is not None else None
    except Unsupported as error:
        raise ConfigError(f"{path} was written by another kvd: {error}") from error
    except Corrupt:
        return None


def check_key(path: Path, wanted: bytes, given: bytes) -> None:
    """Raise `ConfigError` unless the key id `given` is the one that the log in `path` has."""
    if wanted == given:
        return
    elsewhere = "or give another folder to begin a new log in"
    if wanted == NO_KEY:
        raise ConfigError(
            f"{path} is not encrypted, key {given.hex()} was given: give none, {elsewhere}"
        )
    found = f"key {given.hex()} was given" if given != NO_KEY else "no key was given"
    raise ConfigError(
        f"{path} is encrypted with key {wanted.hex()}, {found}: give that one, {elsewhere}"
    )


def _header_from_segments(path: Path, ops: FileOps) -> LogHeader | None:
    # The header is lost: the segments say whose they are, as long as all say the same.
    headers = [
        header
        for slot in find_segments(path)
        if (header := read_segment_header(segment_path(path, slot), ops))
    ]
    if not headers:
        return None
    newest = max(headers, key=lambda header: header.sequence)
    if any((h.log_id, h.key_id) != (newest.log_id, newest.key_id) for h in headers):
        raise ConfigError(f"{path} holds segments of more than one log and no header")
    return LogHeader(
        log_id=newest.log_id,
        segment_size=newest.segment_size,
        run=max(newest.sequence >> RUN_SHIFT, 1),
        key_id=newest.key_id,
    )


def _next_run(found: LogHeader | None, segment_size: int, key_id: bytes) -> LogHeader:
    if found is None:
        return LogHeader(
            log_id=secrets.token_bytes(16), segment_size=segment_size, run=1, key_id=key_id
        )
    if found.run >= RUN_MAX:
        raise ConfigError(f"the log was opened {RUN_MAX} times; start a new one")
    return replace(found, run=found.run + 1)
