"""The attach socket: who may attach, what it does with bytes that are none, and how it starts and
stops.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvd
from kvd.daemon.local import is_allowed
from kvd.errors import AccessDenied, Unavailable
from kvd.proto import kvd_pb2 as pb
from kvd.proto.limits import MESSAGE_SIZE_MAX, PROTOCOL_VERSION
from tests.conftest import DaemonProcess
from tests.test_client import chunk_keys, chunks, until

NOBODY = 65534


class RawClient:
    """A client that sends whatever it likes."""

    def __init__(self, path: Path, *, attach: bool = True) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(30)
        self.socket.connect(str(path))
        if attach:
            message = pb.AttachRequest(version=PROTOCOL_VERSION, client="raw")
            self.socket.send(pb.Request(id=1, attach=message).SerializeToString())
            _, fds, _, _ = socket.recv_fds(self.socket, MESSAGE_SIZE_MAX, 1)
            os.close(fds[0])

    def __del__(self) -> None:
        self.socket.close()

    def ask(self, packet: bytes) -> pb.Response:
        self.socket.send(packet)
        return pb.Response.FromString(self.socket.recv(MESSAGE_SIZE_MAX))


def lookup_packet(request_id: int = 5) -> bytes:
    message = pb.LookupRequest(keys=bytes(32))
    return pb.Request(id=request_id, lookup=message).SerializeToString()


@contextlib.contextmanager
def open_folder() -> Iterator[Path]:
    """A folder that every user may enter, unlike pytest's."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def attach_as(uid: int, path: Path) -> str:
    """What a process of user `uid` gets when it attaches: "attached" or the error."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.setgroups([])
        os.setgid(uid)
        os.setuid(uid)
        try:
            kvd.connect(path).close()
            said = "attached"
        except kvd.errors.KvdError as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    said = os.read(reader, 10_000).decode()
    os.close(reader)
    return said


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to be another user")


@needs_root
def test_a_client_of_another_user_is_refused_by_the_sockets_mode() -> None:
    with open_folder() as folder:
        daemon = DaemonProcess(folder)
        try:
            assert daemon.socket.stat().st_mode & 0o777 == 0o600
            said = attach_as(NOBODY, daemon.socket)
            assert said.startswith("AccessDenied: user 65534 may not open")
        finally:
            daemon.kill()


@needs_root
def test_a_client_of_another_user_is_refused_by_its_credentials() -> None:
    with open_folder() as folder:
        daemon = DaemonProcess(folder)
        try:
            # Somebody opened the door too far: the daemon still looks at who comes in.
            daemon.socket.chmod(0o666)
            said = attach_as(NOBODY, daemon.socket)
            assert said.startswith("AccessDenied: user 65534 may not attach")
            assert "--socket-group" in said
            with daemon.connect() as client:
                assert client.status(audit=True).num_sessions == 1
        finally:
            daemon.kill()


@needs_root
def test_a_group_may_be_let_in() -> None:
    with open_folder() as folder:
        daemon = DaemonProcess(folder, "--socket-group", "nogroup")
        try:
            assert daemon.socket.stat().st_mode & 0o777 == 0o660
            assert attach_as(NOBODY, daemon.socket) == "attached"
        finally:
            daemon.kill()


def test_only_the_own_user_root_and_the_group_are_allowed() -> None:
    me = os.geteuid()
    assert is_allowed(me, 1, "")
    assert is_allowed(0, 1, "")
    assert not is_allowed(me + 1, 1, "")
    assert not is_allowed(me + 1, 1, "nogroup")
    assert is_allowed(me + 1, 65534, "nogroup")


def test_broken_messages_get_an_error_and_the_session_goes_on(daemon: DaemonProcess) -> None:
    raw = RawClient(daemon.socket)
    for packet, code in (
        (b"\xff" * 50, "invalid_request"),
        (lookup_packet()[:-3], "invalid_request"),
        (b"\x08\x05\x9a\x06\x00", "invalid_request"),
        (b"\x00" * (MESSAGE_SIZE_MAX + 500), "too_large"),
        (b"", "invalid_request"),
    ):
        assert raw.ask(packet).error.code == code
    assert raw.ask(lookup_packet()).lookup.count == 0
    with daemon.connect() as client:
        assert client.status(audit=True).num_sessions == 2


def test_a_session_that_does_not_attach_gets_nothing(daemon: DaemonProcess) -> None:
    raw = RawClient(daemon.socket, attach=False)
    assert "attach comes first" in raw.ask(lookup_packet()).error.message


def test_a_client_that_reads_no_answers_harms_nobody(
    daemon: DaemonProcess, layout: kvd.KVLayout
) -> None:
    raw = RawClient(daemon.socket)
    raw.socket.settimeout(0.2)
    sent = 0
    with contextlib.suppress(TimeoutError):
        while sent < 100_000:
            raw.socket.send(lookup_packet(sent + 1))
            sent += 1
    assert sent < 100_000, "the daemon goes on reading from a client that reads nothing"
    with daemon.connect() as client:
        client.store(layout, chunk_keys(layout, 1), chunks(layout, 1))
        assert client.lookup(chunk_keys(layout, 1)) == 1
    # Once it reads, it gets every answer, in order.
    raw.socket.settimeout(30)
    for expected in range(1, sent + 1):
        assert pb.Response.FromString(raw.socket.recv(MESSAGE_SIZE_MAX)).id == expected
    assert raw.ask(lookup_packet(7)).id == 7


def test_a_release_without_an_answer_is_possible(daemon: DaemonProcess) -> None:
    raw = RawClient(daemon.socket)
    raw.socket.send(pb.Request(release=pb.ReleaseRequest(lease=5)).SerializeToString())
    assert raw.ask(lookup_packet(9)).id == 9


def start_again(daemon: DaemonProcess) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvd", "start", "--cpu-size", "64MiB", "--http", "none"]
    command += ["--grpc-socket", "none", "--socket", str(daemon.socket)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_socket_in_use_is_left_alone(daemon: DaemonProcess, layout: kvd.KVLayout) -> None:
    with daemon.connect() as client:
        client.store(layout, chunk_keys(layout, 1), chunks(layout, 1))
        second = start_again(daemon)
        assert second.returncode != 0
        assert f"in use by a live daemon, pid {daemon.pid}" in second.stderr
        assert "Traceback" not in second.stderr
        assert client.lookup(chunk_keys(layout, 1)) == 1
    with daemon.connect() as client:
        assert client.lookup(chunk_keys(layout, 1)) == 1


def test_a_stale_socket_is_replaced(daemon: DaemonProcess) -> None:
    daemon.kill()
    assert daemon.socket.is_socket()
    with pytest.raises(Unavailable):
        daemon.connect()
    daemon.restart()
    with daemon.connect() as client:
        assert client.status().state == "serving"


def test_a_file_in_the_sockets_place_is_not_deleted(daemon: DaemonProcess) -> None:
    assert daemon.stop() == 0
    daemon.socket.write_text("precious")
    second = start_again(daemon)
    assert second.returncode != 0
    assert "is no socket" in second.stderr
    assert daemon.socket.read_text() == "precious"


def test_sigterm_lets_leases_end_and_gives_no_new_ones(
    daemon: DaemonProcess, layout: kvd.KVLayout
) -> None:
    client = daemon.connect()
    client.store(layout, chunk_keys(layout, 1), chunks(layout, 1))
    lease = client.pin(layout, chunk_keys(layout, 1))
    daemon.process.send_signal(signal.SIGTERM)
    until(lambda: client.status().state == "draining")
    with pytest.raises(Unavailable, match="draining"):
        client.pin(layout, chunk_keys(layout, 1))
    lease.load(0, chunks(layout, 1)[0])
    assert daemon.process.poll() is None
    lease.release()
    assert daemon.process.wait(timeout=60) == 0
    assert not daemon.socket.exists()
    client.close()


def test_a_drain_ends_even_if_a_client_holds_on(tmp_path: Path, layout: kvd.KVLayout) -> None:
    daemon = DaemonProcess(tmp_path, "--drain-s", "0.2")
    client = daemon.connect()
    client.store(layout, chunk_keys(layout, 1), chunks(layout, 1))
    lease = client.pin(layout, chunk_keys(layout, 1))
    assert daemon.stop() == 0
    with contextlib.suppress(Unavailable):
        client.status()
    with pytest.raises(kvd.errors.LeaseExpired):
        lease.check()
    client.close()


def test_a_client_with_another_clock_is_refused(
    daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = time.monotonic_ns
    monkeypatch.setattr(time, "monotonic_ns", lambda: real() - 10**12)
    with pytest.raises(AccessDenied, match="do not share a monotonic clock"):
        daemon.connect()
