"""The gRPC plane: the whole API for clients without shared memory, for administration, for peers.

A stream is one session, and its bytes travel in messages. The daemon alone writes them into the
arena, so a session may be closed at any moment: nobody else can still be writing.

On the Unix socket the file's mode is the guard, for gRPC does not tell who the peer is; on TCP it
is the client's certificate.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn, TypeVar
from urllib.parse import quote

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from kvd.daemon import admin
from kvd.daemon.config import Config
from kvd.daemon.session import Session, lookup
from kvd.daemon.sockets import claim, give_to_group
from kvd.daemon.store import ChunkStore
from kvd.daemon.tls import TlsFiles, TlsPem
from kvd.errors import (
    AccessDenied,
    ConfigError,
    Corrupt,
    DeadlineExceeded,
    InvalidRequest,
    KvdError,
    LayoutMismatch,
    LeaseExpired,
    TierFailed,
    TooLarge,
    Unavailable,
    UnknownLease,
)
from kvd.proto import kvd_pb2 as pb
from kvd.proto.address import parse_address
from kvd.proto.limits import GRPC_MESSAGE_SIZE_MAX

log = logging.getLogger("kvd.rpc")

M = TypeVar("M", bound=Message)

SERVICE = pb.DESCRIPTOR.services_by_name["Kvd"].full_name

# Each may hold a request and an answer of 4 MiB in the daemon: at most 1 GiB together.
SESSIONS_MAX = 128

# Sessions, and beside them unary calls and watchers of the health.
CALLS_MAX = SESSIONS_MAX + 128

# A peer that opens a stream and says nothing does not keep the place of one that would.
ATTACH_WITHIN_S = 10.0

# How soon a watcher of the health hears of a change.
HEALTH_LOOK_EVERY_S = 0.25

# Headers have 8 KiB in all, and a message may quote what the client sent.
ERROR_SIZE_MAX = 1024

_OPTIONS = (
    ("grpc.max_receive_message_length", GRPC_MESSAGE_SIZE_MAX),
    # A second daemon on a port is an error, not a partner that gets every other client.
    ("grpc.so_reuseport", 0),
    # Only identity: KV does not compress, and a small message must not become a large one.
    ("grpc.compression_enabled_algorithms_bitset", 1),
    # A host that vanishes says no word: its session ends half a minute later, its extents with it.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # Clients ask in the same way; by default that would count as an attack.
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
)

_STATUS = {
    InvalidRequest.code: grpc.StatusCode.INVALID_ARGUMENT,
    LayoutMismatch.code: grpc.StatusCode.FAILED_PRECONDITION,
    TooLarge.code: grpc.StatusCode.RESOURCE_EXHAUSTED,
    UnknownLease.code: grpc.StatusCode.NOT_FOUND,
    AccessDenied.code: grpc.StatusCode.PERMISSION_DENIED,
    LeaseExpired.code: grpc.StatusCode.FAILED_PRECONDITION,
    Corrupt.code: grpc.StatusCode.DATA_LOSS,
    DeadlineExceeded.code: grpc.StatusCode.DEADLINE_EXCEEDED,
    Unavailable.code: grpc.StatusCode.UNAVAILABLE,
    TierFailed.code: grpc.StatusCode.INTERNAL,
}


class GrpcServer:
    """Serves `kvd.v1.Kvd`, health and reflection. `port` is the one that TCP got, 0 without TCP."""

    def __init__(self, store: ChunkStore, facts: admin.Facts) -> None:
        self.port = 0
        self._lock = -1
        self._store = store
        self._facts = facts
        self._num_sessions = 0
        self._server = grpc.aio.server(options=_OPTIONS, maximum_concurrent_rpcs=CALLS_MAX)
        self._server.add_generic_rpc_handlers((self._handlers(),))
        health_pb2_grpc.add_HealthServicer_to_server(_health_servicer(facts), self._server)
        names = (SERVICE, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name)
        reflection.enable_server_reflection((*names, reflection.SERVICE_NAME), self._server)

    @classmethod
    async def start(cls, config: Config, store: ChunkStore, facts: admin.Facts) -> GrpcServer:
        """A server that listens where `config` says. Raises `ConfigError`: then nothing is left."""
        self = cls(store, facts)
        path = config.grpc_socket_path
        try:
            if config.listen:
                self.port = _listen_tcp(self._server, config)
                log.info("event=grpc_listening port=%d tls=%s", self.port, config.has_tls)
            if path is not None:
                # The last that can fail: a server that never ran would leave its file behind.
                self._lock = claim(path, "--grpc-socket")
                _listen_unix(self._server, path, config.socket_group)
                log.info("event=grpc_listening socket=%s", path)
        except BaseException:
            await self.close()
            raise
        await self._server.start()
        return self

    async def close(self) -> None:
        """Take no more calls and end all sessions."""
        await self._server.stop(None)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _handlers(self) -> Any:
        # Requests come as bytes: what cannot be parsed gets an answer, and no trace in the log.
        store = self._store
        calls = {
            "Lookup": self._unary(pb.LookupRequest, partial(lookup, store)),
            "Status": self._unary(pb.StatusRequest, partial(admin.status, store, self._facts)),
            "List": self._unary(pb.ListRequest, partial(admin.list_chunks, store)),
            "Clear": self._unary(pb.ClearRequest, partial(admin.clear, store)),
            "Hold": self._unary(pb.HoldRequest, partial(admin.hold, store)),
        }
        methods = {name: grpc.unary_unary_rpc_method_handler(call) for name, call in calls.items()}
        methods["Session"] = grpc.stream_stream_rpc_method_handler(self._session)
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    async def _session(self, _: object, context: Any) -> None:
        if self._num_sessions >= SESSIONS_MAX:
            message = f"{SESSIONS_MAX} gRPC sessions are open already"
            log.warning("event=client_refused reason=%r", message)
            await _abort(context, Unavailable(message), grpc.StatusCode.RESOURCE_EXHAUSTED)
        session = Session(self._store, self._facts, has_arena=False)
        self._num_sessions += 1
        self._facts.num_sessions += 1
        peer = context.peer()
        log.info("event=session_opened session=%d peer=%s", session.id, peer)
        try:
            await _converse(session, context)
        except grpc.aio.InternalError:
            # The client went away under an answer: an end of the stream like any other.
            log.debug("event=client_gone session=%d", session.id)
        finally:
            # Whatever ended the stream, the cancellation of this very task among it.
            num_leases = len(session.leases)
            session.close()
            self._num_sessions -= 1
            self._facts.num_sessions -= 1
            log.info("event=session_closed session=%d leases_taken_back=%d", session.id, num_leases)

    def _unary(
        self, kind: type[M], answer: Callable[[M], Message]
    ) -> Callable[[bytes, Any], Awaitable[bytes]]:
        async def handle(packet: bytes, context: Any) -> bytes:
            try:
                return answer(kind.FromString(packet)).SerializeToString()
            except DecodeError:
                self._store.counters["request_errors"] += 1
                return await _abort(context, InvalidRequest(f"this is no {kind.DESCRIPTOR.name}"))
            except KvdError as error:
                self._store.counters["request_errors"] += 1
                return await _abort(context, error)
            except Exception:
                # Nothing has changed, as in a session; what went wrong is not the client's.
                log.exception("event=request_failed verb=%s", kind.DESCRIPTOR.name)
                self._store.counters["internal_errors"] += 1
                hidden = KvdError("the call failed inside the daemon, see its log")
                return await _abort(context, hidden)

        return handle


async def _converse(session: Session, context: Any) -> None:
    """Answer each request of a stream before the next one is read, until it ends."""
    try:
        async with asyncio.timeout(ATTACH_WITHIN_S):
            packet = await context.read()
    except TimeoutError:
        await _abort(context, DeadlineExceeded(f"no attach in {ATTACH_WITHIN_S} s"))
    # At the end of the stream there are no bytes but a mark.
    while isinstance(packet, bytes):
        answer = session.handle_packet(packet)
        if answer is not None and not isinstance(answer, bytes):
            answer = await answer
        if answer is not None:
            await context.write(answer)
        packet = await context.read()


async def _abort(context: Any, error: KvdError, status: grpc.StatusCode | None = None) -> NoReturn:
    """End a call with the status of `error`, and its own code beside it."""
    status = status or _STATUS.get(error.code, grpc.StatusCode.INTERNAL)
    details = str(error)[:ERROR_SIZE_MAX]
    await context.abort(status, details, trailing_metadata=(("kvd-code", error.code),))
    raise AssertionError("abort raises")


def _health_servicer(facts: admin.Facts) -> SimpleNamespace:
    """grpc.health.v1 out of the facts themselves, so that there is no second state to keep."""
    names = ("", SERVICE)

    def status(name: str) -> Any:
        kind = health_pb2.HealthCheckResponse
        if name not in names:
            return kind(status=kind.SERVICE_UNKNOWN)
        return kind(status=kind.SERVING if facts.state == "serving" else kind.NOT_SERVING)

    async def check(message: Any, context: Any) -> Any:
        if message.service not in names:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"there is {SERVICE} and ''")
        return status(message.service)

    async def watch(message: Any, _: object) -> AsyncIterator[Any]:
        last = None
        while True:
            if (found := status(message.service)) != last:
                yield found
                last = found
            await asyncio.sleep(HEALTH_LOOK_EVERY_S)

    async def list_all(*_: object) -> Any:
        # Stubs that type checkers bring along are older than the message.
        kind = health_pb2.HealthListResponse  # pyright: ignore[reportAttributeAccessIssue]
        return kind(statuses={name: status(name) for name in names})

    return SimpleNamespace(Check=check, Watch=watch, List=list_all)


def _listen_unix(server: grpc.aio.Server, path: Path, group: str) -> None:
    # The file has this mode from its first moment; there is none in which others could connect.
    umask = os.umask(0o177)
    try:
        server.add_insecure_port(f"unix:{quote(str(path.absolute()))}")
    except RuntimeError as error:
        raise ConfigError(f"cannot listen at {path}; choose another --grpc-socket") from error
    finally:
        os.umask(umask)
    if group:
        give_to_group(path, group)


def _listen_tcp(server: grpc.aio.Server, config: Config) -> int:
    """Listen at `config.listen`, which the config has checked against its TLS; the port."""
    host, port = parse_address(config.listen)
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        if not config.has_tls:
            return int(server.add_insecure_port(address))
        return int(server.add_secure_port(address, _credentials(config)))
    except RuntimeError as error:
        raise ConfigError(
            f"cannot listen at {config.listen}: the port is taken or the address not this machine's"
        ) from error


def _credentials(config: Config) -> grpc.ServerCredentials:
    files = TlsFiles(config)

    def renewed() -> Any:
        # Asked at each handshake, on a thread of gRPC's; None is no change.
        pem = files.read_again()
        return _certificates(pem) if pem else None

    return grpc.dynamic_ssl_server_credentials(
        _certificates(files.read()),
        renewed,
        require_client_authentication=bool(config.tls_client_ca),
    )


def _certificates(pem: TlsPem) -> Any:
    return grpc.ssl_server_certificate_configuration([(pem.key, pem.cert)], pem.client_ca)
