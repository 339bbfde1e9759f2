"""The client's side of gRPC: daemons that are silent, late, liars about time, or gone."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvd
from kvd.client.endpoint import parse_endpoint
from kvd.client.remote import RemoteConnection
from kvd.errors import AccessDenied, DeadlineExceeded, KvdError, LeaseExpired, Unavailable
from kvd.keys import chain_keys
from kvd.proto import kvd_pb2 as pb
from kvd.proto.limits import DATA_SIZE_MAX
from tests.conftest import DaemonProcess
from tests.daemon_in_thread import PATIENCE_S, DaemonInThread
from tests.fake_daemon import FakeDaemon

# For a call that is to be given up: the daemon never answers it, so that only an answer could end
# it sooner.
GIVE_UP_S = 0.05

S = 10**9

PIN = pb.Request(pin=pb.PinRequest())
LOOKUP = pb.Request(lookup=pb.LookupRequest(keys=bytes(32)))


def connect(address: str) -> RemoteConnection:
    return RemoteConnection(address, name="test", timeout_s=PATIENCE_S)


def pin_reply(lease: int = 0, deadline_ns: int = 0) -> pb.Response:
    return pb.Response(pin=pb.PinReply(lease=lease, deadline_ns=deadline_ns))


def reserve_reply(lease: int, deadline_ns: int = 0) -> pb.Response:
    return pb.Response(reserve=pb.ReserveReply(lease=lease, deadline_ns=deadline_ns))


def give_up(connection: RemoteConnection, daemon: FakeDaemon, request: pb.Request) -> int:
    """The id of a request that the daemon has seen, after its caller has given it up."""
    verb = request.WhichOneof("verb")
    while True:
        with pytest.raises(DeadlineExceeded):
            connection.call(request, GIVE_UP_S)
        # On a machine under load the request may not even have left.
        for seen in list(daemon.requests):
            if seen.WhichOneof("verb") == verb:
                return seen.id


@pytest.fixture
def silent(tmp_path: Path) -> Iterator[FakeDaemon]:
    """A daemon that answers the attach and nothing else."""
    daemon = FakeDaemon(tmp_path)
    yield daemon
    daemon.stop()


# Silence.


def test_a_call_without_an_answer_ends_at_its_deadline_and_the_session_goes_on(
    silent: FakeDaemon,
) -> None:
    connection = connect(silent.address)
    with pytest.raises(DeadlineExceeded, match="no answer"):
        connection.call(LOOKUP, GIVE_UP_S)
    assert connection.is_open
    connection.close()


def test_an_attach_without_an_answer_ends_at_its_deadline(tmp_path: Path) -> None:
    import socket

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "mute.sock"))
        listener.listen()
        with pytest.raises(DeadlineExceeded):
            RemoteConnection(f"grpc+unix://{tmp_path}/mute.sock", name="", timeout_s=GIVE_UP_S)


@pytest.mark.parametrize(
    ("request_", "late"),
    [
        (PIN, pin_reply(lease=77)),
        (pb.Request(reserve=pb.ReserveRequest()), reserve_reply(lease=77)),
    ],
    ids=["pin", "reserve"],
)
def test_what_a_late_answer_grants_is_given_back(
    silent: FakeDaemon, request_: pb.Request, late: pb.Response
) -> None:
    connection = connect(silent.address)
    late.id = give_up(connection, silent, request_)
    silent.say(late)
    (release,) = silent.until_requests("release")
    assert (release.id, release.release.lease) == (0, 77)
    connection.close()


def test_a_late_answer_that_grants_nothing_is_forgotten(silent: FakeDaemon) -> None:
    connection = connect(silent.address)
    lookup = give_up(connection, silent, LOOKUP)
    silent.say(pb.Response(id=lookup, lookup=pb.LookupReply(count=1)))
    late = pin_reply()
    late.id = give_up(connection, silent, PIN)
    silent.say(late)
    connection.release(5)
    (release,) = silent.until_requests("release")
    assert release.release.lease == 5
    connection.close()


def test_a_call_given_up_before_it_was_sent_is_never_sent(silent: FakeDaemon) -> None:
    connection = connect(silent.address)
    silent.deafen()
    data = bytes(DATA_SIZE_MAX)
    # Flow control lets a few of them out; what stands behind those stays with us.
    for request in [pb.Request(write=pb.WriteRequest(data=data))] * 50 + [PIN]:
        with pytest.raises(DeadlineExceeded):
            connection.call(request, 0.01)
    silent.hear()
    connection.release(5)
    silent.until_requests("release")
    verbs = [request.WhichOneof("verb") for request in silent.requests]
    assert "pin" not in verbs
    assert verbs.count("write") < 50
    connection.close()


def test_one_threads_silence_does_not_hold_up_another(tmp_path: Path) -> None:
    def script(request: pb.Request) -> pb.Response | None:
        if request.WhichOneof("verb") == "pin":
            return None
        return pb.Response(lookup=pb.LookupReply(count=1))

    daemon = FakeDaemon(tmp_path, script)
    connection = connect(daemon.address)
    outcome: list[object] = []

    def wait() -> None:
        try:
            connection.call(PIN, PATIENCE_S)
        except Unavailable as error:
            outcome.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    daemon.until_requests("pin")
    assert connection.call(LOOKUP, PATIENCE_S).lookup.count == 1
    connection.close()
    waiting.join(PATIENCE_S)
    assert outcome, "close ends the calls of other threads"
    daemon.stop()


def test_release_never_raises_and_never_waits(silent: FakeDaemon) -> None:
    connection = connect(silent.address)
    silent.deafen()
    for lease in range(1, 1001):
        connection.release(lease)
    silent.hear()
    released = silent.until_requests("release", 1000)
    assert [request.release.lease for request in released] == list(range(1, 1001))
    connection.close()
    connection.release(1)
    silent.stop()
    connection.release(1)


# Time.


@pytest.mark.parametrize("skew_ns", [-(10**15), 0, 10**15])
def test_a_lease_never_seems_longer_than_the_daemon_means_it(tmp_path: Path, skew_ns: int) -> None:
    def daemon_ns() -> int:
        return time.monotonic_ns() + 2 * 10**15 + skew_ns

    granted: list[int] = []

    def script(request: pb.Request) -> pb.Response | None:
        deadline_ns = daemon_ns() + 20 * S
        granted.append(time.monotonic_ns() + 20 * S)
        if request.WhichOneof("verb") == "renew":
            return pb.Response(renew=pb.RenewReply(deadline_ns=deadline_ns))
        if request.WhichOneof("verb") == "reserve":
            return reserve_reply(1, deadline_ns)
        return pin_reply(1, deadline_ns)

    daemon = FakeDaemon(tmp_path, script, clock_ns=daemon_ns)
    connection = connect(daemon.address)
    for lease_ns in (0, 20 * S):
        for request in (
            pb.Request(pin=pb.PinRequest(lease_ns=lease_ns)),
            pb.Request(reserve=pb.ReserveRequest(lease_ns=lease_ns)),
            pb.Request(renew=pb.RenewRequest(lease_ns=lease_ns)),
        ):
            before_ns = time.monotonic_ns()
            response = connection.call(request, PATIENCE_S)
            verb = str(request.WhichOneof("verb"))
            deadline_ns = getattr(response, verb).deadline_ns
            assert deadline_ns <= granted[-1], verb
            if lease_ns:
                assert deadline_ns >= before_ns + lease_ns, verb
    connection.close()
    daemon.stop()


def test_a_deadline_beyond_all_bounds_is_no_crash(tmp_path: Path) -> None:
    def script(request: pb.Request) -> pb.Response | None:
        if request.WhichOneof("verb") == "renew":
            return pb.Response(renew=pb.RenewReply(deadline_ns=2**64 - 1))
        return pin_reply(1, 2**64 - 1)

    daemon = FakeDaemon(tmp_path, script)
    connection = connect(daemon.address)
    for request in (PIN, pb.Request(renew=pb.RenewRequest())):
        connection.call(request, PATIENCE_S)
    daemon.stop()


# Away.


@pytest.mark.parametrize(
    ("details", "kind", "advice"),
    [
        ("UNAVAILABLE: Permission denied", AccessDenied, "--socket-group"),
        ("UNAVAILABLE: CERTIFICATE_VERIFY_FAILED", AccessDenied, "tls_ca"),
        ("UNIMPLEMENTED: no such method", Unavailable, "no kvd daemon"),
        ("RESOURCE_EXHAUSTED: 128 sessions", Unavailable, "no more clients"),
        ("UNAVAILABLE: whatever gRPC says one day", Unavailable, "kvd start"),
    ],
)
def test_a_failed_attach_says_what_to_do(details: str, kind: type[KvdError], advice: str) -> None:
    failure = parse_endpoint("grpc+unix:///kvd.grpc.sock").failure(details)
    assert type(failure) is kind
    assert advice in str(failure)
    assert details in str(failure)


def test_no_daemon_is_unavailable_and_says_how_to_start_one(tmp_path: Path) -> None:
    for address in (f"grpc+unix://{tmp_path}/none.sock", "grpc://127.0.0.1:1"):
        with pytest.raises(Unavailable, match="kvd start"):
            kvd.connect(address, timeout_s=PATIENCE_S)


def test_another_service_is_no_daemon(tmp_path: Path) -> None:
    import grpc

    server = grpc.server(None)
    server.add_insecure_port(f"unix:{tmp_path}/other.sock")
    server.start()
    with pytest.raises(Unavailable, match="no kvd daemon"):
        kvd.connect(f"grpc+unix://{tmp_path}/other.sock", timeout_s=PATIENCE_S)
    server.stop(None).wait(PATIENCE_S)


def test_a_client_outlives_its_daemon(tmp_path: Path, layout: kvd.KVLayout) -> None:
    keys = chain_keys(layout.fingerprint, range(32), chunk_tokens=16)
    chunks = [bytes([byte]) * layout.size(16) for byte in (1, 2)]
    daemon = DaemonInThread(tmp_path)
    with daemon.connect() as client:
        instance = client.instance
        client.store(layout, keys, chunks)
        lease = client.pin(layout, keys)
        daemon.stop()
        with pytest.raises(Unavailable):
            client.lookup(keys)
        with pytest.raises(LeaseExpired):
            lease.check()
        lease.release()
        daemon.start()
        until_back(client)
        assert client.instance != instance
        assert client.lookup(keys) == 0
        client.store(layout, keys, chunks)
        assert client.lookup(keys) == 2
    daemon.stop()


def until_back(client: kvd.Client) -> None:
    """Return when the client has attached anew."""
    give_up = time.monotonic() + PATIENCE_S
    while True:
        try:
            client.status()
            return
        except Unavailable:
            assert time.monotonic() < give_up


def test_a_reservation_does_not_outlive_its_daemon(tmp_path: Path, layout: kvd.KVLayout) -> None:
    keys = chain_keys(layout.fingerprint, range(32), chunk_tokens=16)
    daemon = DaemonInThread(tmp_path)
    with daemon.connect() as client:
        reservation = client.reserve(layout, keys)
        reservation.write(0, bytes(layout.size(16)))
        daemon.stop()
        daemon.start()
        with pytest.raises(Unavailable):
            reservation.write(1, bytes(layout.size(16)))
        with pytest.raises(Unavailable):
            reservation.commit()
        until_back(client)
        assert client.lookup(keys) == 0
    daemon.stop()


@pytest.fixture
def process(tmp_path: Path) -> Iterator[DaemonProcess]:
    """A daemon in a process of its own, to be killed and stopped."""
    running = DaemonProcess(tmp_path, "--grpc-socket", str(tmp_path / "rpc.sock"))
    yield running
    if running.process.poll() is None:
        running.process.send_signal(signal.SIGCONT)
        running.kill()


def rpc_of(process: DaemonProcess) -> str:
    return f"grpc+unix://{process.socket.with_name('rpc.sock')}"


def test_a_killed_daemon_is_unavailable_and_its_successor_serves(
    process: DaemonProcess, layout: kvd.KVLayout
) -> None:
    keys = chain_keys(layout.fingerprint, range(16), chunk_tokens=16)
    chunk = bytes(layout.size(16))
    with kvd.connect(rpc_of(process), timeout_s=PATIENCE_S) as client:
        client.store(layout, keys, [chunk])
        process.kill()
        with pytest.raises(Unavailable):
            client.lookup(keys)
        process.restart()
        until_back(client)
        assert client.store(layout, keys, [chunk]) == ["granted"]


def test_what_a_stopped_daemon_grants_too_late_goes_back(
    process: DaemonProcess, layout: kvd.KVLayout
) -> None:
    keys = chain_keys(layout.fingerprint, range(16), chunk_tokens=16)
    with kvd.connect(rpc_of(process), timeout_s=PATIENCE_S) as client:
        client.store(layout, keys, [bytes(layout.size(16))])
        process.process.send_signal(signal.SIGSTOP)
        with pytest.raises(DeadlineExceeded):
            client.pin(layout, keys, timeout_s=GIVE_UP_S)
        process.process.send_signal(signal.SIGCONT)
        until_unpinned(client)
        with client.pin(layout, keys) as lease:
            assert len(lease) == 1


def until_unpinned(client: kvd.Client) -> None:
    """Return when the daemon knows of no pin."""
    give_up = time.monotonic() + PATIENCE_S
    # The first answer comes behind the late one, but what that gives back may still be on its way.
    while client.status(audit=True).num_pinned:
        assert time.monotonic() < give_up


def test_a_killed_client_leaves_nothing(tmp_path: Path, layout: kvd.KVLayout) -> None:
    daemon = DaemonInThread(tmp_path)
    script = f"""
        import kvd
        client = kvd.connect({daemon.unix!r}, timeout_s={PATIENCE_S})
        layout = kvd.{layout!r}
        keys = kvd.chain_keys(layout.fingerprint, range(32), chunk_tokens=16)
        reservation = client.reserve(layout, keys)
        reservation.write(0, bytes(layout.size(16)))
        print("written", flush=True)
        input()
    """
    with start_python(script) as victim:
        assert victim.stdout is not None
        assert victim.stdout.readline() == b"written\n"
        assert daemon.store.num_reserved == 2
        victim.kill()
    daemon.until_sessions(0)
    assert daemon.is_empty()
    daemon.stop()


# Processes.


def start_python(script: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", textwrap.dedent(script)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def run_python(script: str) -> bytes:
    """What a script prints, and it ends by itself and well."""
    with start_python(script) as process:
        try:
            output, _ = process.communicate(timeout=PATIENCE_S)
        finally:
            process.kill()
    assert process.returncode == 0
    return output


def test_a_process_that_never_closes_its_client_ends(tmp_path: Path) -> None:
    daemon = DaemonInThread(tmp_path)
    script = f"""
        import kvd
        client = kvd.connect({daemon.unix!r}, timeout_s={PATIENCE_S})
        print(client.lookup([]))
    """
    assert run_python(script) == b"0\n"
    daemon.until_sessions(0)
    daemon.stop()


def test_a_forked_child_is_refused_and_its_parent_goes_on(
    tmp_path: Path, layout: kvd.KVLayout
) -> None:
    daemon = DaemonInThread(tmp_path)
    script = f"""
        import os, kvd
        layout = kvd.{layout!r}
        keys = kvd.chain_keys(layout.fingerprint, range(16), chunk_tokens=16)
        client = kvd.connect({daemon.unix!r}, timeout_s={PATIENCE_S})
        client.store(layout, keys, [bytes(layout.size(16))])
        lease = client.pin(layout, keys)
        child = os.fork()
        if not child:
            for use in (lease.check, client.status, lambda: kvd.connect({daemon.unix!r})):
                try:
                    use()
                except kvd.errors.KvdError as error:
                    print(type(error).__name__, "fork" in str(error), flush=True)
            with kvd.connect({str(daemon.local)!r}) as local:
                print("local", local.lookup(keys), flush=True)
            del lease, client, use
            raise SystemExit
        _, status = os.waitpid(child, 0)
        print("child", status)
        lease.check()
        print("parent", client.lookup(keys))
    """
    assert run_python(script).decode().splitlines() == [
        "LeaseExpired False",
        "Unavailable True",
        "Unavailable True",
        "local 1",
        "child 0",
        "parent 1",
    ]
    daemon.until_sessions(0)
    daemon.stop()


def test_a_child_of_a_process_that_has_used_grpc_is_refused_too(tmp_path: Path) -> None:
    daemon = DaemonInThread(tmp_path)
    script = f"""
        import os, kvd
        kvd.connect({daemon.unix!r}, timeout_s={PATIENCE_S}).close()
        if not os.fork():
            try:
                kvd.connect({daemon.unix!r})
            except kvd.errors.Unavailable as error:
                print("fork" in str(error), flush=True)
            raise SystemExit
        print(os.wait()[1])
    """
    assert run_python(script) == b"True\n0\n"
    daemon.stop()


def test_only_those_who_use_grpc_import_it() -> None:
    script = """
        import sys
        import kvd.client
        print("grpc" in sys.modules)
    """
    assert run_python(script) == b"False\n"
