"""The segment format: round trips, bad bytes, stale records, and the page that describes it."""

from __future__ import annotations

import re
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvd.errors import Corrupt, InvalidRequest, Unsupported
from kvd.tiers import segment as fmt
from kvd.tiers.segment import (
    BLOCK_SIZE,
    LABEL_SIZE_MAX,
    PIECES_MAX,
    RUN_MAX,
    SEGMENT_SIZE_MAX,
    SEGMENT_SIZE_MIN,
    LogHeader,
    RecordHeader,
    SegmentHeader,
    checksum,
    num_pieces,
    pack_header,
    pack_log,
    pack_segment,
    parse_header,
    parse_log,
    parse_segment,
    payload_checksums,
    piece_checksums,
    piece_size,
    record_size,
)
from kvd.tiers.segment_scan import scan

PAGE = Path(__file__).parent.parent / "docs" / "formats" / "segment.md"

u64 = st.integers(1, 2**64 - 1)
log_ids = st.binary(min_size=16, max_size=16).filter(any)
segment_sizes = st.integers(SEGMENT_SIZE_MIN // BLOCK_SIZE, SEGMENT_SIZE_MAX // BLOCK_SIZE).map(
    lambda blocks: blocks * BLOCK_SIZE
)
codecs = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), min_size=1, max_size=32)

key_ids = st.one_of(st.just(bytes(16)), st.binary(min_size=16, max_size=16))
log_headers = st.builds(
    LogHeader,
    log_id=log_ids,
    segment_size=segment_sizes,
    run=st.integers(1, RUN_MAX),
    key_id=key_ids,
)
segment_headers = st.builds(
    SegmentHeader,
    log_id=log_ids,
    segment_size=segment_sizes,
    slot=st.integers(0, 2**32 - 1),
    life=u64,
    sequence=u64,
    key_id=key_ids,
)


def seals(count: int) -> st.SearchStrategy[dict[str, object]]:
    """The fields of an encrypted record of so many pieces."""
    tags = st.binary(min_size=16, max_size=16)
    return st.fixed_dictionaries(
        {
            "key_id": st.binary(min_size=16, max_size=16).filter(any),
            "nonce": st.binary(min_size=12, max_size=12),
            "tag": tags,
            "tags": st.lists(tags, min_size=count, max_size=count).map(tuple),
        }
    )


@st.composite
def record_headers(draw: st.DrawFn) -> RecordHeader:
    size = draw(st.integers(1, 40 << 20))
    count = num_pieces(size)
    pieces = draw(st.lists(u64, min_size=count, max_size=count))
    sealed = draw(st.one_of(st.just({}), seals(count)))
    return RecordHeader(
        log_id=draw(log_ids),
        life=draw(u64),
        sequence=draw(u64),
        offset=draw(st.integers(1, 1000)) * BLOCK_SIZE,
        payload_size=size,
        payload_checksum=draw(st.integers(0, 2**64 - 1)),
        pieces=tuple(pieces),
        label=draw(st.binary(max_size=LABEL_SIZE_MAX)),
        codec=draw(codecs),
        **sealed,
    )


RECORD = RecordHeader(
    log_id=bytes(range(1, 17)),
    life=0x1111,
    sequence=(1 << 40) + 2,
    offset=BLOCK_SIZE,
    payload_size=600_000,
    payload_checksum=0x2222,
    pieces=(3, 4, 5),
    label=b"what it is",
    codec="cachegen/1",
)
SEALED = replace(
    RECORD, key_id=b"k" * 16, nonce=b"n" * 12, tag=b"t" * 16, tags=(b"1" * 16, b"2" * 16, b"3" * 16)
)
SEGMENT = SegmentHeader(
    log_id=RECORD.log_id,
    segment_size=64 * BLOCK_SIZE,
    slot=3,
    life=0x1111,
    sequence=(1 << 40) + 1,
)
LOG = LogHeader(log_id=RECORD.log_id, segment_size=SEGMENT.segment_size, run=1)

BLOCKS = [
    (pack_log(LOG), parse_log),
    (pack_segment(SEGMENT), parse_segment),
    (pack_header(RECORD), parse_header),
    (pack_header(SEALED), parse_header),
]


def resealed(block: bytes, at: int, value: bytes) -> bytes:
    """The block with other bytes at `at` and a checksum that fits: a writer's lie, not bit rot."""
    changed = bytearray(block)
    changed[at : at + len(value)] = value
    struct.pack_into("<Q", changed, BLOCK_SIZE - 8, checksum(changed[: BLOCK_SIZE - 8]))
    return bytes(changed)


@given(log_headers, segment_headers, record_headers())
def test_headers_come_back_as_they_went_in(
    log: LogHeader, segment: SegmentHeader, record: RecordHeader
) -> None:
    assert parse_log(pack_log(log)) == log
    assert parse_segment(pack_segment(segment)) == segment
    assert parse_header(pack_header(record)) == record


@pytest.mark.parametrize(("block", "parse"), BLOCKS, ids=["log", "segment", "record", "sealed"])
def test_every_flipped_byte_is_corrupt(block: bytes, parse: object) -> None:
    assert callable(parse)
    for at in range(BLOCK_SIZE):
        for mask in (0x01, 0x80, 0xFF):
            flipped = bytearray(block)
            flipped[at] ^= mask
            with pytest.raises(Corrupt):
                parse(flipped)


@pytest.mark.parametrize(("block", "parse"), BLOCKS, ids=["log", "segment", "record", "sealed"])
def test_every_truncated_block_is_corrupt(block: bytes, parse: object) -> None:
    assert callable(parse)
    for size in range(BLOCK_SIZE):
        with pytest.raises(Corrupt):
            parse(block[:size])
    with pytest.raises(Corrupt):
        parse(block + b"\0")


@pytest.mark.parametrize(("block", "parse"), BLOCKS, ids=["log", "segment", "record", "sealed"])
def test_a_lie_with_a_good_checksum_is_refused_or_reads_as_what_it_says(
    block: bytes, parse: object
) -> None:
    assert callable(parse)
    packers = {LogHeader: pack_log, SegmentHeader: pack_segment, RecordHeader: pack_header}
    for at in range(BLOCK_SIZE - 8):
        for value in (b"\0", b"\x01", b"\xff"):
            lie = resealed(block, at, value)
            try:
                header = parse(lie)
            except (Corrupt, Unsupported):
                continue
            # Whatever is accepted is in the only form that a writer gives it.
            assert packers[type(header)](header) == lie


@given(st.sampled_from(BLOCKS), st.binary(max_size=2 * BLOCK_SIZE))
def test_noise_is_corrupt(case: tuple[bytes, object], noise: bytes) -> None:
    assert callable(case[1])
    with pytest.raises(Corrupt):
        case[1](noise)


@pytest.mark.parametrize(("block", "parse"), BLOCKS, ids=["log", "segment", "record", "sealed"])
def test_an_intact_block_of_another_version_is_told_apart(block: bytes, parse: object) -> None:
    assert callable(parse)
    with pytest.raises(Unsupported, match="found 2"):
        parse(resealed(block, 8, b"\x02\x00"))


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (10, b"\x02"),  # an unknown flag
        (10, b"\x01"),  # an end mark with a payload
        (12, b"\x00\x20"),  # another block size
        (16, bytes(16)),  # no log id
        (32, bytes(8)),  # no life
        (40, bytes(8)),  # no sequence
        (48, b"\x01"),  # an offset within a block
        (48, bytes(8)),  # the offset of the segment's header
        (56, b"\xff" * 8),  # a payload larger than every segment
        (72, b"\x01"),  # a piece size that does not follow from the payload's
        (76, b"\x04"),  # one piece too many
        (80, b"\xff\xff"),  # a label beyond its room
        (100, b"\x01"),  # a nonce without a key
        (112, b"\x01"),  # a tag without a key
        (128, bytes(32)),  # no codec
        (130, b"\n"),  # a codec that cannot be printed
        (130, b"\x00"),  # a codec with a hole
        (200, b"\x01"),  # reserved bytes
        (256 + 24, b"\x01"),  # behind the last piece
        (512, b"\x01"),  # a piece's tag without a key
        (1024, b"\x01"),  # reserved bytes
        (1280 + 10, b"\x01"),  # behind the label
        (3840, b"\x01"),  # reserved bytes
    ],
)
def test_a_record_header_that_cannot_be_is_corrupt(at: int, value: bytes) -> None:
    with pytest.raises(Corrupt):
        parse_header(resealed(pack_header(RECORD), at, value))


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (84, bytes(16)),  # tags without a key
        (512 + 3 * 16, b"\x01"),  # behind the last tag
        (1279, b"\x01"),  # reserved bytes
    ],
)
def test_a_sealed_header_that_cannot_be_is_corrupt(at: int, value: bytes) -> None:
    with pytest.raises(Corrupt):
        parse_header(resealed(pack_header(SEALED), at, value))


@given(st.integers(1, SEGMENT_SIZE_MAX - 2 * BLOCK_SIZE))
def test_pieces_are_few_and_cover_the_payload(size: int) -> None:
    assert 1 <= num_pieces(size) <= PIECES_MAX
    assert (num_pieces(size) - 1) * piece_size(size) < size <= num_pieces(size) * piece_size(size)
    assert piece_size(size) % BLOCK_SIZE == 0


@given(st.integers(1, 3 << 20))
@settings(max_examples=20, deadline=None)
def test_the_checksums_are_those_of_the_whole_and_of_its_parts(size: int) -> None:
    payload = np.resize(np.arange(251, dtype=np.uint8), size)
    whole, pieces = payload_checksums(payload)
    assert whole == checksum(payload.tobytes())
    step = piece_size(size)
    parts = [payload[at : at + step].tobytes() for at in range(0, size, step)]
    assert list(pieces) == [checksum(part) for part in parts]


def test_a_record_that_cannot_be_is_refused() -> None:
    for size, label, codec in [
        (0, b"", "raw"),
        (15 * BLOCK_SIZE, b"", "raw"),
        (1, bytes(LABEL_SIZE_MAX + 1), "raw"),
        (1, b"", ""),
        (1, b"", "ü"),
        (1, b"", "x" * 33),
    ]:
        with pytest.raises(InvalidRequest):
            fmt.check_record(size, label, codec, segment_size=16 * BLOCK_SIZE)


class Image:
    """A segment in memory, written record by record."""

    def __init__(self, header: SegmentHeader = SEGMENT) -> None:
        self.header = header
        self.bytes = bytearray(header.segment_size)
        self.bytes[:BLOCK_SIZE] = pack_segment(header)
        self.at = BLOCK_SIZE
        self.sequence = header.sequence
        self.unreadable: set[int] = set()

    def append(self, payload: bytes, label: bytes = b"", **changes: object) -> RecordHeader:
        self.sequence += 1
        data = np.frombuffer(payload, dtype=np.uint8)
        record = RecordHeader(
            log_id=self.header.log_id,
            life=self.header.life,
            sequence=self.sequence,
            offset=self.at,
            payload_size=len(payload),
            payload_checksum=checksum(payload) if payload else 0,
            pieces=payload_checksums(data)[1] if payload else (),
            label=label,
            is_end=not payload,
        )
        record = replace(record, **changes)  # type: ignore[arg-type]
        self.bytes[self.at : self.at + BLOCK_SIZE] = pack_header(record)
        self.bytes[self.at + BLOCK_SIZE : self.at + BLOCK_SIZE + len(payload)] = payload
        self.at += record_size(len(payload))
        return record

    def scan(self, header: SegmentHeader | None = None) -> list[RecordHeader]:
        return list(scan(header or self.header, self.read))

    def read(self, offset: int, size: int) -> bytes | None:
        if any(offset <= bad < offset + size for bad in self.unreadable):
            return None
        return bytes(self.bytes[offset : offset + size])


def test_a_scan_finds_every_record_and_stops_at_the_end_mark() -> None:
    image = Image()
    written = [image.append(bytes([i]) * (1 + 3000 * i), b"%d" % i) for i in range(6)]
    assert image.scan() == written
    mark = image.append(b"")
    assert image.scan() == [*written, mark]


@given(st.lists(st.integers(1, 20_000), min_size=1, max_size=8), st.data())
@settings(max_examples=50, deadline=None)
def test_a_lost_record_does_not_hide_those_behind_it(sizes: list[int], data: st.DataObject) -> None:
    image = Image()
    written = [image.append(b"\xaa" * size) for size in sizes]
    lost = data.draw(st.sampled_from(written))
    if data.draw(st.booleans()):
        image.bytes[lost.offset + data.draw(st.integers(0, BLOCK_SIZE - 1))] ^= 0x40
    else:
        image.unreadable.add(lost.offset)
    assert image.scan() == [record for record in written if record is not lost]


def test_what_an_earlier_life_left_is_never_found() -> None:
    image = Image()
    for index in range(6):
        image.append(b"old" * 1000, b"old %d" % index)
    next_life = replace(SEGMENT, life=0x9999, sequence=image.sequence + 1)
    image.header, image.at, image.sequence = next_life, BLOCK_SIZE, next_life.sequence
    image.bytes[:BLOCK_SIZE] = pack_segment(next_life)
    assert image.scan() == []
    # As long as an old one: the next old record's header stands right where a scan looks.
    new = image.append(b"new" * 1000)
    assert image.scan() == [new]


def test_what_a_run_lost_does_not_come_back_behind_what_a_later_run_wrote() -> None:
    image = Image()
    kept = image.append(b"k" * 5000)
    lost = image.append(b"l" * 5000)
    behind = image.append(b"b" * 5000)
    # A crash took `lost`; the next run saw no more than `kept`, and goes on there.
    image.at = lost.offset
    image.sequence = 2 << 40
    new = image.append(b"n" * 5000)
    assert new.end == behind.offset
    assert image.scan() == [kept, new]


@pytest.mark.parametrize(
    "lie",
    [
        {"life": 0x1112},
        {"log_id": bytes(range(2, 18))},
        {"offset": 2 * BLOCK_SIZE},
        {"sequence": SEGMENT.sequence},
        {"payload_size": 200_000, "pieces": (7,), "payload_checksum": 7, "offset": 20 * BLOCK_SIZE},
        {"key_id": b"k" * 16, "tags": (bytes(16),)},
    ],
)
def test_a_record_of_elsewhere_is_not_taken_for_ours(lie: dict[str, object]) -> None:
    image = Image()
    if lie.get("offset") == 20 * BLOCK_SIZE:
        image.at = 20 * BLOCK_SIZE
    image.append(b"x" * 5000, **lie)
    if "payload_size" in lie:
        # It would end behind the segment.
        image.header = replace(SEGMENT, segment_size=60 * BLOCK_SIZE)
    assert image.scan() == []


def hex_dump(title: str) -> dict[int, bytes]:
    """Bytes by offset of the page's dump under `title`."""
    text = PAGE.read_text().split(f"### {title}", 1)[1].split("```")[1]
    found = {}
    for line in text.strip().splitlines():
        match = re.match(r"([0-9a-f]{4})  ((?:[0-9a-f]{2} ?)+)", line)
        assert match, line
        found[int(match[1], 16)] = bytes.fromhex(match[2])
    return found


def block_of(dump: dict[int, bytes]) -> bytes:
    block = bytearray(BLOCK_SIZE)
    for at, content in dump.items():
        block[at : at + len(content)] = content
    return bytes(block)


def test_the_pages_example_is_what_the_code_writes() -> None:
    log_id = bytes(range(0x10, 0x20))
    log = LogHeader(log_id=log_id, segment_size=256 << 20, run=1)
    segment = SegmentHeader(
        log_id=log_id,
        segment_size=256 << 20,
        slot=7,
        life=0x0123456789ABCDEF,
        sequence=(1 << 40) + 1,
    )
    payload = np.frombuffer(b"kvd" * 100_000, dtype=np.uint8)
    record = RecordHeader(
        log_id=log_id,
        life=segment.life,
        sequence=(1 << 40) + 2,
        offset=4096,
        payload_size=300_000,
        payload_checksum=checksum(payload),
        pieces=piece_checksums(payload),
        label=b"hello",
    )
    for title, header, pack, parse in [
        ("The log", log, pack_log, parse_log),
        ("A segment", segment, pack_segment, parse_segment),
        ("A record", record, pack_header, parse_header),
    ]:
        block = block_of(hex_dump(title))
        assert parse(block) == header  # type: ignore[operator]
        assert pack(header) == block  # type: ignore[operator]


def test_the_page_names_the_real_limits() -> None:
    text = PAGE.read_text()
    numbers = (BLOCK_SIZE, LABEL_SIZE_MAX, PIECES_MAX, SEGMENT_SIZE_MIN, SEGMENT_SIZE_MAX, RUN_MAX)
    for number in numbers:
        assert f"{number:,}" in text
    assert f"version {fmt.FORMAT_VERSION}" in text
