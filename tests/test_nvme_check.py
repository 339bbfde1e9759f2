"""The offline check of a segment log: what it finds, what a repair takes away, what it leaves."""

from __future__ import annotations

import contextlib
import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest

from kvd.chunk import Extent
from kvd.errors import ConfigError
from kvd.tiers import segment_check
from kvd.tiers.cipher import Cipher
from kvd.tiers.file_ops import FileOps, Vectors
from kvd.tiers.segment import BLOCK_SIZE, PIECE_SIZE_MIN, pack_header, parse_header
from kvd.tiers.segment_check import DamagedRecord, LogReport, UnreadableSegment, check_log
from kvd.tiers.segment_log import SegmentLog
from tests.file_faults import FaultyOps, flip, pattern
from tests.test_segment import resealed

SEGMENT_SIZE = 1 << 20
SIZE = 300_000


def make(folder: Path, count: int = 6, *, cipher: Cipher | None = None) -> list[Extent]:
    """A log of so many records, three a segment."""
    log = SegmentLog(folder, 8 * SEGMENT_SIZE, segment_size=SEGMENT_SIZE, cipher=cipher)
    with contextlib.closing(log):
        found = [log.append(b"record %d" % seed, pattern(seed, SIZE)) for seed in range(count)]
        log.sync()
    return [extent for extent in found if extent is not None]


def labels(folder: Path, *, cipher: Cipher | None = None) -> list[bytes]:
    """What a daemon finds, each record read."""
    log = SegmentLog(folder, 8 * SEGMENT_SIZE, segment_size=SEGMENT_SIZE, cipher=cipher)
    with contextlib.closing(log):
        records = list(log.scan())
        for record in records:
            out = pattern(0, record.extent.size)
            log.read(record.extent, out)
        return [record.header.label for record in records]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lock"}


def damage(folder: Path, extent: Extent, at: int = 5) -> None:
    slot, offset = divmod(extent.offset, SEGMENT_SIZE)
    flip(folder / f"segment-{slot:08d}", offset + BLOCK_SIZE + at)


def test_a_good_log_is_clean_and_untouched(tmp_path: Path) -> None:
    make(tmp_path)
    before = contents(tmp_path)
    heard: list[tuple[int, int]] = []
    report = check_log(tmp_path, progress=lambda done, whole: heard.append((done, whole)))
    assert report == LogReport(
        num_segments=2,
        num_void=0,
        num_records=6,
        size=6 * SIZE,
        damaged=(),
        unreadable=(),
        is_repaired=False,
    )
    assert report.is_clean
    assert contents(tmp_path) == before
    assert heard == sorted(heard)
    assert len(heard) >= 8
    assert heard[-1] == (2 * SEGMENT_SIZE, 2 * SEGMENT_SIZE)
    # To repair what is whole changes nothing.
    assert check_log(tmp_path, is_repairing=True).is_repaired
    assert contents(tmp_path) == before


@pytest.mark.parametrize("at", [0, PIECE_SIZE_MIN, SIZE - 1])
def test_a_damaged_payload_is_found_and_a_repair_takes_it_away(tmp_path: Path, at: int) -> None:
    extents = make(tmp_path)
    damage(tmp_path, extents[1], at)
    damage(tmp_path, extents[5], at)
    before = contents(tmp_path)
    report = check_log(tmp_path)
    reason = f"piece {at // PIECE_SIZE_MIN} is damaged"
    assert report.damaged == tuple(
        DamagedRecord(
            slot=extents[index].offset // SEGMENT_SIZE,
            offset=extents[index].offset % SEGMENT_SIZE,
            reason=reason,
            label=b"record %d" % index,
        )
        for index in (1, 5)
    )
    assert (report.num_records, report.is_clean, report.is_repaired) == (6, False, False)
    assert contents(tmp_path) == before
    repaired = check_log(tmp_path, is_repairing=True)
    assert repaired.damaged == report.damaged
    assert repaired.is_repaired
    assert check_log(tmp_path).is_clean
    assert labels(tmp_path) == [b"record %d" % index for index in (0, 2, 3, 4)]


def test_padding_is_nobodys_damage(tmp_path: Path) -> None:
    extent = make(tmp_path)[0]
    damage(tmp_path, extent, SIZE)
    assert check_log(tmp_path).is_clean


@pytest.mark.parametrize("how", ["damaged", "another log", "another slot", "empty"])
def test_a_segment_that_cannot_be_believed_is_told_of_and_deleted(tmp_path: Path, how: str) -> None:
    folder = tmp_path / "kv"
    make(folder)
    path = folder / "segment-00000001"
    if how == "damaged":
        flip(path, 40)
        reason = "its header is damaged"
    elif how == "another log":
        make(tmp_path / "other")
        path.write_bytes((tmp_path / "other" / path.name).read_bytes())
        reason = "it belongs to another log or slot"
    elif how == "another slot":
        path.write_bytes((folder / "segment-00000000").read_bytes())
        reason = "it belongs to another log or slot"
    else:
        os.truncate(path, 0)
        reason = "its header is damaged"
    report = check_log(folder)
    assert report.unreadable == (UnreadableSegment(slot=1, reason=reason),)
    assert report.num_records == 3
    assert path.exists()
    repaired = check_log(folder, is_repairing=True)
    assert repaired.is_repaired
    assert not path.exists()
    assert check_log(folder).is_clean
    assert labels(folder) == [b"record %d" % index for index in range(3)]


def test_void_segments_are_no_fault_and_a_repair_gives_their_room_back(tmp_path: Path) -> None:
    make(tmp_path)
    with (tmp_path / "segment-00000001").open("r+b") as file:
        file.write(bytes(BLOCK_SIZE))
    report = check_log(tmp_path)
    assert (report.num_void, report.is_clean) == (1, True)
    assert check_log(tmp_path, is_repairing=True).is_repaired
    assert not (tmp_path / "segment-00000001").exists()


def test_a_segment_cut_short_loses_what_was_behind_the_cut(tmp_path: Path) -> None:
    extents = make(tmp_path, 3)
    os.truncate(tmp_path / "segment-00000000", extents[2].offset + BLOCK_SIZE + 100)
    report = check_log(tmp_path)
    assert [(bad.label, bad.reason) for bad in report.damaged] == [
        (b"record 2", "the file is cut short")
    ]
    assert check_log(tmp_path, is_repairing=True).is_repaired
    assert labels(tmp_path) == [b"record 0", b"record 1"]


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_nothing_outside_the_folder_is_read_or_changed(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "kv"
    extents = make(folder)
    path, target = folder / "segment-00000001", tmp_path / "elsewhere"
    path.rename(target)
    flip(target, extents[5].offset % SEGMENT_SIZE + BLOCK_SIZE)
    before = target.read_bytes()
    if kind == "link":
        path.symlink_to(target)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    heard: list[int] = []
    report = check_log(folder, is_repairing=True, progress=lambda done, _: heard.append(done))
    assert heard[-1] == 2 * SEGMENT_SIZE
    assert report.unreadable == (UnreadableSegment(slot=1, reason="is no plain file"),)
    assert (report.num_records, report.is_repaired) == (3, False)
    assert target.read_bytes() == before
    assert os.path.lexists(path)


@pytest.mark.parametrize("name", ["lock", "log"])
def test_a_link_in_the_place_of_the_logs_own_files_is_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "kv"
    make(folder)
    target = tmp_path / "elsewhere"
    (folder / name).rename(target)
    (folder / name).symlink_to(target)
    before = target.read_bytes()
    with pytest.raises(ConfigError, match="symbolic links"):
        check_log(folder, is_repairing=True)
    with pytest.raises(ConfigError, match="symbolic links"):
        SegmentLog(folder, 8 * SEGMENT_SIZE, segment_size=SEGMENT_SIZE)
    assert target.read_bytes() == before


def test_a_log_that_a_daemon_has_open_is_refused(tmp_path: Path) -> None:
    log = SegmentLog(tmp_path, 8 * SEGMENT_SIZE, segment_size=SEGMENT_SIZE)
    with contextlib.closing(log), pytest.raises(ConfigError, match=f"process {os.getpid()}"):
        check_log(tmp_path)
    assert check_log(tmp_path).num_segments == 0


def test_what_is_no_log_is_refused_and_left_alone(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no folder"):
        check_log(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with pytest.raises(ConfigError, match="no segment log"):
        check_log(tmp_path)


def test_a_log_of_another_version_is_refused(tmp_path: Path) -> None:
    make(tmp_path)
    for name in ("log", "segment-00000001"):
        before = contents(tmp_path)
        block = resealed(before[name][:BLOCK_SIZE], 8, b"\x02")
        (tmp_path / name).write_bytes(block + before[name][BLOCK_SIZE:])
        with pytest.raises(ConfigError, match="written by another kvd"):
            check_log(tmp_path, is_repairing=True)
        (tmp_path / name).write_bytes(before[name])
    assert check_log(tmp_path).is_clean


def test_a_lost_log_header_hides_no_record(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "log").unlink()
    assert check_log(tmp_path).num_records == 6


def test_an_encrypted_log_is_checked_with_its_key_and_without(tmp_path: Path) -> None:
    cipher, other = Cipher(b"k" * 32), Cipher(b"o" * 32)
    extents = make(tmp_path, cipher=cipher)
    assert check_log(tmp_path, cipher=cipher).is_clean
    assert check_log(tmp_path).is_clean
    with pytest.raises(ConfigError, match="give that one"):
        check_log(tmp_path, cipher=other)
    damage(tmp_path, extents[1])
    for key in (cipher, None):
        assert [bad.label for bad in check_log(tmp_path, cipher=key).damaged] == [b"record 1"]
    assert check_log(tmp_path, is_repairing=True).is_repaired
    assert len(labels(tmp_path, cipher=cipher)) == 5


def test_a_forged_record_is_found_with_the_key(tmp_path: Path) -> None:
    cipher = Cipher(b"k" * 32)
    extent = make(tmp_path, cipher=cipher)[0]
    path = tmp_path / "segment-00000000"
    with path.open("r+b") as file:
        file.seek(extent.offset)
        header = parse_header(file.read(BLOCK_SIZE))
        file.seek(extent.offset)
        file.write(pack_header(replace(header, label=b"forged")))
    assert check_log(tmp_path).is_clean
    report = check_log(tmp_path, cipher=cipher, is_repairing=True)
    assert [bad.label for bad in report.damaged] == [b"forged"]
    assert "was changed" in report.damaged[0].reason
    assert len(labels(tmp_path, cipher=cipher)) == 5


class BadBlock(FileOps):
    """One block of the device cannot be read."""

    def __init__(self, offset: int) -> None:
        self.offset = offset

    def preadv(self, fd: int, vectors: Vectors, offset: int) -> int:
        size = sum(vector.size for vector in vectors)
        if offset <= self.offset < offset + size:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().preadv(fd, vectors, offset)


def test_a_payload_that_cannot_be_read_is_damaged(tmp_path: Path) -> None:
    extents = make(tmp_path, 3)
    report = check_log(tmp_path, ops=BadBlock(extents[1].offset + BLOCK_SIZE))
    assert [(bad.label, bad.reason) for bad in report.damaged] == [
        (b"record 1", "cannot be read: Input/output error")
    ]


def test_a_header_that_cannot_be_read_is_told_of_and_its_neighbours_stay(tmp_path: Path) -> None:
    extents = make(tmp_path, 3)
    report = check_log(tmp_path, is_repairing=True, ops=BadBlock(extents[1].offset))
    assert report.num_records == 2
    reason = f"cannot be read at {extents[1].offset}: Input/output error"
    assert report.unreadable == (UnreadableSegment(slot=0, reason=reason),)
    assert not report.is_repaired
    assert len(labels(tmp_path)) == 3


@pytest.mark.parametrize("name", ["pwritev", "fdatasync", "unlink", "sync_directory"])
def test_a_repair_that_fails_says_so(tmp_path: Path, name: str) -> None:
    extents = make(tmp_path)
    damage(tmp_path, extents[0])
    flip(tmp_path / "segment-00000001", 40)
    ops = FaultyOps()
    ops.fail(name, errno.EROFS)
    report = check_log(tmp_path, is_repairing=True, ops=ops)
    assert not report.is_repaired
    assert check_log(tmp_path, is_repairing=True).is_repaired
    assert check_log(tmp_path).is_clean


def test_a_folder_that_cannot_be_written_is_a_config_error(tmp_path: Path) -> None:
    make(tmp_path)
    ops = FaultyOps()
    ops.fail("open", errno.EROFS)
    with pytest.raises(ConfigError, match=r"cannot be checked: .*Read-only"):
        check_log(tmp_path, ops=ops)


def test_who_stops_a_check_finds_the_folder_free(tmp_path: Path) -> None:
    make(tmp_path)

    def stop(done: int, _: int) -> None:
        raise KeyboardInterrupt(done)

    with pytest.raises(KeyboardInterrupt):
        check_log(tmp_path, progress=stop)
    assert check_log(tmp_path).is_clean


def test_a_payload_changed_by_a_forger_is_found_with_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cipher = Cipher(b"k" * 32)
    extents = make(tmp_path, 3, cipher=cipher)
    damage(tmp_path, extents[1])
    # XXH3 is no secret: who wants to finds other bytes with the same checksum.
    with (tmp_path / "segment-00000000").open("rb") as file:
        pieces = []
        for extent in extents:
            file.seek(extent.offset)
            pieces += parse_header(file.read(BLOCK_SIZE)).pieces
    # The second piece of the changed record is not looked at any more.
    answers = iter(pieces[:3] + pieces[4:])
    monkeypatch.setattr(segment_check, "checksum", lambda _: next(answers))
    report = check_log(tmp_path, cipher=cipher)
    assert [bad.label for bad in report.damaged] == [b"record 1"]
    assert "piece 0 of an encrypted record was changed" in report.damaged[0].reason


def test_a_file_that_becomes_a_link_is_not_followed(tmp_path: Path) -> None:
    folder = tmp_path / "kv"
    make(folder)

    class Swaps(FileOps):
        def open(self, path: Path, flags: int) -> int:
            if path.name == "segment-00000001" and not path.is_symlink():
                path.rename(tmp_path / "elsewhere")
                path.symlink_to(tmp_path / "elsewhere")
            return super().open(path, flags)

    report = check_log(folder, ops=Swaps())
    assert report.num_records == 3
    assert "symbolic links" in report.unreadable[0].reason
