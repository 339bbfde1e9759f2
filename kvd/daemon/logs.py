"""Logs for operators: one line per event, key=value, whatever a value contains.

    log = logging.getLogger("kvd.local")
    log.info("event=session_opened session=%d client=%s", 7, "my engine")

    ts=2026-01-31T12:00:00.123Z level=info event=session_opened session=7 client="my engine"

The template is ours and names the keys; the values may come from clients. The formatter writes each
of them so that it can neither end the line nor pass for another key. Bytes are a chunk's key: eight
hexadecimal digits of it. What libraries log becomes `event=log` with its text as one value.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import traceback
from datetime import UTC, datetime
from logging.handlers import WatchedFileHandler

from kvd.errors import ConfigError

# A value that a client chose must not fill the disk; a traceback is ours and may be longer.
VALUE_LENGTH_MAX = 256
TRACEBACK_LENGTH_MAX = 16384

_KEY_DIGITS = 8
_BARE = re.compile(r"[A-Za-z0-9_./:@+,*%-]+", re.ASCII)


def configure(level: str = "info", file: str = "") -> logging.Handler:
    """Send every log of this process, from `level` on, to standard error or to `file`.

    Replaces what was set before. A file that is renamed away is opened anew, as logrotate expects.
    Raises `ConfigError` where the file cannot be opened.
    """
    try:
        handler = WatchedFileHandler(file) if file else logging.StreamHandler(sys.stderr)
    except OSError as error:
        raise ConfigError(f"log_file: {file}: {error.strerror}") from error
    handler.setFormatter(LineFormatter())
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    root.setLevel(level.upper())
    return handler


class LineFormatter(logging.Formatter):
    """A record as one line. A template that does not fit its values is logged as it is."""

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC)
        stamp = moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03d}Z"
        line = f"ts={stamp} level={record.levelname.lower()} {_event_of(record)}"
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            text = "".join(traceback.format_exception(error))
            line += f" error={quoted(f'{type(error).__name__}: {error}')}"
            line += f" traceback={quoted(text, length_max=TRACEBACK_LENGTH_MAX)}"
        return line


def quoted(text: str, *, length_max: int = VALUE_LENGTH_MAX) -> str:
    """`text` as one value of a line: bare where that is clear, else a JSON string; cut if long."""
    if len(text) > length_max:
        text = text[:length_max] + "…"
    if _BARE.fullmatch(text):
        return text
    # What a terminal would act on is escaped too, not only what JSON must escape.
    return json.dumps(text, ensure_ascii=not text.replace("\n", "").isprintable())


class _Value:
    """An argument that is written as one value, by %s and %r alike."""

    def __init__(self, value: object) -> None:
        self._text = _text_of(value)

    def __str__(self) -> str:
        return quoted(self._text)

    __repr__ = __str__


def _event_of(record: logging.LogRecord) -> str:
    if isinstance(record.msg, str) and record.msg.startswith("event="):
        arguments = record.args if isinstance(record.args, tuple) else ()
        try:
            return record.msg % tuple(map(_as_value, arguments))
        except (TypeError, ValueError, LookupError):
            return f"event=bad_log template={quoted(record.msg)}"
    try:
        message = record.getMessage()
    except (TypeError, ValueError, LookupError):
        message = str(record.msg)
    return f"event=log logger={quoted(record.name)} message={quoted(message)}"


def _as_value(argument: object) -> object:
    # Numbers stay what they are, for %d and %.1f; a bool is a word.
    if isinstance(argument, (int, float)) and not isinstance(argument, bool):
        return argument
    return _Value(argument)


def _text_of(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value).hex()[:_KEY_DIGITS]
    if isinstance(value, (list, tuple, set, frozenset)):
        return ",".join(map(_text_of, value))
    return str(value)
