"""Connections to a daemon: the attach socket with its arena, and the role that a gRPC stream fills
as well.
"""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from kvd.arena import Arena
from kvd.errors import AccessDenied, Corrupt, DeadlineExceeded, Unavailable, from_code
from kvd.proto import kvd_pb2 as pb
from kvd.proto.address import SOCKET_PATH_SIZE_MAX
from kvd.proto.limits import MESSAGE_SIZE_MAX, PROTOCOL_VERSION

# Plain integers: `|` of the socket module's flags is Python code, half a microsecond a time.
_NO_SIGNAL = int(socket.MSG_NOSIGNAL)
_NOT_NOW = int(socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)

_LOOK = int(socket.MSG_PEEK | socket.MSG_DONTWAIT)

_TIMEVAL = struct.Struct("ll")


class Connection(Protocol):
    """One session with a daemon. A failure to reach it is `Unavailable`, and then the connection is
    over.
    """

    arena: Arena | None
    instance: str
    is_open: bool

    @property
    def is_alive(self) -> bool:
        """Whether the session still stands: a reader looks when its copy has ended, for a daemon
        that comes back may find the same arena and use its bytes anew.
        """
        ...

    def call(self, request: pb.Request, timeout_s: float) -> pb.Response:
        """The answer to `request`, whose id is set here.

        Raises `DeadlineExceeded` when it does not come in time: what it will grant is given back as
        soon as it comes. An error answer is raised as the `KvdError` that it names.
        """
        ...

    def release(self, lease: int) -> None:
        """Give a lease back without waiting. Never raises: a session that is over has given back
        everything.
        """
        ...

    def hold_open(self) -> None:
        """Somebody writes into the arena: `close` waits, for the daemon may reuse the bytes after
        it.
        """
        ...

    def let_close(self) -> None:
        """The writer that `hold_open` announced has ended."""
        ...

    def close(self) -> None:
        """End the session, once nobody writes any more."""
        ...


class LocalConnection:
    """A `Connection` over the attach socket; thread-safe, one request in flight at a time."""

    def __init__(self, path: Path, *, name: str, timeout_s: float) -> None:
        self.is_open = True
        self.arena: Arena | None = None
        # Re-entrant: a collected lease may give itself back while this very thread waits for an
        # answer.
        self._lock = threading.RLock()
        self._ids = 0
        self._owed: list[int] = []
        self._num_writers = 0
        self._is_closing = False
        self._token = 0
        self._timeout_s = 0.0
        self._socket = _connect(path)
        _connections.add(self)
        try:
            self._set_timeout(timeout_s)
            reply, self.arena = self._attach(name)
        except BaseException:
            self.is_open = False
            self._socket.close()
            raise
        self.instance = reply.instance
        self.session = reply.session
        self._token = reply.token

    @property
    def is_alive(self) -> bool:
        """Whether the daemon still holds the other end. A look, no question."""
        if not self.is_open:
            return False
        try:
            return bool(self._socket.recv(1, _LOOK))
        except BlockingIOError:
            return True
        except OSError:
            return False

    def call(self, request: pb.Request, timeout_s: float) -> pb.Response:
        give_up = time.monotonic() + timeout_s
        if not self._lock.acquire(timeout=timeout_s):
            raise DeadlineExceeded(f"another thread's call took all of the {timeout_s} s")
        try:
            if not self.is_open:
                raise Unavailable("the connection to the daemon is closed")
            self._ids += 1
            request.id = self._ids
            self._set_timeout(timeout_s)
            response = self._exchange(request, give_up, timeout_s)
        finally:
            self._lock.release()
        if response.WhichOneof("result") == "error":
            raise from_code(response.error.code, response.error.message)
        return response

    def release(self, lease: int) -> None:
        with self._lock:
            if self.is_open:
                self._owed.append(lease)
                self._pay(_NOT_NOW)

    def hold_open(self) -> None:
        with self._lock:
            self._num_writers += 1

    def let_close(self) -> None:
        with self._lock:
            self._num_writers -= 1
            if self._is_closing and not self._num_writers:
                self._stop()

    def close(self) -> None:
        with self._lock:
            self.is_open = False
            self._is_closing = True
            if not self._num_writers:
                self._stop()
        if self.arena is not None:
            self.arena.close()

    def _attach(self, name: str) -> tuple[pb.AttachReply, Arena]:
        message = pb.AttachRequest(version=PROTOCOL_VERSION, client=name, stopped=_stopped)
        sent_ns = time.monotonic_ns()
        try:
            self._socket.send(pb.Request(id=0, attach=message).SerializeToString())
            packet, fds, _, _ = socket.recv_fds(self._socket, MESSAGE_SIZE_MAX, 1)
        except BlockingIOError:
            raise DeadlineExceeded("the daemon did not answer the attach in time") from None
        except OSError as error:
            # A daemon that refuses us may have closed before we wrote; its reason is still there to
            # read.
            packet, fds = _last_words(self._socket), []
            if not packet:
                raise Unavailable(f"the daemon closed the connection: {error.strerror}") from error
        if not packet:
            raise Unavailable("the daemon closed the connection at the attach")
        response = pb.Response.FromString(packet)
        if response.WhichOneof("result") == "error":
            raise from_code(response.error.code, response.error.message)
        if len(fds) != 1:
            raise Unavailable("the daemon sent no arena")
        arena = Arena.attach(fds[0])
        reply = response.attach
        # Deadlines are points on the host's monotonic clock: a time namespace of its own would
        # shift them.
        if not sent_ns <= reply.now_ns <= time.monotonic_ns():
            arena.close()
            raise AccessDenied(
                "client and daemon do not share a monotonic clock (time namespaces?)"
            )
        return reply, arena

    def _exchange(self, request: pb.Request, give_up: float, timeout_s: float) -> pb.Response:
        if self._owed:
            self._pay(_NO_SIGNAL)
        try:
            self._socket.send(request.SerializeToString(), _NO_SIGNAL)
        except BlockingIOError:
            raise DeadlineExceeded(f"the daemon took no request for {timeout_s} s") from None
        except OSError as error:
            raise self._lost(error) from error
        while True:
            try:
                packet = self._socket.recv(MESSAGE_SIZE_MAX)
            except BlockingIOError:
                packet = None
            except OSError as error:
                raise self._lost(error) from error
            if packet is None:
                raise DeadlineExceeded(f"no answer from the daemon in {timeout_s} s")
            if not packet:
                raise self._lost(None)
            response = _decode(packet)
            if response.id == request.id:
                return response
            self._give_back(response)
            self._set_timeout(max(give_up - time.monotonic(), 0.001))

    def _give_back(self, response: pb.Response) -> None:
        """A late answer to a call that was given up: what it grants is nobody's."""
        kind = response.WhichOneof("result")
        lease = getattr(response, kind).lease if kind in ("pin", "reserve") else 0
        if lease:
            self._owed.append(lease)
            self._pay(_NOT_NOW)

    def _pay(self, flags: int) -> None:
        """Send the releases that are owed; what the socket does not take now goes before the next
        call.
        """
        try:
            while self._owed:
                release = pb.Request(release=pb.ReleaseRequest(lease=self._owed[0]))
                self._socket.send(release.SerializeToString(), flags)
                self._owed.pop(0)
        except BlockingIOError:
            pass
        except OSError as error:
            self._lost(error)

    def _set_timeout(self, timeout_s: float) -> None:
        # The kernel's own timeouts spare a poll() in each call; setting them costs one only when
        # they change.
        if timeout_s != self._timeout_s:
            value = _TIMEVAL.pack(int(timeout_s), int(timeout_s % 1 * 1e6) or int(timeout_s < 1))
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)
            self._timeout_s = timeout_s

    def _lost(self, error: OSError | None) -> Unavailable:
        """The session is over. The socket closes with the last writer, in case the daemon still
        lives.
        """
        self.is_open = False
        self._is_closing = True
        if not self._num_writers:
            self._stop()
        return Unavailable(f"the daemon went away: {error.strerror if error else 'end of file'}")

    def _stop(self) -> None:
        """Nobody writes in this session any more: a daemon that finds its extents may have them."""
        self._socket.close()
        if self._token:
            _stopped.append(self._token)
            self._token = 0

    def _forget_after_fork(self) -> None:
        """In a forked child: the session is the parent's. The arena is not mapped here
        (MADV_DONTFORK).
        """
        self.is_open = False
        self._lock = threading.RLock()
        self._socket.close()


def _connect(path: Path) -> socket.socket:
    raw = os.fsencode(path)
    if len(raw) > SOCKET_PATH_SIZE_MAX:
        raise Unavailable(
            f"socket path has {len(raw)} bytes, at most {SOCKET_PATH_SIZE_MAX} work: {path}"
        )
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        peer.connect(raw)
    except PermissionError:
        peer.close()
        raise AccessDenied(
            f"user {os.geteuid()} may not open {path}; ask for --socket-group"
        ) from None
    except OSError as error:
        peer.close()
        raise Unavailable(
            f"no daemon at {path} ({error.strerror}); start one with `kvd start`"
        ) from error
    return peer


def _last_words(peer: socket.socket) -> bytes:
    try:
        return peer.recv(MESSAGE_SIZE_MAX, socket.MSG_DONTWAIT)
    except OSError:
        return b""


def _decode(packet: bytes) -> pb.Response:
    try:
        return pb.Response.FromString(packet)
    except Exception as error:
        raise Corrupt(
            f"the daemon answered {len(packet)} bytes that are no kvd.v1 response"
        ) from error


_connections: weakref.WeakSet[LocalConnection] = weakref.WeakSet()

# Tokens of this process's sessions that are over, the latest ones: more do not end while a daemon
# is away.
_stopped: deque[int] = deque(maxlen=256)


def _after_fork() -> None:
    for connection in list(_connections):
        connection._forget_after_fork()


_register: Callable[..., None] = os.register_at_fork
_register(after_in_child=_after_fork)
