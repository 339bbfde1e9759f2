"""A segment log whose files are not as they were left: damage is a miss where it is, no further."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvd.errors import ConfigError, Corrupt
from kvd.tiers.aligned import aligned_bytes
from kvd.tiers.segment import BLOCK_SIZE, PIECE_SIZE_MIN, checksum
from kvd.tiers.segment_log import SegmentLog
from tests.file_faults import flip, pattern
from tests.nvme_log import SEGMENT_SIZE, SIZE, Opener, assert_holds, disk_bytes, fill, put


# Where a bit may flip, from the record's header on: its fields, a piece's checksum, the label, what
# is reserved, the header's checksum, the payload's first and last byte.
@pytest.mark.parametrize("at", [0, 9, 20, 33, 41, 50, 57, 65, 90, 130, 257, 1281, 3900, 4090])
def test_a_bit_flipped_in_a_header_is_corrupt_and_hides_no_neighbour(
    open_log: Opener, tmp_path: Path, at: int
) -> None:
    log = open_log()
    extents = [put(log, seed) for seed in range(3)]
    flip(tmp_path / "kv" / "segment-00000000", extents[1].offset + at)
    with pytest.raises(Corrupt):
        log.read(extents[1], aligned_bytes(10_000))
    with pytest.raises(Corrupt):
        log.read_header(extents[1])
    log = open_log()
    assert [record.extent for record in log.scan()] == [extents[0], extents[2]]
    assert_holds(log, extents[0], 0)
    assert_holds(log, extents[2], 2)
    new = put(log, 9)
    assert new.offset > extents[2].offset


@pytest.mark.parametrize("at", [0, 1, PIECE_SIZE_MIN, 599_999])
def test_a_bit_flipped_in_a_payload_is_corrupt_where_it_is(
    open_log: Opener, tmp_path: Path, at: int
) -> None:
    log = open_log()
    extent = put(log, 1, 600_000)
    flip(tmp_path / "kv" / "segment-00000000", extent.offset + BLOCK_SIZE + at)
    with pytest.raises(Corrupt, match=f"piece {at // PIECE_SIZE_MIN}"):
        log.read(extent, aligned_bytes(600_000))
    for start in range(0, 600_000, PIECE_SIZE_MIN):
        out = aligned_bytes(min(PIECE_SIZE_MIN, 600_000 - start))
        if start <= at < start + PIECE_SIZE_MIN:
            with pytest.raises(Corrupt, match=f"piece {at // PIECE_SIZE_MIN}"):
                log.read_range(extent, start, out)
        else:
            log.read_range(extent, start, out)
            assert (out == pattern(1, 600_000)[start : start + out.size]).all()


def test_a_bit_flipped_in_the_padding_matters_to_nobody(open_log: Opener, tmp_path: Path) -> None:
    log = open_log()
    extent = put(log, 1, 10_000)
    flip(tmp_path / "kv" / "segment-00000000", extent.offset + BLOCK_SIZE + 10_001)
    assert_holds(log, extent, 1)


def test_a_damaged_segment_header_loses_that_segment_alone(
    open_log: Opener, tmp_path: Path
) -> None:
    log = open_log()
    held = fill(log)
    flip(tmp_path / "kv" / "segment-00000001", 50)
    log = open_log()
    assert {r.extent for r in log.scan()} == {
        extent for extent in held if extent.offset // SEGMENT_SIZE != 1
    }
    assert log.segments()[1].status == "void"


def test_a_segment_copied_to_another_slot_is_not_believed(open_log: Opener, tmp_path: Path) -> None:
    log = open_log()
    fill(log)
    folder = tmp_path / "kv"
    (folder / "segment-00000001").write_bytes((folder / "segment-00000000").read_bytes())
    log = open_log()
    assert not [r for r in log.scan() if r.extent.offset // SEGMENT_SIZE == 1]


def test_a_segment_cut_short_is_corrupt_behind_the_cut(open_log: Opener, tmp_path: Path) -> None:
    log = open_log()
    extents = [put(log, seed, 100_000) for seed in range(4)]
    os.truncate(tmp_path / "kv" / "segment-00000000", extents[2].offset + 50_000)
    assert_holds(log, extents[1], 1)
    for extent in extents[2:]:
        with pytest.raises(Corrupt):
            log.read(extent, aligned_bytes(100_000))
    log = open_log()
    assert extents[:2] == [r.extent for r in log.scan()][:2]
    assert_holds(log, extents[1], 1)
    assert_holds(log, put(log, 9, 100_000), 9)


def test_a_link_in_a_segments_place_is_not_followed(open_log: Opener, tmp_path: Path) -> None:
    log = open_log()
    held = fill(log)
    path, target = tmp_path / "kv" / "segment-00000001", tmp_path / "elsewhere"
    path.rename(target)
    path.symlink_to(target)
    before = target.read_bytes()
    log = open_log()
    assert [segment.slot for segment in log.segments()] == [0, 2, 3]
    assert len(list(log.scan())) == sum(extent.offset // SEGMENT_SIZE != 1 for extent in held)
    # Its slot is used again, and nothing is written where it led to.
    new = put(log, 9, 200_000)
    assert new.offset // SEGMENT_SIZE == 1
    assert_holds(log, new, 9)
    assert target.read_bytes() == before


def test_a_file_that_grew_is_cut_to_its_segment(open_log: Opener, tmp_path: Path) -> None:
    log = open_log()
    extent = put(log, 1)
    os.truncate(tmp_path / "kv" / "segment-00000000", 3 * SEGMENT_SIZE)
    log = open_log()
    assert disk_bytes(tmp_path / "kv") == SEGMENT_SIZE
    assert_holds(log, extent, 1)


@pytest.mark.parametrize("damage", ["lost", "flipped", "short"])
def test_a_lost_log_header_is_taken_from_the_segments(
    open_log: Opener, tmp_path: Path, damage: str
) -> None:
    log = open_log()
    held = {put(log, seed): seed for seed in range(3)}
    path = tmp_path / "kv" / "log"
    if damage == "lost":
        path.unlink()
    elif damage == "flipped":
        flip(path, 100)
    else:
        os.truncate(path, 100)
    log = open_log()
    newest = max(record.header.sequence for record in log.scan())
    assert {record.extent for record in log.scan()} == held.keys()
    for extent, seed in held.items():
        assert log.adopt(extent)
        assert_holds(log, extent, seed)
    assert log.read_header(put(log, 9)).sequence > newest


def test_another_version_or_segment_size_is_refused_and_left_alone(
    open_log: Opener, tmp_path: Path
) -> None:
    log = open_log()
    put(log, 1)
    log.close()
    with pytest.raises(ConfigError, match="segments of 1048576 bytes, 65536 asked for"):
        SegmentLog(tmp_path / "kv", SIZE, segment_size=65536)
    for name in ("log", "segment-00000000"):
        path = tmp_path / "kv" / name
        before = path.read_bytes()
        block = bytearray(before[:BLOCK_SIZE])
        block[8] = 2
        block[-8:] = checksum(block[:-8]).to_bytes(8, "little")
        path.write_bytes(bytes(block) + before[BLOCK_SIZE:])
        with pytest.raises(ConfigError, match="written by another kvd"):
            SegmentLog(tmp_path / "kv", SIZE, segment_size=SEGMENT_SIZE)
        path.write_bytes(before)
    log = open_log()
    assert log.num_extents == 0
    assert len(list(log.scan())) == 1


def test_segments_of_two_logs_without_a_header_are_refused(
    open_log: Opener, tmp_path: Path
) -> None:
    put(open_log(), 1)
    put(open_log(path=tmp_path / "other"), 1)
    folder = tmp_path / "kv"
    (tmp_path / "other" / "segment-00000000").rename(folder / "segment-00000001")
    (folder / "log").unlink()
    with pytest.raises(ConfigError, match="more than one log"):
        SegmentLog(folder, SIZE, segment_size=SEGMENT_SIZE)
