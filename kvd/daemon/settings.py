"""Setting: how one field of the config is read, wherever it stands, and which values it may have.

A reader takes text (flags, variables) or a TOML value. It is idempotent, so it checks finished
values as well, and raises `ValueError` that says what was wanted and what was found.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kvd.proto.address import SOCKET_PATH_SIZE_MAX, parse_address
from kvd.sizes import format_size, parse_size

_TRUE = ("true", "yes", "on", "1")
_FALSE = ("false", "no", "off", "0")

# The longest wait that anyone can mean; what is longer is a mistake in the unit.
SECONDS_MAX = 3600.0


@dataclass(frozen=True, slots=True)
class Setting:
    """What the metadata of a config field says under "setting"."""

    read: Callable[[object], object]
    metavar: str
    help: str
    choices: tuple[str, ...] = ()

    @property
    def is_switch(self) -> bool:
        """Whether its flag takes no value."""
        return self.read is read_switch


def setting(
    read: Callable[[object], object], metavar: str, help: str, *, choices: tuple[str, ...] = ()
) -> dict[str, Setting]:
    """The metadata of a config field."""
    return {"setting": Setting(read, metavar, help, choices)}


def read_text(value: object) -> str:
    """Printable text."""
    if not isinstance(value, str) or not value.isprintable():
        raise ValueError(f"printable text wanted, found {value!r}")
    return value


def read_choice(*choices: str) -> Callable[[object], str]:
    """A reader for one of `choices`."""

    def read(value: object) -> str:
        if not isinstance(value, str) or value not in choices:
            raise ValueError(f"one of {', '.join(choices)} wanted, found {value!r}")
        return value

    return read


def read_names(value: object) -> tuple[str, ...]:
    """Names, as a list or with commas between them; at least one, none twice."""
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, (list, tuple)) or not all(isinstance(part, str) for part in parts):
        raise ValueError(f"names with commas between them wanted, found {value!r}")
    names = tuple(part.strip() for part in parts)
    if not names or not all(names) or len(set(names)) != len(names):
        raise ValueError(f"at least one name and none twice wanted, found {value!r}")
    return names


def read_switch(value: object) -> bool:
    """True or false."""
    if isinstance(value, str) and value.lower() in _TRUE + _FALSE:
        return value.lower() in _TRUE
    if not isinstance(value, bool):
        raise ValueError(f"true or false wanted, found {value!r}")
    return value


def read_seconds(value: object) -> float:
    """Seconds from 0 to an hour."""
    try:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise ValueError
        seconds = float(value)
        if not math.isfinite(seconds) or not 0 <= seconds <= SECONDS_MAX:
            raise ValueError
    except (ValueError, OverflowError):
        raise ValueError(f"seconds in 0..{SECONDS_MAX:.0f} wanted, found {value!r}") from None
    return seconds


def read_count(count_min: int, count_max: int) -> Callable[[object], int]:
    """A reader for a whole number within bounds."""

    def read(value: object) -> int:
        try:
            if isinstance(value, bool) or not isinstance(value, (int, str)):
                raise ValueError
            count = int(value)
            if not count_min <= count <= count_max:
                raise ValueError
        except ValueError:
            raise ValueError(
                f"a whole number in {count_min}..{count_max} wanted, found {value!r}"
            ) from None
        return count

    return read


def read_size(size_min: int) -> Callable[[object], int]:
    """A reader for a size in bytes, with or without a unit, of at least `size_min`."""

    def read(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            raise ValueError(f"a size like 8GiB wanted, found {value!r}")
        size = parse_size(value) if isinstance(value, str) else value
        if size < size_min:
            raise ValueError(f"at least {format_size(size_min)} wanted, found {format_size(size)}")
        return size

    return read


def read_socket(value: object) -> Path:
    """A path that a Unix socket can have."""
    if not isinstance(value, (str, Path)) or not str(value).isprintable() or not str(value):
        raise ValueError(f"a path wanted, found {value!r}")
    size = len(str(value).encode())
    if size > SOCKET_PATH_SIZE_MAX:
        raise ValueError(
            f"a socket's path has at most {SOCKET_PATH_SIZE_MAX} bytes, found {size}: {value}"
        )
    return Path(value)


def read_address(*words: str) -> Callable[[object], str]:
    """A reader for `host:port` or one of `words` that mean something else."""

    def read(value: object) -> str:
        if not isinstance(value, str):
            raise ValueError(f"an address like 127.0.0.1:9471 wanted, found {value!r}")
        if value not in words:
            parse_address(value)
        return value

    return read
