"""kvq/1: what is promised of the numbers, of the bytes, and of hostile bytes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvd.codecs import kvq_section
from kvd.codecs.attention_score import token_classes
from kvd.codecs.base import Bytes, Codec, Part, Span
from kvd.codecs.bitstream import body_offset, read_header, read_sections, write_head
from kvd.codecs.kernels import ids as ids_by_loops
from kvd.codecs.kernels import kvq as roles
from kvd.codecs.kernels import numba_ids as ids_by_numba
from kvd.codecs.kernels import numba_kvq, numba_kvq_lanes, reference
from kvd.codecs.kernels.kvq import Coded, Dither, Kernels, Place, Scales, Tokens, Window
from kvd.codecs.kvq import NUM_SINKS, Kvq
from kvd.codecs.kvq_section import Content
from kvd.codecs.kvq_side import ids_size_max, pack_ids, unpack_ids
from kvd.codecs.profile import Level, Rope
from kvd.codecs.rope import rotate, rotation, unrotate
from kvd.codecs.tables import (
    CLASS_RAW,
    FILE_NAME,
    NUM_TABLES,
    SUPPORT_MAX,
    SYMBOL_OFFSET,
    TOTAL,
    TOTAL_BITS,
    tables,
)
from kvd.errors import Corrupt, InvalidRequest, Unsupported
from kvd.layout import KVLayout
from tests.codec_chunks import bell, encoded, layout_of, noise, numbers_of, real_chunk, stored
from tests.codec_data import Book, OneProfile, as_dtype, load_profile
from tests.contracts.codec import ContainedCodecContract

FIXTURES = Path(__file__).parent / "fixtures" / "bitstreams"
PAGE = Path(__file__).parents[1] / "docs" / "formats" / "bitstream-kvq.md"
BOTH: list[Any] = [numba_kvq, reference]


# The contract of every codec, at each kind of level, by both implementations.


class KvqContract(ContainedCodecContract):
    level = "none"
    compute: Any = numba_kvq

    @pytest.fixture(autouse=True)
    def _book(self) -> None:
        self.book = Book(self.level)

    def open(self, layout: KVLayout) -> Codec:
        self.book.for_layout(layout)
        return Kvq(self.level, self.book, compute=self.compute)

    def assert_near(self, found: Bytes, chunk: Bytes, layout: KVLayout) -> None:
        numbers, wanted = numbers_of(found, layout), numbers_of(chunk, layout)
        is_finite = np.isfinite(wanted).all(axis=(0, 1, 3, 4))
        raw = np.isin(np.arange(numbers.shape[2]), range(NUM_SINKS)) | ~is_finite
        bits = [stored.view(np.uint16).reshape(numbers.shape) for stored in (found, chunk)]
        assert np.array_equal(bits[0][:, :, raw], bits[1][:, :, raw])
        # Steps are 1 at most; a rotation or a transform moves errors, and keeps their squares' sum.
        errors = (numbers - wanted)[:, :, ~raw]
        assert (errors**2).mean() <= 0.15 if errors.size else True
        assert np.abs(errors).max(initial=0) <= 3 + np.abs(wanted[:, :, ~raw]).max(initial=0) / 100


class TestNone(KvqContract):
    pass


class TestNoneByReference(KvqContract):
    compute = reference


class TestDithered(KvqContract):
    level = "dithered"


class TestHead(KvqContract):
    level = "head"


class TestLayer(KvqContract):
    level = "layer"


class TestCross(KvqContract):
    level = "cross"


# The same bits from both implementations.


@st.composite
def chunks(draw: st.DrawFn) -> tuple[KVLayout, Bytes, Span, str, str]:
    layers, planes, heads = (
        draw(st.integers(1, 3)),
        draw(st.integers(1, 2)),
        draw(st.integers(1, 2)),
    )
    dim = draw(st.sampled_from([1, 3, 16, 24, 64]))
    dtype = draw(st.sampled_from(["bfloat16", "float16"]))
    layout = layout_of(layers, planes, heads, dim, dtype=dtype)
    num_tokens = draw(st.sampled_from([1, 2, 5, 31, 32, 33, 40]))
    start = draw(st.sampled_from([0, 2, 1000, (1 << 32) - 3]))
    shape, seed = layout.shape(num_tokens), draw(st.integers(0, 1 << 20))
    kind = draw(st.sampled_from(["real", "bits", "zero", "constant", "wide", "outliers", "holes"]))
    chunk = _values(kind, layout, num_tokens, seed).copy()
    assert chunk.size == layout.size(num_tokens) == 2 * int(np.prod(shape))
    level = draw(st.sampled_from(["none", "dithered"]))
    style = draw(st.sampled_from(["half", "pairs"]))
    return layout, chunk, Span(start=start, num_tokens=num_tokens), level, style


def _values(kind: str, layout: KVLayout, num_tokens: int, seed: int) -> Bytes:
    count = layout.size(num_tokens) // 2
    if kind == "bits":
        return noise(count, seed).astype(np.uint16).view(np.uint8)
    if kind == "zero":
        return np.zeros(2 * count, np.uint8)
    if kind == "constant":
        return np.full(count, noise(1, seed)[0] & np.uint64(0x47FF), np.uint16).view(np.uint8)
    if kind == "wide":
        exponents = (noise(count, seed) % np.uint64(32)).astype(np.int32) - 14
        return stored(np.ldexp(bell(count, seed), exponents), layout.dtype)
    chunk = real_chunk(layout, num_tokens, seed).copy()
    if kind == "outliers":
        chunk.view(np.uint16)[::97] = 0x447A  # 1,000 in bfloat16.
    if kind == "holes":
        holes = noise(3, seed) % np.uint64(count)
        chunk.view(np.uint16)[holes.astype(np.int64)] = [0x7F81, 0xFC00, 0x7C01]
    return chunk


@settings(max_examples=150, deadline=None)
@given(chunks())
def test_numba_and_numpy_have_the_same_bits(case: tuple[KVLayout, Bytes, Span, str, str]) -> None:
    layout, chunk, span, level, style = case
    book = Book(level, style)  # type: ignore[arg-type]
    codecs = [Kvq(level, book, compute=compute, token_classes=every_third) for compute in BOTH]
    bitstreams = [encoded(codec, chunk, layout, start=span.start) for codec in codecs]
    assert bitstreams[0].tobytes() == bitstreams[1].tobytes()
    decoded = []
    for codec in codecs:
        out = np.zeros(chunk.size, np.uint8)
        codec.decode(bitstreams[0], layout, span, out)
        decoded.append(out.tobytes())
    assert decoded[0] == decoded[1]


@pytest.mark.parametrize("level", ["head", "layer", "cross"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_numba_and_numpy_agree_behind_a_transform(level: str, dtype: str) -> None:
    layout = layout_of(3, 2, 2, 32, dtype=dtype)
    chunk = real_chunk(layout, 70)
    book = Book(level)
    bitstream = encoded(Kvq(level, book), chunk, layout)
    span, found = Span(start=0, num_tokens=70), []
    for compute in BOTH:
        out = np.zeros(chunk.size, np.uint8)
        Kvq(level, book, compute=compute).decode(bitstream, layout, span, out)
        found.append(numbers_of(out, layout))
    ulp = 2.0 ** (-7 if dtype == "bfloat16" else -10)
    assert (np.abs(found[0] - found[1]) <= ulp * np.abs(found[1]) + 1e-5).all()


@pytest.mark.parametrize("level", ["none", "dithered"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_tokens_beyond_a_tile_have_the_same_bits(level: str, dtype: str) -> None:
    layout = layout_of(1, 2, 2, 40, dtype=dtype)
    for kind in ("real", "outliers", "holes"):
        chunk = _values(kind, layout, 301, 6).copy()
        codecs = [Kvq(level, Book(level), compute=each, token_classes=every_third) for each in BOTH]
        found = [encoded(codec, chunk, layout, start=2).tobytes() for codec in codecs]
        assert found[0] == found[1]


@pytest.mark.parametrize("dim", [1, 7, 8, 20, 64, 128, 200, 264])
@pytest.mark.parametrize("style", ["half", "pairs"])
def test_numba_finds_the_classes_of_the_scores(dim: int, style: str) -> None:
    layout = layout_of(2, 2, 2, dim)
    chunk = _values("holes", layout, 70, dim).copy()
    profile = Book("none", style).for_layout(layout)  # type: ignore[arg-type]
    weights = bell(2 * 2 * dim, 9).reshape(2, 2, dim) / np.sqrt(dim)
    # Sums near the edges between classes: the order of adding shows.
    weights[1] *= 1e-3
    bias = np.array([0.3, 0.5]).reshape(2, 1, 1).repeat(2, axis=1)
    scores = np.concatenate([weights, bias], axis=-1).astype(np.float32)
    book = OneProfile(replace(profile, scores=scores))
    codecs = [Kvq("none", book, compute=each, token_classes=token_classes) for each in BOTH]
    bitstreams = [encoded(codec, chunk, layout, start=4) for codec in codecs]
    assert bitstreams[0].tobytes() == bitstreams[1].tobytes()
    classes = np.array([each.classes for each in contents(bitstreams[0], layout, 70, 4)])
    assert set(np.unique(classes[classes != CLASS_RAW])) >= {0, 1}


@pytest.mark.parametrize("dim", [5, 64, 127, 200, 264])
def test_scores_are_added_in_the_order_of_numpy(dim: int) -> None:
    # Large weights whose sum is about 0: what is left is what rounding left, by the order.
    weights = (bell(dim, 3) * 1e6).astype(np.float32)
    weights[-1] = -weights[:-1].astype(np.float64).sum()
    keys = stored(np.repeat(1 + np.abs(bell(256, 8)), dim).reshape(1, 1, 256, 1, dim), "bfloat16")
    layout, span = layout_of(1, 1, 1, dim), Span(start=0, num_tokens=256)
    scores = np.append(weights, np.float32(1)).reshape(1, 1, dim + 1)
    profile = replace(Book().for_layout(layout), rope=Rope(), scores=scores)
    ones = np.ones((1, 1, 1, dim), np.float32)
    scales = Scales(means=ones, steps=ones, rotation=rotation(Rope(), span), is_half=False)
    kv = keys.view(np.uint16).reshape(layout.shape(256))
    found = numba_kvq.token_classes(kv, scales, scores, 2)
    numbers = numbers_of(keys, layout)[0, 0].astype(np.float32)
    assert np.array_equal(found[0], token_classes(numbers, profile, 0))
    assert len(np.unique(found)) > 1


def test_a_quotient_is_exact_for_every_frequency() -> None:
    # Each state that a lane may have depends on all symbols behind it: 2^20 quotients.
    for scale in (0.4, 2.0, 30.0):
        symbols = np.rint(bell(2048 * 512, 12).reshape(2048, 512) * scale).astype(np.int16)
        classes = np.zeros(2048, np.uint8)
        ids = numba_kvq.choose_tables(symbols, classes)
        coded = numba_kvq.encode(symbols, classes, ids)
        assert np.array_equal(numba_kvq.decode(coded, classes, ids, 2048), symbols)


def test_costs_of_many_tokens_do_not_run_over() -> None:
    # 2^17 costs of 27 bits: more than 32 bits hold.
    symbols = np.full((1 << 17, 1), 20_000, np.int16)
    for finer in (1, 2):
        symbols[::2] = 3
        classes = np.zeros(len(symbols), np.uint8)
        classes[1::3] = finer
        sums = np.zeros(NUM_TABLES)
        magnitudes = np.minimum(symbols[:, 0], SUPPORT_MAX + 1)
        for index in range(CLASS_RAW):
            counts = np.bincount(magnitudes[classes == index], minlength=SUPPORT_MAX + 2)
            sums += counts @ tables().costs[index]
        assert sums.min() > 1 << 32
        assert numba_kvq.choose_tables(symbols, classes)[0] == sums.argmin()


def every_third(keys: NDArray[np.float32], profile: Any, layer: int) -> NDArray[np.uint8]:
    classes = np.zeros(keys.shape[:2], np.uint8)
    classes[::3] = 1
    classes[1::9] = 2
    return classes


# How near a number comes back.


@settings(max_examples=150, deadline=None)
@given(chunks())
def test_an_error_is_half_a_step_of_its_class_or_the_token_is_exact(
    case: tuple[KVLayout, Bytes, Span, str, str],
) -> None:
    layout, chunk, span, level, style = case
    book = Book(level, style)  # type: ignore[arg-type]
    codec = Kvq(level, book, token_classes=every_third)
    out = np.zeros(chunk.size, np.uint8)
    codec.decode(encoded(codec, chunk, layout, start=span.start), layout, span, out)
    is_near = errors_in_steps(out, chunk, layout, span, book) <= 0.5
    # A token is exact or near as a section keeps it: a layer and a head.
    bits = [array.view(np.uint16).reshape(layout.shape(span.num_tokens)) for array in (out, chunk)]
    is_exact = (bits[0] == bits[1]).all(axis=(1, 4))
    assert (is_near.all(axis=(1, 4)) | is_exact).all()
    has_holes = ~np.isfinite(numbers_of(chunk, layout)).all(axis=(1, 4))
    assert is_exact[has_holes].all()
    sinks = np.arange(span.start, span.start + span.num_tokens) < NUM_SINKS
    assert is_exact[:, sinks].all()


def errors_in_steps(
    found: Bytes, chunk: Bytes, layout: KVLayout, span: Span, book: Book
) -> NDArray[np.float64]:
    """Of un-rotated elements, in steps of their tokens' classes, less what rounding may add."""
    profile = book.for_layout(layout)
    factors = np.array([4, 16, 1])[
        [0 if t % 3 == 0 else 1 if t % 9 == 1 else 2 for t in range(span.num_tokens)]
    ]
    with np.errstate(all="ignore"):
        numbers = [numbers_of(array, layout).astype(np.float64) for array in (found, chunk)]
        size = np.abs(numbers[1])
        errors = numbers[0] - numbers[1]
        errors[:, 0] = turned(errors[:, 0], profile.rope, span)
        size[:, 0] = radii(size[:, 0], profile.rope)
        steps = profile.steps[:, :, None].astype(np.float64)
        spare = (size + steps) * 2.0**-8 + np.abs(profile.means[:, :, None]) * 2.0**-8
        return (np.abs(errors) - spare) / steps * factors[None, None, :, None, None]


def turned(keys: NDArray[np.float64], rope: Rope, span: Span) -> NDArray[np.float64]:
    """Turned back, as complex numbers."""
    first, second = pairs_of(rope)
    positions = span.start + np.arange(span.num_tokens, dtype=np.float64)
    turn = np.exp(-1j * positions[:, None] * rope.frequencies)[:, None]
    found = keys.copy()
    number = (keys[..., first] + 1j * keys[..., second]) * turn
    found[..., first], found[..., second] = number.real, number.imag
    return found


def radii(size: NDArray[np.float64], rope: Rope) -> NDArray[np.float64]:
    first, second = pairs_of(rope)
    found = size.copy()
    found[..., first] = found[..., second] = np.hypot(size[..., first], size[..., second])
    return found


def pairs_of(rope: Rope) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    count = len(rope.frequencies)
    if rope.style == "half":
        first = rope.offset + np.arange(count)
        return first, first + count
    first = rope.offset + 2 * np.arange(count)
    return first, first + 1


@pytest.mark.parametrize("style", ["half", "pairs"])
def test_a_rope_turns_as_complex_numbers_do(style: Any) -> None:
    rope = Rope(frequencies=0.5 ** np.arange(6, dtype=np.float64), style=style, offset=3)
    keys = bell(10 * 2 * 16, 3).reshape(10, 2, 16)
    span = Span(start=77, num_tokens=10)
    by = rotation(rope, span)
    assert np.allclose(unrotate(keys, by), turned(keys.astype(np.float64), rope, span), atol=1e-5)
    assert np.allclose(rotate(unrotate(keys, by), by), keys, atol=1e-6)
    assert np.array_equal(rotate(keys, by)[..., :3], keys[..., :3])


def test_a_positions_dither_is_its_own_whatever_chunk_it_is_in() -> None:
    rows = np.array([0, 640], np.uint32)
    early = reference.offsets(Dither(rows=rows, start=100), 40, 128)
    late = reference.offsets(Dither(rows=rows, start=120), 20, 128)
    assert np.array_equal(early[20:], late)
    assert np.array_equal(
        early[:, 64:], reference.offsets(Dither(rows=rows[1:], start=100), 40, 64)
    )


def test_dither_is_uniform_and_its_neighbours_have_nothing_in_common() -> None:
    rows = np.arange(0, 4096, 64, dtype=np.uint32)
    values = reference.offsets(Dither(rows=rows, start=1 << 20), 256, 4096).astype(np.float64)
    assert values.min() >= -0.5
    assert values.max() < 0.5
    assert abs(values.mean()) < 1e-3
    assert abs(values.var() - 1 / 12) < 1e-4
    for other in (values[1:, :], values[:, 1:], values[1:, 1:], values[64:, 64:]):
        same = values[: other.shape[0], : other.shape[1]]
        assert abs((same * other).mean() * 12) < 5e-3


def test_finer_classes_have_finer_errors() -> None:
    layout = layout_of(1, 2, 1, 64)
    chunk, book, span = real_chunk(layout, 90), Book(), Span(start=9, num_tokens=90)
    codec = Kvq("none", book, token_classes=every_third)
    out = np.zeros(chunk.size, np.uint8)
    codec.decode(encoded(codec, chunk, layout, start=9), layout, span, out)
    values = np.abs(numbers_of(out, layout) - numbers_of(chunk, layout))[0, 1, :, 0]
    classes = every_third(np.zeros((90, 1, 64), np.float32), None, 0)[:, 0]
    means = [values[classes == index].mean() for index in range(3)]
    assert means[1] < means[0] / 3
    assert means[2] < means[1] / 2


def test_a_section_takes_the_finest_class_of_its_heads_and_layers() -> None:
    def second_head(keys: NDArray[np.float32], profile: Any, layer: int) -> NDArray[np.uint8]:
        return np.array([[0, 2 if layer == 1 else 1]] * len(keys), np.uint8)

    layout = layout_of(2, 2, 2, 16)
    for level, wanted in [("none", [0, 1, 0, 2]), ("layer", [1, 2]), ("cross", [2])]:
        codec = Kvq(level, Book(level), token_classes=second_head)
        found = contents(encoded(codec, real_chunk(layout, 8), layout, start=50), layout, 8, 50)
        assert [int(content.classes.max()) for content in found] == wanted


def test_classes_see_the_keys_as_they_were_before_the_rope() -> None:
    layout, span = layout_of(2, 2, 2, 16), Span(start=50, num_tokens=8)
    book, seen = Book(), {}

    def look(keys: NDArray[np.float32], profile: Any, layer: int) -> NDArray[np.uint8]:
        seen[layer] = keys.copy()
        return np.zeros(keys.shape[:2], np.uint8)

    chunk = real_chunk(layout, 8)
    encoded(Kvq("none", book, token_classes=look), chunk, layout, start=50)
    keys = numbers_of(chunk, layout)[1, 0].astype(np.float64)
    assert np.allclose(seen[1], turned(keys, book.for_layout(layout).rope, span), atol=1e-4)


def contents(bitstream: Bytes, layout: KVLayout, num_tokens: int, start: int) -> list[Content]:
    header = read_header(bitstream)
    span = Span(start=start, num_tokens=num_tokens)
    row = layout.num_planes * layout.head_dim
    return [
        kvq_section.parse(
            section.content, num_tokens, len(section.layers) * len(section.heads) * row
        )
        for section in read_sections(bitstream, header, layout, span, Part())
    ]


# How many bits it takes.


def test_a_normal_channel_takes_little_more_than_its_entropy() -> None:
    symbols = np.rint(bell(256 * 512, 4).reshape(256, 512) * 1.7).astype(np.int16)
    classes = np.zeros(256, np.uint8)
    ids = numba_kvq.choose_tables(symbols, classes)
    coded = numba_kvq.encode(symbols, classes, ids)
    counts = np.unique(symbols, return_counts=True)[1] / symbols.size
    entropy = -(counts * np.log2(counts)).sum()
    bits = (16 * len(coded.words) + 16 * len(coded.escapes)) / symbols.size
    assert entropy - 0.001 < bits < 1.01 * entropy


def test_channels_of_zeros_take_no_more_than_their_ids() -> None:
    layout = layout_of(1, 1, 1, 64)
    book = Book()
    profile = book.for_layout(layout)
    chunk = stored(np.tile(profile.means.reshape(1, 1, 1, 1, 64), (1, 1, 256, 1, 1)), "bfloat16")
    # The first of a context's tokens: no rotation, no sinks behind it.
    profile = replace(profile, rope=Rope())
    size = encoded(Kvq("none", OneProfile(profile)), chunk, layout, start=4).size
    assert size <= 176 + 8 + 16 + 2 * 8 + 16


def test_what_the_tables_do_not_know_is_escaped() -> None:
    layout = layout_of(1, 1, 1, 64)
    numbers = bell(64 * 64, 5).reshape(1, 1, 64, 1, 64).copy()
    numbers[0, 0, 7, 0, 3] = 1200
    numbers[0, 0, 40, 0, 3] = -3000
    numbers[0, 0, 40, 0, 60] = 700
    chunk = stored(numbers, "bfloat16")
    profile = replace(Book().for_layout(layout), rope=Rope())
    codec = Kvq("none", OneProfile(profile))
    bitstream = encoded(codec, chunk, layout, start=4)
    (content,) = contents(bitstream, layout, 64, 4)
    assert len(content.coded.escapes) >= 3
    assert not len(content.raws)
    for num_tokens in (8, 41, 64):
        out = np.zeros(chunk.size, np.uint8)
        span = Span(start=4, num_tokens=64)
        codec.decode(bitstream, layout, span, out, Part(token_end=num_tokens))
        errors = numbers_of(out, layout) - numbers_of(chunk, layout)
        spare = np.abs(numbers_of(chunk, layout)) / 128 + 0.51
        assert (np.abs(errors) <= spare)[:, :, :num_tokens].all()


def test_what_does_not_compress_is_kept_verbatim() -> None:
    layout = layout_of(2, 2, 2, 32)
    chunk = real_chunk(layout, 40)
    codec = Kvq("fine", Book())
    bitstream = encoded(codec, chunk, layout, start=4)
    assert bitstream.size <= codec.size_bytes_max(layout, 40) < 1.1 * chunk.size
    out = np.zeros(chunk.size, np.uint8)
    codec.decode(bitstream, layout, Span(start=4, num_tokens=40), out)
    assert out.tobytes() == chunk.tobytes()


def test_the_bytes_are_the_same_on_two_threads() -> None:
    layout = layout_of(4, 2, 2, 64)
    chunk = real_chunk(layout, 100)
    for level in ("none", "head"):
        book = Book(level)
        one, two = (Kvq(level, book, num_threads=count) for count in (1, 2))
        bitstream = encoded(one, chunk, layout)
        assert bitstream.tobytes() == encoded(two, chunk, layout).tobytes()
        found = [np.zeros(chunk.size, np.uint8) for _ in range(2)]
        for codec, out in zip((one, two), found, strict=True):
            codec.decode(bitstream, layout, Span(start=0, num_tokens=100), out)
        assert found[0].tobytes() == found[1].tobytes()


# The tables.


def test_the_tables_are_those_of_every_release() -> None:
    content = (Path(roles.__file__).parents[1] / FILE_NAME).read_bytes()
    digest = "7a2930031ca2bb0e3729655ec785aa8b1a4005ea654aaa0b3067a37eca1e6756"
    assert sha256(content).hexdigest() == digest


def test_a_table_is_the_law_that_it_is_named_after() -> None:
    grid = np.linspace(-40, 40, 800_001)
    for first, last, shape, octave in [(1, 26, 2.0, -8 / 3), (32, 57, 1.3, -9 / 3)]:
        density = np.exp(-(np.abs(grid) ** shape))
        deviation = np.sqrt((density * grid**2).sum() / density.sum())
        for table in range(first, last):
            scale = 2 ** (octave + (table - first) / 3) / deviation
            share = law(grid, density / density.sum(), scale)
            # What coding the law with the table costs, above its entropy; thin tails round up.
            assert divergence(share, table) < 0.012


def law(grid: NDArray[np.float64], density: NDArray[np.float64], scale: float) -> Any:
    symbols = np.abs(np.rint(grid * scale)).astype(int)
    return np.bincount(np.minimum(symbols, SUPPORT_MAX + 1), density, SUPPORT_MAX + 2)


def divergence(share: NDArray[np.float64], table: int) -> float:
    support = int(tables().supports[table])
    inside, outside = share[: support + 1], share[support + 1 :].sum()
    frequencies = (tables().spans[table, SYMBOL_OFFSET : SYMBOL_OFFSET + support + 1] >> 16) + 1
    shares = frequencies / TOTAL
    shares[1:] *= 2
    is_there = inside > 0
    return float(
        (inside * np.log2(inside / shares, where=is_there, out=np.zeros(len(inside)))).sum()
        + outside
    )


def test_a_tables_slots_are_each_symbols_span() -> None:
    found = tables()
    for table in range(NUM_TABLES):
        symbols = found.slots[table].view(np.int32) >> 22
        support = int(found.supports[table])
        for symbol in range(-support, support + 1):
            span = int(found.spans[table, SYMBOL_OFFSET + symbol])
            start, count = span & 0xFFFF, (span >> 16) + 1
            assert (symbols[start : start + count] == symbol).all()
            assert (symbols == symbol).sum() == count
        frequencies = (found.spans[table] >> np.uint32(16)).astype(np.uint64) + np.uint64(1)
        states = (frequencies << np.uint64(32 - TOTAL_BITS)) - np.uint64(1)
        for offset in (0, 1, 12345):
            tried = states - np.uint64(offset)
            found_quotients = (tried * found.reciprocals[table]) >> np.uint64(32 + TOTAL_BITS)
            assert np.array_equal(found_quotients, tried // frequencies)


def test_costs_are_logarithms() -> None:
    found = tables()
    spans = found.spans[1:, SYMBOL_OFFSET] >> np.uint32(16)
    wanted = -np.log2((spans + np.uint32(1)) / TOTAL)
    assert np.allclose(found.costs[0, 0, 1:] / 4096, wanted, atol=1 / 4096)


# What is refused.


def test_float32_is_kept_as_the_bfloat16_next_to_it() -> None:
    narrow = layout_of(2, 2, 2, 64)
    wide = as_dtype(narrow, "float32")
    chunk = real_chunk(narrow, 40)
    numbers = (chunk.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    # Beside a bfloat16 by less than half of its last bit, and not finite in a token.
    numbers = (numbers * np.float32(1 + 2**-11)).reshape(wide.shape(40))
    numbers[0, 0, 9, 0, :2] = np.inf, np.nan
    book = Book()
    codec, span = Kvq("none", book), Span(start=0, num_tokens=40)
    bitstream = encoded(codec, numbers.reshape(-1).view(np.uint8).copy(), wide)
    out = np.full(numbers.shape, 7.1, np.float32)
    part = Part(layer_start=1, head_end=1, token_end=13)
    codec.decode(bitstream, wide, span, out.reshape(-1).view(np.uint8), part)
    found = out[1, :, :13, :1].copy()
    out[1, :, :13, :1] = 7.1
    assert (out == np.float32(7.1)).all(), "more than the part was written"
    codec.decode(bitstream, wide, span, out.reshape(-1).view(np.uint8))
    assert np.array_equal(found, out[1, :, :13, :1])
    assert not (out.view(np.uint32) & 0xFFFF).any()
    assert (out[0, 0, 9, 0, 0], np.isnan(out[0, 0, 9, 0, 1])) == (np.inf, True)
    exact = np.zeros(narrow.shape(40), np.uint16)
    rounded = chunk.view(np.uint16).reshape(narrow.shape(40)).copy()
    rounded[0, 0, 9, 0, :2] = 0x7F80, 0x7FC0
    stream = encoded(codec, rounded.reshape(-1).view(np.uint8), narrow)
    codec.decode(stream, narrow, span, exact.reshape(-1).view(np.uint8))
    assert np.array_equal(out.view(np.uint32) >> 16, exact)


def test_only_floats_are_kept() -> None:
    layout = layout_of(1, 2, 1, 64, dtype="uint8")
    codec = Kvq("none", Book())
    chunk = np.zeros(layout.size(2), np.uint8)
    out = np.zeros(2 * codec.size_bytes_max(layout, 2), np.uint8)
    with pytest.raises(Unsupported, match="not uint8"):
        codec.encode(chunk, layout, Span(start=0, num_tokens=2), out)
    with pytest.raises(Unsupported, match="not uint8"):
        codec.decode(out, layout, Span(start=0, num_tokens=2), chunk)


def test_a_model_without_a_profile_is_refused() -> None:
    layout, other = layout_of(1, 2, 1, 64), layout_of(1, 2, 1, 64, model="other")
    book = OneProfile(Book().for_layout(layout))
    with pytest.raises(Unsupported, match="other"):
        encoded(Kvq("none", book), real_chunk(other, 4), other)
    bitstream = encoded(Kvq("none", book), real_chunk(layout, 4), layout)
    empty = Kvq("none", OneProfile(Book().for_layout(other)))
    with pytest.raises(Unsupported, match="profile"):
        empty.decode(
            bitstream, layout, Span(start=0, num_tokens=4), np.zeros(layout.size(4), np.uint8)
        )


@pytest.mark.parametrize("level", ["none such", 6, -1])
def test_a_level_that_the_profile_lacks_is_refused(level: int | str) -> None:
    layout = layout_of(1, 2, 1, 64)
    with pytest.raises(Unsupported, match="dithered"):
        encoded(Kvq(level, Book()), real_chunk(layout, 4), layout)


def test_a_profile_of_another_shape_is_refused() -> None:
    layout = layout_of(1, 2, 2, 64)
    profile = Book().for_layout(layout)
    thin = replace(profile, means=profile.means[:, :, :1], steps=profile.steps[:, :, :1])
    with pytest.raises(Unsupported, match="the chunk of"):
        encoded(Kvq("none", OneProfile(thin)), real_chunk(layout, 4), layout)
    with pytest.raises(Unsupported, match="basis"):
        encoded(Kvq("head", OneProfile(profile)), real_chunk(layout, 4), layout)


def test_a_buffer_of_another_size_is_refused() -> None:
    layout = layout_of(1, 2, 1, 64)
    codec = Kvq("none", Book())
    bitstream = encoded(codec, real_chunk(layout, 4), layout)
    with pytest.raises(InvalidRequest, match="bytes"):
        codec.decode(bitstream, layout, Span(start=0, num_tokens=4), np.zeros(7, np.uint8))
    with pytest.raises(InvalidRequest, match="bytes"):
        codec.encode(np.zeros(0, np.uint8), layout, Span(start=0, num_tokens=0), bitstream)


def test_without_numba_numpy_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    roles.kernels.cache_clear()
    monkeypatch.setitem(sys.modules, "kvd.codecs.kernels.numba_kvq", None)
    monkeypatch.delattr("kvd.codecs.kernels.numba_kvq")
    try:
        assert roles.kernels() is reference  # type: ignore[comparison-overlap]
    finally:
        roles.kernels.cache_clear()


# Hostile bytes, behind all checksums.

HOSTILE_TOKENS, HOSTILE_CHANNELS = 40, 24


def hostile_section() -> Bytes:
    """A section with all there can be: classes, escapes, raw tokens, channels of zeros."""
    shape = (HOSTILE_TOKENS, HOSTILE_CHANNELS)
    symbols = np.rint(bell(shape[0] * shape[1], 8).reshape(shape) * 3).astype(np.int16)
    symbols[:, 5] = 0
    symbols[9, 7], symbols[33, 20] = 4000, -300
    classes = np.zeros(shape[0], np.uint8)
    classes[[0, 8, 39]] = CLASS_RAW, 1, 2
    symbols[0] = 0
    ids = reference.choose_tables(symbols, classes)
    coded = reference.encode(symbols, classes, ids)
    raws = noise(shape[1], 3).astype(np.uint16).reshape(1, -1)
    return kvq_section.pack(Content(ids=ids, classes=classes, coded=coded, raws=raws))


def read(section: Bytes, compute: Kernels, num_tokens: int) -> NDArray[np.int16] | None:
    """The symbols, None where the section is corrupt."""
    try:
        content = kvq_section.parse(section, HOSTILE_TOKENS, HOSTILE_CHANNELS)
        symbols = compute.decode(content.coded, content.classes, content.ids, num_tokens)
    except Corrupt:
        return None
    assert symbols.shape == (num_tokens, HOSTILE_CHANNELS)
    assert content.raws_by_token(num_tokens).keys() <= set(range(num_tokens))
    return symbols


HOSTILE_WINDOW = Window(layers=range(1), heads=range(1))


def hostile_scales() -> Scales:
    shape = (1, 2, 1, HOSTILE_CHANNELS // 2)
    return Scales(
        means=np.full(shape, 0.25, np.float32),
        steps=np.full(shape, 1.5, np.float32),
        rotation=rotation(Rope(frequencies=np.ones(2)), Span(start=3, num_tokens=HOSTILE_TOKENS)),
        is_half=False,
    )


def read_whole(section: Bytes, num_tokens: int) -> NDArray[np.uint16] | None:
    """The elements in one call, None where the section is corrupt. It stands between other bytes,
    which are not part of it.
    """
    kv = np.zeros((1, 2, HOSTILE_TOKENS, 1, HOSTILE_CHANNELS // 2), np.uint16)
    image = np.concatenate([np.full(7, 0xFF, np.uint8), section, np.full(9, 0xFF, np.uint8)])
    place = Place(
        offset=7, size=section.size, section=HOSTILE_WINDOW, wanted=HOSTILE_WINDOW, basis=None
    )
    tokens = Tokens(count=HOSTILE_TOKENS, wanted=num_tokens, start=3, is_dithered=False)
    found = numba_kvq.restore_sections(image, [place], tokens, hostile_scales(), kv)
    assert found in (None, 0)
    return kv if found is None else None


def elements_of(section: Bytes, symbols: NDArray[np.int16]) -> NDArray[np.uint16]:
    """What the reference makes of a section's symbols."""
    content = kvq_section.parse(section, HOSTILE_TOKENS, HOSTILE_CHANNELS)
    kv = np.zeros((1, 2, HOSTILE_TOKENS, 1, HOSTILE_CHANNELS // 2), np.uint16)
    numbers = reference.dequantise(symbols, content.classes, None)
    raws = content.raws_by_token(len(symbols))
    reference.restore(numbers, HOSTILE_WINDOW, HOSTILE_WINDOW, hostile_scales(), raws, kv)
    return kv


def read_hostile_sections(seeds: int) -> None:
    """Each flip, each cut, random tails; both implementations must find the same."""
    section = hostile_section()
    damaged = [section[:size] for size in range(section.size)]
    damaged += [np.append(section, np.uint8(0))]
    for at in range(section.size):
        damaged.append(section.copy())
        damaged[-1][at] ^= 1 << at % 8
    for seed in range(seeds):
        damaged.append(section.copy())
        first = 16 + int(noise(1, seed)[0] % np.uint64(section.size - 16))
        damaged[-1][first:] = noise(section.size - first, seed).astype(np.uint8)
        # More or fewer words, escapes and raw tokens, of the same size together.
        shifted = section.copy()
        counts = shifted[:8].view("<u4")
        counts[:] = (counts.astype(np.int64) + np.array([1, -1]) * (seed % 9 - 4)) & 0xFFFFFFFF
        damaged.append(shifted)
    for found in damaged:
        for num_tokens in (HOSTILE_TOKENS, 33, 5):
            one, two = (read(found, compute, num_tokens) for compute in BOTH)
            assert (one is None) == (two is None)
            assert one is None or two is None or np.array_equal(one, two)
            elements = read_whole(found, num_tokens)
            assert (elements is None) == (two is None)
            if elements is not None and two is not None:
                assert np.array_equal(elements, elements_of(found, two))


def test_a_hostile_section_is_corrupt_or_some_symbols() -> None:
    assert read(hostile_section(), reference, HOSTILE_TOKENS) is not None
    read_hostile_sections(150)


def test_kernels_stay_within_their_arrays(tmp_path: Path) -> None:
    code = "from tests import test_codecs_kvq as t; t.read_hostile_sections(20); t.round_trips()"
    environment = {**os.environ, "NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path)}
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, env=environment)


@pytest.mark.skipif(not numba_kvq_lanes.IS_WIDE, reason="this machine has no such vectors")
def test_without_wide_vectors_the_bits_are_the_same(tmp_path: Path) -> None:
    code = (
        "from tests import test_codecs_kvq as t; assert not t.numba_kvq_lanes.IS_WIDE;"
        "t.read_hostile_sections(5); t.round_trips()"
    )
    environment = {
        **os.environ,
        "NUMBA_CPU_NAME": "x86-64-v2",
        "NUMBA_CPU_FEATURES": "",
        "NUMBA_CACHE_DIR": str(tmp_path),
    }
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, env=environment)


def round_trips() -> None:
    """Shapes with odd ends, through all kernels, and the reference's bytes."""
    for shape, num_tokens in [((2, 2, 2, 24), 33), ((1, 1, 1, 3), 1), ((3, 2, 2, 64), 40)]:
        for level in ("none", "dithered", "cross"):
            for dtype in ("bfloat16", "float16"):
                layout = layout_of(*shape, dtype=dtype)
                codec = Kvq(level, Book(level, "pairs"), token_classes=every_third)
                chunk = _values("holes", layout, num_tokens, 3)
                bitstream = encoded(codec, chunk, layout)
                span = Span(start=0, num_tokens=num_tokens)
                out = np.zeros(chunk.size, np.uint8)
                codec.decode(bitstream, layout, span, out, Part(head_start=shape[2] - 1))
                if level == "cross":
                    continue
                book = Book(level, "pairs")
                slow = Kvq(level, book, token_classes=every_third, compute=reference)
                assert encoded(slow, chunk, layout).tobytes() == bitstream.tobytes()
                wanted = np.zeros(chunk.size, np.uint8)
                slow.decode(bitstream, layout, span, wanted, Part(head_start=shape[2] - 1))
                assert wanted.tobytes() == out.tobytes()


def test_every_bad_count_of_a_section_is_corrupt() -> None:
    section = hostile_section()
    for at, value in [
        (0, 1 << 31),
        (4, 0xFFFFFFFF),
        (8, HOSTILE_TOKENS // 4 + 1),
        (8, 0),
        (12, 6),
        (12, 193 << 3),
    ]:
        damaged = section.copy()
        damaged[at : at + 4] = np.frombuffer(int(value).to_bytes(4, "little"), np.uint8)
        assert read(damaged, reference, HOSTILE_TOKENS) is None


@given(
    st.lists(
        st.sampled_from([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3]), min_size=1, max_size=300
    )
)
def test_classes_come_back_and_take_little_room(classes: list[int]) -> None:
    wanted = np.array(classes, np.uint8)
    num_raws = classes.count(CLASS_RAW)
    nothing = Coded(
        states=np.empty(0, np.uint32), words=np.empty(0, np.uint16), escapes=np.empty(0, np.int16)
    )
    content = Content(
        ids=np.zeros(1, np.uint8),
        classes=wanted,
        coded=nothing,
        raws=np.ones((num_raws, 1), np.uint16),
    )
    section = kvq_section.pack(content)
    found = kvq_section.parse(section, len(classes), 1)
    assert np.array_equal(found.classes, wanted)
    assert len(found.raws) == num_raws
    room = section.size - 16 - 1 - 2 * num_raws
    assert room <= min(-(-len(classes) // 4), sum(map(bool, classes)) + len(classes) // 64)


@given(st.lists(st.integers(0, NUM_TABLES - 1), min_size=1, max_size=200))
def test_table_ids_come_back(ids: list[int]) -> None:
    wanted = np.array(ids, np.uint8)
    found, num_low_bits = pack_ids(wanted)
    assert np.array_equal(unpack_ids(found, num_low_bits, len(ids)), wanted)
    assert len(found) <= ids_size_max(len(ids))
    by_python = np.zeros(len(found), np.uint8)
    ids_by_loops.write(wanted, num_low_bits, by_python)
    assert np.array_equal(by_python, found)
    for damaged in (found[:-1], np.append(found, np.uint8(0))):
        with pytest.raises(Corrupt):
            unpack_ids(damaged, num_low_bits, len(ids))


@pytest.mark.parametrize("compiled", [ids_by_loops, ids_by_numba])
@pytest.mark.parametrize(
    ("bits", "num_channels"),
    [([0b010], 1), ([0xFE, *[0xFF] * 7, 1], 1), ([0xFE], 1), ([], 1), ([0], 5)],
    ids=["below 0", "above 31", "without end", "none", "too few"],
)
def test_bits_that_are_no_table_ids_are_refused(
    bits: list[int], num_channels: int, compiled: Any
) -> None:
    found = np.array(bits, np.uint8)
    assert compiled.read(found, 0, np.zeros(num_channels, np.uint8)) == -1


def test_runs_of_classes_beyond_the_tokens_are_corrupt() -> None:
    section = np.array([0] * 8 + [1, 0, 0, 0] + [1 << 3, 0, 0, 0] + [0] + [39 << 2 | 1], np.uint8)
    assert kvq_section.parse(section, 40, 1).classes.tolist() == [0] * 39 + [1]
    with pytest.raises(Corrupt, match="classes of 40"):
        kvq_section.parse(section, 39, 1)


def test_what_is_behind_a_section_is_corrupt() -> None:
    longer = np.append(hostile_section(), np.uint8(0))
    with pytest.raises(Corrupt, match="bytes expected"):
        kvq_section.parse(longer, HOSTILE_TOKENS, HOSTILE_CHANNELS)


@pytest.mark.parametrize(
    ("counts", "behind", "problem"),
    [
        ([0, 0, 2], [0, 0, 0], "bytes of classes"),
        ([0, 0, 0], [0b0110, 5, 0, 0, 0], "minimum"),
        ([1, 0, 0], [0, 7, 7], "no channel"),
        ([0, 1, 0], [0, 7, 7], "no channel"),
    ],
)
def test_what_a_section_cannot_say_is_corrupt(
    counts: list[int], behind: list[int], problem: str
) -> None:
    head = np.array([*counts, 1 << 3], "<u4").view(np.uint8)
    section = np.concatenate([head, np.array(behind, np.uint8)])
    with pytest.raises(Corrupt, match=problem):
        kvq_section.parse(section, 1, 1)


def test_table_ids_have_five_low_bits_at_most() -> None:
    for count, num_channels in [(5, 1), (6, 1), (7, 1)]:
        section = np.zeros(16 + -(-(2 + count) // 8), np.uint8)
        section[12] = (section.size - 16) << 3 | count
        if count == 5:
            kvq_section.parse(section, 4, num_channels)
            continue
        with pytest.raises(Corrupt, match="low bits"):
            kvq_section.parse(section, 4, num_channels)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"level": 99}, "level 99"),
        ({"level": 3}, "sections"),
        ({"section_heads": 2}, "sections"),
        ({"codec": "kvq/2"}, "kvq/2"),
        ({"is_exact": True}, "kvq/1 expected"),
    ],
)
def test_a_header_that_is_not_the_levels_is_corrupt(change: dict[str, Any], problem: str) -> None:
    layout, span = layout_of(1, 2, 2, 64), Span(start=0, num_tokens=4)
    codec = Kvq("none", Book())
    bitstream = encoded(codec, real_chunk(layout, 4), layout)
    header = read_header(bitstream)
    parts = [part.content for part in read_sections(bitstream, header, layout, span, Part())]
    other = replace(header, **change)
    rows, columns = other.num_sections(layout)
    out = np.zeros(2 * bitstream.size, np.uint8)
    at, sizes = body_offset(other, layout), []
    for content in parts[: rows * columns]:
        out[at : at + content.size] = content
        at += -(-content.size // 16) * 16
        sizes.append(content.size)
    size = write_head(other, layout, span, sizes, out)
    with pytest.raises(Corrupt, match=problem):
        codec.decode(out[:size], layout, span, np.zeros(layout.size(4), np.uint8))


@pytest.mark.parametrize("compute", BOTH)
def test_a_large_float16_does_not_become_infinite(compute: Kernels) -> None:
    layout, span = layout_of(1, 2, 1, 64, dtype="float16"), Span(start=9, num_tokens=4)
    profile = Book().for_layout(layout)
    steps = np.full_like(profile.steps, 1000)
    book = OneProfile(replace(profile, steps=steps, means=0 * steps, rope=Rope()))
    chunk = np.full(4 * 128, 0x7BFF, np.uint16).view(np.uint8)
    chunk[1::4] = 0xFB
    codec, out = Kvq("none", book, compute=compute), np.zeros(chunk.size, np.uint8)
    codec.decode(encoded(codec, chunk, layout, start=9), layout, span, out)
    assert out.tobytes() == chunk.tobytes()


@pytest.mark.parametrize("compute", BOTH)
def test_a_stream_must_end_where_its_tokens_do(compute: Kernels) -> None:
    content = kvq_section.parse(hostile_section(), HOSTILE_TOKENS, HOSTILE_CHANNELS)

    def decode(num_tokens: int = HOSTILE_TOKENS, **changes: NDArray[Any]) -> None:
        coded = replace(content.coded, **changes)
        compute.decode(coded, content.classes, content.ids, num_tokens)

    words, escapes, states = content.coded.words, content.coded.escapes, content.coded.states
    decode()
    with pytest.raises(Corrupt, match="early"):
        decode(words=words[:-1])
    with pytest.raises(Corrupt, match="longer"):
        decode(words=np.append(words, words[:1]))
    with pytest.raises(Corrupt, match="escape"):
        decode(escapes=escapes[:-1])
    with pytest.raises(Corrupt, match="longer"):
        decode(escapes=np.append(escapes, escapes))
    with pytest.raises(Corrupt):
        decode(states=states + np.uint32(1 << 16))
    # A prefix does not look at what it does not need.
    decode(32, words=np.append(words, words[:1]), escapes=escapes)


# The page.


def test_the_pages_example_is_what_the_code_reads_and_writes() -> None:
    example = PAGE.read_text().split("## Example", 1)[1]
    dump, table = example.split("```")[1], example.split("```")[3]
    found = bytearray()
    for line in dump.strip().splitlines():
        match = re.fullmatch(r"([0-9a-f]{4})  ((?:[0-9a-f]{2} ?)+)", line)
        assert match, line
        assert int(match[1], 16) == len(found)
        found += bytes.fromhex(match[2])
    wanted = np.array([line.split() for line in table.strip().splitlines()], np.int16)
    content = kvq_section.parse(np.frombuffer(bytes(found), np.uint8), *wanted.shape)
    for compute in BOTH:
        symbols = compute.decode(content.coded, content.classes, content.ids, len(wanted))
        assert np.array_equal(symbols, wanted)
    assert str(content.ids.tolist())[1:-1] in example
    assert content.classes.tolist() == [3, 0, 0, 0, 1, 0]
    assert kvq_section.pack(content).tobytes() == found


def test_the_page_names_the_tables_and_the_limits() -> None:
    text = PAGE.read_text()
    assert sha256((Path(roles.__file__).parents[1] / FILE_NAME).read_bytes()).hexdigest() in text
    for number in (TOTAL, 1 << roles.STATE_BITS, roles.SYMBOL_MAX, 65504):
        assert f"{number:,}" in text


# Bytes of this release, for ever.

GOLDEN_LAYOUT = layout_of(4, 2, 4, 8, model="golden")
GOLDEN_LATENT = layout_of(2, 1, 1, 24, dtype="float16", model="golden latent")
GOLDEN_LEVELS = (
    Level(name="none", scale=0.5),
    Level(name="dithered", scale=0.75, is_dithered=True),
    Level(name="head", scale=0.5, transform="head"),
    Level(name="layer", scale=0.75, transform="layer"),
    Level(name="cross", scale=1.0, transform="cross", section_layers=4),
)
# Level, tokens, start, what the chunk holds, whether its layout is the latent one; what it decodes
# to.
GOLDEN = {
    "kvq-none": ("none", 40, 0, "real", False),
    "kvq-dithered": ("dithered", 33, 1000, "real", False),
    "kvq-escapes": ("none", 40, 7, "outliers", False),
    "kvq-holes": ("dithered", 35, 1 << 32, "holes", False),
    "kvq-token": ("none", 1, 500, "real", False),
    "kvq-latent": ("dithered", 37, 2, "real", True),
    "kvq-head": ("head", 34, 0, "real", False),
    "kvq-layer": ("layer", 12, 64, "real", False),
    "kvq-cross": ("cross", 33, 64, "holes", False),
}
GOLDEN_DIGESTS = {
    "kvq-none": "f69b42adc540975aeba1fc7588badeafac3da0ee8d7c43f63ee1e70ffb361899",
    "kvq-dithered": "09e49280d21c7b66a9ba0992923d5000bde0f0244ddfec974d30294b0fd37600",
    "kvq-escapes": "4322adab2491954f403810f0cafa7f3f877aaa5b63e6eff61b758063bcb6b2ff",
    "kvq-holes": "f3a27c34a17b194d6c42d39e73bdccb334d0c6294dd7b4d145ce51eb3072741c",
    "kvq-token": "d240e501565c66f3183e588d4e484caa47fae778bb1875e4ab7017b7469f513d",
    "kvq-latent": "a3825b419e0c77d7a979d11b6d595bac8a194cd73e2c81eacc1ff558f3b84225",
    "kvq-head": "42adc148e4dfb04703108b09f3ee17e7dbdc727bd2d7b32c15db9306050de3f9",
    "kvq-layer": "5b536cc6648f59644ee607fdd26d3741dd221fd1568d060a0e1db3bf7d9b4b64",
    "kvq-cross": "7ac60bb5cb760a6cc1ac8ca81f32dd18095ed666beded90fa17594749fb5367c",
}


def golden(name: str) -> tuple[KVLayout, Span, Bytes, OneProfile]:
    _, num_tokens, start, kind, is_latent = GOLDEN[name]
    layout = GOLDEN_LATENT if is_latent else GOLDEN_LAYOUT
    path = FIXTURES / ("kvq-profile-latent.npz" if is_latent else "kvq-profile.npz")
    book = OneProfile(load_profile(path, layout, GOLDEN_LEVELS))
    return (
        layout,
        Span(start=start, num_tokens=num_tokens),
        _values(kind, layout, num_tokens, 7),
        book,
    )


@pytest.mark.parametrize("compute", BOTH)
@pytest.mark.parametrize("name", GOLDEN)
def test_bytes_of_a_release_decode_for_ever(name: str, compute: Kernels) -> None:
    layout, span, chunk, book = golden(name)
    out = np.zeros(chunk.size, np.uint8)
    bitstream = np.fromfile(FIXTURES / f"{name}.bin", np.uint8)
    Kvq(0, book, compute=compute).decode(bitstream, layout, span, out)
    assert sha256(out.tobytes()).hexdigest() == GOLDEN_DIGESTS[name]


@pytest.mark.parametrize("compute", BOTH)
@pytest.mark.parametrize(
    "name", [name for name in GOLDEN if GOLDEN[name][0] in ("none", "dithered")]
)
def test_the_encoder_writes_what_it_wrote(name: str, compute: Kernels) -> None:
    layout, span, chunk, book = golden(name)
    codec = Kvq(GOLDEN[name][0], book, compute=compute, token_classes=every_third)
    found = encoded(codec, chunk, layout, start=span.start)
    assert found.tobytes() == (FIXTURES / f"{name}.bin").read_bytes()
