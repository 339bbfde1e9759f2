"""Places in an engine's process where a test lets a thread wait, to do something meanwhile.

    engine's process: install(folder), by `KVD_TEST_HOLDS`, in `engine_main.py`
    test:             with held(folder, "load") as hold:
                          engine.ask(...)
                          hold.until_reached()
                          ...

A file of the place's name in the folder says that whoever comes there waits until it is gone.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

SETTING = "KVD_TEST_HOLDS"
# A test that died lets nobody wait for ever.
HOLD_S_MAX = 120.0
LOOK_EVERY_S = 0.01

# Where: (module, class, method), and whether it is before or after the call.
PLACES = {
    # A hit was found and pinned, its load has not begun.
    "load": ("kvd.client.connectors.vllm_loads", "Loads", "start", "before"),
    # A piece of several has been loaded.
    "scatter": ("kvd.client.connectors.vllm_pages", "Pages", "scatter", "after"),
    # The same of a layer, in a step that loads.
    "layer": ("kvd.client.connectors.vllm_step", "Progress", "layer_written", "after"),
    # A save has been begun, and has read nothing.
    "reserve": ("kvd.client.connectors.late_client", "LateClient", "reserve", "before"),
    # A piece of several has been read.
    "gather": ("kvd.client.connectors.vllm_pages", "Pages", "gather", "after"),
    # All was written and nothing committed.
    "commit": ("kvd.client.lease", "Reservation", "commit", "before"),
}


class Hold:
    """One place that is held."""

    def __init__(self, folder: Path, place: str) -> None:
        assert place in PLACES
        self.file = folder / place
        self.reached = folder / f"{place}.reached"

    def until_reached(self) -> None:
        """Return when somebody waits there."""
        give_up = time.monotonic() + HOLD_S_MAX
        while not self.reached.exists():
            assert time.monotonic() < give_up, f"nobody comes to {self.file.name}"
            time.sleep(LOOK_EVERY_S)


@contextmanager
def held(folder: Path, place: str) -> Iterator[Hold]:
    """Whoever comes to `place` waits until the end of the block."""
    hold = Hold(folder, place)
    hold.reached.unlink(missing_ok=True)
    hold.file.touch()
    try:
        yield hold
    finally:
        hold.file.unlink()


def install(folder: Path) -> None:
    """Put all places into this process."""
    for place, (module, kind, method, when) in PLACES.items():
        found = getattr(importlib.import_module(module), kind)
        setattr(found, method, _waiting(getattr(found, method), Hold(folder, place), when))


def _waiting(method: Any, hold: Hold, when: str) -> Any:
    @wraps(method)
    def waiting(self: Any, *args: Any, **options: Any) -> Any:
        # A step without loads comes there as well.
        has_work = bool(args and len(args[0])) if hold.file.name == "load" else True
        if when == "before" and has_work:
            _wait(hold)
        result = method(self, *args, **options)
        if when == "after" and has_work:
            _wait(hold)
        return result

    return waiting


def _wait(hold: Hold) -> None:
    give_up = time.monotonic() + HOLD_S_MAX
    while hold.file.exists() and time.monotonic() < give_up:
        hold.reached.touch()
        time.sleep(LOOK_EVERY_S)
