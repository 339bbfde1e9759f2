"""Segment: the format of the NVMe log, bytes to values and back. docs/formats/segment.md.

Everything is cut into blocks of 4 KiB; a block that describes something ends with its own checksum,
at the same place in every version. The one idea: a record names the *life* of its segment, a number
drawn when the segment was opened for writing. A segment that is used again has another life, and
what the last one left behind means nothing.

    segment    header | record | record | ...            | end
    record     header block: label, checksums, place     | payload, padded to a block

A payload is cut into pieces, each with its checksum in the header: a part can be read and verified
by itself, and nobody needs a checksum of the whole. Encrypted (cipher.py), a piece has its tag
there too, and the checksums are those of what stands on the device.

No I/O here.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from kvd.errors import Corrupt, InvalidRequest, Unsupported

FORMAT_VERSION = 1

BLOCK_SIZE = 4096
SEGMENT_SIZE_DEFAULT = 256 << 20
SEGMENT_SIZE_MIN = 4 * BLOCK_SIZE
# Offsets within a segment stay far below what one write call takes.
SEGMENT_SIZE_MAX = 1 << 30

LABEL_SIZE_MAX = 2560
CODEC_SIZE_MAX = 32

# Parts of a payload that can be verified by themselves: 256 KiB, or what makes few enough of them
# for the checksums and tags of all to stand in the header.
PIECE_SIZE_MIN = 256 << 10
PIECES_MAX = 32

# Sequences are (run << 40) + count: each run of the log begins above all that were before it.
RUN_SHIFT = 40
RUN_MAX = (1 << 24) - 1

KEY_ID_SIZE = 16
NONCE_SIZE = 12
TAG_SIZE = 16
# The key id of what is not encrypted.
NO_KEY = bytes(KEY_ID_SIZE)

FLAG_END = 1

_MAGIC_LOG = b"KVD-LOG\0"
_MAGIC_SEGMENT = b"KVD-SEG\0"
MAGIC_RECORD = b"KVD-REC\0"

# Each block: magic, version, flags, block size, log id.
_HEAD = struct.Struct("<8sHHI16s")
_LOG = struct.Struct("<QQ16s")
_SEGMENT = struct.Struct("<QQQQ16s")
# ... life, sequence, offset, payload size, payload checksum, piece size, num pieces, label size,
# key id, nonce, tag, codec.
_RECORD = struct.Struct("<QQQQQIII16s12s16s32s")
_PIECES_AT = 256
_TAGS_AT = _PIECES_AT + 8 * PIECES_MAX
_LABEL_AT = 1280
_LABEL_END = _LABEL_AT + LABEL_SIZE_MAX
CHECKSUM_AT = BLOCK_SIZE - 8

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True, kw_only=True)
class LogHeader:
    """The log as a whole: who it is, how large its segments are, how often it was opened."""

    log_id: bytes
    segment_size: int
    run: int
    key_id: bytes = NO_KEY

    def __post_init__(self) -> None:
        _want(len(self.log_id) == 16 and any(self.log_id), "log id")
        _want(len(self.key_id) == KEY_ID_SIZE, "key id")
        check_segment_size(self.segment_size)
        _want(0 < self.run <= RUN_MAX, "run")


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentHeader:
    """One life of one segment. `sequence` is below that of each of its records."""

    log_id: bytes
    segment_size: int
    slot: int
    life: int
    sequence: int
    key_id: bytes = NO_KEY

    def __post_init__(self) -> None:
        _want(len(self.log_id) == 16 and any(self.log_id), "log id")
        _want(len(self.key_id) == KEY_ID_SIZE, "key id")
        check_segment_size(self.segment_size)
        _want(0 <= self.slot < 1 << 32, "slot")
        _want(0 < self.life < 1 << 64, "life")
        _want(0 < self.sequence < 1 << 64, "sequence")


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordHeader:
    """What stands before a payload. `offset` is the header's own, in bytes from the segment's
    start; `is_end` marks the block behind a full segment's last record.

    `payload_checksum` is the storer's own, 0 for none. Of an encrypted record it is encrypted too,
    as long as `Cipher.open_header` has not seen the header; `tags` are those of the pieces.
    """

    log_id: bytes
    life: int
    sequence: int
    offset: int
    payload_size: int
    payload_checksum: int
    pieces: tuple[int, ...]
    label: bytes
    codec: str = "raw"
    is_end: bool = False
    key_id: bytes = NO_KEY
    nonce: bytes = bytes(NONCE_SIZE)
    tag: bytes = bytes(TAG_SIZE)
    tags: tuple[bytes, ...] = ()

    def __post_init__(self) -> None:
        _want(len(self.log_id) == 16 and any(self.log_id), "log id")
        _want(0 < self.life < 1 << 64, "life")
        _want(0 < self.sequence < 1 << 64, "sequence")
        _want(BLOCK_SIZE <= self.offset < SEGMENT_SIZE_MAX, "offset")
        _want(self.offset % BLOCK_SIZE == 0, "offset")
        _want(0 <= self.payload_size < SEGMENT_SIZE_MAX, "payload size")
        _want(self.is_end == (self.payload_size == 0), "end mark")
        _want(0 <= self.payload_checksum < 1 << 64, "payload checksum")
        _want(len(self.pieces) == num_pieces(self.payload_size), "count of pieces")
        _want(len(self.label) <= LABEL_SIZE_MAX, "label's length")
        _want(not (self.is_end and (self.label or self.payload_checksum)), "end mark")
        _want(0 < len(self.codec) <= CODEC_SIZE_MAX, "codec's length")
        _want(self.codec.isascii() and self.codec.isprintable(), "codec")
        self._check_cipher()

    def _check_cipher(self) -> None:
        _want(len(self.key_id) == KEY_ID_SIZE, "key id")
        _want(len(self.nonce) == NONCE_SIZE and len(self.tag) == TAG_SIZE, "tag")
        _want(all(len(tag) == TAG_SIZE for tag in self.tags), "tag")
        if self.is_encrypted:
            _want(len(self.tags) == len(self.pieces) > 0, "count of tags")
        else:
            _want(not (any(self.nonce) or any(self.tag) or self.tags), "tag")

    @property
    def is_encrypted(self) -> bool:
        """Whether the payload needs a key."""
        return self.key_id != NO_KEY

    @property
    def end(self) -> int:
        """Offset behind the record, in bytes from the segment's start."""
        return self.offset + record_size(self.payload_size)


def check_segment_size(size: int) -> None:
    """Raise `Corrupt` for a size that no segment has."""
    is_fit = SEGMENT_SIZE_MIN <= size <= SEGMENT_SIZE_MAX and size % BLOCK_SIZE == 0
    _want(is_fit, "segment size")


def check_record(payload_size: int, label: bytes, codec: str, *, segment_size: int) -> None:
    """Raise `InvalidRequest` for a record that fits into no segment of that size."""
    longest = payload_size_max(segment_size)
    if not 0 < payload_size <= longest:
        raise InvalidRequest(f"a payload has 1..{longest} bytes, found {payload_size}")
    if len(label) > LABEL_SIZE_MAX:
        raise InvalidRequest(f"a label has at most {LABEL_SIZE_MAX} bytes, found {len(label)}")
    if not (0 < len(codec) <= CODEC_SIZE_MAX and codec.isascii() and codec.isprintable()):
        raise InvalidRequest(f"a codec's name is 1..{CODEC_SIZE_MAX} ASCII letters, found {codec}")


def record_size(payload_size: int) -> int:
    """Bytes that a record takes, header and padding included."""
    return BLOCK_SIZE + padded(payload_size)


def payload_size_max(segment_size: int) -> int:
    """Bytes of the longest payload: a segment holds its header and at least one record."""
    return segment_size - 2 * BLOCK_SIZE


def padded(size: int) -> int:
    """`size` in whole blocks."""
    return -(-size // BLOCK_SIZE) * BLOCK_SIZE


def piece_size(payload_size: int) -> int:
    """Bytes of a payload's pieces but the last: the least power of two that gives few enough."""
    size = PIECE_SIZE_MIN
    while size * PIECES_MAX < payload_size:
        size *= 2
    return size


def num_pieces(payload_size: int) -> int:
    """How many pieces a payload has."""
    return -(-payload_size // piece_size(payload_size))


def checksum(payload: NDArray[np.uint8] | Buffer) -> int:
    """XXH3-64 with seed 0."""
    # Not `xxh3_64_intdigest`: that one keeps the interpreter to itself while it works.
    running = xxhash.xxh3_64()
    running.update(payload)
    return running.intdigest()


def payload_checksums(payload: NDArray[np.uint8]) -> tuple[int, tuple[int, ...]]:
    """The checksum of `payload`, `uint8 [size]`, and that of each of its pieces.

    Piece by piece, so that the second look at a piece finds it in the processor's cache.
    """
    pieces = pieces_of(payload)
    if len(pieces) == 1:
        whole = checksum(payload)
        return whole, (whole,)
    running = xxhash.xxh3_64()
    checksums = []
    for piece in pieces:
        checksums.append(checksum(piece))
        running.update(piece)
    return running.intdigest(), tuple(checksums)


def piece_checksums(payload: NDArray[np.uint8]) -> tuple[int, ...]:
    """The checksum of each piece of `payload`, `uint8 [size]`."""
    return tuple(checksum(piece) for piece in pieces_of(payload))


def pieces_of(payload: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    """The pieces of `payload`, `uint8 [size]`, in its own memory."""
    step = piece_size(payload.size)
    return [payload[at : at + step] for at in range(0, payload.size, step)]


def pack_log(header: LogHeader) -> bytes:
    """One block."""
    block = _block(_MAGIC_LOG, 0, header.log_id)
    _LOG.pack_into(block, _HEAD.size, header.segment_size, header.run, header.key_id)
    return _sealed(block)


def parse_log(block: Buffer) -> LogHeader:
    """The log's header. Raises `Corrupt`, or `Unsupported` for an intact one of another version."""
    log_id, _ = _parse_head(block, _MAGIC_LOG, flags_known=0)
    segment_size, run, key_id = _LOG.unpack_from(block, _HEAD.size)
    _want_zeros(block, _HEAD.size + _LOG.size, CHECKSUM_AT)
    return LogHeader(log_id=log_id, segment_size=segment_size, run=run, key_id=key_id)


def pack_segment(header: SegmentHeader) -> bytes:
    """One block."""
    block = _block(_MAGIC_SEGMENT, 0, header.log_id)
    values = (header.segment_size, header.slot, header.life, header.sequence, header.key_id)
    _SEGMENT.pack_into(block, _HEAD.size, *values)
    return _sealed(block)


def parse_segment(block: Buffer) -> SegmentHeader:
    """A segment's header. Raises `Corrupt`, or `Unsupported` for one of another version."""
    log_id, _ = _parse_head(block, _MAGIC_SEGMENT, flags_known=0)
    size, slot, life, sequence, key_id = _SEGMENT.unpack_from(block, _HEAD.size)
    _want_zeros(block, _HEAD.size + _SEGMENT.size, CHECKSUM_AT)
    return SegmentHeader(
        log_id=log_id,
        segment_size=size,
        slot=slot,
        life=life,
        sequence=sequence,
        key_id=key_id,
    )


def pack_header(header: RecordHeader) -> bytes:
    """One block."""
    block = _block(MAGIC_RECORD, FLAG_END if header.is_end else 0, header.log_id)
    _RECORD.pack_into(
        block,
        _HEAD.size,
        header.life,
        header.sequence,
        header.offset,
        header.payload_size,
        header.payload_checksum,
        piece_size(header.payload_size),
        len(header.pieces),
        len(header.label),
        header.key_id,
        header.nonce,
        header.tag,
        header.codec.encode("ascii"),
    )
    struct.pack_into(f"<{len(header.pieces)}Q", block, _PIECES_AT, *header.pieces)
    tags = b"".join(header.tags)
    block[_TAGS_AT : _TAGS_AT + len(tags)] = tags
    block[_LABEL_AT : _LABEL_AT + len(header.label)] = header.label
    return _sealed(block)


def parse_header(block: Buffer) -> RecordHeader:
    """A record's header. Raises `Corrupt`, or `Unsupported` for one of another version.

    Whether it belongs to its segment is for `belongs` to say.
    """
    log_id, flags = _parse_head(block, MAGIC_RECORD, flags_known=FLAG_END)
    life, sequence, offset, size, payload_checksum, piece, count, label_size, *rest = (
        _RECORD.unpack_from(block, _HEAD.size)
    )
    key_id, nonce, tag, codec = rest
    _want(size < SEGMENT_SIZE_MAX and piece == piece_size(size), "piece size")
    _want(count == num_pieces(size), "count of pieces")
    _want(label_size <= LABEL_SIZE_MAX, "label's length")
    codec = codec.rstrip(b"\0")
    _want(codec.isascii(), "codec")
    num_tags = count if key_id != NO_KEY else 0
    tags_end = _TAGS_AT + TAG_SIZE * num_tags
    _want_zeros(block, _HEAD.size + _RECORD.size, _PIECES_AT)
    _want_zeros(block, _PIECES_AT + 8 * count, _TAGS_AT)
    _want_zeros(block, tags_end, _LABEL_AT)
    _want_zeros(block, _LABEL_AT + label_size, CHECKSUM_AT)
    return RecordHeader(
        log_id=log_id,
        life=life,
        sequence=sequence,
        offset=offset,
        payload_size=size,
        payload_checksum=payload_checksum,
        pieces=struct.unpack_from(f"<{count}Q", block, _PIECES_AT),
        label=bytes(block[_LABEL_AT : _LABEL_AT + label_size]),
        codec=codec.decode("ascii"),
        is_end=bool(flags & FLAG_END),
        key_id=key_id,
        nonce=nonce,
        tag=tag,
        tags=tuple(bytes(block[at : at + TAG_SIZE]) for at in range(_TAGS_AT, tags_end, TAG_SIZE)),
    )


def belongs(record: RecordHeader, segment: SegmentHeader, offset: int) -> bool:
    """The record was written at `offset` of this segment in this life, with its key if it has one,
    and ends within it.
    """
    return (
        record.log_id == segment.log_id
        and record.life == segment.life
        and record.sequence > segment.sequence
        and record.offset == offset
        and record.end <= segment.segment_size
        and (record.is_end or record.key_id == segment.key_id)
    )


def _block(magic: bytes, flags: int, log_id: bytes) -> bytearray:
    block = bytearray(BLOCK_SIZE)
    _HEAD.pack_into(block, 0, magic, FORMAT_VERSION, flags, BLOCK_SIZE, log_id)
    return block


def _sealed(block: bytearray) -> bytes:
    struct.pack_into("<Q", block, CHECKSUM_AT, checksum(memoryview(block)[:CHECKSUM_AT]))
    return bytes(block)


def _parse_head(block: Buffer, magic: bytes, *, flags_known: int) -> tuple[bytes, int]:
    _want(len(block) == BLOCK_SIZE, "block's length")
    found_magic, version, flags, block_size, log_id = _HEAD.unpack_from(block)
    _want(found_magic == magic, "magic")
    (found,) = struct.unpack_from("<Q", block, CHECKSUM_AT)
    _want(found == checksum(memoryview(block)[:CHECKSUM_AT]), "header's checksum")
    if version != FORMAT_VERSION:
        raise Unsupported(f"segment format {FORMAT_VERSION} expected, found {version}")
    _want(block_size == BLOCK_SIZE, "block size")
    _want(flags & ~flags_known == 0, "flag")
    return log_id, flags


def _want_zeros(block: Buffer, start: int, end: int) -> None:
    # Compared as a whole: a look at each byte takes longer than the checksum of the payload.
    _want(bytes(block[start:end]) == bytes(end - start), "reserved bytes")


def _want(is_good: bool, what: str) -> None:
    if not is_good:
        raise Corrupt(f"a bad {what} in a block of the segment log")
