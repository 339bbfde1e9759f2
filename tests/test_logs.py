"""A log line is one event, whatever its values contain."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvd.daemon import logs
from kvd.daemon.logs import TRACEBACK_LENGTH_MAX, VALUE_LENGTH_MAX, LineFormatter, quoted
from kvd.errors import ConfigError

PAIR = re.compile(r'([a-z_]+)=("(?:[^"\\]|\\.)*"|[^ "=]+)(?: |$)')


def parse(line: str) -> dict[str, str]:
    """A line's pairs, as a reader of key=value logs finds them; nothing may be left over."""
    assert PAIR.sub("", line) == "", line
    return {
        key: json.loads(value) if value.startswith('"') else value
        for key, value in PAIR.findall(line)
    }


def line_of(template: object, *values: object, level: int = logging.INFO, name: str = "kvd") -> str:
    record = logging.LogRecord(name, level, "", 0, template, values, None)
    record.created = 1769860800.1239
    return LineFormatter().format(record)


@pytest.fixture
def untouched_root() -> Iterator[None]:
    """The root logger, as it was, after the test."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    for handler in handlers:
        root.removeHandler(handler)
    yield
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    for handler in handlers:
        root.addHandler(handler)
    root.setLevel(level)


def test_line_is_time_level_event_and_pairs() -> None:
    line = line_of("event=ready socket=%s size=%d seconds=%.1f", Path("/run/kvd.sock"), 64, 0.25)
    assert line == (
        "ts=2026-01-31T12:00:00.123Z level=info event=ready "
        "socket=/run/kvd.sock size=64 seconds=0.2"
    )


def test_key_is_eight_digits_and_keys_are_a_list() -> None:
    line = line_of("event=evicted key=%s keys=%s", bytes(range(32)), [b"\xff" * 32, b"\x00" * 32])
    assert parse(line)["key"] == "00010203"
    assert parse(line)["keys"] == "ffffffff,00000000"


@pytest.mark.parametrize("conversion", ["%s", "%r"])
def test_value_is_quoted_only_where_needed(conversion: str) -> None:
    template = f"event=x value={conversion}"
    assert line_of(template, "vllm-0.10/worker:3").endswith(" value=vllm-0.10/worker:3")
    assert line_of(template, "my engine").endswith(' value="my engine"')
    assert line_of(template, "").endswith(' value=""')
    assert line_of(template, True).endswith(" value=true")
    assert line_of(template, None).endswith(" value=None")
    assert line_of(template, OSError(2, "gone")).endswith(' value="[Errno 2] gone"')


@given(st.text(max_size=VALUE_LENGTH_MAX))
def test_no_value_ends_the_line_or_passes_for_another_key(value: str) -> None:
    line = line_of("event=session_opened client=%s session=%d", value, 7)
    assert line.isprintable()
    pairs = parse(line)
    assert list(pairs) == ["ts", "level", "event", "client", "session"]
    assert pairs["client"] == value


def test_what_a_terminal_acts_on_is_escaped() -> None:
    assert quoted("\x1b[2J\x9b\x7f\u202e") == '"\\u001b[2J\\u009b\\u007f\\u202e"'
    assert quoted("größer") == '"größer"'


def test_long_value_is_cut() -> None:
    assert len(parse(line_of("event=x client=%s", "a" * 10_000))["client"]) == VALUE_LENGTH_MAX + 1


def test_percent_in_a_value_is_no_conversion() -> None:
    assert parse(line_of("event=x client=%s", "100%d%s"))["client"] == "100%d%s"


def test_library_message_is_one_value() -> None:
    line = line_of("lost %s\nevent=ready", "it", name="asyncio", level=logging.WARNING)
    assert parse(line)["event"] == "log"
    assert parse(line)["level"] == "warning"
    assert parse(line)["logger"] == "asyncio"
    assert parse(line)["message"] == "lost it\nevent=ready"
    assert "\n" not in line


def test_template_that_does_not_fit_is_logged_as_it_is() -> None:
    assert parse(line_of("event=x size=%d", "many"))["template"] == "event=x size=%d"
    assert parse(line_of("event=x a=%s b=%s", 1))["event"] == "bad_log"
    assert parse(line_of("%d apples", "many"))["message"] == "%d apples"


def test_exception_stays_on_the_line() -> None:
    try:
        raise ValueError("bad\nthing")
    except ValueError as error:
        record = logging.LogRecord("kvd", logging.ERROR, "", 0, "event=request_failed", (), None)
        record.exc_info = (type(error), error, error.__traceback__)
    line = LineFormatter().format(record)
    assert "\n" not in line
    assert parse(line)["error"] == "ValueError: bad\nthing"
    assert "test_logs.py" in parse(line)["traceback"]
    assert len(line) < TRACEBACK_LENGTH_MAX


@pytest.mark.usefixtures("untouched_root")
class TestConfigure:
    def test_logs_go_to_standard_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        stream = io.StringIO()
        monkeypatch.setattr("sys.stderr", stream)
        logs.configure("info")
        logging.getLogger("kvd.any").info("event=ready pid=%d", 7)
        logging.getLogger("kvd.any").debug("event=unheard")
        assert [parse(line)["event"] for line in stream.getvalue().splitlines()] == ["ready"]

    def test_logs_go_to_a_file_and_to_a_new_one_after_a_rotation(self, tmp_path: Path) -> None:
        file = tmp_path / "kvd.log"
        logs.configure("debug", str(file))
        log = logging.getLogger("kvd.any")
        log.debug("event=first")
        file.rename(tmp_path / "kvd.log.1")
        log.debug("event=second")
        assert parse((tmp_path / "kvd.log.1").read_text().strip())["event"] == "first"
        assert parse(file.read_text().strip())["event"] == "second"

    def test_twice_is_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        stream = io.StringIO()
        monkeypatch.setattr("sys.stderr", stream)
        logs.configure("info")
        logs.configure("info")
        logging.getLogger("kvd.any").info("event=ready")
        assert stream.getvalue().count("event=ready") == 1

    def test_file_that_cannot_be_opened_is_an_error_that_names_it(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"log_file: .*no/kvd.log: No such file"):
            logs.configure("info", str(tmp_path / "no/kvd.log"))
