"""Sizes in bytes, as people write and read them: `8GiB`, `1.5 GiB`, `512MiB`, `2GB`."""

from __future__ import annotations

import re

_BINARY = ("KiB", "MiB", "GiB", "TiB", "PiB")
_DECIMAL = ("KB", "MB", "GB", "TB", "PB")

# Units by their lower-case names. `8Gi` is how Kubernetes writes it; a bare `8G` is binary to some
# people and decimal to others, so it is neither here.
_UNITS: dict[str, int] = {"": 1, "b": 1}
for _power, (_two, _ten) in enumerate(zip(_BINARY, _DECIMAL, strict=True), start=1):
    _UNITS[_two.lower()] = _UNITS[_two[:2].lower()] = 1024**_power
    _UNITS[_ten.lower()] = 1000**_power

# Thirty digits are more than any machine has bytes, and a longer text is refused at once.
_SIZE = re.compile(r"\s*([0-9]{1,30})(?:\.([0-9]{1,30}))?\s*([A-Za-z]*)\s*", re.ASCII)


def parse_size(text: str) -> int:
    """Bytes of a size with or without a unit, exactly; a fraction of a byte is cut off.

    Raises `ValueError` that says what would be a size.
    """
    match = _SIZE.fullmatch(text)
    factor = _UNITS.get(match[3].lower()) if match else None
    if match is None or factor is None or (match[2] and factor == 1):
        raise ValueError(f"a size like 8GiB, 1.5GiB, 512MiB or 2GB wanted, found {text!r}")
    whole, fraction = match[1], match[2] or ""
    return int(whole + fraction) * factor // int(10 ** len(fraction))


def format_size(size: int) -> str:
    """`size` in the largest binary unit that leaves 1 or more, to two decimals: `1.5 GiB`."""
    value, unit = float(size), "B"
    for larger in _BINARY:
        if round(value, 2) < 1024:
            break
        value, unit = value / 1024, larger
    return f"{round(value, 2):.2f}".rstrip("0").rstrip(".") + f" {unit}"


def format_share(part: int, whole: int) -> str:
    """`part` of `whole` bytes with its share: `1 GiB of 4 GiB (25 %)`."""
    share = 100 * part / whole if whole else 0.0
    return f"{format_size(part)} of {format_size(whole)} ({share:.0f} %)"
