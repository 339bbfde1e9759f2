"""How fast is kvq/1 on a GPU, by level, beside a copy within its memory?

A Llama-8B: 32 layers, 8 heads x 128, 16 chunks of 256 tokens, 512 MiB of bfloat16, of which
Gauss noise takes 3 bits an element. The answer on the back of an envelope, for an H100 (132
multiprocessors of 1.7 GHz, 4 instructions a cycle each, 3.35 TB/s):

    decode      4,096 sections are 4,096 warps, 31 a multiprocessor. A step is 84 instructions for
                32 symbols: 650 cycles for all 31, longer than the wait of one (some 350), so that
                instructions are the bound: 680 GB/s. Symbols are zeroed, written and read, elements
                written, words read: 8.4 bytes for 2, 800 GB/s. One after the other: 370 GB/s.
    one chunk   256 sections are 2 warps a multiprocessor: 2,048 steps of 350 cycles, 80 GB/s.
    encode      symbols are read four times and written once, words written: 13 bytes for 2,
                500 GB/s; the tables' costs, 256 bytes an element in L1 (29 TB/s): 220 GB/s; a
                coder's step 110 instructions with its division: 500 GB/s. Together: 110 GB/s.
    transforms  2 FLOP for each channel of a section: 512 an element by head, 4,096 by layer, 16,384
                across 4 layers; of 60 TFLOP/s in float32, half: 120, 15 and 4 GB/s more to wait.
    whole call  the host adds checksums (3 bits of 16, 12 GB/s: 60 GB/s), what Python does for a
                section (5 us: 25 GB/s), and the copy to the device (25 GB/s: 130 GB/s): 15 GB/s. To
                encode it packs sections (60 us each): 2 GB/s.

GB/s are bytes of bfloat16 by seconds, between CUDA events, warm. `same` says whether bytes and bits
of a chunk are those of the CPU's kernels; with a transform they may be an ulp apart.

    python benchmarks/codecs_gpu.py [--quick] [--json FILE]
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import (
    Figure,
    Row,
    arguments,
    console_for,
    host_facts,
    interleave,
    median_of,
    print_figures,
    print_rows,
    progress_bar,
    write_json,
)
from kvd.codecs import gpu
from kvd.codecs.base import Span
from kvd.codecs.kvq import Kvq
from kvd.codecs.profile import Level, Profile, Rope, canonical
from kvd.errors import Unsupported
from kvd.layout import KVLayout

# The least that is worth having: decoding at an H100's link to its host, several times over.
TARGETS = {"decode": 150.0, "encode": 50.0, "decode_call": 10.0, "encode_call": 1.0}
WARM_ROUNDS = 3
# Steps of half a deviation: 3 bits.
STEP = 0.5
ROPE_BASE = 500_000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """What is measured. The default is a Llama-8B."""

    num_layers: int = 32
    num_heads: int = 8
    dim: int = 128
    num_tokens: int = 256
    num_chunks: int = 16
    rounds: int = 30
    levels: tuple[str, ...] = ("none", "dithered", "head", "layer", "cross")


QUICK = Scale(num_chunks=4, rounds=8, levels=("none", "dithered", "head"))

LEVELS = (
    Level(name="none", scale=1.0),
    Level(name="dithered", scale=1.0, is_dithered=True),
    Level(name="head", scale=1.0, transform="head"),
    Level(name="layer", scale=1.0, transform="layer"),
    Level(name="cross", scale=1.0, transform="cross", section_layers=4),
)


def main(arguments_given: Sequence[str] | None = None) -> int:
    """Measure, print the tables, write the JSON. Without a GPU it says so."""
    options = arguments(__doc__ or "").parse_args(arguments_given)
    console = console_for(options.json)
    console.print(" | ".join(f"{name} {value}" for name, value in host_facts().items()))
    reason = missing()
    figures: list[Figure] = []
    rows: list[Row] = []
    if reason is None:
        figures, rows = measure("cuda", QUICK if options.quick else Scale())
    else:
        figures = [
            Figure.missing(figure_name(verb), reason, target=target, at_least=True, unit="GB/s")
            for verb, target in TARGETS.items()
        ]
    print_rows(console, "kvq/1 on a GPU, GB/s of bfloat16", rows)
    print_figures(console, figures)
    write_json(options.json, "codecs_gpu", figures, rows)
    return 0


def missing() -> str | None:
    """Why nothing can be measured here."""
    try:
        import torch
        import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
    except ImportError as error:
        return str(error)
    if not torch.cuda.is_available():
        return f"no CUDA device (triton {triton.__version__})"
    return None


def measure(device: str, scale: Scale) -> tuple[list[Figure], list[Row]]:
    """Figures and the table, a row a level."""
    figures: list[Figure] = []
    rows: list[Row] = []
    for level in scale.levels:
        samples, is_same = measure_level(device, scale, level)
        row: dict[str, object] = {"level": level, "same": is_same}
        for name, values in samples.items():
            row[name] = median_of(values).value
        rows.append(row)
        if level == "none":
            figures += [
                Figure.of(
                    figure_name(verb),
                    median_of(samples[verb]),
                    target=target,
                    at_least=True,
                    unit="GB/s",
                )
                for verb, target in TARGETS.items()
            ]
    return figures, rows


def figure_name(verb: str) -> str:
    """The figure of a verb, of the level without a transform."""
    return f"kvq_gpu_{verb}_gbps"


def measure_level(device: str, scale: Scale, level: str) -> tuple[dict[str, list[float]], bool]:
    """GB/s of each thing by round; whether a chunk's bytes and bits are the CPU's."""
    import torch

    layout = layout_of(scale)
    book = Book(layout, level)
    spans = [
        Span(start=index * scale.num_tokens, num_tokens=scale.num_tokens)
        for index in range(scale.num_chunks)
    ]
    shape = (scale.num_chunks, *layout.shape(scale.num_tokens))
    torch.manual_seed(1)
    chunks = torch.randn(shape, device=device, dtype=torch.float32).to(torch.bfloat16)
    out, other = torch.zeros_like(chunks), torch.empty_like(chunks)
    bitstreams = gpu.encode_on_device(chunks, layout, spans, book, level)
    (decode,) = gpu.prepare_decode(bitstreams, layout, spans, book, out)
    (one,) = gpu.prepare_decode(bitstreams[:1], layout, spans[:1], book, out[:1])
    encode, _ = gpu.prepare_encode(chunks, layout, spans, book, level)
    size = layout.size(scale.num_tokens)
    things: dict[str, tuple[Callable[[], object], int]] = {
        "memcpy": (lambda: other.copy_(chunks), scale.num_chunks * size),
        "decode": (decode, scale.num_chunks * size),
        "decode_one": (one, size),
        "encode": (encode, scale.num_chunks * size),
        "decode_call": (
            lambda: gpu.decode_to_device(bitstreams, layout, spans, book, out),
            scale.num_chunks * size,
        ),
        "encode_call": (
            lambda: gpu.encode_on_device(chunks, layout, spans, book, level),
            scale.num_chunks * size,
        ),
    }
    for function, _ in things.values():
        for _ in range(WARM_ROUNDS):
            function()
    measures = [rated(device, function, count) for function, count in things.values()]
    with progress_bar(level, scale.rounds) as tick:
        found = interleave(measures, scale.rounds, tick)
    is_same = is_the_cpus(chunks[0], out[0], bitstreams[0], layout, spans[0], book, level)
    return dict(zip(things, found, strict=True)), is_same


def rated(device: str, function: Callable[[], object], size: int) -> Callable[[], float]:
    """GB/s of a call that makes `size` bytes."""
    import torch

    if device != "cuda":

        def on_host() -> float:
            start = time.perf_counter()
            function()
            return size / (time.perf_counter() - start) / 1e9

        return on_host

    def on_device() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        function()
        end.record()
        end.synchronize()
        return float(size / (start.elapsed_time(end) / 1e3) / 1e9)

    return on_device


def is_the_cpus(
    chunk: Any, decoded: Any, bitstream: Any, layout: KVLayout, span: Span, book: Book, level: str
) -> bool:
    """Whether a chunk's bytes and bits are those of the kernels of the CPU."""
    codec = Kvq(level, book)
    kv = bits_of(chunk)
    written = np.empty(codec.size_bytes_max(layout, span.num_tokens), np.uint8)
    size = codec.encode(kv, layout, span, written)
    read = np.empty_like(kv)
    codec.decode(bitstream, layout, span, read)
    return np.array_equal(written[:size], bitstream) and np.array_equal(read, bits_of(decoded))


def bits_of(chunk: Any) -> NDArray[np.uint8]:
    """The bytes of a tensor."""
    import torch

    found: NDArray[np.uint8] = chunk.cpu().contiguous().view(torch.uint8).numpy().reshape(-1)
    return found


def layout_of(scale: Scale) -> KVLayout:
    """The layout of a chunk."""
    return KVLayout(
        model="benchmark",
        revision="1",
        dtype="bfloat16",
        num_layers=scale.num_layers,
        num_kv_heads=scale.num_heads,
        head_dim=scale.dim,
        chunk_tokens=scale.num_tokens,
    )


class Book:
    """A profile for one level: the steps are the same everywhere, a basis is a reflection."""

    def __init__(self, layout: KVLayout, level: str) -> None:
        shape = (layout.num_layers, layout.num_planes, layout.num_kv_heads, layout.head_dim)
        found = next(known for known in LEVELS if known.name == level)
        pairs = layout.head_dim // 2
        bases = {} if found.transform == "none" else {found.transform: basis_of(layout, found)}
        self._profile = Profile(
            hash=bytes(range(32)),
            layout=canonical(layout),
            rope=Rope(frequencies=ROPE_BASE ** -(np.arange(pairs) / pairs)),
            means=np.zeros(shape, np.float32),
            steps=np.full(shape, STEP, np.float32),
            levels=LEVELS,
            bases=bases,
        )

    def for_layout(self, layout: KVLayout) -> Profile | None:
        return self._profile if canonical(layout) == self._profile.layout else None

    def by_hash(self, hash: bytes) -> Profile | None:
        return self._profile if hash == self._profile.hash else None


def basis_of(layout: KVLayout, level: Level) -> NDArray[np.float32]:
    """The same for each group of layers and heads."""
    layers = level.section_layers if level.transform == "cross" else 1
    heads = 1 if level.transform == "head" else layout.num_kv_heads
    if layout.num_layers % layers:
        raise Unsupported(f"groups of {layers} layers of {layout.num_layers}")
    count = layers * layout.num_planes * heads * layout.head_dim
    axis = np.random.default_rng(1).standard_normal(count).astype(np.float32)
    basis = np.eye(count, dtype=np.float32)
    basis -= np.outer(axis, axis) * np.float32(2 / (axis @ axis))
    groups = (layout.num_layers // layers, layout.num_kv_heads // heads)
    return np.broadcast_to(basis, (*groups, count, count))


if __name__ == "__main__":
    raise SystemExit(main())
