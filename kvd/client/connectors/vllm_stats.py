"""What the connector tells vLLM's log and Prometheus of itself.

Counters by name, from scheduler and workers alike, sent along with each step's output and summed on
the way. Why a prompt was computed stands in `misses`, by reason.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, defaultdict

# Why KV was computed that might have been loaded.
MISSES = {
    "short": "the prompt is shorter than a block, or than what is worth a load",
    "absent": "nobody stored this prefix, or it was evicted",
    "local": "the engine has as much itself",
    "not_wanted": "the request or the operator wants no load",
    "unavailable": "the daemon is away",
    "slow": "the daemon did not answer in time",
    "lost": "it was found, and gone or damaged when it was loaded",
    "failed": "the load failed otherwise",
}

COUNTERS = {
    "hits": "Prompts of which a part was found and loaded.",
    "hits_in_step": "Those that were loaded layer by layer, by the step that goes on behind them.",
    "hit_tokens": "Tokens that were to be loaded instead of computed.",
    "loads": "Loads that have ended, well or not, on each rank.",
    "loaded_bytes": "Bytes of KV that were loaded.",
    "load_seconds": "Time from the start of loads to their end.",
    "saves": "Steps of requests of which something was to be stored.",
    "saves_failed": "Those that came to nothing.",
    "saves_dropped": "Those that were not begun: the daemon did not follow.",
    "saves_given_up": "Those whose blocks were wanted before they were read.",
    "save_seconds": "Time from the start of saves to their end.",
    "stored_chunks": "Chunks, and parts of chunks, that were stored.",
    "stored_bytes": "Bytes of KV that were stored.",
}

# A reason is told in the log when it first comes up, and then at most so often.
TELL_EVERY_S = 60.0


class Tally:
    """Counts until they are taken; thread-safe."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._lock = threading.Lock()
        self._counts: defaultdict[str, float] = defaultdict(float)
        self._told: dict[str, float] = {}
        self._since: Counter[str] = Counter()

    def add(self, **counts: float) -> None:
        """Add to the counters of these names."""
        with self._lock:
            for name, count in counts.items():
                self._counts[name] += count

    def miss(self, reason: str, request: str, detail: str = "") -> None:
        """A prompt, or the rest of one, is computed for this reason."""
        assert reason in MISSES
        with self._lock:
            self._counts[f"miss_{reason}"] += 1
            self._since[reason] += 1
            now = time.monotonic()
            is_due = now - self._told.get(reason, -TELL_EVERY_S) >= TELL_EVERY_S
            count = self._since[reason]
            if is_due:
                self._told[reason] = now
                self._since[reason] = 0
        if is_due and reason not in ("local", "absent", "short"):
            self._log.warning(
                "event=miss reason=%s meaning=%r request=%s times=%d detail=%r",
                reason,
                MISSES[reason],
                request,
                count,
                detail,
            )
        else:
            self._log.debug("event=miss reason=%s request=%s detail=%r", reason, request, detail)

    def take(self) -> dict[str, float]:
        """What was counted since the last time."""
        with self._lock:
            counts, self._counts = self._counts, defaultdict(float)
        return dict(counts)


def merged(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    """The sums."""
    return {name: one.get(name, 0) + other.get(name, 0) for name in one | other}
