"""What the connector of an engine counted, and how many chunks it should have stored."""

from __future__ import annotations

from collections import Counter

from tests.vllm.harness import Engine

CHUNK_TOKENS = 256

_PREFIX = "kvd_vllm_"


def counts(engine: Engine) -> Counter[str]:
    """The connector's counters by name, over all ranks; misses as `miss_REASON`.

    What ended after the engine's last step comes with its next one.
    """
    assert engine.settle()
    found: Counter[str] = Counter()
    for series, value in engine.metrics(_PREFIX).items():
        name, _, labels = series.removeprefix(_PREFIX).partition("{")
        if name.endswith("_total"):
            reason = dict(label.split("=", 1) for label in labels[:-1].split(",")).get("reason")
            found[f"miss_{reason}" if reason else name.removesuffix("_total")] += int(value)
    return found


class Since:
    """What was counted since this was made."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._before = counts(engine)

    def __call__(self) -> Counter[str]:
        # Unlike `-`, this would show a counter that went back.
        now = counts(self._engine)
        now.subtract(self._before)
        return now


def num_pieces(num_tokens: int, *, block_size: int = 32, chunk_tokens: int = CHUNK_TOKENS) -> int:
    """Chunks that a prompt is stored as: whole ones, and its last whole blocks."""
    whole, left = divmod(num_tokens, chunk_tokens)
    return whole + (left >= block_size)


def hit_tokens(num_tokens: int, *, block_size: int = 32) -> int:
    """Tokens of a stored prompt that are loaded: whole blocks."""
    return num_tokens // block_size * block_size
