"""The keeper: a process that holds the arena's and the ledger's descriptors while no daemon lives.

    python -m kvd.daemon.keeper_process SOCKET_PATH --keep-s N

listens at SOCKET_PATH, goes to the background in a session of its own (no signal meant for the
daemon or its terminal reaches it) and then returns: 0 when it listens, 3 where another keeper does.
The one idea: sealed memory lives as long as a descriptor of it, so it is enough to hold two. It
maps nothing, imports nothing of kvd, and nothing at all once it runs: an upgrade may replace every
file under it. It ends, and the memory goes with it, when it has had no daemon for N seconds, or
when its daemon leaves and nothing is kept.

Packets on the socket (SOCK_SEQPACKET, mode 0600, peers of the same user or root), little-endian:

| offset | size | type | meaning |
|---|---|---|---|
| 0 | 8 | bytes | magic, `KVD-KEEP` |
| 8 | 2 | uint16 | version, 1 |
| 10 | 2 | uint16 | kind |
| 12 | 4 | uint32 | 0 |
| 16 | | | body |

| kind | from | body | descriptors | answer |
|---|---|---|---|---|
| 1 hello | daemon | keep_s uint32, configuration's fingerprint 32 bytes | | 16, 17, 19, 20, 21 |
| 2 deposit | daemon | facts | arena, ledger | 18 or 19 |
| 3 drop | daemon | | | 18 |
| 16 empty | keeper | why, UTF-8, or nothing | | |
| 17 kept | keeper | facts | arena, ledger | |
| 18 done | keeper | | | |
| 19 refused | keeper | why, UTF-8 | | |
| 20 other version | keeper | its own version is in the head | | |
| 21 busy | keeper | pid of the daemon that is connected, uint32 | | |

Facts are the arena's size (uint64), the ledger's size (uint64) and the boot id (16 bytes). The head
and the kinds drop, done, other version and busy MUST stay as they are in every version: a daemon
can always ask a keeper of another version to let go. What was deposited under another fingerprint
is let go at the hello.
"""

from __future__ import annotations

import fcntl
import os
import select
import socket
import struct
import sys
import time
from contextlib import suppress

VERSION = 1
MAGIC = b"KVD-KEEP"

HELLO, DEPOSIT, DROP = 1, 2, 3
EMPTY, KEPT, DONE, REFUSED, OTHER_VERSION, BUSY = 16, 17, 18, 19, 20, 21

HEAD = struct.Struct("<8sHHI")
HELLO_BODY = struct.Struct("<I32s")
FACTS_BODY = struct.Struct("<QQ16s")
BUSY_BODY = struct.Struct("<I")

PACKET_SIZE_MAX = 4096
NUM_FDS = 2

# Ten minutes are enough for an upgrade or a restart; a week is more than any repair takes.
KEEP_S_DEFAULT = 600
KEEP_S_MAX = 7 * 24 * 3600

# Who connects says hello at once; who does not would keep a daemon out.
HELLO_S_MAX = 5.0

# A keeper that is ending holds its lock a moment longer than its socket.
LOCK_S_MAX = 1.0
LOCK_LOOK_EVERY_S = 0.02

# Daemons that wait to be told that another one is connected.
BACKLOG = 8

EXIT_FAILED, EXIT_USAGE, EXIT_OTHER = 1, 2, 3

_PEERCRED = struct.Struct("3i")


class KeeperServer:
    """Keeps what one daemon at a time deposits. `serve` returns when nothing is left to keep."""

    def __init__(self, listener: socket.socket, *, keep_s: int) -> None:
        self._listener = listener
        self._keep_s = keep_s
        self._give_up = time.monotonic() + keep_s
        self._kept: list[int] = []
        self._facts = b""
        self._fingerprint = b""
        # The daemon that is connected, and what it said so far.
        self._seat: socket.socket | None = None
        self._seat_pid = 0
        self._seat_fingerprint: bytes | None = None
        self._has_spoken = False
        self._hello_by = 0.0
        self._is_over = False

    def serve(self) -> None:
        """Answer daemons until the memory is let go."""
        while not self._is_over:
            poll = select.poll()
            poll.register(self._listener, select.POLLIN)
            if self._seat is not None:
                poll.register(self._seat, select.POLLIN)
            ready = {fd for fd, _ in poll.poll(self._patience_ms())}
            # The one that is connected first: if it is gone, its place is free for the next.
            if self._seat is not None and self._seat.fileno() in ready:
                self._hear(self._seat)
            elif self._listener.fileno() in ready:
                self._accept()
            elif not ready:
                self._lose_patience()
        self._let_go()

    def _patience_ms(self) -> float | None:
        if self._has_spoken:
            return None
        until = self._give_up if self._seat is None else self._hello_by
        return max(0.0, until - time.monotonic()) * 1000

    def _lose_patience(self) -> None:
        now = time.monotonic()
        if self._seat is None:
            self._is_over = now >= self._give_up
        elif now >= self._hello_by:
            self._leave()

    def _accept(self) -> None:
        try:
            peer, _ = self._listener.accept()
        except OSError:
            # It went away again before we looked.
            return
        pid, uid, _ = _PEERCRED.unpack(
            peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size)
        )
        if uid not in (0, os.geteuid()):
            _send(peer, REFUSED, b"this keeper serves another user")
            _hang_up(peer)
        elif self._seat is not None:
            _send(peer, BUSY, BUSY_BODY.pack(self._seat_pid))
            _hang_up(peer)
        else:
            self._seat, self._seat_pid = peer, pid
            self._seat_fingerprint = None
            self._hello_by = time.monotonic() + HELLO_S_MAX

    def _leave(self) -> None:
        """The daemon is gone, or must go: its place is free, and the seconds begin."""
        assert self._seat is not None
        _hang_up(self._seat)
        self._seat = None
        if self._has_spoken:
            self._has_spoken = False
            self._give_up = time.monotonic() + self._keep_s
            self._is_over = not self._kept

    def _hear(self, seat: socket.socket) -> None:
        flags = socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
        try:
            packet, fds, found, _ = socket.recv_fds(seat, PACKET_SIZE_MAX, NUM_FDS, flags)
        except BlockingIOError:
            return
        except OSError:
            packet, fds, found = b"", [], 0
        if found & (socket.MSG_TRUNC | socket.MSG_CTRUNC) or len(packet) < HEAD.size:
            packet = b""
        answer = self._answer(packet, fds) if packet else None
        if fds is not self._kept:
            _close(fds)
        if answer is None or not _send(seat, *answer, fds=self._kept if answer[0] == KEPT else []):
            self._leave()

    def _answer(self, packet: bytes, fds: list[int]) -> tuple[int, bytes] | None:
        """Kind and body of what to say, or None to a peer that makes no sense."""
        magic, version, kind, _ = HEAD.unpack_from(packet)
        body = packet[HEAD.size :]
        if magic != MAGIC:
            return None
        self._has_spoken = True
        if kind == DROP:
            self._let_go()
            return DONE, b""
        if version != VERSION:
            return OTHER_VERSION, b""
        if kind == HELLO and len(body) == HELLO_BODY.size:
            return self._greet(*HELLO_BODY.unpack(body))
        if kind == DEPOSIT and len(body) == FACTS_BODY.size:
            return self._take(fds, body)
        return REFUSED, b"the keeper does not know such a packet"

    def _greet(self, keep_s: int, fingerprint: bytes) -> tuple[int, bytes]:
        if not 0 < keep_s <= KEEP_S_MAX:
            return REFUSED, b"the seconds to keep are out of range"
        self._keep_s = keep_s
        self._seat_fingerprint = fingerprint
        if self._kept and self._fingerprint != fingerprint:
            self._let_go()
            return EMPTY, b"what was kept belongs to another configuration"
        return (KEPT, self._facts) if self._kept else (EMPTY, b"")

    def _take(self, fds: list[int], facts: bytes) -> tuple[int, bytes]:
        if self._seat_fingerprint is None:
            return REFUSED, b"hello comes before a deposit"
        if len(fds) != NUM_FDS:
            return REFUSED, b"a deposit has two descriptors"
        self._let_go()
        self._kept, self._facts, self._fingerprint = fds, facts, self._seat_fingerprint
        return DONE, b""

    def _let_go(self) -> None:
        _close(self._kept)
        self._kept = []


def main(arguments: list[str]) -> int:
    """Listen, go to the background, serve; the exit code."""
    if len(arguments) != 3 or arguments[1] != "--keep-s" or not arguments[2].isdigit():
        return _fail("usage: keeper_process SOCKET_PATH --keep-s N", EXIT_USAGE)
    path, keep_s = arguments[0], int(arguments[2])
    if not 0 < keep_s <= KEEP_S_MAX:
        return _fail(f"--keep-s is 1..{KEEP_S_MAX}, found {keep_s}", EXIT_USAGE)
    try:
        if _lock(path + ".lock") is None:
            return EXIT_OTHER
        listener = _listen(path)
    except OSError as error:
        return _fail(f"cannot listen at {path}: {error.strerror or error}", EXIT_FAILED)
    ready, is_ready = os.pipe()
    if os.fork():
        # Whoever started us waits for this process, which waits for the keeper's end of the pipe.
        os.close(is_ready)
        os.read(ready, 1)
        os._exit(0)
    _detach()
    # Once more: a socket names the process that listened last, and that one is gone.
    listener.listen(BACKLOG)
    os.close(ready)
    os.close(is_ready)
    try:
        KeeperServer(listener, keep_s=keep_s).serve()
    finally:
        # Before the lock goes, so that nobody's new socket is taken away.
        _unlink(path)
    return 0


def _lock(name: str) -> int | None:
    """The lock that one keeper holds for its life, or None where another does."""
    fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    give_up = time.monotonic() + LOCK_S_MAX
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= give_up:
                os.close(fd)
                return None
            time.sleep(LOCK_LOOK_EVERY_S)
        else:
            return fd


def _listen(path: str) -> socket.socket:
    _unlink(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    os.umask(0o177)
    listener.bind(path)
    listener.listen(BACKLOG)
    return listener


def _detach() -> None:
    """Away from the daemon's session, terminal, folder and files."""
    os.setsid()
    os.chdir("/")
    nothing = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(nothing, fd)
    if nothing > 2:
        os.close(nothing)
    # What runs from here on must not need a file of this Python, which may be replaced.
    sys.path.clear()


def _send(peer: socket.socket, kind: int, body: bytes, fds: list[int] | None = None) -> bool:
    """Whether the peer has the packet; one that does not read its answers has not."""
    packet = HEAD.pack(MAGIC, VERSION, kind, 0) + body
    try:
        socket.send_fds(peer, [packet], fds or [], socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
    except OSError:
        return False
    return True


def _hang_up(peer: socket.socket) -> None:
    """End a connection so that the peer still gets what was sent to it.

    Closed over an unread packet, a connection is reset and the answer lost: so nothing more may
    come, then what came is read.
    """
    with suppress(OSError):
        peer.shutdown(socket.SHUT_RD)
        while peer.recv(PACKET_SIZE_MAX, socket.MSG_DONTWAIT):
            pass
    peer.close()


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def _unlink(path: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)  # noqa: PTH108 (pathlib is not worth its memory here)


def _fail(text: str, code: int) -> int:
    os.write(2, text.encode() + b"\n")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
