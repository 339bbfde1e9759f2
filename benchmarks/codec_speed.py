"""How fast a core encodes and decodes a chunk, by codec, level and shape.

    python benchmarks/codec_speed.py [--quick] [--json FILE]

On the back of an envelope: `kvq` decodes 32 symbols in about 60 cycles, and touches each element in
five more loops of vectors: 3 cycles an element, 2 GB/s of 16-bit elements at 3 GHz. Behind a
transform of C channels come 2 C operations an element: at 100 GFLOP/s and 256 channels 5 ns, which
is 0.4 GB/s whatever else is done. `bf16` looks symbols up four at a time: 1 ns an element, 2 GB/s.
Two threads have a chunk each and share nothing: twice as fast, as far as a loop is that does no
more than multiply (codec_two_cores.py).

CPU time of this process, one thread, beside a memcpy of the chunk in the same round. Chunks are
made here, no model is run: channels of scales over a decade, a few with large means, keys rotated,
every fourth token worth a finer step. `entropy` is symbols out of words and no more.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.codec_entropy import entropy_decoder
from benchmarks.codec_two_cores import Task, two_cores
from benchmarks.common import (
    Figure,
    Row,
    arguments,
    console_for,
    interleave,
    median_of,
    print_figures,
    print_rows,
    progress_bar,
    significant,
    write_json,
)
from kvd.codecs.attention_score import token_classes
from kvd.codecs.base import Bytes, Codec, Span
from kvd.codecs.bf16 import Bf16
from kvd.codecs.kvq import Kvq
from kvd.codecs.profile import Level, Profile, Rope, canonical
from kvd.codecs.rope import rotate, rotation
from kvd.layout import KVLayout

NUM_TOKENS = 256
START = 1024
ROUNDS, ROUNDS_QUICK = 31, 5

# Rounds of what takes as long as six chunks and one.
ROUNDS_CORES, ROUNDS_CORES_QUICK = 15, 5

# Layers, heads and dims; few layers of a large model are as good as all.
SHAPES = {"smollm2": (30, 3, 64), "qwen": (24, 2, 64), "llama-8b": (8, 8, 128)}
SHAPES_TRANSFORMED = {"smollm2": (10, 3, 64), "llama-8b": (2, 8, 128)}

LEVELS = (
    Level(name="none", scale=1.0),
    Level(name="dithered", scale=1.0, is_dithered=True),
    Level(name="classes", scale=1.0),
    Level(name="head", scale=2.0, transform="head"),
    Level(name="head dithered", scale=2.0, transform="head", is_dithered=True),
)
# GB/s of a core, by codec, level, shape and operation.
TARGETS = {
    ("kvq", "none", "smollm2", "decode"): 0.55,
    ("kvq", "none", "llama-8b", "decode"): 0.55,
    ("kvq", "none", "smollm2", "encode"): 0.4,
    ("kvq", "none", "llama-8b", "encode"): 0.4,
    ("kvq", "classes", "smollm2", "encode"): 0.3,
    ("kvq", "classes", "llama-8b", "encode"): 0.3,
    ("kvq", "head", "smollm2", "encode"): 0.3,
    ("kvq", "head", "llama-8b", "encode"): 0.3,
    ("kvq", "head", "llama-8b", "decode"): 0.35,
    ("kvq", "entropy", "smollm2", "decode"): 0.8,
    ("bf16", "-", "smollm2", "decode"): 1.5,
    ("bf16", "-", "llama-8b", "decode"): 1.5,
    ("bf16", "-", "qwen", "decode"): 1.5,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One codec at one level and one shape."""

    codec: str
    level: str
    shape: str
    layout: KVLayout
    chunk: Bytes
    profile: Profile
    coder: Codec

    @property
    def span(self) -> Span:
        return Span(start=START, num_tokens=NUM_TOKENS)


class OneProfile:
    """A book of one profile."""

    def __init__(self, profile: Profile) -> None:
        self._profile = profile

    def for_layout(self, layout: KVLayout) -> Profile:
        return self._profile

    def by_hash(self, hash: bytes) -> Profile:
        return self._profile


def main() -> None:
    args = arguments(__doc__ or "").parse_args()
    console = console_for(args.json)
    rounds = ROUNDS_QUICK if args.quick else ROUNDS
    keep_products_to_one_thread()
    cases = [case for shape in SHAPES for case in cases_of(shape)]
    rows: list[Row] = []
    figures: list[Figure] = []
    with progress_bar("codecs", len(cases)) as tick:
        for case in cases:
            found, aims = measured(case, rounds)
            rows += found
            figures += aims
            tick()
    pairs = two_cores(tasks_of("smollm2"), ROUNDS_CORES_QUICK if args.quick else ROUNDS_CORES)
    two_rows, two_figures = pairs
    print_rows(console, "A core's speed", rows)
    print_rows(console, "Two cores' speed", two_rows)
    print_figures(console, figures + two_figures)
    write_json(args.json, "codec_speed", figures + two_figures, rows + two_rows)


def keep_products_to_one_thread() -> None:
    """As the daemon does (daemon/coder.py)."""
    with suppress(ImportError):
        from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

        threadpool_limits(1, user_api="blas")


def cases_of(shape: str) -> list[Case]:
    found = [case_of("bf16", "-", shape)]
    found += [case_of("kvq", level, shape) for level in ("none", "dithered", "classes")]
    if shape in SHAPES_TRANSFORMED:
        found += [case_of("kvq", level, shape) for level in ("head", "head dithered")]
    return found


def case_of(codec: str, level: str, shape: str) -> Case:
    is_transformed = level.startswith("head")
    dims = (SHAPES_TRANSFORMED if is_transformed else SHAPES)[shape]
    layout, chunk, profile = chunk_of(*dims, with_basis=is_transformed)
    coder: Codec = Bf16()
    if codec == "kvq":
        classes = token_classes if level == "classes" else None
        coder = Kvq(level, OneProfile(profile), token_classes=classes)
    return Case(
        codec=codec,
        level=level,
        shape=shape,
        layout=layout,
        chunk=chunk,
        profile=profile,
        coder=coder,
    )


def tasks_of(shape: str) -> list[Task]:
    """What two threads do side by side."""
    cases = {
        "bf16": case_of("bf16", "-", shape),
        "kvq": case_of("kvq", "none", shape),
        "kvq_classes": case_of("kvq", "classes", shape),
    }
    return [
        Task(
            codec=name,
            coder=case.coder,
            layout=case.layout,
            chunk=case.chunk,
            span=case.span,
            operations=("encode", "decode"),
        )
        for name, case in cases.items()
    ]


def measured(case: Case, rounds: int) -> tuple[list[Row], list[Figure]]:
    """Rows and figures of a case, a row for each operation."""
    out = np.empty(case.coder.size_bytes_max(case.layout, NUM_TOKENS), np.uint8)
    size = case.coder.encode(case.chunk, case.layout, case.span, out)
    bitstream, target = out[:size].copy(), np.zeros_like(case.chunk)

    def encode() -> None:
        case.coder.encode(case.chunk, case.layout, case.span, out)

    def decode() -> None:
        case.coder.decode(bitstream, case.layout, case.span, target)

    def copy() -> None:
        np.copyto(target, case.chunk)

    work: dict[str, Callable[[], None]] = {"encode": encode, "decode": decode, "memcpy": copy}
    if (case.codec, case.level) == ("kvq", "none"):
        work["entropy"] = entropy_decoder(bitstream, case.layout, case.span, case.profile)
    for function in work.values():
        function()
    times = interleave([seconds_of(function) for function in work.values()], rounds)
    rates = dict(
        zip(work, ([case.chunk.size / 1e9 / t for t in one] for one in times), strict=True)
    )
    rows, figures = [], []
    for name in [name for name in work if name != "memcpy"]:
        level, operation = ("entropy", "decode") if name == "entropy" else (case.level, name)
        rows.append(row_of(case, level, operation, rates[name], rates["memcpy"], size))
        key = (case.codec, level, case.shape, operation)
        if key in TARGETS:
            figures.append(
                Figure.of(
                    "_".join(part for part in key if part != "-"),
                    median_of(rates[name]),
                    target=TARGETS[key],
                    at_least=True,
                    unit="GB/s",
                )
            )
    return rows, figures


def row_of(
    case: Case, level: str, operation: str, rates: list[float], copies: list[float], size: int
) -> Row:
    rate = median_of(rates)
    return {
        "codec": case.codec,
        "level": level,
        "shape": case.shape,
        "operation": operation,
        "bits_a_value": significant(16 * size / case.chunk.size, 3),
        "GB_per_s": significant(rate.value, 3),
        "CPU_s_per_GB": significant(1 / rate.value, 3),
        "memcpy_GB_per_s": significant(median_of(copies).value, 3),
        "samples": rate.samples,
    }


def seconds_of(function: Callable[[], None]) -> Callable[[], float]:
    """CPU time of a call."""

    def measure() -> float:
        before = time.process_time_ns()
        function()
        return max(time.process_time_ns() - before, 1) / 1e9

    return measure


def chunk_of(
    layers: int, heads: int, dim: int, *, with_basis: bool = False
) -> tuple[KVLayout, Bytes, Profile]:
    """A chunk and the profile that fits it."""
    random = np.random.default_rng(dim)
    layout = KVLayout(
        model="synthetic",
        revision="1",
        dtype="bfloat16",
        num_layers=layers,
        num_planes=2,
        num_kv_heads=heads,
        head_dim=dim,
    )
    shape = (layers, 2, heads, dim)
    scales = np.exp(random.normal(0, 0.6, shape)).astype(np.float32)
    has_mean = random.random(shape) < 0.1
    means = (6 * random.normal(size=shape) * scales * has_mean).astype(np.float32)
    rope = Rope(frequencies=10_000.0 ** (-2 * np.arange(dim // 2) / dim))
    profile = Profile(
        hash=b"synthetic".ljust(32, b"\0"),
        layout=canonical(layout),
        rope=rope,
        means=means,
        steps=(scales * random.choice([0.4, 0.8], shape)).astype(np.float32),
        levels=LEVELS,
        bases={"head": bases_of(random, (layers, heads, 2 * dim))} if with_basis else {},
        scores=scores_of(random, means[:, 0], scales[:, 0]),
    )
    return layout, bytes_of(random, layout, profile, scales), profile


def scores_of(
    random: np.random.Generator, means: NDArray[np.float32], scales: NDArray[np.float32]
) -> NDArray[np.float32]:
    """A quarter of the tokens is of class 1 or 2, 3 % are of class 2: float32 [layers, heads, dim +
    1], where keys have such means and scales.
    """
    weights = random.normal(size=means.shape)
    weights *= 0.843 / np.linalg.norm(weights, axis=-1, keepdims=True) / scales
    constants = -0.068 - (weights * means).sum(-1, keepdims=True)
    return np.concatenate([weights, constants], axis=-1).astype(np.float32)


def bytes_of(
    random: np.random.Generator, layout: KVLayout, profile: Profile, scales: NDArray[np.float32]
) -> Bytes:
    """Numbers around the profile's means, keys rotated, rounded to bfloat16."""
    numbers = random.normal(size=layout.shape(NUM_TOKENS)).astype(np.float32)
    numbers = numbers * scales[:, :, None] + profile.means[:, :, None]
    by = rotation(profile.rope, Span(start=START, num_tokens=NUM_TOKENS))
    for keys in numbers[:, 0]:
        keys[:] = rotate(keys, by)
    bits = numbers.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return rounded.astype(np.uint16).reshape(-1).view(np.uint8)


def bases_of(random: np.random.Generator, shape: Sequence[int]) -> NDArray[np.float32]:
    """Orthonormal, no two alike: float32 [layers, heads, channels, channels]."""
    layers, heads, channels = shape
    drawn = random.normal(size=(layers, heads, channels, channels))
    return np.linalg.qr(drawn)[0].astype(np.float32)


if __name__ == "__main__":
    main()
