"""The local plane: one SOCK_SEQPACKET socket at which clients of this host attach.

The peer's user is checked (SO_PEERCRED), then it gets the arena's descriptor with the answer to its
attach. After that a packet is a request, its answer a packet; bulk bytes never come this way. End
of file ends the session.

The daemon never closes the session of a live client by itself: such a client may be writing into
its extents, and they may only be reused when it cannot any more. A client that does not read its
answers is not read from either.
"""

from __future__ import annotations

import asyncio
import errno
import grp
import logging
import os
import pwd
import select
import socket
import struct
from collections import deque
from collections.abc import Awaitable
from pathlib import Path

from kvd.arena import Arena
from kvd.daemon.admin import Facts
from kvd.daemon.session import Session
from kvd.daemon.sockets import claim, give_to_group
from kvd.daemon.store import ChunkStore
from kvd.errors import AccessDenied, ConfigError
from kvd.proto import kvd_pb2 as pb
from kvd.proto.limits import MESSAGE_SIZE_MAX

log = logging.getLogger("kvd.local")

# Clients of one node: engines, their workers, tools. The bound keeps descriptors for the daemon's
# own use.
SESSIONS_MAX = 512

# How long new clients wait when the process has no descriptor left for them.
ACCEPT_PAUSE_S = 0.5

_PEERCRED = struct.Struct("3i")


class LocalServer:
    """Listens at `path` and runs a `Session` for each client."""

    def __init__(
        self, path: Path, arena: Arena, store: ChunkStore, facts: Facts, *, group: str = ""
    ) -> None:
        self._path = path
        self._arena = arena
        self._store = store
        self._facts = facts
        self._group = group
        self._clients: set[_LocalClient] = set()
        self._loop = asyncio.get_running_loop()
        self._lock = claim(path, "--socket")
        try:
            self._listener = _listen(path, group)
        except BaseException:
            os.close(self._lock)
            raise
        self._loop.add_reader(self._listener, self._accept)

    @property
    def num_clients(self) -> int:
        """Sessions open now."""
        return len(self._clients)

    def close(self) -> None:
        """Take no more clients and end all sessions; for the end of the process only."""
        self._loop.remove_reader(self._listener)
        self._listener.close()
        self._path.unlink(missing_ok=True)
        for client in list(self._clients):
            client.close()
        os.close(self._lock)

    def _accept(self) -> None:
        try:
            peer, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            log.error("event=accept_failed error=%r", os.strerror(error.errno or 0))
            self._loop.remove_reader(self._listener)
            self._loop.call_later(
                ACCEPT_PAUSE_S, self._loop.add_reader, self._listener, self._accept
            )
            return
        peer.setblocking(False)
        refusal = self._refusal(peer)
        if refusal:
            log.warning("event=client_refused reason=%r", refusal)
            answer = pb.Response(error=pb.Error(code=AccessDenied.code, message=refusal))
            _try_send(peer, answer.SerializeToString())
            peer.close()
            return
        session = Session(self._store, self._facts, has_arena=True, pid=_credentials(peer)[0])
        self._clients.add(_LocalClient(self, peer, session, self._arena.fd))
        self._facts.num_sessions += 1
        log.info("event=session_opened session=%d sessions=%d", session.id, len(self._clients))

    def _refusal(self, peer: socket.socket) -> str:
        _, uid, gid = _credentials(peer)
        if not is_allowed(uid, gid, self._group):
            return f"user {uid} may not attach: this daemon serves user {os.geteuid()}" + (
                f" and group {self._group}" if self._group else " (--socket-group lets a group in)"
            )
        if len(self._clients) >= SESSIONS_MAX:
            return f"{SESSIONS_MAX} sessions are open already"
        return ""

    def forget(self, client: _LocalClient) -> None:
        """A client is gone."""
        self._clients.discard(client)
        self._facts.num_sessions -= 1


class _LocalClient:
    """One connection: answers packets in order, and closes its session at end of file."""

    def __init__(
        self, server: LocalServer, peer: socket.socket, session: Session, arena_fd: int
    ) -> None:
        self._server = server
        self._peer = peer
        self._session = session
        self._arena_fd = arena_fd
        self._loop = asyncio.get_running_loop()
        self._unsent: deque[tuple[bytes, list[int]]] = deque()
        # One byte more than allowed: a packet that fills it was too long, and the rest is gone.
        self._buffer = bytearray(MESSAGE_SIZE_MAX + 1)
        self._view = memoryview(self._buffer)
        self._pending: asyncio.Task[None] | None = None
        self._loop.add_reader(peer, self._read)

    def _read(self) -> None:
        try:
            size = self._peer.recv_into(self._buffer)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.close()
            return
        if not size and _is_hung_up(self._peer):
            self.close()
            return
        was_attached = self._session.is_attached
        answer = self._session.handle_packet(bytes(self._view[:size]))
        if isinstance(answer, bytes):
            is_first = self._session.is_attached and not was_attached
            self._send(answer, [self._arena_fd] if is_first else [])
        elif answer is not None:
            # The next request waits in the socket until this one is answered.
            self._loop.remove_reader(self._peer)
            self._pending = self._loop.create_task(self._send_later(answer))

    async def _send_later(self, pending: Awaitable[bytes | None]) -> None:
        answer = await pending
        self._pending = None
        self._loop.add_reader(self._peer, self._read)
        if answer is not None:
            self._send(answer, [])

    def _send(self, answer: bytes, fds: list[int]) -> None:
        if not self._unsent and _try_send(self._peer, answer, fds):
            return
        if not self._unsent:
            self._loop.remove_reader(self._peer)
            self._loop.add_writer(self._peer, self._flush)
        self._unsent.append((answer, fds))

    def _flush(self) -> None:
        while self._unsent:
            if not _try_send(self._peer, *self._unsent[0]):
                return
            self._unsent.popleft()
        self._loop.remove_writer(self._peer)
        self._loop.add_reader(self._peer, self._read)

    def close(self) -> None:
        self._loop.remove_reader(self._peer)
        self._loop.remove_writer(self._peer)
        self._peer.close()
        if self._pending is not None:
            self._pending.cancel()
        num_leases = len(self._session.leases)
        self._session.close()
        self._server.forget(self)
        log.info(
            "event=session_closed session=%d leases_taken_back=%d", self._session.id, num_leases
        )


def _credentials(peer: socket.socket) -> tuple[int, int, int]:
    """Process, user and group of the peer."""
    raw = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size)
    pid, uid, gid = _PEERCRED.unpack(raw)
    return pid, uid, gid


def is_allowed(uid: int, gid: int, group: str) -> bool:
    """Whether a peer may attach: the daemon's own user, root, or a member of `group`."""
    if uid in (0, os.geteuid()):
        return True
    if not group:
        return False
    entry = grp.getgrnam(group)
    if gid == entry.gr_gid:
        return True
    try:
        return pwd.getpwuid(uid).pw_name in entry.gr_mem
    except KeyError:
        return False


def _try_send(peer: socket.socket, packet: bytes, fds: list[int] | None = None) -> bool:
    """Whether the packet is gone, or can never go: then end of file follows anyway."""
    try:
        if fds:
            socket.send_fds(peer, [packet], fds, socket.MSG_NOSIGNAL)
        else:
            peer.send(packet, socket.MSG_NOSIGNAL)
    except (BlockingIOError, InterruptedError):
        return False
    except OSError as error:
        # A full send queue, not a dead peer.
        return error.errno != errno.ENOBUFS
    return True


def _is_hung_up(peer: socket.socket) -> bool:
    poll = select.poll()
    poll.register(peer, select.POLLRDHUP)
    return any(
        event & (select.POLLRDHUP | select.POLLHUP | select.POLLERR) for _, event in poll.poll(0)
    )


def _listen(path: Path, group: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    umask = os.umask(0o177)
    try:
        listener.bind(str(path))
        if group:
            give_to_group(path, group)
        listener.listen(SESSIONS_MAX)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen at {path}: {error.strerror or error}") from error
    except ConfigError:
        listener.close()
        raise
    finally:
        os.umask(umask)
    return listener
