"""Frames: what the daemon and the process of its index say to each other, over a socket pair.

    u32, bytes that follow | kind, 1 byte | body

    daemon to index
      LOOK     walk the database that is there, copy what is good, put the copy in its place
      BEGIN    begin an empty database beside the one that is there
      WRITE    changes: one transaction in the database that is open
      PLACE    1 byte, 1 if complete: the database that was begun takes the other's place
    index to daemon
      ENTRIES  while LOOK walks: what it found, each a change of kind PUT
      WALKED   LOOK has seen all; UTF-8: why the index must be rebuilt, empty if it need not
      DONE     LOOK, BEGIN, WRITE or PLACE is done; WRITE is durable if the database is in place
      FAILED   UTF-8: why it is not done. The process ends; what was done before stays

A change is a u32 of the bytes that follow, then 1 byte PUT and an entry, or 1 byte DELETE, a
database key and a u64 offset, or 1 byte SYNC: when the transaction is durable, no power cut shall
take it either. At most one of LOOK, BEGIN, WRITE, PLACE is under way. The index ends
at the end of its input. This is no format of anything kept: both ends are always of one version.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from kvd.errors import Corrupt

LOOK = b"l"
BEGIN = b"b"
WRITE = b"w"
PLACE = b"p"
ENTRIES = b"e"
WALKED = b"k"
DONE = b"d"
FAILED = b"f"

PUT = 0
DELETE = 1
SYNC = 2

# What one frame carries where there is more to say: large enough that a frame costs nothing, small
# enough that neither end stands still over it for long.
BODY_SIZE = 1 << 20
# A frame that says it is longer is no frame: one change may go beyond `BODY_SIZE`.
FRAME_SIZE_MAX = 2 * BODY_SIZE

HEAD = struct.Struct("<Ic")
_SIZE = struct.Struct("<I")
_OFFSET = struct.Struct("<Q")


def pack_frame(kind: bytes, body: bytes = b"") -> bytes:
    """A frame, ready to be sent."""
    return HEAD.pack(1 + len(body), kind) + body


def parse_head(head: bytes) -> tuple[bytes, int]:
    """The kind of a frame and the size of its body. Raises `Corrupt` for an impossible one."""
    size, kind = HEAD.unpack(head)
    if not 0 < size <= FRAME_SIZE_MAX:
        raise Corrupt(f"a frame of 1..{FRAME_SIZE_MAX} bytes expected, found {size}")
    return kind, size - 1


def pack_put(entry: bytes) -> bytes:
    """The change that puts an entry there, in place of one with the same database key."""
    return b"%b\0%b" % (_SIZE.pack(1 + len(entry)), entry)


def pack_delete(name: bytes, offset: int) -> bytes:
    """The change that takes a record away, if it is at `offset` of the segment log."""
    return b"%b\1%b%b" % (_SIZE.pack(9 + len(name)), name, _OFFSET.pack(offset))


def pack_sync() -> bytes:
    """The change that changes nothing, and makes all before it safe from a power cut."""
    return _SIZE.pack(1) + bytes([SYNC])


def parse_delete(change: bytes) -> tuple[bytes, int]:
    """The database key and the offset of a change of kind DELETE."""
    return change[:-8], int(_OFFSET.unpack(change[-8:])[0])


def changes(body: bytes) -> Iterator[tuple[int, bytes]]:
    """Each change of a body: its kind, and what stands behind that. Raises `Corrupt`."""
    at, end = 0, len(body)
    while at < end:
        start = at + _SIZE.size
        at = start + (_SIZE.unpack_from(body, at)[0] if start <= end else 0)
        if at > end or at <= start:
            raise Corrupt("a change does not end within its frame")
        yield body[start], body[start + 1 : at]
