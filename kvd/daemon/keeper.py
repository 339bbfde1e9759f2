"""Keeper: the daemon's side of the process that holds its memory while no daemon lives.

The daemon starts the keeper, gives it the descriptors of its arena and ledger, and keeps the
connection open: its end, however the daemon dies, is what starts the keeper's clock. The packets
are described in keeper_process.py. Every call waits a few seconds at most; every failure is one the
daemon can start without: then nothing is kept over its end, and all else is as ever.

All of it blocks: call it off the event loop.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kvd.daemon import keeper_process as protocol
from kvd.daemon.processes import read_boot_id
from kvd.errors import ConfigError, Unavailable
from kvd.proto.address import SOCKET_PATH_SIZE_MAX

FINGERPRINT_SIZE = 32

# A keeper answers in microseconds; starting a Python takes a tenth of a second on an idle machine.
ANSWER_S_MAX = 5.0
START_S_MAX = 15.0

# Longer than one start and one answer: a keeper that is ending may have to go first.
ATTACH_S_MAX = 30.0
RETRY_EVERY_S = 0.02

_PEERCRED = struct.Struct("3i")


@dataclass(frozen=True, slots=True, kw_only=True)
class ArenaFacts:
    """What the keeper is told of a deposit, and tells again. Sizes are in bytes."""

    arena_size: int
    ledger_size: int
    boot_id: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What an earlier daemon left. The descriptors belong to whoever has this."""

    arena_fd: int
    ledger_fd: int
    facts: ArenaFacts

    def close(self) -> None:
        """Let go of both descriptors, where they are not used."""
        os.close(self.arena_fd)
        os.close(self.ledger_fd)


class Keeper:
    """A connection to the keeper beside `socket_path`, the only one it has.

    `pid` is the keeper's process. `reason` says why nothing was kept, where the keeper knew. Not
    thread-safe.
    """

    def __init__(self, connection: socket.socket, path: Path) -> None:
        self.path = path
        self.reason = ""
        self.pid, _ = _peer_of(connection)
        self._connection = connection
        self._kept: Kept | None = None

    @classmethod
    def attach(
        cls,
        socket_path: Path,
        *,
        keep_s: int = protocol.KEEP_S_DEFAULT,
        fingerprint: bytes = bytes(FINGERPRINT_SIZE),
    ) -> Keeper:
        """Connect to the keeper of the daemon at `socket_path`, and start one if none is there.

        It will keep for `keep_s` seconds after this connection's end. `fingerprint` stands for all
        of the configuration that the kept memory depends on; what was kept under another one is let
        go. A keeper of another version is asked to let go, and replaced.

        Raises `ConfigError` for a path or a number that cannot be, `Unavailable` where another
        daemon is connected or no answer comes. Ends within `ATTACH_S_MAX` and `START_S_MAX`
        seconds.
        """
        _check(keep_s, fingerprint)
        path = keeper_path(socket_path)
        give_up = time.monotonic() + ATTACH_S_MAX
        while time.monotonic() < give_up:
            connection = _connect(path)
            if connection is None:
                _start(path, keep_s)
                continue
            keeper = cls(connection, path)
            try:
                if keeper._greet(keep_s, fingerprint):
                    return keeper
            except BaseException:
                keeper.close()
                raise
            keeper.close()
            # One that is ending: it takes its socket away, and then another can start.
            time.sleep(RETRY_EVERY_S)
        raise Unavailable(f"the keeper at {path} did not let a daemon in for {ATTACH_S_MAX:.0f} s")

    @property
    def is_alive(self) -> bool:
        """Whether the keeper still holds the connection. A look, no question."""
        if self._connection.fileno() < 0:
            return False
        poll = select.poll()
        poll.register(self._connection, select.POLLRDHUP)
        return not poll.poll(0)

    def kept(self) -> Kept | None:
        """What an earlier daemon left here, once: the caller has the descriptors from then on."""
        kept, self._kept = self._kept, None
        return kept

    def deposit(self, arena_fd: int, ledger_fd: int, facts: ArenaFacts) -> None:
        """Have the keeper hold both, instead of what it held; the caller keeps its own descriptors.

        Raises `Unavailable`; the keeper then holds what it held before, or is gone.
        """
        body = protocol.FACTS_BODY.pack(facts.arena_size, facts.ledger_size, facts.boot_id)
        self._expect_done(protocol.DEPOSIT, body, [arena_fd, ledger_fd])

    def drop(self) -> None:
        """Have the keeper let go of what it holds. When this returns its descriptors are closed.

        Memory goes with the last descriptor and the last mapping of it. Raises `Unavailable`.
        """
        self._forget_kept()
        self._expect_done(protocol.DROP, b"", [])

    def close(self) -> None:
        """End the connection: the keeper's seconds begin, or it ends where it holds nothing."""
        self._forget_kept()
        self._connection.close()

    def _forget_kept(self) -> None:
        if self._kept is not None:
            self._kept.close()
            self._kept = None

    def _greet(self, keep_s: int, fingerprint: bytes) -> bool:
        """Whether the keeper takes us; one that is ending, or of another version, does not."""
        hello = protocol.HELLO_BODY.pack(keep_s, fingerprint)
        answer = _ask(self._connection, protocol.HELLO, hello, [])
        if answer is None:
            return False
        version, kind, body, fds = answer
        if kind == protocol.KEPT:
            self._kept = _checked(body, fds)
            if self._kept is None:
                self.reason = "what was kept is not what the keeper was told"
                self.drop()
            return True
        _close(fds)
        if kind == protocol.EMPTY:
            self.reason = body.decode(errors="replace")
            return True
        if kind == protocol.OTHER_VERSION or version != protocol.VERSION:
            self.drop()
            return False
        raise _refusal(self.path, kind, body)

    def _expect_done(self, kind: int, body: bytes, fds: list[int]) -> None:
        answer = _ask(self._connection, kind, body, fds)
        if answer is None:
            raise Unavailable(f"the keeper at {self.path} is gone; attach again to start another")
        _, found, text, found_fds = answer
        _close(found_fds)
        if found != protocol.DONE:
            raise _refusal(self.path, found, text)


def keeper_path(socket_path: Path) -> Path:
    """Where the keeper of the daemon at `socket_path` listens. Raises `ConfigError`."""
    path = socket_path.absolute()
    path = path.with_name(path.name + ".keeper")
    if len(os.fsencode(path)) > SOCKET_PATH_SIZE_MAX:
        raise ConfigError(
            f"the keeper's socket {path} is longer than {SOCKET_PATH_SIZE_MAX} bytes; "
            "choose a shorter --socket"
        )
    return path


def drop_kept(socket_path: Path) -> bool:
    """Have the keeper beside `socket_path` let go and end; False if there is none.

    For a daemon that starts there without one, and for one that stops for good. Raises
    `Unavailable` where another daemon is connected to it, or no answer comes.
    """
    path = keeper_path(socket_path)
    connection = _connect(path)
    if connection is None:
        return False
    keeper = Keeper(connection, path)
    try:
        keeper.drop()
    finally:
        keeper.close()
    return True


def facts_here(arena_size: int, ledger_size: int) -> ArenaFacts:
    """The facts of a deposit made now, on this boot of this machine. Raises `Unavailable`."""
    return ArenaFacts(arena_size=arena_size, ledger_size=ledger_size, boot_id=read_boot_id())


def _check(keep_s: int, fingerprint: bytes) -> None:
    if not 0 < keep_s <= protocol.KEEP_S_MAX:
        raise ConfigError(f"memory is kept for 1..{protocol.KEEP_S_MAX} s, found {keep_s}")
    assert len(fingerprint) == FINGERPRINT_SIZE


def _connect(path: Path) -> socket.socket | None:
    """A connection to the keeper, or None where none listens."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.settimeout(ANSWER_S_MAX)
    try:
        connection.connect(str(path))
        _, uid = _peer_of(connection)
    except (FileNotFoundError, ConnectionRefusedError):
        connection.close()
        return None
    except OSError as error:
        connection.close()
        raise Unavailable(f"the keeper at {path} cannot be reached: {error}") from error
    if uid not in (0, os.geteuid()):
        connection.close()
        raise ConfigError(f"{path} is a socket of user {uid}; choose another --socket")
    return connection


def _peer_of(connection: socket.socket) -> tuple[int, int]:
    """Process and user at the other end."""
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size)
    pid, uid, _ = _PEERCRED.unpack(found)
    return pid, uid


def _start(path: Path, keep_s: int) -> None:
    """Start a keeper that listens when this returns, or find that another one does."""
    # By its file and isolated (-I -S): it needs no package, and nothing of the environment.
    command = [sys.executable, "-I", "-S", protocol.__file__, str(path), "--keep-s", str(keep_s)]
    try:
        path.parent.mkdir(mode=0o755 if os.geteuid() == 0 else 0o700, parents=True, exist_ok=True)
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
            timeout=START_S_MAX,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"no keeper at {path} after {START_S_MAX:.0f} s") from error
    except OSError as error:
        raise Unavailable(f"the keeper at {path} cannot be started: {error}") from error
    if done.returncode not in (0, protocol.EXIT_OTHER):
        said = done.stderr.decode(errors="replace").strip()
        raise ConfigError(f"the keeper does not start: {said or f'exit {done.returncode}'}")


def _ask(
    connection: socket.socket, kind: int, body: bytes, fds: list[int]
) -> tuple[int, int, bytes, list[int]] | None:
    """Version, kind, body and descriptors of the answer, or None where the keeper is gone."""
    packet = protocol.HEAD.pack(protocol.MAGIC, protocol.VERSION, kind, 0) + body
    found: list[int] = []
    try:
        # One that has refused us already said so before it closed: its answer is still there.
        with suppress(BrokenPipeError):
            socket.send_fds(connection, [packet], fds, socket.MSG_NOSIGNAL)
        answer, found, _, _ = socket.recv_fds(
            connection, protocol.PACKET_SIZE_MAX, protocol.NUM_FDS, socket.MSG_CMSG_CLOEXEC
        )
    except TimeoutError as error:
        raise Unavailable(f"the keeper gave no answer within {ANSWER_S_MAX:.0f} s") from error
    except ConnectionError:
        return None
    except OSError as error:
        raise Unavailable(f"the keeper cannot be asked: {error}") from error
    if not answer:
        _close(found)
        return None
    if len(answer) < protocol.HEAD.size or not answer.startswith(protocol.MAGIC):
        _close(found)
        raise Unavailable(f"{len(answer)} bytes are no answer of a keeper")
    _, version, found_kind, _ = protocol.HEAD.unpack_from(answer)
    return version, found_kind, answer[protocol.HEAD.size :], found


def _checked(body: bytes, fds: list[int]) -> Kept | None:
    """The deposit, or None, its descriptors closed, where it is not what its facts say."""
    if len(body) == protocol.FACTS_BODY.size and len(fds) == protocol.NUM_FDS:
        arena_size, ledger_size, boot_id = protocol.FACTS_BODY.unpack(body)
        sizes = [os.fstat(fd).st_size for fd in fds]
        if sizes == [arena_size, ledger_size] and boot_id == read_boot_id():
            facts = ArenaFacts(arena_size=arena_size, ledger_size=ledger_size, boot_id=boot_id)
            return Kept(arena_fd=fds[0], ledger_fd=fds[1], facts=facts)
    _close(fds)
    return None


def _refusal(path: Path, kind: int, body: bytes) -> Unavailable:
    if kind == protocol.BUSY and len(body) == protocol.BUSY_BODY.size:
        (pid,) = protocol.BUSY_BODY.unpack(body)
        return Unavailable(
            f"the keeper at {path} serves another daemon, pid {pid}; stop it or choose another "
            "--socket"
        )
    said = body.decode(errors="replace") if kind == protocol.REFUSED else f"answer {kind}"
    return Unavailable(f"the keeper at {path} refuses: {said}")


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
