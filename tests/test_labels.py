"""Labels: round trips, one form only, and bytes that nobody wrote."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvd.chunk import CATEGORY_SIZE_MAX, REUSE_SIZE_MAX, ChunkMeta, Fingerprint
from kvd.daemon.expiries import Stamp
from kvd.daemon.labels import (
    LABEL_SIZE_MAX,
    NO_TENANT,
    check_label,
    decode_label,
    encode_label,
    tenant_of,
)
from kvd.errors import Corrupt, InvalidRequest
from kvd.keys import ChunkKey
from kvd.proto.limits import TTL_NS_MAX
from kvd.tiers import segment

PAGE = Path(__file__).parent.parent / "docs" / "formats" / "index.md"


def hex_dump(title: str) -> bytes:
    """The bytes of the page's dump under `title`."""
    lines = PAGE.read_text().split(f"### {title}\n", 1)[1].split("```")[1].strip().splitlines()
    found = b""
    for line in lines:
        match = re.match(r"([0-9a-f]{4})  ((?:[0-9a-f]{2} ?)+)", line)
        assert match, line
        assert int(match[1], 16) == len(found), line
        found += bytes.fromhex(match[2])
    return found


names = st.binary(min_size=32, max_size=32)
metas = st.builds(
    ChunkMeta,
    key=names.map(ChunkKey),
    parent=st.none() | names,
    layout=names.map(Fingerprint),
    start=st.integers(0, 2**64 - 1),
    num_tokens=st.integers(1, 2**32 - 1),
    category=st.text(max_size=20).filter(lambda text: len(text.encode()) <= CATEGORY_SIZE_MAX),
    prefill_us=st.integers(0, 2**32 - 1),
    reuse=st.binary(max_size=REUSE_SIZE_MAX),
)
tenants = st.binary(min_size=8, max_size=8)
stamps = st.none() | st.builds(
    Stamp, wall_ns=st.integers(0, 2**64 - 1), ttl_ns=st.integers(1, TTL_NS_MAX)
)

META = ChunkMeta(
    key=ChunkKey(bytes(range(32))),
    parent=bytes(range(32, 64)),
    layout=Fingerprint(bytes(range(64, 96))),
    start=512,
    num_tokens=256,
    category="système",
    prefill_us=41_000,
    reuse=b"scores",
)
TENANT = tenant_of("a secret")
STAMP = Stamp(1_767_225_600 * 10**9, 3600 * 10**9)


@given(metas, tenants, stamps)
def test_a_label_decodes_to_what_it_was_made_of(
    meta: ChunkMeta, tenant: bytes, stamp: Stamp | None
) -> None:
    label = encode_label(meta, tenant, stamp)
    assert len(label) <= LABEL_SIZE_MAX
    assert decode_label(label) == (meta, tenant, stamp)
    assert encode_label(meta, tenant, stamp) == label
    check_label(meta, label)


@given(metas, tenants, stamps, st.data())
def test_flipped_and_cut_labels_are_corrupt_or_in_the_one_form(
    meta: ChunkMeta, tenant: bytes, stamp: Stamp | None, data: st.DataObject
) -> None:
    label = bytearray(encode_label(meta, tenant, stamp))
    at = data.draw(st.integers(0, len(label) - 1))
    label[at] ^= data.draw(st.integers(1, 255))
    cut = data.draw(st.integers(0, len(label)))
    for bad in (bytes(label), bytes(label[:cut]), bytes(label) + b"\0"):
        try:
            found = decode_label(bad)
        except Corrupt:
            continue
        assert encode_label(*found) == bad


@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_corrupt(data: bytes) -> None:
    with pytest.raises(Corrupt):
        decode_label(b"\x00" + data)
    try:
        decode_label(b"\x01" + data)
    except Corrupt:
        pass
    else:
        assert len(data) >= 127


def test_every_truncation_is_corrupt() -> None:
    for label in (encode_label(META, TENANT), encode_label(META, TENANT, STAMP)):
        for size in range(len(label)):
            with pytest.raises(Corrupt):
                decode_label(label[:size])


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (0, b"\x02"),  # version
        (1, b"\x05"),  # flags
        (1, b"\x03"),  # an end, and none is there
        (1, b"\x00"),  # no parent, and one is there
        (2, b"\x41"),  # category size
        (3, b"\x01"),  # reserved
        (4, bytes(4)),  # no tokens
        (20, b"\x01\x08"),  # reuse size
        (22, b"\x01"),  # reserved
        (128, b"\xff"),  # category that is not UTF-8
    ],
)
def test_values_that_are_not_allowed_are_corrupt(at: int, value: bytes) -> None:
    label = bytearray(encode_label(META, TENANT))
    label[at : at + len(value)] = value
    with pytest.raises(Corrupt):
        decode_label(bytes(label))


@pytest.mark.parametrize("ttl_ns", [0, TTL_NS_MAX + 1, 2**64 - 1])
def test_a_time_to_live_that_nobody_can_ask_for_is_corrupt(ttl_ns: int) -> None:
    label = bytearray(encode_label(META, TENANT, STAMP))
    label[136:144] = ttl_ns.to_bytes(8, "little")
    with pytest.raises(Corrupt, match="time to live"):
        decode_label(bytes(label))


def test_the_largest_label_fits_a_record_and_the_next_one_is_refused() -> None:
    full = replace(META, category="c" * CATEGORY_SIZE_MAX, reuse=bytes(REUSE_SIZE_MAX))
    assert len(encode_label(full, TENANT, STAMP)) == LABEL_SIZE_MAX <= segment.LABEL_SIZE_MAX
    with pytest.raises(InvalidRequest):
        replace(META, reuse=bytes(REUSE_SIZE_MAX + 1))


def test_what_has_no_room_in_a_label_is_refused() -> None:
    for meta, tenant in [
        (META, b"short"),
        (replace(META, layout=Fingerprint(b"short")), TENANT),
        (replace(META, start=2**64), TENANT),
        (replace(META, num_tokens=2**32), TENANT),
    ]:
        with pytest.raises(InvalidRequest):
            encode_label(meta, tenant)


def test_a_cost_beyond_the_label_is_the_largest_it_can_name() -> None:
    for cost, named in [(2**40, 2**32 - 1), (-1, 0)]:
        found = decode_label(encode_label(replace(META, prefill_us=cost), TENANT))
        assert found.meta.prefill_us == named


def test_a_label_of_another_chunk_is_corrupt() -> None:
    label = encode_label(META, TENANT)
    check_label(replace(META, category="", prefill_us=0), label)
    for other in [
        replace(META, key=ChunkKey(bytes(32))),
        replace(META, layout=Fingerprint(bytes(32))),
        replace(META, num_tokens=255),
    ]:
        with pytest.raises(Corrupt):
            check_label(other, label)


def test_tenants_are_apart_and_the_salt_is_not_told() -> None:
    assert tenant_of("") == NO_TENANT == bytes(8)
    assert len({tenant_of(salt) for salt in ("", "a", "b", "ab")}) == 4
    assert tenant_of("a") == tenant_of("a")
    assert b"a secret"[:4] not in tenant_of("a secret")


def test_the_page_shows_a_label_as_it_is() -> None:
    meta = replace(META, category="chat", reuse=b"scores")
    assert hex_dump("A label") == encode_label(meta, tenant_of("tenant"))
    label = encode_label(meta, tenant_of("tenant"), STAMP)
    assert hex_dump("A label with an end") == label
