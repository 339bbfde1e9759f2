"""Segment check: a log that no daemon has open, every byte of its records verified.

It believes nothing and follows nothing out of the folder: a link is told of and left alone. To
repair is only to take away: a damaged record's header is cleared, so that no scan meets it again; a
segment that holds nothing is deleted, and the log makes another when it needs one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from stat import S_ISREG
from typing import TYPE_CHECKING

from kvd.errors import ConfigError, Corrupt, Unsupported
from kvd.tiers.aligned import aligned_bytes, read_all, read_bytes, scratch_bytes, write_all
from kvd.tiers.file_ops import FILE_OPS, FileOps
from kvd.tiers.log_directory import check_key, find_log_header, lock_folder, try_direct
from kvd.tiers.segment import (
    BLOCK_SIZE,
    Buffer,
    LogHeader,
    RecordHeader,
    SegmentHeader,
    checksum,
    padded,
    parse_segment,
    piece_size,
)
from kvd.tiers.segment_files import segment_path, segment_slots
from kvd.tiers.segment_scan import scan

if TYPE_CHECKING:
    from kvd.tiers.cipher import Cipher

# Bytes of segments that are done, and of all.
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class DamagedRecord:
    """A record whose header is intact and whose payload is not what was stored.

    `offset` is that of the header, in bytes from the segment's start.
    """

    slot: int
    offset: int
    reason: str
    label: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class UnreadableSegment:
    """A segment that nothing can be read from, or not all, and why."""

    slot: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LogReport:
    """What a check found. `size` is bytes of payloads that were looked at.

    Void segments hold nothing and are no fault: they wait to be filled. A record whose header is
    damaged cannot be told from room that was never used, and is not counted.
    """

    num_segments: int
    num_void: int
    num_records: int
    size: int
    damaged: tuple[DamagedRecord, ...]
    unreadable: tuple[UnreadableSegment, ...]
    is_repaired: bool

    @property
    def is_clean(self) -> bool:
        """Nothing was found damaged."""
        return not self.damaged and not self.unreadable


def check_log(
    path: Path,
    *,
    is_repairing: bool = False,
    progress: Progress | None = None,
    cipher: Cipher | None = None,
    ops: FileOps = FILE_OPS,
) -> LogReport:
    """Verify every record of the log in the folder `path`; blocking, a thread's work.

    With `is_repairing`, damaged records' headers are cleared and segments without a readable header
    deleted, durably; `is_repaired` says that this left nothing bad behind. With `cipher`, tags
    are verified too; without it, an encrypted log's checksums are. `progress` hears of each record.
    Raises `ConfigError` where there is no log, a daemon has it open, it is of another version or
    key. What it raises, and what `progress` raises, leaves the rest of the log as it was.
    """
    if not path.is_dir():
        raise ConfigError(f"{path} is no folder with a segment log")
    try:
        lock_fd = lock_folder(path, ops)
    except OSError as error:
        raise ConfigError(f"{path} cannot be checked: {error}") from error
    try:
        log = find_log_header(path, ops)
        if log is None:
            raise ConfigError(f"there is no segment log in {path}")
        if cipher is not None:
            check_key(path, log.key_id, cipher.key_id)
        return _Check(path, log, cipher, is_repairing=is_repairing, ops=ops).run(progress)
    except OSError as error:
        raise ConfigError(f"{path} cannot be checked: {error}") from error
    finally:
        ops.close(lock_fd)


@dataclass(slots=True)
class _Findings:
    num_void: int = 0
    num_records: int = 0
    size: int = 0
    damaged: list[DamagedRecord] = field(default_factory=list)
    unreadable: list[UnreadableSegment] = field(default_factory=list)
    # Slots whose files hold nothing, and whether all repairs went well.
    empty: list[int] = field(default_factory=list)
    is_repaired: bool = True


class _Check:
    def __init__(
        self, path: Path, log: LogHeader, cipher: Cipher | None, *, is_repairing: bool, ops: FileOps
    ) -> None:
        self._path = path
        self._log = log
        self._cipher = cipher
        self._is_repairing = is_repairing
        self._ops = ops
        # The device is asked, not what the page cache remembers of it.
        self._direct = os.O_DIRECT if try_direct(path / "log", ops) is None else 0
        self._found = _Findings()

    def run(self, progress: Progress | None) -> LogReport:
        slots = segment_slots(self._path)
        size = self._log.segment_size
        for index, slot in enumerate(slots):
            for end in self._check_segment(slot):
                if progress is not None:
                    progress(index * size + end, len(slots) * size)
        if self._is_repairing:
            self._delete_empty()
        found = self._found
        return LogReport(
            num_segments=len(slots),
            num_void=found.num_void,
            num_records=found.num_records,
            size=found.size,
            damaged=tuple(found.damaged),
            unreadable=tuple(found.unreadable),
            is_repaired=self._is_repairing and found.is_repaired,
        )

    def _check_segment(self, slot: int) -> Iterator[int]:
        """Look at a segment; yields the offset behind each record, and the segment's end."""
        try:
            if not S_ISREG(segment_path(self._path, slot).lstat().st_mode):
                self._leave_alone(slot, "is no plain file")
            else:
                with self._open(slot, os.O_RDONLY | self._direct) as fd:
                    header = self._segment_header(slot, fd)
                    if header is not None:
                        yield from self._check_records(slot, fd, header)
        except OSError as error:
            self._give_up(slot, f"cannot be read: {error.strerror}")
        yield self._log.segment_size

    def _segment_header(self, slot: int, fd: int) -> SegmentHeader | None:
        block = read_bytes(self._ops, fd, BLOCK_SIZE, 0)
        if block is not None and not any(memoryview(block).cast("Q")):
            self._found.num_void += 1
            self._found.empty.append(slot)
            return None
        try:
            header = parse_segment(block or b"")
        except Unsupported as error:
            raise ConfigError(f"{self._path} was written by another kvd: {error}") from error
        except Corrupt:
            self._give_up(slot, "its header is damaged")
            return None
        ours = (self._log.log_id, slot, self._log.segment_size, self._log.key_id)
        if (header.log_id, header.slot, header.segment_size, header.key_id) != ours:
            self._give_up(slot, "it belongs to another log or slot")
            return None
        return header

    def _give_up(self, slot: int, reason: str) -> None:
        self._found.unreadable.append(UnreadableSegment(slot=slot, reason=reason))
        self._found.empty.append(slot)

    def _leave_alone(self, slot: int, reason: str) -> None:
        self._found.unreadable.append(UnreadableSegment(slot=slot, reason=reason))
        self._found.is_repaired = False

    def _check_records(self, slot: int, fd: int, segment: SegmentHeader) -> Iterator[int]:
        failures: list[str] = []

        def read(offset: int, size: int) -> Buffer | None:
            try:
                return read_bytes(self._ops, fd, size, offset)
            except OSError as error:
                failures.append(f"cannot be read at {offset}: {error.strerror}")
                return None

        damaged = []
        for record in scan(segment, read):
            if not record.is_end:
                reason = self._damage(fd, record)
                self._found.num_records += 1
                self._found.size += record.payload_size
                if reason is not None:
                    damaged.append(
                        DamagedRecord(
                            slot=slot, offset=record.offset, reason=reason, label=record.label
                        )
                    )
            yield record.end
        if failures:
            # There may be records where nothing could be read; those that could be are kept.
            self._leave_alone(slot, failures[0])
        self._found.damaged += damaged
        if damaged and self._is_repairing:
            self._clear(slot, [record.offset for record in damaged])

    def _damage(self, fd: int, header: RecordHeader) -> str | None:
        """What is wrong with a record's payload."""
        try:
            if self._cipher is not None:
                header = self._cipher.open_header(header)
            step = piece_size(header.payload_size)
            for number, wanted in enumerate(header.pieces):
                size = min(step, header.payload_size - number * step)
                out = scratch_bytes(padded(size))
                at = header.offset + BLOCK_SIZE + number * step
                if not read_all(self._ops, fd, [out], at):
                    return "the file is cut short"
                if checksum(out[:size]) != wanted:
                    return f"piece {number} is damaged"
                if self._cipher is not None:
                    self._cipher.open_piece(header, number, out[:size])
        except OSError as error:
            return f"cannot be read: {error.strerror}"
        except Corrupt as error:
            return str(error)
        return None

    def _clear(self, slot: int, offsets: list[int]) -> None:
        zeros = aligned_bytes(BLOCK_SIZE)
        try:
            with self._open(slot, os.O_RDWR | self._direct) as fd:
                for offset in offsets:
                    write_all(self._ops, fd, [zeros], offset)
                self._ops.fdatasync(fd)
        except OSError:
            self._found.is_repaired = False

    def _delete_empty(self) -> None:
        try:
            for slot in self._found.empty:
                self._ops.unlink(segment_path(self._path, slot))
            self._ops.sync_directory(self._path)
        except OSError:
            self._found.is_repaired = False

    @contextmanager
    def _open(self, slot: int, flags: int) -> Iterator[int]:
        fd = self._ops.open(segment_path(self._path, slot), flags | os.O_NOFOLLOW)
        try:
            yield fd
        finally:
            self._ops.close(fd)
