"""The index on disk: database keys and values to bytes and back. docs/formats/index.md.

One LMDB database, three kinds of entries, in this order: the header, the layouts, the records. The
one idea: each value ends with a checksum of its key and of itself, so that whatever a damaged file
gives, what passes was once put there. An *entry* is a database key and its value, end to end.

It imports neither LMDB nor numpy: the daemon and the index's own process both use it.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple, cast

import xxhash

from kvd.errors import Corrupt, InvalidRequest, Unsupported

if TYPE_CHECKING:
    from kvd.keys import ChunkKey

FORMAT_VERSION = 1

# What the segment log allows; more than a record there can have is refused here as well.
LABEL_SIZE_MAX = 2560
CODEC_SIZE_MAX = 32
# Far above any encoded layout, whose texts have 4 KiB each.
LAYOUT_SIZE_MAX = 64 << 10

LOG_ID_SIZE = 16
# Every database key but the header's: a kind, then a chunk's key or a layout's fingerprint.
NAME_SIZE = 33
# No entry is longer; what a damaged file calls longer is not even looked at.
ENTRY_SIZE_MAX = NAME_SIZE + LAYOUT_SIZE_MAX + 8

HEADER_NAME = b"\0"
LAYOUT_KIND = b"\1"
RECORD_KIND = b"\2"

_MAGIC = b"KVD-IDX\0"
_FLAG_COMPLETE = 1

_CHECKSUM = struct.Struct("<Q")
# Magic, version, flags, reserved, log id, total.
_HEADER = struct.Struct("<8sHHI16sQ")
# Key, offset, life, payload checksum, payload size, label size, codec size; behind the kind.
_RECORD = struct.Struct("<32sQQQQHB")
_FIXED_SIZE = 1 + _RECORD.size + _CHECKSUM.size
_VERSION = struct.Struct("<H")
# What a header of any version has: magic, version, checksum.
_HEADER_SIZE_MIN = len(_MAGIC) + _VERSION.size + _CHECKSUM.size


class IndexRecord(NamedTuple):
    """One durable copy of a chunk: where its record is in the segment log, and what is known of it
    without reading it. `size` is the payload's bytes, `checksum` its XXH3-64, `life` that of the
    segment.
    """

    key: ChunkKey
    offset: int
    size: int
    life: int
    checksum: int
    label: bytes
    codec: str = "raw"


class Header(NamedTuple):
    """Whose index this is. It is complete unless a rebuild has not ended yet. `total` is the sum of
    all other entries' checksums, modulo 2^64: an old page in a new one's place has another.
    """

    log_id: bytes
    is_complete: bool = False
    total: int = 0


def is_sealed(entry: bytes) -> bool:
    """Whether an entry is as it was written."""
    if len(entry) <= _CHECKSUM.size:
        return False
    return checksum_of(entry) == xxhash.xxh3_64_intdigest(entry[:-8])


def checksum_of(value: bytes) -> int:
    """The checksum that stands at the end of a value, or of an entry."""
    return int(_CHECKSUM.unpack_from(value, len(value) - 8)[0])


def pack_header(header: Header) -> bytes:
    """The value of the header."""
    flags = _FLAG_COMPLETE if header.is_complete else 0
    body = _HEADER.pack(_MAGIC, FORMAT_VERSION, flags, 0, header.log_id, header.total)
    return _seal(HEADER_NAME + body)[len(HEADER_NAME) :]


def parse_header(value: bytes) -> Header:
    """Raises `Corrupt`, and `Unsupported` for the header of another version."""
    entry = HEADER_NAME + value
    if not is_sealed(entry) or len(value) < _HEADER_SIZE_MIN or not value.startswith(_MAGIC):
        raise Corrupt("the index has no intact header")
    version = int(_VERSION.unpack_from(value, len(_MAGIC))[0])
    if version != FORMAT_VERSION:
        raise Unsupported(f"version {FORMAT_VERSION} of the index expected, found {version}")
    if len(value) != _HEADER.size + _CHECKSUM.size:
        raise Corrupt(f"the index's header cannot have {len(value)} bytes")
    _, _, flags, zero, log_id, total = _HEADER.unpack_from(value)
    if flags > _FLAG_COMPLETE or zero:
        raise Corrupt("the index's header has values that are not allowed")
    return Header(log_id, bool(flags), total)


def pack_record(record: IndexRecord) -> bytes:
    """The entry of a record. Raises `InvalidRequest` for one that no segment log holds."""
    codec = record.codec.encode()
    if len(record.label) > LABEL_SIZE_MAX:
        raise InvalidRequest(f"a label has {LABEL_SIZE_MAX} bytes, found {len(record.label)}")
    if not (0 < len(codec) <= CODEC_SIZE_MAX and record.codec.isascii()):
        raise InvalidRequest(f"a codec is 1..{CODEC_SIZE_MAX} of ASCII, found {record.codec!r}")
    head = _RECORD.pack(
        record.key,
        record.offset,
        record.life,
        record.checksum,
        record.size,
        len(record.label),
        len(codec),
    )
    return _seal(RECORD_KIND + head + codec + record.label)


def parse_record(entry: bytes) -> IndexRecord:
    """The inverse of `pack_record`; the caller has seen that the entry is sealed. Raises
    `Corrupt`.
    """
    size = len(entry)
    if size < _FIXED_SIZE:
        raise Corrupt(f"an index record has {_FIXED_SIZE} bytes or more, found {size}")
    key, offset, life, payload_checksum, payload_size, label_size, codec_size = _RECORD.unpack_from(
        entry, 1
    )
    if size != _FIXED_SIZE + label_size + codec_size or not codec_size:
        raise Corrupt(f"an index record of {size} bytes does not have the sizes it names")
    label_at = 1 + _RECORD.size + codec_size
    try:
        codec = str(entry[1 + _RECORD.size : label_at], "ascii")
    except UnicodeDecodeError as error:
        raise Corrupt("an index record's codec is not ASCII") from error
    return IndexRecord(
        cast("ChunkKey", key),
        offset,
        payload_size,
        life,
        payload_checksum,
        entry[label_at : label_at + label_size],
        codec,
    )


def record_offset(value: bytes) -> int:
    """Where the record of a stored value is in the segment log."""
    return int(_CHECKSUM.unpack_from(value)[0])


def record_name(key: bytes) -> bytes:
    """The database key of a chunk's record."""
    return RECORD_KIND + key


def pack_layout(fingerprint: bytes, encoded: bytes) -> bytes:
    """The entry of a layout. Raises `InvalidRequest` for one that is too long."""
    if len(encoded) > LAYOUT_SIZE_MAX or len(fingerprint) != NAME_SIZE - 1:
        raise InvalidRequest(
            f"a layout has a fingerprint of {NAME_SIZE - 1} bytes and at most {LAYOUT_SIZE_MAX} "
            f"more, found {len(fingerprint)} and {len(encoded)}"
        )
    return _seal(LAYOUT_KIND + fingerprint + encoded)


def parse_layout(entry: bytes) -> tuple[bytes, bytes]:
    """The inverse of `pack_layout`, under the same condition as `parse_record`."""
    if len(entry) < NAME_SIZE + _CHECKSUM.size:
        raise Corrupt(f"an index layout of {len(entry)} bytes is too short")
    return entry[1:NAME_SIZE], entry[NAME_SIZE:-8]


def _seal(data: bytes) -> bytes:
    return data + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(data))
