"""The command line: what people and programs see of it, against real daemons."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import trustme
from click.testing import CliRunner, Result

import kvd
import kvd.client
import kvd.daemon.server
from kvd.cli import main
from kvd.cli.console import make_table, printable
from kvd.cli.flags import Remote
from kvd.cli.listing import pages, status_rows
from kvd.daemon.config import Config, flag_of
from kvd.errors import TooLarge
from kvd.keys import ChunkKey
from kvd.proto import kvd_pb2 as pb
from tests.conftest import DaemonProcess

ROOT = Path(__file__).parents[1]
COMMANDS = (
    *("start", "status", "ls", "clear", "pin", "unpin", "persist", "scrub", "fsck"),
    *("doctor", "completion", "calibrate"),
)
REMOTE_COMMANDS = (
    *("status", "ls", "clear --all --yes", f"pin {'ab' * 32}", f"unpin {'ab' * 32}"),
    *("persist", "scrub"),
)
KVD = (sys.executable, "-m", "kvd")


def cli(*arguments: object, **env: str | None) -> Result:
    """The command in this process, with no KVD_ variable but those in `env`."""
    clean = {name: None for name in os.environ if name.startswith("KVD_")}
    return CliRunner().invoke(main, [str(one) for one in arguments], env={**clean, **env})


def answer(*arguments: object, exit_code: int = 0) -> Any:
    """What the command says with --json: one object, and nothing else."""
    result = cli(*arguments, "--json")
    assert result.exit_code == exit_code, result.output
    assert result.stderr == ""
    assert result.stdout.count("\n") == 1
    return json.loads(result.stdout)


def refusal(*arguments: object, exit_code: int = 2) -> str:
    """The one line that a command ends with when it is refused."""
    result = cli(*arguments)
    assert result.exit_code == exit_code, result.output
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("kvd: ")
    return result.stderr


@contextmanager
def terminal(
    *arguments: object, stdin: bytes = b""
) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The command on a terminal of 120 columns: its process, and where to read what it shows."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 40, 120, 0, 0))
    if stdin:
        os.write(ours, stdin)
    process = subprocess.Popen(
        [*KVD, *map(str, arguments)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=ROOT,
        env={**os.environ, "TERM": "xterm-256color"},
    )
    os.close(theirs)
    try:
        yield process, ours
    finally:
        os.close(ours)
        process.kill()
        process.wait()


def read_until(shown: int, wanted: str = "\0") -> str:
    """What a terminal shows up to `wanted`, or to the command's end, without colours."""
    text = ""
    while wanted not in text:
        try:
            text += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", os.read(shown, 65536).decode())
        except OSError:
            break
    return text


def on_terminal(*arguments: object, stdin: bytes = b"") -> tuple[int, str]:
    """The exit code of a command on a terminal, and what it showed."""
    with terminal(*arguments, stdin=stdin) as (process, shown):
        text = read_until(shown)
        return process.wait(timeout=60), text


def fill(daemon: DaemonProcess, layout: kvd.KVLayout, count: int = 5) -> list[ChunkKey]:
    """Keys of a prompt of `count` chunks, the first of category system, the others of chat."""
    keys = kvd.chain_keys(layout.fingerprint, range(16 * count), chunk_tokens=16)
    chunks = [np.zeros(layout.shape(16), np.float32)] * count
    with daemon.connect() as client:
        client.store(layout, keys[:1], chunks[:1], category="system")
        client.store(layout, keys[1:], chunks[1:], category="chat", parent=keys[0], start=16)
    return keys


class TestHelp:
    @pytest.mark.parametrize("arguments", ["--help", "start --help", "ls --help", "--version"])
    def test_help_loads_nothing_heavy(self, arguments: str) -> None:
        script = (
            "import sys\n"
            "from kvd.cli import main\n"
            f"main({arguments.split()}, prog_name='kvd', standalone_mode=False)\n"
            "print(sorted({name.partition('.')[0] for name in sys.modules}"
            " | {name for name in sys.modules if name.startswith('kvd.')}))\n"
        )
        command = [sys.executable, "-c", script]
        output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        loaded = set(eval(output.stdout.splitlines()[-1]))
        heavy = {"torch", "numpy", "numba", "triton", "grpc", "google", "rich", "prometheus_client"}
        heavy |= {"uvloop", "asyncio", "xxhash", "pynvml", "transformers", "vllm", "sglang"}
        heavy |= {"kvd.client", "kvd.daemon.server", "kvd.daemon.store", "kvd.proto.kvd_pb2"}
        assert "kvd.cli.commands" in loaded
        assert not loaded & heavy

    def test_every_command_has_a_help_and_json(self) -> None:
        assert set(main.commands) == set(COMMANDS)
        listed = cli("--help").stdout
        for name in COMMANDS:
            assert f"  {name} " in listed
            text = cli(name, "--help").stdout
            assert "--json" in text
            # Long flags only.
            assert not re.search(r"^\s+-[a-z]\b", text, re.MULTILINE)

    def test_start_has_a_flag_for_each_field_with_its_default(self) -> None:
        text = " ".join(cli("start", "--help").stdout.split())
        for field in fields(Config):
            assert f" {flag_of(field.name)} " in text
        assert "[default: 4GiB]" in text
        assert "[default: 127.0.0.1:9470]" in text
        assert "[auto|never|require]" in text

    def test_version(self) -> None:
        result = cli("--version")
        assert (result.exit_code, result.stdout) == (0, f"kvd {kvd.__version__}\n")

    def test_no_command_is_a_usage_error_with_the_help(self) -> None:
        result = cli()
        assert (result.exit_code, result.stdout) == (2, "")
        assert "Usage: kvd" in result.stderr.replace("main", "kvd")

    def test_module_is_the_command(self) -> None:
        output = subprocess.run([*KVD, "--version"], cwd=ROOT, capture_output=True, check=True)
        assert output.stdout.decode() == f"kvd {kvd.__version__}\n"


class TestUsage:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ("stat", "No such command 'stat'"),
            ("start --cpu-sise 4GiB", "No such option"),
            ("start --config /nowhere.toml", "/nowhere.toml"),
            ("completion", "Missing argument"),
            ("completion tcsh", "'tcsh' is not one of"),
            ("ls --limit 0", "0 is not in the range x>=1"),
            ("status --timeout-s 0", "not in the range"),
            ("status --address node:1", "--address node:1 is beyond this machine: give --tls-ca"),
            ("status --address node", "--address: an address like"),
            ("status --address 127.0.0.1:1 --socket /x", "--socket and --address name two daemons"),
            ("status --insecure", "--insecure need --address"),
            (f"status --tls-ca {__file__}", "the --tls files and --insecure need --address"),
            (f"status --address h:1 --tls-cert {__file__}", "--tls-cert and --tls-key go together"),
            (f"status --address h:1 --insecure --tls-ca {__file__}", "--insecure means no TLS"),
            ("status --address h:1 --tls-ca /nowhere.pem", "/nowhere.pem"),
            ("status --watch", "--watch needs a terminal, and goes without --json"),
            ("clear", "name what to drop: KEY..., or --category and --layout, or --all"),
            ("clear --all --category x", "name what to drop"),
            ("clear 12345678 --category x", "name what to drop"),
            ("pin", "Missing argument"),
        ],
    )
    def test_mistake_is_one_line_and_exit_code_2(self, arguments: str, message: str) -> None:
        assert message in refusal(*arguments.split())
        error = answer(*arguments.split(), exit_code=2)["error"]
        assert error["code"] == "usage"
        assert message in error["message"]

    def test_mistake_points_to_the_help_of_its_command(self) -> None:
        assert refusal("clear").endswith("clear --help`)\n")

    @pytest.mark.parametrize("command", REMOTE_COMMANDS)
    def test_no_daemon_is_a_failure_that_says_what_to_do(
        self, command: str, tmp_path: Path
    ) -> None:
        arguments = [*command.split(), "--socket", str(tmp_path / "kvd.sock")]
        line = refusal(*arguments, exit_code=1)
        assert f"no daemon at {tmp_path}/kvd.sock" in line
        assert "kvd start" in line
        assert answer(*arguments, exit_code=1)["error"]["code"] == "unavailable"

    def test_variable_names_the_socket_too(self, tmp_path: Path) -> None:
        result = cli("status", KVD_SOCKET=str(tmp_path / "other.sock"))
        assert result.exit_code == 1
        assert f"no daemon at {tmp_path}/other.sock" in result.stderr

    @pytest.mark.parametrize("key", ["1234567", "xyzxyzxyz", "ab" * 33, "--", ""])
    def test_key_must_look_like_one(self, key: str, daemon: DaemonProcess) -> None:
        line = refusal("pin", "--socket", daemon.socket, "--", key)
        assert "a key is 8 to 64 hexadecimal digits, found" in line


class TestStart:
    @pytest.fixture
    def started(self, monkeypatch: pytest.MonkeyPatch) -> list[Config]:
        """The configs that `kvd start` would run."""
        configs: list[Config] = []

        def run(config: Config) -> int:
            configs.append(config)
            return 0

        monkeypatch.setattr(kvd.daemon.server, "run", run)
        return configs

    def test_flags_beat_variables_and_variables_the_file(
        self, started: list[Config], tmp_path: Path
    ) -> None:
        toml = tmp_path / "kvd.toml"
        toml.write_text('cpu_size = "2MiB"\nhttp = "none"\ndrain_s = 3\n')
        env = {"KVD_CONFIG": str(toml), "KVD_CPU_SIZE": "4MiB", "KVD_HTTP": "127.0.0.1:0"}
        result = cli("start", "--cpu-size", "8MiB", "--socket", "/tmp/x.sock", **env)
        assert result.exit_code == 0, result.output
        (config,) = started
        assert (config.cpu_size, config.http, config.drain_s) == (8 << 20, "127.0.0.1:0", 3.0)
        assert config.socket == Path("/tmp/x.sock")

    def test_switch_can_be_given_and_taken_back(self, started: list[Config]) -> None:
        cli("start", "--insecure", "--cpu-size", "2MiB")
        cli("start", "--no-insecure", "--cpu-size", "2MiB", KVD_INSECURE="1")
        cli("start", "--cpu-size", "2MiB", KVD_INSECURE="1")
        assert [config.insecure for config in started] == [True, False, True]

    def test_json_says_what_is_started(self, started: list[Config]) -> None:
        said = answer("start", "--cpu-size", "2MiB", "--socket", "/tmp/x.sock")
        assert said["pid"] == os.getpid()
        assert set(said["config"]) == {field.name for field in fields(Config)}
        assert (said["config"]["cpu_size"], said["config"]["socket"]) == (2 << 20, "/tmp/x.sock")
        assert len(started) == 1

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ("--tiers gpu", "tier 'gpu' does not exist here; there is: cpu"),
            ("--cpu-size 1EiB", "flag --cpu-size: a size like"),
            ("--cpu-size 900TiB", "cpu_size is 900 TiB, but"),
            ("--listen 0.0.0.0:1", "listen 0.0.0.0:1 is beyond this machine"),
            ("--tls-cert /nowhere.pem", "tls_cert is given without tls_key"),
            ("--log-file /nowhere/kvd.log", "log_file: /nowhere/kvd.log has no directory"),
        ],
    )
    def test_what_cannot_be_does_not_start(
        self, started: list[Config], arguments: str, message: str
    ) -> None:
        assert message in refusal("start", *arguments.split())
        error = answer("start", *arguments.split(), exit_code=2)["error"]
        assert error["code"] == "config"
        assert message in error["message"]
        assert started == []

    def test_unknown_variable_does_not_start(self, started: list[Config]) -> None:
        result = cli("start", KVD_CPUSIZE="1GiB")
        assert result.exit_code == 2
        assert "variable KVD_CPUSIZE is unknown; did you mean KVD_CPU_SIZE?" in result.stderr
        assert started == []

    def test_second_daemon_on_a_socket_fails_and_leaves_the_first(
        self, daemon: DaemonProcess
    ) -> None:
        flags = ["--socket", str(daemon.socket), "--cpu-size", "2MiB", "--http", "none"]
        command = [*KVD, "start", *flags, "--grpc-socket", "none", "--log-level", "error"]
        output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert output.returncode == 1
        assert f"kvd: socket {daemon.socket} is in use by a live daemon" in output.stderr
        assert "Traceback" not in output.stderr
        assert answer("status", "--socket", daemon.socket)["pid"] == daemon.pid

    def test_daemon_serves_metrics_and_stops_when_told(self, tmp_path: Path) -> None:
        running = DaemonProcess(tmp_path, "--http", "127.0.0.1:0", "--json")
        try:
            assert "event=http_listening port=" in running.log.read_text()
            assert running.stop() == 0
        finally:
            running.process.kill()
        assert not running.socket.exists()


class TestStatus:
    def test_status_is_the_daemon_in_numbers(
        self, daemon: DaemonProcess, layout: kvd.KVLayout
    ) -> None:
        fill(daemon, layout)
        said = answer("status", "--audit", "--socket", daemon.socket)
        assert (said["state"], said["pid"], said["version"]) == (
            "serving",
            daemon.pid,
            kvd.__version__,
        )
        assert (said["num_chunks"], said["num_layouts"]) == (5, 1)
        assert said["counters"]["commit_chunks"] == 5
        (tier,) = said["tiers"]
        assert (tier["name"], tier["size"], tier["used"]) == ("cpu", 64 << 20, 5 * layout.size(16))

    def test_status_in_a_pipe_is_lines_with_tabs(
        self, daemon: DaemonProcess, layout: kvd.KVLayout
    ) -> None:
        fill(daemon, layout)
        lines = cli("status", "--socket", daemon.socket).stdout.splitlines()
        said = dict(line.split("\t") for line in lines)
        assert said["state"] == "serving"
        assert said["chunks"] == "5 in 1 layouts"
        assert said["tier cpu"].startswith("20 KiB of 64 MiB (0 %)")
        assert said["stored"] == "5 chunks, 20 KiB"

    def test_rows_speak_of_trouble_only_if_there_is_some(self) -> None:
        quiet = pb.StatusReply(state="serving", uptime_ns=90_000 * 10**9)
        assert "up 1 d 1 h" in dict(status_rows(quiet))["version"]
        assert "internal errors" not in dict(status_rows(quiet))
        loud = pb.StatusReply(counters={"internal_errors": 2, "lookup_chunks": 8, "lookup_hits": 6})
        rows = dict(status_rows(loud))
        assert rows["internal errors"] == "2"
        assert rows["lookups"] == "6 of 8 chunks found (75.0 %)"

    def test_watch_shows_until_interrupted(self, daemon: DaemonProcess) -> None:
        with terminal("status", "--watch", "--socket", daemon.socket) as (process, shown):
            assert "serving" in read_until(shown, "evicted")
            process.send_signal(signal.SIGINT)
            assert "Traceback" not in read_until(shown)
            assert process.wait(timeout=60) == 0


class TestList:
    def test_list_is_every_chunk_and_its_layout(
        self, daemon: DaemonProcess, layout: kvd.KVLayout
    ) -> None:
        keys = fill(daemon, layout)
        said = answer("ls", "--socket", daemon.socket)
        chunks = {chunk["key"]: chunk for chunk in said["chunks"]}
        assert set(chunks) == {key.hex() for key in keys}
        second = chunks[keys[1].hex()]
        assert second["parent"] == keys[0].hex()
        assert (second["start"], second["num_tokens"], second["size"]) == (16, 16, layout.size(16))
        assert (second["category"], second["tier"], second["pins"]) == ("chat", "cpu", 0)
        assert said["layouts"][layout.fingerprint.hex()]["model"] == "tiny"
        assert said["is_partial"] is False

    def test_filters_leave_out_the_rest(self, daemon: DaemonProcess, layout: kvd.KVLayout) -> None:
        keys = fill(daemon, layout)
        here = ("--socket", daemon.socket)
        system = answer("ls", "--category", "system", *here)["chunks"]
        assert [chunk["key"] for chunk in system] == [keys[0].hex()]
        digits = layout.fingerprint.hex()
        assert len(answer("ls", "--layout", digits, *here)["chunks"]) == 5
        assert len(answer("ls", "--layout", digits[:8].upper(), *here)["chunks"]) == 5
        assert answer("ls", "--layout", "00" * 32, *here)["chunks"] == []
        line = refusal("ls", "--layout", "0" * 8, *here, exit_code=1)
        assert "no layout here begins with 00000000" in line

    def test_limit_says_that_there_may_be_more(
        self, daemon: DaemonProcess, layout: kvd.KVLayout
    ) -> None:
        fill(daemon, layout)
        assert answer("ls", "--limit", 2, "--socket", daemon.socket)["is_partial"] is True
        assert answer("ls", "--limit", 5, "--socket", daemon.socket)["is_partial"] is False
        result = cli("ls", "--limit", 2, "--socket", daemon.socket)
        assert len(result.stdout.splitlines()) == 2
        assert result.stderr == "kvd: there may be more, --limit 2 ended the list\n"

    def test_line_in_a_pipe_begins_with_the_whole_key(
        self, daemon: DaemonProcess, layout: kvd.KVLayout
    ) -> None:
        keys = fill(daemon, layout)
        lines = cli("ls", "--socket", daemon.socket).stdout.splitlines()
        assert {line.split("\t")[0] for line in lines} == {key.hex() for key in keys}

    def test_table_on_a_terminal_has_short_keys_and_a_head(
        self, daemon: DaemonProcess, layout: kvd.KVLayout
    ) -> None:
        keys = fill(daemon, layout)
        code, text = on_terminal("ls", "--socket", daemon.socket)
        assert code == 0
        head, *rows = text.splitlines()
        assert head.split()[:5] == ["key", "layout", "start", "tokens", "size"]
        assert {row.split()[0] for row in rows} == {key.hex()[:8] for key in keys}

    def test_reader_that_leaves_early_gets_no_traceback(
        self, daemon: DaemonProcess, layout: kvd.KVLayout
    ) -> None:
        fill(daemon, layout)
        reading, writing = os.pipe()
        os.close(reading)
        command = [*KVD, "ls", "--socket", str(daemon.socket)]
        output = subprocess.run(command, cwd=ROOT, stdout=writing, stderr=subprocess.PIPE)
        os.close(writing)
        assert b"Traceback" not in output.stderr

    def test_name_from_a_client_cannot_move_the_cursor(
        self, daemon: DaemonProcess, layout: kvd.KVLayout
    ) -> None:
        keys = kvd.chain_keys(layout.fingerprint, range(16), chunk_tokens=16)
        with daemon.connect() as client:
            chunk = np.zeros(layout.shape(16), np.float32)
            client.store(layout, keys, [chunk], category="[red]\x1b[2J\t\n")
        assert "[red]\\x1b[2J\\t\\n" in cli("ls", "--socket", daemon.socket).stdout
        _, text = on_terminal("ls", "--socket", daemon.socket)
        assert "[red]\\x1b[2J" in "".join(text.split())

    def test_page_that_is_too_long_is_asked_for_in_smaller_ones(self) -> None:
        chunks = [pb.ChunkInfo(key=bytes([index]) * 32) for index in range(100)]
        asked: list[int] = []

        def list_chunks(limit: int, cursor: int, category: str, layout: bytes) -> pb.ListReply:
            asked.append(limit)
            if limit > 40:
                raise TooLarge("ask for less at once")
            end = cursor + limit
            return pb.ListReply(chunks=chunks[cursor:end], cursor=end if end < 100 else 0)

        client: Any = SimpleNamespace(list_chunks=list_chunks)
        found = [chunk.key for reply in pages(client) for chunk in reply.chunks]
        assert found == [chunk.key for chunk in chunks]
        # Smaller once, smaller from then on.
        assert asked == sorted(asked, reverse=True)
        assert asked[0] > 40 >= asked[-1]

    def test_page_of_one_chunk_that_is_too_long_is_an_error(self) -> None:
        def refuse(**_: object) -> pb.ListReply:
            raise TooLarge("never")

        client: Any = SimpleNamespace(list_chunks=refuse)
        with pytest.raises(TooLarge):
            list(pages(client))


class TestClear:
    def test_key_goes_with_what_continues_it(
        self, daemon: DaemonProcess, layout: kvd.KVLayout
    ) -> None:
        keys = fill(daemon, layout)
        here = ("--socket", daemon.socket)
        assert answer("clear", keys[3].hex(), *here) == {"count": 2, "size": 2 * layout.size(16)}
        left = {chunk["key"] for chunk in answer("ls", *here)["chunks"]}
        assert left == {key.hex() for key in keys[:3]}
        assert cli("clear", keys[2].hex()[:8], *here).stdout == "dropped 1 chunks, 4 KiB\n"

    def test_category_and_layout(self, daemon: DaemonProcess, layout: kvd.KVLayout) -> None:
        fill(daemon, layout)
        here = ("--socket", daemon.socket)
        digits = layout.fingerprint.hex()[:10]
        assert answer("clear", "--category", "nothing", *here)["count"] == 0
        assert answer("clear", "--category", "chat", "--layout", digits, *here)["count"] == 4
        assert answer("clear", "--layout", digits, *here)["count"] == 1

    def test_unknown_key_drops_nothing(self, daemon: DaemonProcess, layout: kvd.KVLayout) -> None:
        fill(daemon, layout)
        here = ("--socket", daemon.socket)
        line = refusal("clear", "00000000", *here, exit_code=1)
        assert "no key here begins with 00000000" in line
        assert answer("status", *here)["num_chunks"] == 5

    def test_all_needs_a_yes(self, daemon: DaemonProcess, layout: kvd.KVLayout) -> None:
        fill(daemon, layout)
        here = ("--socket", daemon.socket)
        assert "say --yes if that is meant" in refusal("clear", "--all", *here)
        assert answer("clear", "--all", *here, exit_code=2)["error"]["code"] == "usage"
        assert answer("status", *here)["num_chunks"] == 5
        assert answer("clear", "--all", "--yes", *here)["count"] == 5
        assert answer("status", "--audit", *here)["num_chunks"] == 0

    @pytest.mark.parametrize(("said", "code", "num_left"), [(b"y\n", 0, 0), (b"n\n", 1, 5)])
    def test_all_asks_on_a_terminal(
        self,
        said: bytes,
        code: int,
        num_left: int,
        daemon: DaemonProcess,
        layout: kvd.KVLayout,
    ) -> None:
        fill(daemon, layout)
        found, text = on_terminal("clear", "--all", "--socket", daemon.socket, stdin=said)
        assert "Drop all 5 chunks?" in text
        assert found == code
        assert answer("status", "--socket", daemon.socket)["num_chunks"] == num_left


class TestPin:
    def test_pinned_chunk_stays_until_unpinned(
        self, daemon: DaemonProcess, layout: kvd.KVLayout
    ) -> None:
        keys = fill(daemon, layout)
        here = ("--socket", daemon.socket)
        assert cli("pin", keys[0].hex()[:8], keys[0].hex(), *here).stdout == "pinned 1 chunks\n"
        (listed,) = answer("ls", "--category", "system", *here)["chunks"]
        assert (listed["is_held"], listed["pins"]) == (True, 0)
        assert "0+held" in cli("ls", "--category", "system", *here).stdout
        assert answer("clear", "--all", "--yes", *here)["count"] == 4
        assert answer("unpin", keys[0].hex(), *here) == {"count": 1}
        assert answer("clear", "--all", "--yes", *here)["count"] == 1

    def test_pin_of_what_is_not_here_fails_and_pins_the_others(
        self, daemon: DaemonProcess, layout: kvd.KVLayout
    ) -> None:
        keys = fill(daemon, layout)
        arguments = ("pin", keys[0].hex(), "ab" * 32, "--socket", daemon.socket)
        assert "1 of 2 chunks are not here, pinned the other 1" in refusal(*arguments, exit_code=1)
        assert answer("clear", "--all", "--yes", "--socket", daemon.socket)["count"] == 4

    def test_digits_of_several_keys_are_refused_with_the_keys(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        keys = [bytes.fromhex("aabbccdd" + f"{index:02x}" * 28) for index in range(6)]
        reply = pb.ListReply(chunks=[pb.ChunkInfo(key=key) for key in keys])

        @contextmanager
        def connect(self: Remote) -> Iterator[Any]:
            yield SimpleNamespace(list_chunks=lambda **_: reply)

        monkeypatch.setattr(Remote, "connect", connect)
        line = refusal("pin", "AABBCCDD")
        assert "6 keys begin with aabbccdd, give more digits: aabbccdd0000" in line
        assert line.count("aabbccdd") == 5


class TestAddress:
    @pytest.mark.parametrize(
        ("arguments", "target"),
        [
            ("", None),
            ("--socket /a.sock", "/a.sock"),
            ("--address 127.0.0.1:9471", "grpc://127.0.0.1:9471"),
            ("--address node:9471 --insecure", "grpc://node:9471"),
            (f"--address node:9471 --tls-ca {__file__}", "grpcs://node:9471"),
        ],
    )
    def test_flags_name_the_daemon(
        self, arguments: str, target: str | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[tuple[str | None, dict[str, Any]]] = []

        def connect(address: str | None, **options: Any) -> Any:
            seen.append((address, options))
            raise kvd.errors.Unavailable("seen")

        monkeypatch.setattr(kvd.client, "connect", connect)
        refusal("status", "--timeout-s", "1.5", *arguments.split(), exit_code=1)
        ((address, options),) = seen
        assert address == target
        assert options["timeout_s"] == 1.5
        assert options["name"] == "kvd"
        assert bool(options["tls_ca"]) == ("grpcs" in str(target))

    def test_commands_work_over_grpc_on_loopback(
        self, tmp_path: Path, layout: kvd.KVLayout
    ) -> None:
        with running(tmp_path, "--listen", "127.0.0.1:0") as daemon:
            keys = fill(daemon, layout)
            there = ("--address", f"127.0.0.1:{grpc_port(daemon)}")
            assert answer("status", *there)["num_chunks"] == 5
            assert answer("pin", keys[0].hex()[:8], *there) == {"count": 1}
            assert answer("clear", "--all", "--yes", *there)["count"] == 4

    def test_commands_work_over_mutual_tls(self, tmp_path: Path, layout: kvd.KVLayout) -> None:
        authority = trustme.CA()
        authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
        for name in ("localhost", "operator"):
            made = authority.issue_cert(name)
            made.private_key_pem.write_to_path(str(tmp_path / f"{name}.key"))
            made.cert_chain_pems[0].write_to_path(str(tmp_path / f"{name}.pem"))
        flags = ["--tls-cert", str(tmp_path / "localhost.pem")]
        flags += ["--tls-key", str(tmp_path / "localhost.key")]
        flags += ["--tls-client-ca", str(tmp_path / "ca.pem")]
        with running(tmp_path, "--listen", "127.0.0.1:0", *flags) as daemon:
            fill(daemon, layout)
            there = ("--address", f"localhost:{grpc_port(daemon)}")
            ca = ("--tls-ca", tmp_path / "ca.pem")
            mine = ("--tls-cert", tmp_path / "operator.pem", "--tls-key", tmp_path / "operator.key")
            assert answer("status", *there, *ca, *mine)["num_chunks"] == 5
            assert answer("status", *there, *ca, exit_code=1)["error"]["message"]
            assert answer("status", *there, "--insecure", exit_code=1)["error"]["message"]


@contextmanager
def running(folder: Path, *flags: str) -> Iterator[DaemonProcess]:
    daemon = DaemonProcess(folder, *flags)
    try:
        yield daemon
    finally:
        daemon.kill()


def grpc_port(daemon: DaemonProcess) -> int:
    """The port that a daemon told to listen at port 0 says it got."""
    found = re.search(r"event=grpc_listening port=(\d+)", daemon.log.read_text())
    assert found, daemon.log.read_text()
    return int(found[1])


class TestDoctor:
    def test_doctor_says_what_this_machine_has(self, tmp_path: Path) -> None:
        said = answer("doctor", "--socket", tmp_path / "kvd.sock")
        assert said["verdict"] in ("ok", "warn")
        found = {one["name"]: one for one in said["findings"]}
        assert set(found["memory"]) == {"name", "value", "verdict", "advice"}
        assert found["daemon"]["value"] == f"none at {tmp_path}/kvd.sock"

    def test_doctor_finds_the_daemon_and_does_not_disturb_it(self, daemon: DaemonProcess) -> None:
        lines = cli("doctor", "--socket", daemon.socket).stdout.splitlines()
        found = dict(line.split("\t", 1) for line in lines)
        assert f"pid {daemon.pid} " in found["daemon"]
        assert answer("status", "--socket", daemon.socket)["state"] == "serving"

    def test_machine_that_cannot_run_kvd_is_a_failure(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(name: str, flags: int) -> int:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(os, "memfd_create", refuse)
        assert answer("doctor", exit_code=1)["verdict"] == "bad"

    def test_table_shows_on_a_terminal(self, tmp_path: Path) -> None:
        code, text = on_terminal("doctor", "--socket", tmp_path / "kvd.sock")
        assert code == 0
        assert text.split()[:4] == ["what", "verdict", "found", "meaning"]


class TestCompletion:
    @pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
    def test_script_calls_kvd_for_words(self, shell: str) -> None:
        script = cli("completion", shell).stdout
        assert f"_KVD_COMPLETE={shell}_complete" in script
        assert answer("completion", shell) == {"shell": shell, "script": script.removesuffix("\n")}

    def test_words_are_completed(self) -> None:
        env = {**os.environ, "_KVD_COMPLETE": "bash_complete"}
        env |= {"COMP_WORDS": "kvd start --huge-pages ", "COMP_CWORD": "3"}
        output = subprocess.run(KVD, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
        words = [line.partition(",")[2] for line in output.stdout.splitlines()]
        assert words == ["auto", "never", "require"]


class TestTable:
    def test_numbers_stand_to_the_right_and_long_values_fold(self) -> None:
        table = make_table(("a", "b", "c"), [(1, "short", "x" * 50), (22, "s", "y")])
        assert [column.justify for column in table.columns] == ["right", "left", "left"]
        assert [column.no_wrap for column in table.columns] == [True, True, False]

    def test_printable_leaves_text_and_escapes_the_rest(self) -> None:
        assert printable("größer [x]") == "größer [x]"
        assert printable("a\x1b[2J\u202e") == "a\\x1b[2J\\u202e"
