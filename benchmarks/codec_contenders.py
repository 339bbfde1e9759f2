"""What is compared: our codecs as an operator names them, through real bitstreams, and published
ones as functions of KV (codec_peers.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.codec_peers import kivi, lmcache_cachegen, turboquant
from kvd.codecs.base import WHOLE, Bytes, Codec, Part, Span
from kvd.codecs.registry import open_codec
from kvd.layout import KVLayout

if TYPE_CHECKING:
    from benchmarks.codec_judge import Restore
    from kvd.client.calibration.subject import Floats

PLAIN = "plain"
NO_TRANSFORM = "kvq"
TRANSFORM = "kvq, transform"
PUBLISHED = "published"
LMCACHE = "cachegen, LMCache"
LOSSLESS = "bf16"


class Stopwatch:
    """A codec that notes the CPU time of each of its calls, all threads together."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self.name = codec.name
        self.is_exact = codec.is_exact
        self.encode_rates: list[float] = []
        self.decode_rates: list[float] = []

    def size_bytes_max(self, layout: KVLayout, num_tokens: int) -> int:
        return self._codec.size_bytes_max(layout, num_tokens)

    def encode(self, kv: Bytes, layout: KVLayout, span: Span, out: Bytes) -> int:
        started = time.process_time_ns()
        written = self._codec.encode(kv, layout, span, out)
        self.encode_rates.append(kv.size / max(1, time.process_time_ns() - started))
        return written

    def decode(
        self, bitstream: Bytes, layout: KVLayout, span: Span, out: Bytes, part: Part = WHOLE
    ) -> None:
        started = time.process_time_ns()
        self._codec.decode(bitstream, layout, span, out, part)
        self.decode_rates.append(out.size / max(1, time.process_time_ns() - started))


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """A codec under a name. `stopwatch` is there for codecs with bitstreams: bytes a nanosecond of
    CPU are GB/s of a core.
    """

    name: str
    group: str
    restore: Restore
    stopwatch: Stopwatch | None = field(default=None)

    @property
    def encode_gbps(self) -> float | None:
        return _median(self.stopwatch.encode_rates) if self.stopwatch else None

    @property
    def decode_gbps(self) -> float | None:
        return _median(self.stopwatch.decode_rates) if self.stopwatch else None


class Shelf:
    """Profiles of one model, as codecs ask for them."""

    def __init__(self, profile: Any) -> None:
        self._profile = profile

    def for_layout(self, layout: KVLayout) -> Any:
        return self._profile

    def by_hash(self, profile_hash: bytes) -> Any:
        return self._profile if profile_hash == self._profile.hash else None


def contenders(layout: KVLayout, profile: Any, levels: Sequence[str]) -> list[Contender]:
    """What every run compares: int8, those `levels` of kvq that the profile has, LMCache's."""
    known = {level.name: level for level in profile.levels}
    found = [coded("int8", PLAIN, layout)]
    for name in levels:
        if name in known:
            group = NO_TRANSFORM if known[name].transform == "none" else TRANSFORM
            found.append(coded(f"kvq:{name}", group, layout, Shelf(profile)))
    return [*found, _published(LMCACHE, lmcache_cachegen)]


def more_contenders(layout: KVLayout, cachegen: Any) -> list[Contender]:
    """The others; `cachegen` is a profile of the paper's."""
    return [
        coded("fp8", PLAIN, layout),
        coded("cachegen", PUBLISHED, layout, Shelf(cachegen)),
        _published("KIVI, 4 bit", partial(kivi, num_bits=4)),
        _published("TurboQuant, 4 bit", partial(turboquant, num_bits=4)),
    ]


def coded(spec: str, group: str, layout: KVLayout, profiles: Any = None) -> Contender:
    """A codec of ours, through its bitstreams."""
    from kvd.client.calibration.gate import through

    stopwatch = Stopwatch(open_codec(spec, profiles))

    def restore(kv: Floats) -> tuple[Floats, float]:
        return through(stopwatch, kv, layout)

    return Contender(name=spec, group=group, restore=restore, stopwatch=stopwatch)


def _published(name: str, restore: Callable[[Floats], tuple[Floats, float]]) -> Contender:
    return Contender(name=name, group=PUBLISHED, restore=restore)


def _median(rates: Sequence[float]) -> float | None:
    # The first call compiles.
    return float(np.median(rates[1:])) if len(rates) > 1 else None
