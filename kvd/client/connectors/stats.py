"""What a connector has done, in numbers."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from kvd.errors import KvdError


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """A connector's counters at one moment, since it was attached.

    `requests` are calls that kvd served; those it left alone are in `bypassed`, by reason.
    `failures` are loads and stores that came to nothing, by operation and error code, as in
    "load:unavailable": what was to be loaded was computed. `stores_dropped` are stores that were
    given up because the ones before them had not ended. Sizes are bytes.
    """

    requests: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    loaded_size: int = 0
    stored_chunks: int = 0
    stored_size: int = 0
    stores_dropped: int = 0
    load_s: float = 0.0
    store_s: float = 0.0
    bypassed: Mapping[str, int] = field(default_factory=dict)
    failures: Mapping[str, int] = field(default_factory=dict)


class Recorder:
    """Counts for `Stats`; thread-safe. The first failure of each kind is a warning in the log."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._seconds = {"load_s": 0.0, "store_s": 0.0}
        self._bypassed: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()

    def add(self, *, load_s: float = 0.0, store_s: float = 0.0, **counts: int) -> None:
        """Add to the counters of these names."""
        with self._lock:
            self._counts.update(counts)
            self._seconds["load_s"] += load_s
            self._seconds["store_s"] += store_s

    def bypass(self, reason: str) -> None:
        """A call was left alone."""
        with self._lock:
            self._bypassed[reason] += 1

    def fail(self, operation: str, error: Exception) -> None:
        """A load or store came to nothing."""
        code = error.code if isinstance(error, KvdError) else "internal"
        with self._lock:
            self._failures[f"{operation}:{code}"] += 1
            is_first = self._failures[f"{operation}:{code}"] == 1
        level = logging.WARNING if is_first else logging.DEBUG
        self._log.log(level, "event=%s_failed reason=%s error=%r", operation, code, str(error))

    def snapshot(self) -> Stats:
        """The counters as they are now."""
        with self._lock:
            return Stats(
                **self._counts,
                load_s=self._seconds["load_s"],
                store_s=self._seconds["store_s"],
                bypassed=MappingProxyType(dict(self._bypassed)),
                failures=MappingProxyType(dict(self._failures)),
            )
