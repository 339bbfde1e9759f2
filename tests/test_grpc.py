"""The gRPC plane: the same store for those who share no memory, and no way to harm it."""

from __future__ import annotations

import gc
import logging
import os
import stat
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from numpy.typing import NDArray

import kvd
from kvd.client.remote import RemoteConnection
from kvd.daemon import rpc
from kvd.errors import (
    ConfigError,
    InvalidRequest,
    KvdError,
    LeaseExpired,
    TooLarge,
    Unavailable,
    UnknownLease,
)
from kvd.keys import ChunkKey, chain_keys, join_keys
from kvd.proto import kvd_pb2 as pb
from kvd.proto import kvd_pb2_grpc
from kvd.proto.convert import layout_to_message
from kvd.proto.limits import DATA_SIZE_MAX, GRPC_MESSAGE_SIZE_MAX, KEYS_MAX, PROTOCOL_VERSION
from tests.daemon_in_thread import PATIENCE_S, DaemonInThread

# A whole chunk is 8 MiB of float32 or 4 MiB of bfloat16: several messages each.
LAYOUTS = {
    dtype: kvd.KVLayout(
        model="m", revision="r", dtype=dtype, num_layers=8, num_kv_heads=8, head_dim=64
    )
    for dtype in ("float32", "bfloat16")
}

# 16 tokens of 256 bytes.
SMALL = kvd.KVLayout(
    model="m",
    revision="r",
    dtype="float32",
    num_layers=2,
    num_kv_heads=2,
    head_dim=8,
    chunk_tokens=16,
)
SMALL_SIZE = 16 * 256
KEYS = chain_keys(SMALL.fingerprint, range(64), chunk_tokens=16)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonInThread]:
    running = DaemonInThread(tmp_path, listen="127.0.0.1:0")
    yield running
    running.stop()


@pytest.fixture
def stub(daemon: DaemonInThread) -> Iterator[Any]:
    """The service as any gRPC client sees it."""
    with grpc.insecure_channel(f"unix:{daemon.config.grpc_socket_path}") as channel:
        yield kvd_pb2_grpc.KvdStub(channel)


@pytest.fixture
def connection(daemon: DaemonInThread) -> Iterator[RemoteConnection]:
    """A session that knows `SMALL`, with nothing between the test and the messages."""
    made = connect(daemon)
    made.call(pb.Request(declare=pb.DeclareRequest(layout=layout_to_message(SMALL))), PATIENCE_S)
    yield made
    made.close()


def connect(daemon: DaemonInThread) -> RemoteConnection:
    return RemoteConnection(daemon.unix, name="test", timeout_s=PATIENCE_S)


def random_chunk(layout: kvd.KVLayout, num_tokens: int, seed: int) -> NDArray[Any]:
    """Any bits at all, NaNs among them."""
    raw = np.random.default_rng(seed).integers(0, 256, layout.size(num_tokens), dtype=np.uint8)
    dtype = np.float32 if layout.dtype == "float32" else np.uint16
    return raw.view(dtype).reshape(layout.shape(num_tokens))


def chunks_of(layout: kvd.KVLayout) -> tuple[list[ChunkKey], list[NDArray[Any]]]:
    """Two whole chunks and one whose bytes are no whole number of messages."""
    keys = chain_keys(layout.fingerprint, range(3 * 256), chunk_tokens=256)
    return keys, [random_chunk(layout, tokens, tokens) for tokens in (256, 256, 201)]


def assert_loaded(
    client: kvd.Client, layout: kvd.KVLayout, keys: list[ChunkKey], chunks: list[NDArray[Any]]
) -> None:
    outs = [np.zeros_like(chunk) for chunk in chunks]
    assert client.load(layout, keys, outs) == len(keys)
    for out, chunk in zip(outs, chunks, strict=True):
        assert out.tobytes() == chunk.tobytes()


def reserve_request(keys: list[ChunkKey] = KEYS, lease_ns: int = 30 * 10**9) -> pb.Request:
    return pb.Request(
        reserve=pb.ReserveRequest(
            layout=SMALL.fingerprint,
            keys=join_keys(keys),
            parent=SMALL.fingerprint,
            num_tokens=[16] * len(keys),
            lease_ns=lease_ns,
        )
    )


def pin_request(keys: list[ChunkKey] = KEYS, lease_ns: int = 30 * 10**9) -> pb.Request:
    message = pb.PinRequest(keys=join_keys(keys), layout=SMALL.fingerprint, lease_ns=lease_ns)
    return pb.Request(pin=message)


def reserve(connection: RemoteConnection, **options: Any) -> int:
    lease = connection.call(reserve_request(**options), PATIENCE_S).reserve.lease
    assert lease
    return lease


def pin(connection: RemoteConnection, **options: Any) -> int:
    lease = connection.call(pin_request(**options), PATIENCE_S).pin.lease
    assert lease
    return lease


def store_small(daemon: DaemonInThread) -> None:
    chunks = [random_chunk(SMALL, 16, seed) for seed in range(len(KEYS))]
    with daemon.connect() as client:
        client.store(SMALL, KEYS, chunks)
    daemon.until_sessions(1)


# What comes back.


@pytest.mark.parametrize("dtype", LAYOUTS)
@pytest.mark.parametrize("plane", ["unix", "tcp"])
def test_a_chunk_of_many_messages_comes_back_bit_identical(
    daemon: DaemonInThread, plane: str, dtype: str
) -> None:
    layout = LAYOUTS[dtype]
    keys, chunks = chunks_of(layout)
    assert layout.size(256) > DATA_SIZE_MAX
    with daemon.connect(getattr(daemon, plane), verify=True) as client:
        states = client.store(layout, keys, chunks)
        assert states == ["granted"] * 3
        assert_loaded(client, layout, keys, chunks)
        assert client.status(audit=True).num_chunks == 3


@pytest.mark.parametrize(("source", "target"), [("unix", "local"), ("local", "unix")])
def test_a_chunk_stored_over_one_plane_is_read_over_the_other(
    daemon: DaemonInThread, source: str, target: str
) -> None:
    layout = LAYOUTS["float32"]
    keys, chunks = chunks_of(layout)
    with daemon.connect(getattr(daemon, source), verify=True) as client:
        client.store(layout, keys, chunks)
    with daemon.connect(getattr(daemon, target), verify=True) as client:
        assert_loaded(client, layout, keys, chunks)


def test_many_threads_share_one_session(daemon: DaemonInThread) -> None:
    tokens = [list(range(start, start + 16)) for start in range(0, 64 * 16, 16)]
    keys = [chain_keys(SMALL.fingerprint, part, chunk_tokens=16) for part in tokens]
    with daemon.connect() as client, ThreadPoolExecutor(8) as pool:

        def store_and_load(index: int) -> None:
            chunk = random_chunk(SMALL, 16, index)
            client.store(SMALL, keys[index], [chunk])
            assert_loaded(client, SMALL, keys[index], [chunk])

        list(pool.map(store_and_load, range(len(keys))))
        assert client.status(audit=True).num_chunks == len(keys)


def test_sessions_of_both_planes_are_counted(daemon: DaemonInThread) -> None:
    with daemon.connect(daemon.local) as client, daemon.connect(), daemon.connect(daemon.tcp):
        assert client.status().num_sessions == 3
    daemon.until_sessions(0)


# What is left behind.


def end_by_close(connection: RemoteConnection) -> None:
    connection.close()


def end_by_half_close(connection: RemoteConnection) -> None:
    connection._stream.end()


@pytest.mark.parametrize("end", [end_by_close, end_by_half_close])
def test_a_stream_that_ends_in_mid_write_leaves_nothing(
    daemon: DaemonInThread, connection: RemoteConnection, end: Callable[[RemoteConnection], None]
) -> None:
    lease = reserve(connection)
    half = pb.WriteRequest(lease=lease, index=1, data=bytes(SMALL_SIZE // 2))
    connection.call(pb.Request(write=half), PATIENCE_S)
    assert daemon.store.num_reserved == len(KEYS)
    end(connection)
    daemon.until_sessions(0)
    assert daemon.is_empty()
    with daemon.connect() as client:
        assert client.lookup(KEYS) == 0


def test_the_end_of_a_stream_takes_its_pins_back(
    daemon: DaemonInThread, connection: RemoteConnection
) -> None:
    store_small(daemon)
    pin(connection)
    connection.close()
    daemon.until_sessions(0)
    assert daemon.store.num_pinned == 0
    daemon.loop.call(daemon.store.check)


def test_a_client_that_nobody_has_any_more_ends_its_session(daemon: DaemonInThread) -> None:
    client = daemon.connect()
    reservation = client.reserve(SMALL, KEYS)
    daemon.until_sessions(1)
    del client, reservation
    gc.collect()
    daemon.until_sessions(0)
    assert daemon.is_empty()


def test_a_client_that_vanishes_under_an_answer_is_no_error(
    daemon: DaemonInThread, stub: Any, caplog: pytest.LogCaptureFixture
) -> None:
    layout = LAYOUTS["float32"]
    keys, chunks = chunks_of(layout)
    with daemon.connect() as client:
        client.store(layout, keys, chunks)
    pin = pb.PinRequest(keys=join_keys(keys), layout=layout.fingerprint)
    lease: SimpleQueue[int] = SimpleQueue()

    def requests() -> Iterator[pb.Request]:
        yield attach()
        yield pb.Request(id=2, pin=pin)
        read = pb.ReadRequest(lease=lease.get(timeout=PATIENCE_S), size=DATA_SIZE_MAX)
        yield from [pb.Request(id=3, read=read)] * 20

    session = stub.Session(requests(), timeout=PATIENCE_S)
    assert next(session).WhichOneof("result") == "attach"
    lease.put(next(session).pin.lease)
    assert len(next(session).read.data) == DATA_SIZE_MAX
    session.cancel()
    daemon.until_sessions(0)
    assert daemon.store.num_pinned == 0
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


def test_closing_the_server_ends_all_sessions(daemon: DaemonInThread) -> None:
    with daemon.connect() as client:
        client.reserve(SMALL, KEYS)
        daemon.stop()
        assert daemon.facts.num_sessions == 0
        assert daemon.is_empty()


# Lies.


def lies(connection: RemoteConnection, foreign: int) -> dict[str, tuple[str, pb.Request]]:
    """Requests that no session may get through with: name -> (code, request)."""
    writing = reserve(connection, keys=KEYS[2:3])
    reading = pin(connection, keys=KEYS[:2])
    ended = reserve(connection, keys=KEYS[3:])
    connection.call(pb.Request(commit=pb.CommitRequest(lease=ended)), PATIENCE_S)

    def write(lease: int = writing, index: int = 0, offset: int = 0, size: int = 1) -> pb.Request:
        data = bytes(size)
        return pb.Request(write=pb.WriteRequest(lease=lease, index=index, offset=offset, data=data))

    def read(lease: int = reading, index: int = 0, offset: int = 0, size: int = 1) -> pb.Request:
        return pb.Request(read=pb.ReadRequest(lease=lease, index=index, offset=offset, size=size))

    def commit(lease: int) -> pb.Request:
        return pb.Request(commit=pb.CommitRequest(lease=lease))

    def release(lease: int) -> pb.Request:
        return pb.Request(release=pb.ReleaseRequest(lease=lease))

    return {
        "write beyond the chunk": ("invalid_request", write(offset=SMALL_SIZE)),
        "write across its end": ("invalid_request", write(offset=SMALL_SIZE - 1, size=2)),
        "write at the end of the world": ("invalid_request", write(offset=2**64 - 1)),
        "write to no chunk": ("invalid_request", write(index=1)),
        "write more than a message has": ("too_large", write(size=DATA_SIZE_MAX + 1)),
        "write under a pin": ("invalid_request", write(lease=reading)),
        "write under a foreign lease": ("unknown_lease", write(lease=foreign)),
        "write after the commit": ("unknown_lease", write(lease=ended)),
        "read beyond the chunk": ("invalid_request", read(offset=SMALL_SIZE)),
        "read across its end": ("invalid_request", read(size=SMALL_SIZE + 1)),
        "read at the end of the world": ("invalid_request", read(offset=2**64 - 1)),
        "read everything": ("too_large", read(size=2**64 - 1)),
        "read no chunk": ("invalid_request", read(index=2)),
        "read under a reservation": ("invalid_request", read(lease=writing)),
        "read under a foreign lease": ("unknown_lease", read(lease=foreign)),
        "commit twice": ("unknown_lease", commit(ended)),
        "commit a pin": ("unknown_lease", commit(reading)),
        "commit a foreign lease": ("unknown_lease", commit(foreign)),
        "release what has ended": ("unknown_lease", release(ended)),
        "release a foreign lease": ("unknown_lease", release(foreign)),
        "release nothing": ("unknown_lease", release(0)),
        "attach twice": (
            "invalid_request",
            pb.Request(attach=pb.AttachRequest(version=PROTOCOL_VERSION)),
        ),
        "ask for nothing": ("invalid_request", pb.Request()),
    }


def test_a_lie_is_an_error_and_changes_nothing(
    daemon: DaemonInThread, connection: RemoteConnection
) -> None:
    chunks = [random_chunk(SMALL, 16, seed) for seed in range(2)]
    with daemon.connect() as honest:
        honest.store(SMALL, KEYS[:2], chunks)
        reservation = honest.reserve(
            SMALL, chain_keys(SMALL.fingerprint, range(100, 116), chunk_tokens=16)
        )
        reservation.write(0, chunks[0])
        for name, (code, request) in lies(connection, reservation._id).items():
            with pytest.raises(KvdError) as raised:
                connection.call(request, PATIENCE_S)
            assert raised.value.code == code, name
            daemon.loop.call(daemon.store.check)
        assert reservation.commit() == 1
        assert_loaded(honest, SMALL, KEYS[:2], chunks)


def test_a_lease_is_released_once(daemon: DaemonInThread, connection: RemoteConnection) -> None:
    release = pb.Request(release=pb.ReleaseRequest(lease=reserve(connection)))
    connection.call(release, PATIENCE_S)
    assert daemon.is_empty()
    with pytest.raises(UnknownLease):
        connection.call(release, PATIENCE_S)


def test_past_the_deadline_no_byte_is_read_or_written(
    daemon: DaemonInThread, connection: RemoteConnection
) -> None:
    store_small(daemon)
    reading = pin(connection, lease_ns=1)
    with pytest.raises(LeaseExpired):
        connection.call(pb.Request(read=pb.ReadRequest(lease=reading, size=1)), PATIENCE_S)
    other = chain_keys(SMALL.fingerprint, range(100, 116), chunk_tokens=16)
    writing = reserve(connection, keys=other, lease_ns=1)
    with pytest.raises(LeaseExpired):
        connection.call(pb.Request(write=pb.WriteRequest(lease=writing, data=b"1")), PATIENCE_S)
    with pytest.raises(LeaseExpired):
        connection.call(pb.Request(commit=pb.CommitRequest(lease=writing)), PATIENCE_S)
    connection.release(writing)
    daemon.loop.until(lambda: daemon.store.num_reserved == 0)
    assert daemon.store.lookup(other) == 0
    daemon.loop.call(daemon.store.check)


def test_a_message_above_the_limit_is_refused_and_the_session_goes_on(
    daemon: DaemonInThread, connection: RemoteConnection
) -> None:
    lease = reserve(connection)
    data = bytes(GRPC_MESSAGE_SIZE_MAX)
    with pytest.raises(TooLarge):
        connection.call(pb.Request(write=pb.WriteRequest(lease=lease, data=data)), PATIENCE_S)
    connection.call(pb.Request(write=pb.WriteRequest(lease=lease, data=b"1")), PATIENCE_S)


# The stream as another client than ours would use it.


def attach(version: int = PROTOCOL_VERSION) -> pb.Request:
    return pb.Request(id=1, attach=pb.AttachRequest(version=version))


def test_attach_comes_first(stub: Any) -> None:
    lookup = pb.Request(id=7, lookup=pb.LookupRequest(keys=join_keys(KEYS)))
    first, second, third = stub.Session(iter([lookup, attach(), lookup]), timeout=PATIENCE_S)
    assert (first.id, first.error.code) == (7, "invalid_request")
    assert (second.id, second.attach.version) == (1, PROTOCOL_VERSION)
    assert (third.id, third.WhichOneof("result")) == (7, "lookup")


def test_another_protocol_version_is_told_what_to_do(stub: Any) -> None:
    (answer,) = stub.Session(iter([attach(PROTOCOL_VERSION + 1)]), timeout=PATIENCE_S)
    assert answer.error.code == "invalid_request"
    assert "same kvd-cache on both sides" in answer.error.message


def test_a_field_of_a_later_version_is_ignored(stub: Any) -> None:
    request = pb.Request.FromString(attach().SerializeToString() + b"\xf8\x07\x01")
    (answer,) = stub.Session(iter([request]), timeout=PATIENCE_S)
    assert answer.WhichOneof("result") == "attach"


def test_a_release_without_an_id_has_no_answer(stub: Any) -> None:
    release = pb.Request(release=pb.ReleaseRequest(lease=5))
    answers = list(stub.Session(iter([attach(), release]), timeout=PATIENCE_S))
    assert [answer.id for answer in answers] == [1]


@pytest.mark.parametrize(
    ("packet", "compression", "status"),
    [
        (
            bytes(GRPC_MESSAGE_SIZE_MAX + 1),
            grpc.Compression.NoCompression,
            grpc.StatusCode.RESOURCE_EXHAUSTED,
        ),
        # A mebibyte of zeros is a kibibyte on the wire: what unpacks is not unpacked here.
        (bytes(1 << 20), grpc.Compression.Gzip, grpc.StatusCode.UNIMPLEMENTED),
    ],
    ids=["too large", "compressed"],
)
def test_a_packet_that_is_not_read_ends_its_stream_and_no_other(
    daemon: DaemonInThread,
    connection: RemoteConnection,
    packet: bytes,
    compression: Any,
    status: grpc.StatusCode,
) -> None:
    reserve(connection)
    with grpc.insecure_channel(f"unix:{daemon.config.grpc_socket_path}") as channel:
        session = channel.stream_stream("/kvd.v1.Kvd/Session")
        with pytest.raises(grpc.RpcError) as raised:
            list(session(iter([packet]), timeout=PATIENCE_S, compression=compression))
    assert raised.value.code() == status
    daemon.until_sessions(1)
    assert daemon.store.num_reserved == len(KEYS)


def test_bytes_that_are_no_request_get_an_answer(daemon: DaemonInThread) -> None:
    with grpc.insecure_channel(f"unix:{daemon.config.grpc_socket_path}") as channel:
        session = channel.stream_stream(
            "/kvd.v1.Kvd/Session", response_deserializer=pb.Response.FromString
        )
        packets = [b"\xff\xff\xff", attach().SerializeToString()]
        first, second = session(iter(packets), timeout=PATIENCE_S)
        assert (first.id, first.error.code) == (0, "invalid_request")
        assert second.WhichOneof("result") == "attach"
        with pytest.raises(grpc.RpcError) as raised:
            channel.unary_unary("/kvd.v1.Kvd/Lookup")(b"\xff\xff\xff", timeout=PATIENCE_S)
        assert code_of(raised.value) == (grpc.StatusCode.INVALID_ARGUMENT, "invalid_request")


def test_a_stream_that_never_attaches_is_ended(
    daemon: DaemonInThread, stub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rpc, "ATTACH_WITHIN_S", 0.01)
    silence = threading.Event()
    with pytest.raises(grpc.RpcError) as raised:
        list(stub.Session(iter(silence.wait, True), timeout=PATIENCE_S))
    silence.set()
    assert code_of(raised.value) == (grpc.StatusCode.DEADLINE_EXCEEDED, "deadline_exceeded")
    daemon.until_sessions(0)


def test_sessions_are_bounded_and_one_that_ends_makes_room(
    daemon: DaemonInThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rpc, "SESSIONS_MAX", 2)
    with daemon.connect():
        with daemon.connect():
            with pytest.raises(Unavailable, match="takes no more clients"):
                daemon.connect()
            assert daemon.facts.num_sessions == 2
        daemon.until_sessions(1)
        with daemon.connect() as client:
            assert client.lookup(KEYS) == 0


# The unary calls.


def code_of(error: Any) -> tuple[grpc.StatusCode, str]:
    """The status of a failed call and kvd's own code."""
    return error.code(), dict(error.trailing_metadata())["kvd-code"]


def test_unary_calls_see_what_sessions_store(daemon: DaemonInThread, stub: Any) -> None:
    with daemon.connect() as client:
        client.store(SMALL, KEYS, [random_chunk(SMALL, 16, 1)] * len(KEYS), category="docs")
    keys = join_keys(KEYS)
    assert stub.Lookup(pb.LookupRequest(keys=keys)).count == len(KEYS)
    assert stub.Status(pb.StatusRequest(audit=True)).num_chunks == len(KEYS)
    assert {chunk.key for chunk in stub.List(pb.ListRequest()).chunks} == set(KEYS)
    assert stub.Hold(pb.HoldRequest(keys=keys, is_held=True)).count == len(KEYS)
    assert stub.Clear(pb.ClearRequest(category="docs")).count == 0
    assert stub.Hold(pb.HoldRequest(keys=keys)).count == len(KEYS)
    assert stub.Clear(pb.ClearRequest(category="docs")).count == len(KEYS)
    assert stub.Lookup(pb.LookupRequest(keys=keys)).count == 0


def test_a_bad_unary_call_names_its_mistake(stub: Any) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        stub.Lookup(pb.LookupRequest(keys=b"short"))
    assert code_of(raised.value) == (grpc.StatusCode.INVALID_ARGUMENT, "invalid_request")
    with pytest.raises(grpc.RpcError) as raised:
        stub.Lookup(pb.LookupRequest(keys=bytes(32 * (KEYS_MAX + 1))))
    assert code_of(raised.value) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "too_large")
    with pytest.raises(grpc.RpcError) as raised:
        stub.Hold(pb.HoldRequest())
    assert code_of(raised.value) == (grpc.StatusCode.INVALID_ARGUMENT, "invalid_request")


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("invalid_request", grpc.StatusCode.INVALID_ARGUMENT),
        ("layout_mismatch", grpc.StatusCode.FAILED_PRECONDITION),
        ("too_large", grpc.StatusCode.RESOURCE_EXHAUSTED),
        ("unknown_lease", grpc.StatusCode.NOT_FOUND),
        ("access_denied", grpc.StatusCode.PERMISSION_DENIED),
        ("lease_expired", grpc.StatusCode.FAILED_PRECONDITION),
        ("corrupt", grpc.StatusCode.DATA_LOSS),
        ("deadline_exceeded", grpc.StatusCode.DEADLINE_EXCEEDED),
        ("unavailable", grpc.StatusCode.UNAVAILABLE),
        ("unsupported", grpc.StatusCode.INTERNAL),
        ("internal", grpc.StatusCode.INTERNAL),
    ],
)
def test_each_failure_has_its_status_and_its_own_code(
    daemon: DaemonInThread,
    stub: Any,
    monkeypatch: pytest.MonkeyPatch,
    code: str,
    status: grpc.StatusCode,
) -> None:
    def fail(*_: object, **__: object) -> int:
        # Quotes what a client sent, at its longest.
        raise kvd.errors.from_code(code, "é" * 100_000)

    monkeypatch.setattr(daemon.store, "hold", fail)
    with pytest.raises(grpc.RpcError) as raised:
        stub.Hold(pb.HoldRequest(keys=join_keys(KEYS)))
    assert code_of(raised.value) == (status, code)


def test_a_bug_in_the_daemon_is_internal_and_tells_no_secret(
    daemon: DaemonInThread, stub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise RuntimeError("secret")

    monkeypatch.setattr(daemon.store, "hold", fail)
    with pytest.raises(grpc.RpcError) as raised:
        stub.Hold(pb.HoldRequest(keys=join_keys(KEYS)))
    assert code_of(raised.value) == (grpc.StatusCode.INTERNAL, "internal")
    assert "secret" not in raised.value.details()
    assert daemon.store.counters["internal_errors"] == 1


# Health, drain, reflection.


def test_health_follows_the_daemons_state(daemon: DaemonInThread) -> None:
    kind = health_pb2.HealthCheckResponse
    with grpc.insecure_channel(f"unix:{daemon.config.grpc_socket_path}") as channel:
        health = health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
        assert next(watch).status == kind.SERVING
        for name in ("", "kvd.v1.Kvd"):
            request = health_pb2.HealthCheckRequest(service=name)
            daemon.facts.state = "serving"
            assert health.Check(request).status == kind.SERVING
            daemon.facts.state = "draining"
            assert health.Check(request).status == kind.NOT_SERVING
        assert next(watch).status == kind.NOT_SERVING
        listed = health.List(health_pb2.HealthListRequest()).statuses
        assert {name: found.status for name, found in listed.items()} == {
            "": kind.NOT_SERVING,
            "kvd.v1.Kvd": kind.NOT_SERVING,
        }
        with pytest.raises(grpc.RpcError) as raised:
            health.Check(health_pb2.HealthCheckRequest(service="other"))
        assert raised.value.code() == grpc.StatusCode.NOT_FOUND
        watch.cancel()


def test_a_draining_daemon_gives_no_new_lease_but_lets_open_ones_end(
    daemon: DaemonInThread,
) -> None:
    chunks = [random_chunk(SMALL, 16, seed) for seed in range(len(KEYS))]
    with daemon.connect() as client:
        client.store(SMALL, KEYS[:2], chunks[:2])
        lease = client.pin(SMALL, KEYS)
        reservation = client.reserve(SMALL, KEYS[2:], parent=KEYS[1], start=32)
        daemon.facts.state = "draining"
        for refused in (client.pin, client.reserve):
            with pytest.raises(Unavailable, match="draining"):
                refused(SMALL, KEYS)
        assert lease.raw(1).tobytes() == chunks[1].tobytes()
        lease.release()
        for index in reservation:
            reservation.write(index, chunks[2 + index])
        assert reservation.commit() == 2


def test_reflection_tells_the_services(daemon: DaemonInThread) -> None:
    with grpc.insecure_channel(f"unix:{daemon.config.grpc_socket_path}") as channel:
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
        (answer,) = call(iter([request]), timeout=PATIENCE_S)
    names = {service.name for service in answer.list_services_response.service}
    assert {"kvd.v1.Kvd", "grpc.health.v1.Health"} <= names


# Where it listens.


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_only_the_owner_may_open_the_socket(daemon: DaemonInThread) -> None:
    assert daemon.config.grpc_socket_path == daemon.local.with_name("kvd.grpc.sock")
    assert mode_of(daemon.config.grpc_socket_path) == 0o600


def test_a_group_may_open_the_socket_if_it_is_named(tmp_path: Path) -> None:
    grp = pytest.importorskip("grp")
    gid = os.getgid()
    daemon = DaemonInThread(tmp_path, socket_group=grp.getgrgid(gid).gr_name)
    path = daemon.config.grpc_socket_path
    assert path is not None
    assert (mode_of(path), path.stat().st_gid) == (0o660, gid)
    daemon.stop()


def test_a_group_that_does_not_exist_stops_the_start_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no group"):
        DaemonInThread(tmp_path, socket_group="no-such-group")
    assert not [path for path in tmp_path.iterdir() if path.is_socket()]


def test_a_path_of_any_characters_works(tmp_path: Path) -> None:
    path = tmp_path / "kv d%41?#&é.sock"
    daemon = DaemonInThread(tmp_path, grpc_socket=str(path))
    assert path.is_socket()
    with daemon.connect() as client:
        assert client.lookup(KEYS) == 0
    daemon.stop()
    assert not path.exists()


def test_the_socket_of_a_dead_daemon_is_replaced_that_of_a_living_one_is_not(
    tmp_path: Path,
) -> None:
    first = tmp_path / "first"
    second = tmp_path / "second"
    path = tmp_path / "deep" / "shared.sock"
    daemon = DaemonInThread(first, grpc_socket=str(path))
    with pytest.raises(ConfigError, match="in use"):
        DaemonInThread(second, grpc_socket=str(path))
    with daemon.connect() as client:
        assert client.lookup(KEYS) == 0
    daemon.stop()
    leave_stale_socket(path)
    daemon = DaemonInThread(second, grpc_socket=str(path))
    with daemon.connect() as client:
        assert client.lookup(KEYS) == 0
    daemon.stop()


def leave_stale_socket(path: Path) -> None:
    import socket

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
    assert path.is_socket()


def test_what_is_no_socket_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("data")
    with pytest.raises(ConfigError, match="no socket"):
        DaemonInThread(tmp_path, grpc_socket=str(path))
    assert path.read_text() == "data"


def test_a_port_that_is_taken_stops_the_start_and_leaves_nothing(
    daemon: DaemonInThread, tmp_path: Path
) -> None:
    folder = tmp_path / "second"
    umask = os.umask(0o022)
    os.umask(umask)
    with pytest.raises(ConfigError, match="taken"):
        DaemonInThread(folder, listen=f"127.0.0.1:{daemon.port}")
    assert [path.name for path in folder.iterdir() if path.is_socket()] == []
    assert os.umask(umask) == umask


def test_beyond_loopback_nothing_listens_without_tls(tmp_path: Path) -> None:
    for host in ("0.0.0.0", "[::]", "192.0.2.1", "example.org"):
        with pytest.raises(ConfigError, match="beyond this machine"):
            DaemonInThread(tmp_path, listen=f"{host}:0")
    assert not list(tmp_path.iterdir())


def test_insecure_is_the_operators_word_for_it(tmp_path: Path) -> None:
    daemon = DaemonInThread(tmp_path, listen="0.0.0.0:0", insecure=True)
    with daemon.connect(daemon.tcp) as client:
        assert client.lookup(KEYS) == 0
    daemon.stop()


def test_addresses_that_can_never_work_are_refused_at_once() -> None:
    for address in (
        "grpc://",
        "grpc://host",
        "grpc://host:99999",
        "grpc://::1:80",
        "grpc+unix://relative/path",
        "grpc+unix://" + "/x" * 60,
    ):
        with pytest.raises(InvalidRequest):
            kvd.connect(address, timeout_s=PATIENCE_S)
