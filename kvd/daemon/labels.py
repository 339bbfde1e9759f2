"""Labels: what a record in the segment log says of its chunk. docs/formats/index.md.

A label is the chunk's meta, its tenant and its end if it has one, in bytes of one form only: what
decodes encodes to the same bytes again. It has no checksum of its own, since it lies in a header or
a value that has one.
"""

from __future__ import annotations

import struct
from hashlib import blake2b
from typing import NamedTuple

from kvd.chunk import CATEGORY_SIZE_MAX, REUSE_SIZE_MAX, ChunkMeta, Fingerprint
from kvd.daemon.expiries import Stamp
from kvd.errors import Corrupt, InvalidRequest
from kvd.keys import KEY_SIZE, ChunkKey, short
from kvd.proto.limits import TTL_NS_MAX

LABEL_VERSION = 1

# Behind a codec's name, in records and index: what it gives back is near the chunk, not the chunk.
APPROXIMATE = "~"

TENANT_SIZE = 8
NO_TENANT = bytes(TENANT_SIZE)

# Version, flags, category size, reserved, tokens, start, prefill, reuse size, reserved, tenant,
# key, layout, parent.
_HEAD = struct.Struct("<BBBBIQIHH8s32s32s32s")

# End and time to live, behind the head of a chunk that has them.
_END = struct.Struct("<QQ")

LABEL_SIZE_MAX = _HEAD.size + _END.size + CATEGORY_SIZE_MAX + REUSE_SIZE_MAX

_FLAG_PARENT = 1
_FLAG_END = 2
_NO_PARENT = bytes(KEY_SIZE)
_PREFILL_US_MAX = (1 << 32) - 1
_TENANT_DOMAIN = b"kvd.tenant.1"


class Label(NamedTuple):
    """What a label says: the chunk, whose it is, and when it ends if it does."""

    meta: ChunkMeta
    tenant: bytes
    stamp: Stamp | None = None


def encode_label(meta: ChunkMeta, tenant: bytes, stamp: Stamp | None = None) -> bytes:
    """The label of a chunk: at most `LABEL_SIZE_MAX` bytes, the same for the same meta, tenant and
    end.

    A prefill of more than 2^32 - 1 us (71 minutes) is said to be just that. Raises `InvalidRequest`
    for what has no room in a label.
    """
    if len(tenant) != TENANT_SIZE or len(meta.layout) != KEY_SIZE:
        raise InvalidRequest(
            f"a label has a tenant of {TENANT_SIZE} bytes and a layout of {KEY_SIZE}, "
            f"found {len(tenant)} and {len(meta.layout)}"
        )
    if meta.start >= 1 << 64 or meta.num_tokens >= 1 << 32:
        raise InvalidRequest(f"chunk {meta.start}+{meta.num_tokens} is beyond what a label holds")
    category = meta.category.encode()
    head = _HEAD.pack(
        LABEL_VERSION,
        _flags(meta, stamp),
        len(category),
        0,
        meta.num_tokens,
        meta.start,
        min(max(meta.prefill_us, 0), _PREFILL_US_MAX),
        len(meta.reuse),
        0,
        tenant,
        meta.key,
        meta.layout,
        _NO_PARENT if meta.parent is None else meta.parent,
    )
    return head + (b"" if stamp is None else _END.pack(*stamp)) + category + meta.reuse


def decode_label(label: bytes) -> Label:
    """The inverse. Raises `Corrupt` for any bytes that `encode_label` does not make."""
    size = len(label)
    if size < _HEAD.size:
        raise Corrupt(f"a label has {_HEAD.size} bytes or more, found {size}")
    (
        version,
        flags,
        category_size,
        zero,
        num_tokens,
        start,
        prefill_us,
        reuse_size,
        zeros,
        *names,
    ) = _HEAD.unpack_from(label)
    tenant, key, layout, parent = names
    if version != LABEL_VERSION:
        raise Corrupt(f"label version {LABEL_VERSION} expected, found {version}")
    at = _HEAD.size + (_END.size if flags & _FLAG_END else 0)
    if (
        flags > _FLAG_PARENT | _FLAG_END
        or zero
        or zeros
        or not num_tokens
        or category_size > CATEGORY_SIZE_MAX
        or reuse_size > REUSE_SIZE_MAX
        or size != at + category_size + reuse_size
        or (not flags & _FLAG_PARENT and parent != _NO_PARENT)
    ):
        raise Corrupt("a label's head has values that no chunk has")
    category, reuse = "", b""
    if size > at:
        category = _decode_category(label[at : at + category_size])
        reuse = label[at + category_size :]
    meta = ChunkMeta(
        key=ChunkKey(key),
        parent=parent if flags & _FLAG_PARENT else None,
        layout=Fingerprint(layout),
        start=start,
        num_tokens=num_tokens,
        category=category,
        prefill_us=prefill_us,
        reuse=reuse,
    )
    return Label(meta, tenant, _decode_end(label) if flags & _FLAG_END else None)


def check_label(meta: ChunkMeta, label: bytes) -> None:
    """Raise `Corrupt` unless the label is that of this chunk."""
    found = decode_label(label).meta
    if found.key != meta.key or found.layout != meta.layout:
        raise Corrupt(f"chunk {short(meta.key)} wanted, the record is {short(found.key)}")
    if found.num_tokens != meta.num_tokens:
        raise Corrupt(f"{meta.num_tokens} tokens wanted, the record has {found.num_tokens}")


def tenant_of(salt: str) -> bytes:
    """What tells tenants apart for quotas: 8 zero bytes for no salt, else a digest of it. It is no
    proof of anything, and does not give the salt away unless that can be guessed.
    """
    if not salt:
        return NO_TENANT
    return blake2b(_TENANT_DOMAIN + salt.encode(), digest_size=TENANT_SIZE).digest()


def _flags(meta: ChunkMeta, stamp: Stamp | None) -> int:
    return (_FLAG_PARENT if meta.parent is not None else 0) | (
        _FLAG_END if stamp is not None else 0
    )


def _decode_end(label: bytes) -> Stamp:
    stamp = Stamp(*_END.unpack_from(label, _HEAD.size))
    if not 0 < stamp.ttl_ns <= TTL_NS_MAX:
        raise Corrupt(f"a label's time to live is 1 to {TTL_NS_MAX} ns, found {stamp.ttl_ns}")
    return stamp


def _decode_category(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise Corrupt("a label's category is not UTF-8") from error


def codec_text(codec: str, *, is_exact: bool) -> str:
    """What a record and the index say of how a copy is encoded."""
    return codec if is_exact else codec + APPROXIMATE


def parse_codec(text: str) -> tuple[str, bool]:
    """The codec of a copy, and whether it is exact."""
    return text.removesuffix(APPROXIMATE), not text.endswith(APPROXIMATE)
