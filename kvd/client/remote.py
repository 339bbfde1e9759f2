"""RemoteConnection: a session over gRPC, for clients that share no memory with the daemon.

One stream is one session. A call leaves by the stream and waits for the answer with its id, so
that several threads can have calls under way and each keeps its own deadline:

    call ──► outbox ──► gRPC's sender ──► daemon        gives up before it is sent: never sent
    call ◄── waiter ◄── receiver thread ◄──             gives up after: its late lease goes back

gRPC does not survive a fork. The child of a process that has used it gets `Unavailable`: let it
attach to the local socket, or start it with `spawn`.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from queue import Empty, SimpleQueue

import grpc

from kvd.arena import Arena
from kvd.client.endpoint import Endpoint, parse_endpoint
from kvd.errors import DeadlineExceeded, TooLarge, Unavailable, from_code
from kvd.proto import kvd_pb2 as pb
from kvd.proto.limits import GRPC_MESSAGE_SIZE_MAX, PROTOCOL_VERSION

METHOD = f"/{pb.DESCRIPTOR.services_by_name['Kvd'].full_name}/Session"

_OPTIONS = (
    ("grpc.max_receive_message_length", GRPC_MESSAGE_SIZE_MAX),
    # A daemon that has come back is tried at once, whatever an earlier channel went through.
    ("grpc.use_local_subchannel_pool", 1),
    # A request is sent once; whether to ask again is the caller's decision.
    ("grpc.enable_retries", 0),
    # A daemon is a neighbour: proxies that the environment names lead elsewhere.
    ("grpc.enable_http_proxy", 0),
    ("grpc.service_config_disable_resolution", 1),
    # A host that vanishes says no word: the session ends half a minute later.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
)

_UINT64_MAX = (1 << 64) - 1


class RemoteConnection:
    """A `Connection` over gRPC; thread-safe, any number of calls under way.

    `address` is `grpc://host:port`, `grpcs://host:port` (TLS) or `grpc+unix:///path`. Deadlines of
    leases are put into this host's monotonic time, never later than the daemon means them.
    """

    def __init__(
        self,
        address: str,
        *,
        name: str,
        timeout_s: float,
        tls_ca: str | Path | None = None,
        tls_cert: str | Path | None = None,
        tls_key: str | Path | None = None,
    ) -> None:
        self.arena: Arena | None = None
        self.is_open = True
        self._endpoint = parse_endpoint(address, tls_ca=tls_ca, tls_cert=tls_cert, tls_key=tls_key)
        self._ids = count(1)
        _check_not_forked()
        self._stream = _Stream(_open_channel(self._endpoint), weakref.WeakMethod(self._ended))
        _connections.add(self)
        try:
            reply = self._attach(name, timeout_s)
        except BaseException:
            self.close()
            raise
        self.instance = reply.instance
        self.session = reply.session

    @property
    def is_alive(self) -> bool:
        """Whether the stream stands. What was read came in messages: it stays what it is."""
        return self.is_open

    def call(self, request: pb.Request, timeout_s: float) -> pb.Response:
        request.id = next(self._ids)
        sent_ns = time.monotonic_ns()
        response = self._exchange(request, timeout_s)
        self._localise(request, response, sent_ns)
        return response

    def release(self, lease: int) -> None:
        if self.is_open:
            self._stream.post(_release(lease))

    def hold_open(self) -> None:
        """Nothing to hold: the daemon alone writes into the arena."""

    def let_close(self) -> None:
        """See `hold_open`."""

    def close(self) -> None:
        self.is_open = False
        self._stream.close()

    def __del__(self) -> None:
        stream = getattr(self, "_stream", None)
        if stream is not None:
            stream.end()

    def _attach(self, name: str, timeout_s: float) -> pb.AttachReply:
        message = pb.AttachRequest(version=PROTOCOL_VERSION, client=name)
        sent_ns = time.monotonic_ns()
        try:
            request = pb.Request(id=next(self._ids), attach=message)
            reply = self._exchange(request, timeout_s).attach
        except Unavailable as error:
            if not self._stream.is_over:
                raise
            raise self._endpoint.failure(self._stream.reason) from error
        # The daemon answered later than we asked: what is added to its times is never too much.
        self._offset_ns = sent_ns - reply.now_ns
        return reply

    def _exchange(self, request: pb.Request, timeout_s: float) -> pb.Response:
        packet = request.SerializeToString()
        if len(packet) > GRPC_MESSAGE_SIZE_MAX:
            raise TooLarge(f"a message has at most {GRPC_MESSAGE_SIZE_MAX} bytes")
        if not self.is_open:
            raise self._stream.failure()
        response = self._stream.exchange(request.id, packet, timeout_s)
        if response is None:
            raise DeadlineExceeded(
                f"no answer from the daemon at {self._endpoint.address} in {timeout_s} s"
            )
        if response.WhichOneof("result") == "error":
            raise from_code(response.error.code, response.error.message)
        return response

    def _localise(self, request: pb.Request, response: pb.Response, sent_ns: int) -> None:
        """Put the deadline of a new or renewed lease into this host's monotonic time.

        A lease of n ns ends n ns after the daemon saw the request, which it did after `sent_ns`:
        so a grant measures the clocks' distance anew, and drift does not add up over a session.
        """
        verb = response.WhichOneof("result")
        if verb == "renew":
            reply = response.renew
            asked_ns = request.renew.lease_ns
            # A renewal never shortens a lease, so it may end later than what was asked for.
            local_ns = max(sent_ns + asked_ns, reply.deadline_ns + self._offset_ns)
            reply.deadline_ns = _clamp(local_ns)
        elif verb in ("pin", "reserve"):
            grant = response.pin if verb == "pin" else response.reserve
            asked_ns = request.pin.lease_ns if verb == "pin" else request.reserve.lease_ns
            offset_ns = self._offset_ns
            if asked_ns and grant.lease:
                offset_ns = self._offset_ns = sent_ns + asked_ns - grant.deadline_ns
            if grant.lease:
                grant.deadline_ns = _clamp(grant.deadline_ns + offset_ns)

    def _ended(self) -> None:
        self.is_open = False

    def _forget_after_fork(self) -> None:
        """In a forked child: the session is the parent's, and so are the threads that serve it."""
        self.is_open = False
        self._stream.forget()


class _Stream:
    """The gRPC stream under a connection, and the thread that hands out its answers.

    It knows its connection by a weak reference only: one that nobody has any more ends it.
    """

    def __init__(
        self, channel: grpc.Channel, ended: weakref.WeakMethod[Callable[[], None]]
    ) -> None:
        self.is_over = False
        self._is_parents = False
        self._channel = channel
        self._ended = ended
        self.reason = "the connection is closed"
        # A call takes its waiter or its packet back by the same atomic pop by which the other side
        # takes it: whoever gets it decides.
        self._waiters: dict[int, SimpleQueue[pb.Response | None]] = {}
        self._unsent: dict[int, bytes] = {}
        # An int stands for a packet in `_unsent`, None for the end. A queue that finalizers may
        # put into at any point of any thread.
        self._outbox: SimpleQueue[int | bytes | None] = SimpleQueue()
        method = channel.stream_stream(METHOD, response_deserializer=pb.Response.FromString)
        self._call = method(self._packets())
        threading.Thread(target=self._receive, name="kvd-grpc", daemon=True).start()

    def exchange(self, id: int, packet: bytes, timeout_s: float) -> pb.Response | None:
        """The answer to a packet, None if it does not come in time. Raises `Unavailable`."""
        waiter: SimpleQueue[pb.Response | None] = SimpleQueue()
        self._waiters[id] = waiter
        self._unsent[id] = packet
        try:
            self._outbox.put(id)
            # The receiver marks the end before it looks for waiters: one of us sees the other.
            if self.is_over:
                raise self.failure()
            response = waiter.get(timeout=timeout_s)
        except BaseException as error:
            response = self._withdraw(id, waiter)
            if not isinstance(error, Empty):
                self._give_back(response)
                raise
            if response is None and not self.is_over:
                return None
        if response is None:
            raise self.failure()
        return response

    def post(self, packet: bytes) -> None:
        """Send a packet that has no answer, without waiting."""
        self._outbox.put(packet)

    def failure(self) -> Unavailable:
        """What a call on a stream that is over comes to."""
        return Unavailable(f"the session with the daemon is over: {self.reason}")

    def end(self) -> None:
        """Let the stream end by itself, soon. Safe in a finalizer: takes no lock, calls no gRPC."""
        self._outbox.put(None)

    def close(self) -> None:
        """End the stream now."""
        self.is_over = True
        self.end()
        if not self._is_parents:
            self._channel.close()

    def forget(self) -> None:
        """Touch gRPC no more: its locks and threads are those of the parent process."""
        self.is_over = self._is_parents = True
        self.reason = _FORKED

    def _withdraw(self, id: int, waiter: SimpleQueue[pb.Response | None]) -> pb.Response | None:
        """Give a call up; its answer if that has come after all."""
        self._unsent.pop(id, None)
        if self._waiters.pop(id, None) is not None:
            return None
        # The receiver has taken the waiter: what it puts there is under way.
        return waiter.get()

    def _packets(self) -> Iterator[bytes]:
        """What gRPC's sender sends, one at a time: it takes the next when the last has gone out."""
        while (item := self._outbox.get()) is not None:
            packet = self._unsent.pop(item, None) if isinstance(item, int) else item
            if packet is not None:
                yield packet

    def _receive(self) -> None:
        try:
            for response in self._call:
                waiter = self._waiters.pop(response.id, None)
                if waiter is not None:
                    waiter.put(response)
                else:
                    self._give_back(response)
            self._lost("end of stream")
        except grpc.RpcError:
            self._lost(f"{self._call.code().name}: {self._call.details()}")
        finally:
            self._finish()

    def _lost(self, reason: str) -> None:
        # All that the session held is free again, or will be when the daemon notices.
        if not self.is_over:
            self.reason = reason

    def _finish(self) -> None:
        self.is_over = True
        if (ended := self._ended()) is not None:
            ended()
        for id in list(self._waiters):
            if (waiter := self._waiters.pop(id, None)) is not None:
                waiter.put(None)
        self.end()
        self._channel.close()

    def _give_back(self, response: pb.Response | None) -> None:
        """The answer to a call that was given up: what it grants is nobody's."""
        kind = response.WhichOneof("result") if response is not None else None
        if response is None or kind not in ("pin", "reserve"):
            return
        lease = response.pin.lease if kind == "pin" else response.reserve.lease
        if lease:
            self.post(_release(lease))


def _release(lease: int) -> bytes:
    return pb.Request(release=pb.ReleaseRequest(lease=lease)).SerializeToString()


def _clamp(value_ns: int) -> int:
    return min(max(value_ns, 0), _UINT64_MAX)


def _open_channel(endpoint: Endpoint) -> grpc.Channel:
    if not endpoint.has_tls:
        return grpc.insecure_channel(endpoint.target, _OPTIONS)
    credentials = grpc.ssl_channel_credentials(endpoint.ca, endpoint.key, endpoint.cert)
    return grpc.secure_channel(endpoint.target, credentials, _OPTIONS)


_FORKED = (
    "gRPC does not survive a fork; attach to the daemon's local socket instead, or start this "
    "process with the spawn method"
)

_connections: weakref.WeakSet[RemoteConnection] = weakref.WeakSet()

# The process that has used gRPC; in another one, its child, gRPC would wait for threads for ever.
_user_pid = 0

# What a forked child keeps for ever, so that no finalizer of gRPC runs in it.
_left_to_parent: list[RemoteConnection] = []


def _check_not_forked() -> None:
    global _user_pid
    if _user_pid not in (0, os.getpid()):
        raise Unavailable(_FORKED)
    _user_pid = os.getpid()


def _after_fork() -> None:
    for connection in list(_connections):
        connection._forget_after_fork()
        _left_to_parent.append(connection)


_register: Callable[..., None] = os.register_at_fork
_register(after_in_child=_after_fork)
