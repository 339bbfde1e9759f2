"""Sessions: whatever bytes a client sends, it gets one answer, and nothing changes that it had no
right to change.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvd.daemon.admin import Facts
from kvd.daemon.leases import WriteLease
from kvd.daemon.session import Session
from kvd.daemon.store import ChunkStore
from kvd.keys import chain_keys, join_keys
from kvd.proto import kvd_pb2 as pb
from kvd.proto.convert import layout_from_message, layout_to_message
from kvd.proto.limits import (
    CODEC_SIZE_MAX,
    DATA_SIZE_MAX,
    KEYS_MAX,
    MESSAGE_SIZE_MAX,
    PROTOCOL_VERSION,
)
from tests.test_store import LAYOUT, new_store

CORPUS = Path(__file__).parent / "fixtures" / "corpus"

KEYS = chain_keys(LAYOUT.fingerprint, range(64), chunk_tokens=16)


def new_session(store: ChunkStore, *, has_arena: bool = True) -> Session:
    session = Session(store, Facts(pid=os.getpid(), state="serving"), has_arena=has_arena)
    attach = pb.AttachRequest(version=PROTOCOL_VERSION, client="test")
    assert session.handle(pb.Request(attach=attach)).HasField("attach")
    return session


def ask(session: Session, **verb: object) -> pb.Response:
    return session.handle(pb.Request(id=7, **verb))  # type: ignore[arg-type]


def error_of(response: pb.Response) -> str:
    assert response.WhichOneof("result") == "error", response
    return response.error.code


def reserve(keys: list[bytes], /, **changes: object) -> pb.ReserveRequest:
    fields: dict = {
        "layout": LAYOUT.fingerprint,
        "keys": join_keys(keys),
        "parent": LAYOUT.fingerprint,
        "num_tokens": [16] * len(keys),
    }
    return pb.ReserveRequest(**{**fields, **changes})


def stored(session: Session, keys: list[bytes]) -> None:
    lease = ask(session, reserve=reserve(keys)).reserve.lease
    assert ask(session, commit=pb.CommitRequest(lease=lease)).commit.count == len(keys)


def snapshot(store: ChunkStore) -> tuple[int, int, int, int]:
    store.check()
    return (
        len(store.directory),
        store.tier.used,
        store.num_pinned + store.num_reserved,
        len(store.layouts),
    )


def valid_requests() -> list[bytes]:
    """One request of each verb, as clients send them."""
    keys = join_keys(KEYS)
    verbs: list[dict] = [
        {"attach": pb.AttachRequest(version=1, client="c")},
        {"declare": pb.DeclareRequest(layout=layout_to_message(LAYOUT))},
        {"lookup": pb.LookupRequest(keys=keys)},
        {"lookup": pb.LookupRequest(keys=keys, standalone=True)},
        {"lookup": pb.LookupRequest(keys=keys, is_exact=True, codecs=["kvq/1"])},
        {"reserve": reserve(KEYS[2:], parent=KEYS[1], start=32, category="chat", prefill_us=9)},
        {"reserve": reserve(KEYS, parent=b"", standalone=True)},
        {"reserve": reserve(KEYS, is_approximate=True)},
        {"commit": pb.CommitRequest(lease=1, checksums=[1, 2])},
        {"pin": pb.PinRequest(keys=keys, layout=LAYOUT.fingerprint, lease_ns=5)},
        {"pin": pb.PinRequest(keys=keys, layout=LAYOUT.fingerprint, standalone=True)},
        {
            "pin": pb.PinRequest(
                keys=keys, layout=LAYOUT.fingerprint, is_exact=True, codecs=["kvq/1", "bf16/1"]
            )
        },
        {"renew": pb.RenewRequest(lease=1, lease_ns=5)},
        {"release": pb.ReleaseRequest(lease=1)},
        {"write": pb.WriteRequest(lease=1, index=0, offset=0, data=b"abc")},
        {"read": pb.ReadRequest(lease=1, index=0, offset=0, size=3)},
        {"status": pb.StatusRequest(audit=True)},
        {"list": pb.ListRequest(limit=2, cursor=1, category="chat")},
        {"clear": pb.ClearRequest(category="chat", limit=1)},
        {"hold": pb.HoldRequest(keys=keys, is_held=True)},
        {"wait": pb.WaitRequest(lease=1, index=0, size=9, timeout_ns=5)},
        {"persist": pb.PersistRequest(keys=keys, timeout_ns=5)},
        {"scrub": pb.ScrubRequest(start=True, rate=9)},
    ]
    return [
        pb.Request(id=index + 1, **verb).SerializeToString() for index, verb in enumerate(verbs)
    ]


def corpus() -> Iterator[bytes]:
    for path in sorted(CORPUS.glob("*.bin")):
        yield path.read_bytes()


def survives(packet: bytes) -> None:
    """The daemon answers, keeps its invariants, and still serves an honest client."""
    store = new_store()
    honest = new_session(store)
    stored(honest, KEYS[:2])
    for has_arena in (True, False):
        session = new_session(store, has_arena=has_arena)
        answer = session.handle_packet(packet)
        if answer is not None:
            assert len(answer) <= MESSAGE_SIZE_MAX
            response = pb.Response.FromString(answer)
            assert response.WhichOneof("result") is not None
            assert response.error.code != "internal", response.error.message
        store.check()
        session.close()
        store.check()
        assert (store.num_pinned, store.num_reserved) == (0, 0)
    assert ask(honest, status=pb.StatusRequest(audit=True)).HasField("status")


def test_the_corpus_holds_every_verb() -> None:
    verbs = set()
    for packet in corpus():
        try:
            verbs.add(pb.Request.FromString(packet).WhichOneof("verb"))
        except Exception:  # noqa: BLE001 - half of the corpus is broken on purpose
            continue
    assert {field.name for field in pb.Request.DESCRIPTOR.oneofs_by_name["verb"].fields} <= verbs


@pytest.mark.parametrize("packet", list(corpus()), ids=lambda packet: f"{len(packet)}B")
def test_the_corpus_is_survived(packet: bytes) -> None:
    survives(packet)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
@example(b"")
def test_random_bytes_are_survived(packet: bytes) -> None:
    survives(packet)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(valid_requests()), st.data())
def test_flipped_and_truncated_requests_are_survived(packet: bytes, data: st.DataObject) -> None:
    broken = bytearray(packet)
    for _ in range(data.draw(st.integers(1, 3))):
        broken[data.draw(st.integers(0, len(broken) - 1))] ^= data.draw(st.integers(1, 255))
    survives(bytes(broken[: data.draw(st.integers(0, len(broken)))]))
    survives(bytes(broken))


numbers = st.sampled_from([0, 1, 2, 31, 255, 2**31, 2**32 - 1, 2**63, 2**64 - 1]) | st.integers(
    0, 9
)
small = st.sampled_from([0, 1, 2, 16, 17, 2**31, 2**32 - 1])
key_bytes = st.sampled_from(
    [
        b"",
        KEYS[0],
        join_keys(KEYS),
        join_keys(KEYS[:1] * 2),
        KEYS[0][:31],
        LAYOUT.fingerprint,
        bytes(64),
    ]
)
codec_names = st.lists(st.sampled_from(["kvq/1", "raw", "", "x" * 17, "é"]), max_size=18)
hostile = st.one_of(
    st.builds(
        pb.LookupRequest,
        keys=key_bytes,
        standalone=st.booleans(),
        is_exact=st.booleans(),
        codecs=codec_names,
    ).map(lambda m: {"lookup": m}),
    st.builds(
        pb.ReserveRequest,
        layout=key_bytes,
        keys=key_bytes,
        parent=key_bytes,
        standalone=st.booleans(),
        start=numbers,
        num_tokens=st.lists(small, max_size=5),
        category=st.text(max_size=80),
        prefill_us=small,
        lease_ns=numbers,
        is_approximate=st.booleans(),
        ttl_ns=numbers,
    ).map(lambda m: {"reserve": m}),
    st.builds(pb.CommitRequest, lease=numbers, checksums=st.lists(numbers, max_size=3)).map(
        lambda m: {"commit": m}
    ),
    st.builds(
        pb.PinRequest,
        keys=key_bytes,
        layout=key_bytes,
        standalone=st.booleans(),
        lease_ns=numbers,
        is_exact=st.booleans(),
        codecs=codec_names,
    ).map(lambda m: {"pin": m}),
    st.builds(pb.RenewRequest, lease=numbers, lease_ns=numbers).map(lambda m: {"renew": m}),
    st.builds(pb.ReleaseRequest, lease=numbers).map(lambda m: {"release": m}),
    st.builds(
        pb.WriteRequest, lease=numbers, index=small, offset=numbers, data=st.binary(max_size=9)
    ).map(lambda m: {"write": m}),
    st.builds(pb.ReadRequest, lease=numbers, index=small, offset=numbers, size=numbers).map(
        lambda m: {"read": m}
    ),
    st.builds(pb.ListRequest, limit=small, cursor=numbers, layout=key_bytes).map(
        lambda m: {"list": m}
    ),
    st.builds(pb.ClearRequest, layout=key_bytes, keys=key_bytes, limit=small).map(
        lambda m: {"clear": m}
    ),
    st.builds(pb.HoldRequest, keys=key_bytes, is_held=st.booleans()).map(lambda m: {"hold": m}),
    st.builds(
        pb.Layout,
        model=st.text(max_size=3),
        dtype=st.sampled_from(["", "float32", "int3"]),
        num_layers=small,
        num_planes=small,
        num_kv_heads=small,
        head_dim=small,
        chunk_tokens=small,
        rank=small,
        world_size=small,
    ).map(lambda m: {"declare": pb.DeclareRequest(layout=m)}),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(hostile, min_size=1, max_size=12), st.booleans())
def test_well_formed_lies_are_survived(verbs: list[dict], has_arena: bool) -> None:
    store = new_store()
    session = new_session(store, has_arena=has_arena)
    for verb in verbs:
        response = ask(session, **verb)
        assert response.id == 7
        assert response.error.code != "internal", response.error.message
        store.check()
    session.close()
    store.check()
    assert (store.num_pinned, store.num_reserved) == (0, 0)


def test_a_request_of_a_newer_client_is_refused_by_name() -> None:
    session = new_session(new_store())
    # Field 99, a verb that does not exist yet.
    response = session.handle_packet(b"\x08\x05\x9a\x06\x00")
    assert response is not None
    answer = pb.Response.FromString(response)
    assert (answer.id, answer.error.code) == (5, "invalid_request")
    assert "no verb that this daemon knows" in answer.error.message


def test_a_message_beyond_the_limit_is_refused() -> None:
    session = new_session(new_store())
    answer = session.handle_packet(b"\x00" * (MESSAGE_SIZE_MAX + 1))
    assert answer is not None
    assert pb.Response.FromString(answer).error.code == "too_large"


def test_attach_comes_first_and_once() -> None:
    store = new_store()
    session = Session(store, Facts(pid=1, state="serving"), has_arena=True)
    assert "attach comes first" in ask(session, lookup=pb.LookupRequest()).error.message
    other = ask(session, attach=pb.AttachRequest(version=99)).error.message
    assert "protocol 2, the client 99" in other
    assert ask(session, attach=pb.AttachRequest(version=2)).attach.arena_size == store.tier.size
    assert "already" in ask(session, attach=pb.AttachRequest(version=2)).error.message


LIES: list[tuple[dict, str, str]] = [
    ({"keys": join_keys(KEYS)[:-1]}, "invalid_request", "multiple of 32"),
    ({"num_tokens": [16]}, "invalid_request", "4 keys come with 1 token counts"),
    ({"num_tokens": [0] * 4}, "invalid_request", "has a token"),
    ({"num_tokens": [17] * 4}, "invalid_request", "at most 16 tokens"),
    ({"keys": b"", "num_tokens": []}, "invalid_request", "0 keys"),
    ({"layout": b"short"}, "invalid_request", "32 bytes, found 5"),
    ({"layout": bytes(32)}, "layout_mismatch", "not known"),
    ({"parent": b""}, "invalid_request", "names its parent"),
    ({"standalone": True}, "invalid_request", "standalone chunks have none"),
    ({"parent": b"x"}, "invalid_request", "32 bytes, found 1"),
    ({"category": "x" * 65}, "invalid_request", "category is longer than 64"),
    ({"lease_ns": 2**63}, "invalid_request", "a lease lasts"),
    ({"keys": join_keys(KEYS[:2] * 2)}, "invalid_request", "names each chunk once"),
]


@pytest.mark.parametrize(("changes", "code", "message"), LIES, ids=lambda value: str(value)[:40])
def test_a_reservation_that_lies_changes_nothing(changes: dict, code: str, message: str) -> None:
    store = new_store()
    session = new_session(store)
    before = snapshot(store)
    response = ask(session, reserve=reserve(KEYS, **changes))
    assert error_of(response) == code
    assert message in response.error.message
    assert snapshot(store) == before


def test_more_keys_than_a_message_may_carry_are_refused() -> None:
    session = new_session(new_store())
    keys = bytes(32) * (KEYS_MAX + 1)
    assert error_of(ask(session, lookup=pb.LookupRequest(keys=keys))) == "too_large"


def test_double_commit_and_release_twice_are_refused() -> None:
    store = new_store()
    session = new_session(store)
    lease = ask(session, reserve=reserve(KEYS)).reserve.lease
    assert ask(session, commit=pb.CommitRequest(lease=lease)).commit.count == 4
    before = snapshot(store)
    for verb in (
        {"commit": pb.CommitRequest(lease=lease)},
        {"release": pb.ReleaseRequest(lease=lease)},
    ):
        response = ask(session, **verb)
        assert error_of(response) == "unknown_lease"
        assert "committed or released already" in response.error.message
    pin = ask(session, pin=pb.PinRequest(keys=join_keys(KEYS), layout=LAYOUT.fingerprint)).pin
    assert ask(session, release=pb.ReleaseRequest(lease=pin.lease)).HasField("release")
    assert error_of(ask(session, release=pb.ReleaseRequest(lease=pin.lease))) == "unknown_lease"
    assert snapshot(store) == before


def test_another_sessions_lease_is_out_of_reach() -> None:
    store = new_store()
    mine, yours = new_session(store), new_session(store)
    lease = ask(mine, reserve=reserve(KEYS)).reserve.lease
    for verb in (
        {"commit": pb.CommitRequest(lease=lease)},
        {"release": pb.ReleaseRequest(lease=lease)},
        {"renew": pb.RenewRequest(lease=lease)},
    ):
        assert error_of(ask(yours, **verb)) == "unknown_lease"
    assert ask(mine, commit=pb.CommitRequest(lease=lease)).commit.count == 4


def test_a_session_that_ends_gives_back_all_it_had() -> None:
    store = new_store()
    keeper = new_session(store)
    stored(keeper, KEYS[:1])
    session = new_session(store)
    ask(session, reserve=reserve(KEYS[1:], parent=KEYS[0], start=16))
    ask(session, pin=pb.PinRequest(keys=KEYS[0], layout=LAYOUT.fingerprint))
    assert (store.num_pinned, store.num_reserved) == (1, 3)
    session.close()
    assert (store.num_pinned, store.num_reserved) == (0, 0)
    assert store.tier.num_extents == 1
    store.check()


def test_a_draining_daemon_lets_leases_end_and_gives_no_new_ones() -> None:
    store = new_store()
    facts = Facts(pid=1, state="serving")
    session = Session(store, facts, has_arena=True)
    ask(session, attach=pb.AttachRequest(version=PROTOCOL_VERSION))
    lease = ask(session, reserve=reserve(KEYS)).reserve.lease
    facts.state = "draining"
    assert ask(session, commit=pb.CommitRequest(lease=lease)).commit.count == 4
    assert error_of(ask(session, reserve=reserve(KEYS))) == "unavailable"
    pin = pb.PinRequest(keys=KEYS[0], layout=LAYOUT.fingerprint)
    assert error_of(ask(session, pin=pin)) == "unavailable"


def test_bytes_travel_only_where_no_arena_is_shared() -> None:
    session = new_session(new_store(), has_arena=True)
    lease = ask(session, reserve=reserve(KEYS)).reserve.lease
    write = pb.WriteRequest(lease=lease, data=b"x")
    assert "maps the arena" in ask(session, write=write).error.message


def test_bytes_that_travel_stay_inside_their_chunk() -> None:
    store = new_store()
    session = new_session(store, has_arena=False)
    lease = ask(session, reserve=reserve(KEYS)).reserve.lease
    size = LAYOUT.size(16)
    for changes, code in (
        ({"index": 4}, "invalid_request"),
        ({"offset": size}, "invalid_request"),
        ({"offset": 2**63}, "invalid_request"),
        ({"data": bytes(DATA_SIZE_MAX + 1)}, "too_large"),
    ):
        message = pb.WriteRequest(**{"lease": lease, "data": b"x", **changes})
        assert error_of(ask(session, write=message)) == code
    assert error_of(ask(session, read=pb.ReadRequest(lease=lease, size=1))) == "invalid_request"
    written = store.lease(lease)
    assert isinstance(written, WriteLease)
    assert all(not store.tier.view(extent).any() for extent in written.extents)


def test_an_expired_lease_moves_no_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    session = new_session(new_store(), has_arena=False)
    lease = ask(session, reserve=reserve(KEYS, lease_ns=1000)).reserve.lease
    now_ns = time.monotonic_ns() + 10**9
    monkeypatch.setattr(time, "monotonic_ns", lambda: now_ns)
    assert error_of(ask(session, write=pb.WriteRequest(lease=lease, data=b"x"))) == "lease_expired"


def test_clear_and_list_come_in_pages() -> None:
    store = new_store()
    session = new_session(store)
    stored(session, KEYS)
    page = ask(session, list=pb.ListRequest(limit=3)).list
    rest = ask(session, list=pb.ListRequest(limit=3, cursor=page.cursor)).list
    listed = [chunk.key for chunk in [*page.chunks, *rest.chunks]]
    assert sorted(listed) == sorted(KEYS)
    assert rest.cursor == 0
    assert layout_from_message(page.layouts[0]) == LAYOUT
    assert ask(session, clear=pb.ClearRequest(keys=KEYS[3])).clear.count == 1
    # One chunk is looked at a call; the first of the chain takes the others with it.
    cursor, dropped = 0, 0
    is_partial = True
    while is_partial:
        reply = ask(session, clear=pb.ClearRequest(limit=1, cursor=cursor)).clear
        cursor, dropped, is_partial = reply.cursor, dropped + reply.count, reply.is_partial
    assert dropped == 3
    assert ask(session, clear=pb.ClearRequest()).clear.is_partial is False
    assert len(store.directory) == 0
    store.check()


def test_clear_walks_past_what_stays() -> None:
    store = new_store()
    session = new_session(store)
    for number in range(6):
        key = chain_keys(LAYOUT.fingerprint, [number] * 16, chunk_tokens=16)
        lease = ask(session, reserve=reserve(key, category="odd" if number % 2 else "even")).reserve
        ask(session, commit=pb.CommitRequest(lease=lease.lease))
    cursor, dropped = 0, 0
    is_partial = True
    while is_partial:
        message = pb.ClearRequest(limit=2, cursor=cursor, category="even")
        reply = ask(session, clear=message).clear
        cursor, dropped, is_partial = reply.cursor, dropped + reply.count, reply.is_partial
    assert dropped == 3
    assert {entry.meta.category for entry in store.directory} == {"odd"}


def test_a_page_of_many_layouts_fits_a_packet() -> None:
    store = new_store()
    session = new_session(store)
    for number in range(60):
        layout = replace(LAYOUT, model="m" * 3000 + str(number), num_layers=1, num_kv_heads=1)
        ask(session, declare=pb.DeclareRequest(layout=layout_to_message(layout)))
        root = layout.fingerprint
        keys = chain_keys(root, range(16), chunk_tokens=16)
        lease = ask(session, reserve=reserve(keys, layout=root, parent=root)).reserve.lease
        ask(session, commit=pb.CommitRequest(lease=lease))
    cursor, seen = 0, 0
    while True:
        answer = session.handle_packet(
            pb.Request(id=1, list=pb.ListRequest(cursor=cursor)).SerializeToString()
        )
        assert answer is not None
        page = pb.Response.FromString(answer).list
        seen, cursor = seen + len(page.chunks), page.cursor
        if not cursor:
            break
    assert seen == 60


def test_a_listing_does_not_show_salts() -> None:
    store = new_store()
    session = new_session(store)
    salted = replace(LAYOUT, salt="a tenant's secret")
    ask(session, declare=pb.DeclareRequest(layout=layout_to_message(salted)))
    root = salted.fingerprint
    message = reserve(chain_keys(root, range(16), chunk_tokens=16), layout=root, parent=root)
    ask(session, commit=pb.CommitRequest(lease=ask(session, reserve=message).reserve.lease))
    page = ask(session, list=pb.ListRequest()).list
    assert b"secret" not in page.SerializeToString()
    assert page.layouts[0].salt.startswith("#")


def test_clear_keeps_what_does_not_match_or_is_pinned() -> None:
    store = new_store()
    session = new_session(store)
    lease = ask(session, reserve=reserve(KEYS[:1], category="chat")).reserve.lease
    ask(session, commit=pb.CommitRequest(lease=lease))
    assert ask(session, clear=pb.ClearRequest(category="code")).clear.count == 0
    pin = ask(session, pin=pb.PinRequest(keys=KEYS[0], layout=LAYOUT.fingerprint)).pin
    assert ask(session, clear=pb.ClearRequest(category="chat")).clear.count == 0
    ask(session, release=pb.ReleaseRequest(lease=pin.lease))
    assert ask(session, clear=pb.ClearRequest(category="chat")).clear.count == 1


def test_an_audit_that_finds_a_breach_says_so() -> None:
    store = new_store()
    session = new_session(store)
    stored(session, KEYS)
    assert store.tier.allocate(4096) is not None
    response = ask(session, status=pb.StatusRequest(audit=True))
    assert "an extent is leaked" in response.error.message


def test_the_longest_answer_to_a_pin_fits_a_packet() -> None:
    """Arenas of terabytes, chunks of gigabytes, and the longest names of codecs."""
    reply = pb.PinReply(
        lease=2**63,
        deadline_ns=2**63,
        offsets=[2**42] * KEYS_MAX,
        sizes=[2**32] * KEYS_MAX,
        num_tokens=[2**14] * KEYS_MAX,
        checksums=[2**63] * KEYS_MAX,
        present=bytes(KEYS_MAX),
        ready=[2**32] * KEYS_MAX,
        is_approximate=bytes(KEYS_MAX),
        codecs=["x" * CODEC_SIZE_MAX] * KEYS_MAX,
        starts=[2**28] * KEYS_MAX,
    )
    assert len(pb.Response(id=2**63, pin=reply).SerializeToString()) < MESSAGE_SIZE_MAX
