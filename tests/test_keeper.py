"""The keeper: real processes, killed and replaced; the memory is there, or it is let go."""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvd.arena import HUGE_PAGE_SIZE, Arena
from kvd.daemon import keeper_process as protocol
from kvd.daemon.keeper import ArenaFacts, Keeper, Kept, drop_kept, facts_here, keeper_path
from kvd.daemon.ledger import Ledger
from kvd.daemon.processes import read_boot_id
from kvd.errors import ConfigError, KvdError, Unavailable

SIZE = 2 * HUGE_PAGE_SIZE
FINGERPRINT = b"f" * 32

# What a process may take to end on a loaded machine, before a test gives up.
PATIENCE_S = 60

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A daemon's socket path; no keeper is left beside it."""
    path = tmp_path / "kvd.sock"
    yield path
    with contextlib.suppress(KvdError):
        drop_kept(path)


class Memory:
    """An arena and a ledger as a daemon has them."""

    def __init__(self) -> None:
        self.arena = Arena.create(SIZE, huge_pages="never")
        self.ledger = Ledger.create(16, arena_size=SIZE, instance=bytes(16))
        self.facts = facts_here(SIZE, self.ledger.size)

    def deposit(self, keeper: Keeper) -> None:
        keeper.deposit(self.arena.fd, self.ledger.fd, self.facts)

    def close(self) -> None:
        self.arena.close()
        self.ledger.close()


@pytest.fixture
def memory() -> Iterator[Memory]:
    made = Memory()
    yield made
    made.close()


def attach(place: Path, *, keep_s: int = 60, fingerprint: bytes = FINGERPRINT) -> Keeper:
    return Keeper.attach(place, keep_s=keep_s, fingerprint=fingerprint)


def memory_of(pid: int) -> list[str]:
    """Name of the memory behind each descriptor of memory that a process has."""
    links = []
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        # The one that lists the folder is gone when it is looked at.
        with contextlib.suppress(FileNotFoundError):
            links.append(str(fd.readlink()))
    return sorted(link.split(":")[1].split()[0] for link in links if link.startswith("/memfd:"))


def held_by(pid: int) -> set[str]:
    """The kinds of memory that a process holds."""
    return set(memory_of(pid))


def has_ended(pid: int, *, wait_ms: int) -> bool:
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    ended = poll.poll(wait_ms)
    os.close(fd)
    return bool(ended)


def await_end(pid: int) -> None:
    assert has_ended(pid, wait_ms=PATIENCE_S * 1000), "the keeper does not end"


def assert_same(kept: Kept | None, memory: Memory) -> None:
    """It is the same memory, not a copy."""
    assert kept is not None
    assert os.fstat(kept.arena_fd).st_ino == os.fstat(memory.arena.fd).st_ino
    assert os.fstat(kept.ledger_fd).st_ino == os.fstat(memory.ledger.fd).st_ino
    assert kept.facts == memory.facts
    kept.close()


def test_what_one_daemon_deposits_the_next_one_finds(place: Path, memory: Memory) -> None:
    first = attach(place)
    assert first.kept() is None
    memory.deposit(first)
    first.close()
    second = attach(place)
    assert second.pid == first.pid
    assert_same(second.kept(), memory)
    assert second.kept() is None, "descriptors are handed over once"
    second.close()
    third = attach(place)
    assert_same(third.kept(), memory)
    third.close()


DAEMON = """
import os, sys, time
from pathlib import Path
from kvd.arena import Arena
from kvd.daemon.keeper import Keeper, facts_here
from kvd.daemon.ledger import Ledger
arena = Arena.create({size}, huge_pages="never")
arena.view(12345, 5)[:] = list(b"hello")
ledger = Ledger.create(16, arena_size={size}, instance=b"i" * 16)
ledger.keep(0, 5, 77, b"label")
keeper = Keeper.attach(Path({place!r}), fingerprint={fingerprint!r})
keeper.deposit(arena.fd, ledger.fd, facts_here({size}, ledger.size))
print(keeper.pid, flush=True)
time.sleep(3600)
"""


def test_memory_survives_every_way_a_daemon_dies(place: Path) -> None:
    code = DAEMON.format(size=SIZE, place=str(place), fingerprint=FINGERPRINT)
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        with subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=REPOSITORY,
            start_new_session=True,
        ) as daemon:
            assert daemon.stdout is not None
            keeper_pid = int(daemon.stdout.readline())
            # As a terminal does with Ctrl-C: to all of the group.
            os.killpg(daemon.pid, number)
        keeper = attach(place)
        assert keeper.pid == keeper_pid
        kept = keeper.kept()
        assert kept is not None
        ledger = Ledger.adopt(kept.ledger_fd, arena_size=SIZE)
        assert [slot.label for slot in ledger.entries().kept] == [b"label"]
        ledger.close()
        arena = Arena.adopt(kept.arena_fd)
        arena.populate(huge_pages="auto")
        assert arena.view(12345, 5).tobytes() == b"hello"
        arena.close()
        keeper.drop()
        keeper.close()
        await_end(keeper_pid)


def test_it_is_in_a_session_of_its_own_and_holds_no_file_of_the_daemon(place: Path) -> None:
    keeper = attach(place)
    assert os.getsid(keeper.pid) == keeper.pid
    files = {str(fd.readlink()) for fd in Path(f"/proc/{keeper.pid}/fd").iterdir()}
    strange = {name for name in files if not name.startswith("socket:")}
    assert strange == {"/dev/null", str(keeper_path(place)) + ".lock"}
    assert Path(f"/proc/{keeper.pid}/cwd").readlink() == Path("/")
    keeper.close()


def test_it_is_small(place: Path, memory: Memory) -> None:
    keeper = attach(place)
    memory.deposit(keeper)
    status = Path(f"/proc/{keeper.pid}/status").read_text()
    rss_kib = int(status.split("VmRSS:")[1].split()[0])
    assert rss_kib < 20 << 10
    maps = Path(f"/proc/{keeper.pid}/maps").read_text()
    assert not any(name in maps for name in ("numpy", "grpc", "google", "kvd-arena"))
    keeper.close()


def test_it_lets_go_and_ends_when_no_daemon_comes(place: Path, memory: Memory) -> None:
    keeper = attach(place, keep_s=1)
    memory.deposit(keeper)
    assert not has_ended(keeper.pid, wait_ms=1500), "it ends while its daemon is connected"
    keeper.close()
    await_end(keeper.pid)
    assert not keeper_path(place).exists()


def test_a_later_daemon_says_anew_how_long(place: Path, memory: Memory) -> None:
    keeper = attach(place, keep_s=600)
    memory.deposit(keeper)
    keeper.close()
    attach(place, keep_s=1).close()
    await_end(keeper.pid)


def test_one_that_keeps_nothing_ends_with_its_daemon(place: Path) -> None:
    keeper = attach(place)
    keeper.close()
    await_end(keeper.pid)


def test_drop_lets_the_memory_go_at_once(place: Path, memory: Memory) -> None:
    keeper = attach(place)
    memory.deposit(keeper)
    assert held_by(keeper.pid) == {"kvd-arena", "kvd-ledger"}
    keeper.drop()
    assert held_by(keeper.pid) == set()
    memory.deposit(keeper)
    assert held_by(keeper.pid) == {"kvd-arena", "kvd-ledger"}
    keeper.close()


def test_a_daemon_that_drops_what_it_was_given_holds_none_of_it(
    place: Path, memory: Memory
) -> None:
    for end in ("drop", "close"):
        keeper = attach(place)
        memory.deposit(keeper)
        keeper.close()
        before = memory_of(os.getpid())
        keeper = attach(place)
        assert memory_of(os.getpid()) != before
        getattr(keeper, end)()
        assert keeper.kept() is None
        assert memory_of(os.getpid()) == before
        keeper.close()


def test_a_deposit_replaces_the_one_before(place: Path, memory: Memory) -> None:
    keeper = attach(place)
    other = Memory()
    for deposited in (memory, other, other):
        deposited.deposit(keeper)
    assert len(list(Path(f"/proc/{keeper.pid}/fd").iterdir())) == 3 + 1 + 2 + 2
    keeper.close()
    keeper = attach(place)
    assert_same(keeper.kept(), other)
    keeper.close()
    other.close()


def test_a_daemon_without_it_drops_what_is_there(place: Path, memory: Memory) -> None:
    assert drop_kept(place) is False
    keeper = attach(place)
    memory.deposit(keeper)
    with pytest.raises(Unavailable, match=rf"another daemon, pid {os.getpid()}"):
        drop_kept(place)
    keeper.close()
    assert drop_kept(place) is True
    await_end(keeper.pid)
    assert drop_kept(place) is False


def test_another_configuration_finds_nothing_and_the_memory_is_gone(
    place: Path, memory: Memory
) -> None:
    keeper = attach(place)
    memory.deposit(keeper)
    keeper.close()
    other = attach(place, fingerprint=b"g" * 32)
    assert other.kept() is None
    assert "another configuration" in other.reason
    assert held_by(other.pid) == set()
    other.close()


@pytest.mark.parametrize(
    "changes", [{"arena_size": SIZE + 1}, {"ledger_size": 5}, {"boot_id": bytes(16)}]
)
def test_what_is_not_as_its_facts_say_is_let_go(
    place: Path, memory: Memory, changes: dict[str, object]
) -> None:
    keeper = attach(place)
    good = {"arena_size": SIZE, "ledger_size": memory.ledger.size, "boot_id": read_boot_id()}
    memory.facts = ArenaFacts(**{**good, **changes})  # type: ignore[arg-type]
    memory.deposit(keeper)
    keeper.close()
    keeper = attach(place)
    assert keeper.kept() is None
    assert "not what the keeper was told" in keeper.reason
    assert held_by(keeper.pid) == set()
    keeper.close()


def test_one_daemon_at_a_time(place: Path) -> None:
    keeper = attach(place)
    with pytest.raises(Unavailable, match=rf"another daemon, pid {os.getpid()}; stop it"):
        attach(place)
    assert keeper.is_alive
    keeper.close()


def test_who_is_sent_away_always_hears_why(place: Path) -> None:
    # Its packet may come before the answer, after it, or after the end of the connection.
    keeper = attach(place)
    hello = protocol.HEAD.pack(protocol.MAGIC, protocol.VERSION, protocol.HELLO, 0) + bytes(36)
    for _ in range(300):
        with dial(place) as visitor:
            with contextlib.suppress(BrokenPipeError):
                for _ in range(3):
                    visitor.send(hello)
            assert kind_of(visitor.recv(4096)) == protocol.BUSY
    keeper.close()


def test_of_daemons_that_start_at_once_one_gets_the_keeper(place: Path) -> None:
    def try_it(_: int) -> Keeper | None:
        try:
            return attach(place)
        except Unavailable:
            return None

    with ThreadPoolExecutor(4) as pool:
        got = [keeper for keeper in pool.map(try_it, range(4)) if keeper is not None]
    assert len(got) == 1
    assert got[0].is_alive
    got[0].close()


def test_one_that_is_killed_is_noticed_and_replaced(place: Path, memory: Memory) -> None:
    keeper = attach(place)
    memory.deposit(keeper)
    assert keeper.is_alive
    os.kill(keeper.pid, signal.SIGKILL)
    await_end(keeper.pid)
    assert not keeper.is_alive
    with pytest.raises(Unavailable, match="gone"):
        memory.deposit(keeper)
    keeper.close()
    # Its socket is still there, and nobody listens.
    assert keeper_path(place).exists()
    again = attach(place)
    assert again.kept() is None
    memory.deposit(again)
    again.close()


def start_changed(place: Path, change: str) -> None:
    """Start a keeper that differs in a constant."""
    code = f"""
import sys
sys.path.insert(0, {str(Path(protocol.__file__).parent)!r})
import keeper_process
{change}
sys.exit(keeper_process.main([{str(keeper_path(place))!r}, "--keep-s", "600"]))
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE_S)


def test_a_keeper_of_another_version_is_replaced(place: Path, memory: Memory) -> None:
    start_changed(place, "keeper_process.VERSION = 2")
    with dial(place) as visitor:
        hello = protocol.HELLO_BODY.pack(600, FINGERPRINT)
        visitor.send(protocol.HEAD.pack(protocol.MAGIC, 2, protocol.HELLO, 0) + hello)
        assert kind_of(visitor.recv(4096)) == protocol.EMPTY
        body = protocol.FACTS_BODY.pack(SIZE, memory.ledger.size, read_boot_id())
        deposit = protocol.HEAD.pack(protocol.MAGIC, 2, protocol.DEPOSIT, 0) + body
        socket.send_fds(visitor, [deposit], [memory.arena.fd, memory.ledger.fd])
        assert kind_of(visitor.recv(4096)) == protocol.DONE
    keeper = attach(place)
    assert keeper.kept() is None
    memory.deposit(keeper)
    keeper.close()


def test_a_daemon_of_another_version_is_told(place: Path) -> None:
    start_changed(place, "")
    with dial(place) as visitor:
        visitor.send(protocol.HEAD.pack(protocol.MAGIC, 9, protocol.HELLO, 0) + b"whatever")
        answer = visitor.recv(4096)
    _, version, kind, _ = protocol.HEAD.unpack(answer)
    assert (version, kind) == (protocol.VERSION, protocol.OTHER_VERSION)


def test_who_says_nothing_is_sent_away(place: Path) -> None:
    start_changed(place, "keeper_process.HELLO_S_MAX = 0.05")
    with dial(place) as silent:
        assert silent.recv(4096) == b""
        keeper = attach(place)
        # Who has said it may be silent for ever.
        assert not has_ended(keeper.pid, wait_ms=300)
        assert keeper.is_alive
        keeper.close()


def dial(place: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.settimeout(PATIENCE_S)
    connection.connect(str(keeper_path(place)))
    return connection


def kind_of(packet: bytes) -> int:
    kind: int = protocol.HEAD.unpack_from(packet)[2]
    return kind


def test_packets_without_sense_cost_nothing(place: Path, memory: Memory) -> None:
    keeper = attach(place)
    memory.deposit(keeper)
    keeper.close()
    chance = random.Random(5)
    with open("/dev/null", "rb") as null:  # noqa: PTH123
        for _ in range(300):
            kind = chance.choice([protocol.HELLO, protocol.DEPOSIT, 4, 16, 65535])
            head = protocol.HEAD.pack(protocol.MAGIC, protocol.VERSION, kind, 0)
            packet = chance.choice([head, b"", chance.randbytes(16), head[:9]])
            packet += chance.randbytes(chance.choice([0, 1, 31, 33, 5000]))
            fds = [null.fileno()] * chance.choice([0, 1, 2, 3, 9])
            with dial(place) as visitor:
                socket.send_fds(visitor, [packet], fds)
                with contextlib.suppress(ConnectionError):
                    visitor.recv(4096)
    keeper = attach(place)
    assert len(list(Path(f"/proc/{keeper.pid}/fd").iterdir())) == 3 + 1 + 2 + 2
    assert_same(keeper.kept(), memory)
    keeper.close()


def test_a_deposit_before_the_hello_is_refused(place: Path, memory: Memory) -> None:
    start_changed(place, "")
    body = protocol.FACTS_BODY.pack(SIZE, memory.ledger.size, read_boot_id())
    with dial(place) as visitor:
        head = protocol.HEAD.pack(protocol.MAGIC, protocol.VERSION, protocol.DEPOSIT, 0)
        socket.send_fds(visitor, [head + body], [memory.arena.fd, memory.ledger.fd])
        answer = visitor.recv(4096)
    assert kind_of(answer) == protocol.REFUSED
    assert b"hello comes before" in answer


def test_a_deposit_of_other_than_two_descriptors_is_not_taken(place: Path, memory: Memory) -> None:
    hello = protocol.HELLO_BODY.pack(600, FINGERPRINT)
    facts = protocol.FACTS_BODY.pack(SIZE, memory.ledger.size, read_boot_id())
    for count in (0, 1, 3):
        keeper = attach(place)
        memory.deposit(keeper)
        keeper.close()
        with dial(place) as visitor:
            head = protocol.HEAD.pack(protocol.MAGIC, protocol.VERSION, protocol.HELLO, 0)
            visitor.send(head + hello)
            assert kind_of(visitor.recv(4096)) == protocol.KEPT
            head = protocol.HEAD.pack(protocol.MAGIC, protocol.VERSION, protocol.DEPOSIT, 0)
            fds = [memory.ledger.fd, memory.arena.fd, memory.arena.fd]
            socket.send_fds(visitor, [head + facts], fds[:count])
            answer = visitor.recv(4096)
            assert not answer or kind_of(answer) == protocol.REFUSED
        keeper = attach(place)
        assert_same(keeper.kept(), memory)
        keeper.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_another_user_gets_nothing(place: Path, memory: Memory) -> None:
    keeper = attach(place)
    memory.deposit(keeper)
    keeper.close()
    assert keeper_path(place).stat().st_mode & 0o777 == 0o600
    # Even where the file's mode would let it in.
    for folder in [keeper_path(place), *list(keeper_path(place).parents)[:3]]:
        folder.chmod(0o777)
    code = f"""
import os, socket
os.setgid(65534); os.setuid(65534)
connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
connection.connect({str(keeper_path(place))!r})
data, fds, _, _ = socket.recv_fds(connection, 4096, 2)
print(data, fds)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    assert b"another user" in said
    assert b"[]" in said


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_the_socket_of_another_user_is_not_trusted(place: Path) -> None:
    for folder in list(place.parents)[:3]:
        folder.chmod(0o777)
    code = f"""
import os, socket
os.setgid(65534); os.setuid(65534)
listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
listener.bind({str(keeper_path(place))!r})
listener.listen()
print("x", flush=True)
input()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        with pytest.raises(ConfigError, match="a socket of user 65534; choose another --socket"):
            attach(place)
        process.kill()


def test_what_cannot_be_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"longer than 107 bytes; choose a shorter --socket"):
        attach(tmp_path / ("x" * 100))
    for keep_s in (0, protocol.KEEP_S_MAX + 1):
        with pytest.raises(ConfigError, match=rf"1\.\.{protocol.KEEP_S_MAX} s, found {keep_s}"):
            attach(tmp_path / "kvd.sock", keep_s=keep_s)
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(Unavailable, match="cannot be"):
        attach(blocked / "kvd.sock")
    (tmp_path / "kvd.sock.keeper").mkdir()
    with pytest.raises(KvdError, match=r"cannot be reached|does not start"):
        attach(tmp_path / "kvd.sock")


def test_the_command_says_how_it_is_used() -> None:
    command = [sys.executable, "-m", "kvd.daemon.keeper_process"]
    for arguments in ([], ["path"], ["path", "--keep-s", "x"], ["path", "--keep-s", "0"]):
        done = subprocess.run(
            [*command, *arguments], capture_output=True, cwd=REPOSITORY, check=False
        )
        assert done.returncode == 2
        assert b"keep-s" in done.stderr
