"""raw, int8, fp8 and cachegen; the registry that knows them all."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from hashlib import sha256
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kvd.codecs import registry
from kvd.codecs.base import Bytes, Codec, Part, Span
from kvd.codecs.bitstream import read_header, read_sections, write_bitstream
from kvd.codecs.cachegen import Cachegen
from kvd.codecs.cachegen_profile import BINS, GROUP_TOKENS, CachegenProfile, calibrate
from kvd.codecs.float8 import E4M3_MAX, fp8, to_e4m3
from kvd.codecs.int8 import int8
from kvd.codecs.kernels import numba_cachegen, reference_cachegen
from kvd.codecs.raw import Raw
from kvd.codecs.registry import codec_names, decode_any, open_codec, parse
from kvd.codecs.values import narrow, widen
from kvd.errors import Corrupt, InvalidRequest, Unsupported
from kvd.layout import KVLayout
from tests.codec_chunks import (
    bell,
    encoded,
    layout_of,
    noise,
    numbers_of,
    real_chunk,
    sealed,
    stored,
)
from tests.contracts.codec import CodecContract, ContainedCodecContract, numbers_apart

FIXTURES = Path(__file__).parent / "fixtures" / "bitstreams"

TWO_LAYERS = layout_of(2, 1, 2, 64)


class Book:
    """One profile."""

    def __init__(self, profile: object) -> None:
        self.profile = profile

    def for_layout(self, layout: KVLayout) -> object:
        return self.profile

    def by_hash(self, profile_hash: bytes) -> object:
        is_it = isinstance(self.profile, CachegenProfile) and self.profile.hash == profile_hash
        return self.profile if is_it else None


@cache
def profile_of(layout: KVLayout) -> CachegenProfile:
    """Calibrated with two chunks that no test encodes."""
    return calibrate([real_chunk(layout, 60, seed) for seed in (21, 22)], layout)


class TestRaw(CodecContract):
    def open(self, layout: KVLayout) -> Codec:
        return Raw()


class TestInt8(ContainedCodecContract):
    def open(self, layout: KVLayout) -> Codec:
        return int8()

    def assert_near(self, found: Bytes, chunk: Bytes, layout: KVLayout) -> None:
        numbers = numbers_of(chunk, layout)
        if np.isnan(numbers).any():
            assert np.array_equal(np.isnan(numbers_of(found, layout)), np.isnan(numbers))
            return
        apart, magnitudes = numbers_apart(found, chunk, layout)
        # Half a step, rounding of scale and result.
        assert np.all(apart <= magnitudes.max(-1, keepdims=True) / 127 * 0.51 + magnitudes / 128)


class TestFp8(ContainedCodecContract):
    def open(self, layout: KVLayout) -> Codec:
        return fp8()

    def assert_near(self, found: Bytes, chunk: Bytes, layout: KVLayout) -> None:
        numbers = numbers_of(chunk, layout)
        if np.isnan(numbers).any():
            assert np.array_equal(np.isnan(numbers_of(found, layout)), np.isnan(numbers))
            return
        apart, magnitudes = numbers_apart(found, chunk, layout)
        largest = magnitudes.max((2, 4), keepdims=True)
        assert np.all(apart <= magnitudes * (1 / 16 + 1 / 128) + largest / 448 * 2.0**-9)


class TestCachegen(ContainedCodecContract):
    def open(self, layout: KVLayout) -> Codec:
        return Cachegen(Book(profile_of(layout)))

    def assert_near(self, found: Bytes, chunk: Bytes, layout: KVLayout) -> None:
        numbers = numbers_of(chunk, layout)
        if np.isnan(numbers).any():
            assert np.isfinite(numbers_of(found, layout)).all()
            return
        apart, magnitudes = numbers_apart(found, chunk, layout)
        steps = profile_of(layout).steps[:, :, None]
        anchored = np.zeros(apart.shape[2], bool)
        anchored[::GROUP_TOKENS] = True
        largest = magnitudes.max(-1, keepdims=True)
        bound = np.where(anchored[:, None, None], largest / 127 * 0.51, steps * 0.51)
        assert np.all(apart <= bound + magnitudes / 128)


@pytest.mark.parametrize("make", [int8, fp8, lambda: Cachegen(Book(None))])
def test_lossy_codecs_keep_floats_only(make: Callable[[], Codec]) -> None:
    layout = layout_of(1, 2, 1, 64, dtype="int8")
    with pytest.raises(Unsupported, match="the layout has int8"):
        encoded(make(), np.zeros(layout.size(4), np.uint8), layout)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("make", [int8, fp8])
def test_the_largest_numbers_stay_finite(dtype: str, make: Callable[[], Codec]) -> None:
    layout = layout_of(1, 1, 1, 64, dtype=dtype)
    numbers = np.full((1, 1, 2, 1, 64), np.inf, np.float32)
    largest = {"bfloat16": 0x7F7F, "float16": 0x7BFF, "float32": 0x7F7FFFFF}[dtype]
    chunk = stored(numbers, dtype)
    words = chunk.view(np.uint32 if dtype == "float32" else np.uint16)
    words[::3] = largest
    codec = make()
    bitstream = encoded(codec, chunk, layout)
    out = np.empty_like(chunk)
    codec.decode(bitstream, layout, Span(start=0, num_tokens=2), out)
    found = numbers_of(out, layout)
    # Infinities become the largest number of what shares a scale.
    assert np.isfinite(found).all()
    assert found.min() >= numbers_of(chunk, layout)[0, 0, 0, 0, 0] * 0.99


def test_rates_are_what_the_pages_say() -> None:
    layout = layout_of(2, 2, 2, 128)
    chunk = real_chunk(layout, 256)
    assert encoded(int8(), chunk, layout).size * 8 / (chunk.size / 2) < 8.14
    assert encoded(fp8(), chunk, layout).size * 8 / (chunk.size / 2) < 8.02
    assert encoded(Raw(), chunk, layout).size == chunk.size
    assert encoded(Cachegen(Book(profile_of(layout))), chunk, layout).size < chunk.size / 3


def test_e4m3_is_the_nearest_and_ties_go_to_even() -> None:
    codes = np.arange(127, dtype=np.uint8)
    layout = layout_of(1, 1, 1, 127, dtype="float32")
    # The largest is 448, so the scale is 1 and decoding shows the numbers.
    numbers = np.zeros(127, np.float32)
    bitstream = encoded(fp8(), np.full(127, 448, np.float32).view(np.uint8), layout).copy()
    bitstream[180 : 180 + 127] = codes
    out = numbers.view(np.uint8)
    fp8().decode(sealed(bitstream, 1), layout, Span(start=0, num_tokens=1), out)
    assert numbers[126] == E4M3_MAX
    assert numbers[1] == 2.0**-9
    assert np.array_equal(to_e4m3(numbers), codes)
    assert np.array_equal(to_e4m3(-numbers), codes | 0x80)
    halves = ((numbers[1:] + numbers[:-1]) / 2).astype(np.float32)
    assert np.array_equal(to_e4m3(halves), codes[:-1] + codes[:-1] % 2)
    assert np.array_equal(to_e4m3(np.nextafter(halves, np.float32(0))), codes[:-1])
    assert np.array_equal(to_e4m3(np.nextafter(halves, np.float32(999))), codes[1:])
    assert to_e4m3(np.array([np.inf, np.nan, 1e9], np.float32)).tolist() == [126, 127, 126]


@pytest.mark.parametrize("dtype", [np.uint16, np.float16])
def test_narrow_rounds_to_the_nearest_even(dtype: type) -> None:
    every: NDArray[Any] = np.arange(65536, dtype=np.uint16).view(dtype)
    numbers = widen(every)
    finite = np.isfinite(numbers)
    assert np.array_equal(narrow(numbers, dtype)[finite], every[finite])
    assert np.isnan(widen(narrow(numbers, dtype)))[np.isnan(numbers)].all()
    payloads = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001], np.uint32).view(np.float32)
    assert np.isnan(widen(narrow(payloads, dtype))).all()
    ordered = np.sort(numbers[finite & (numbers >= 0)])
    middle = ((ordered[1:].astype(np.float64) + ordered[:-1]) / 2).astype(np.float32)
    found = narrow(middle, dtype).view(np.uint16)
    assert np.all(found[: middle.size] % 2 == 0)
    up = widen(narrow(np.nextafter(middle, np.float32(np.inf)), dtype))
    assert np.array_equal(up, ordered[1:])


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("make", [int8, fp8])
def test_a_scale_that_is_no_positive_number_is_corrupt(at: int, make: Callable[[], Codec]) -> None:
    layout = layout_of(1, 1, 1, 64)
    codec = make()
    bitstream = encoded(codec, real_chunk(layout, 1), layout).copy()
    size = 2 if codec.name == "int8/1" else 4
    bad = (b"\x80\x7f", b"\x00\x80") if size == 2 else (b"\0\0\x80\x7f", b"\0\0\x80\xbf")
    bitstream[176 : 176 + size] = np.frombuffer(bad[at], np.uint8)
    with pytest.raises(Corrupt, match="no positive number"):
        codec.decode(
            sealed(bitstream, 1), layout, Span(start=0, num_tokens=1), np.empty(128, np.uint8)
        )


@pytest.mark.parametrize("make", [int8, fp8, lambda: Cachegen(Book(profile_of(TWO_LAYERS)))])
@pytest.mark.parametrize("changes", [{"section_layers": 2}, {"section_heads": 1}, {"level": 1}])
def test_sections_of_another_shape_are_corrupt(
    make: Callable[[], Codec], changes: dict[str, Any]
) -> None:
    codec = make()
    whole = encoded(codec, real_chunk(TWO_LAYERS, 5), TWO_LAYERS)
    span = Span(start=0, num_tokens=5)
    header = read_header(whole)
    content = next(read_sections(whole, header, TWO_LAYERS, span, Part())).content
    out = np.zeros(10_000, np.uint8)

    def write_section(_layers: range, _heads: range, target: Bytes) -> int:
        target[: content.size] = content
        return content.size

    size = write_bitstream(replace(header, **changes), TWO_LAYERS, span, out, write_section)
    with pytest.raises(Corrupt, match=r"expected|neither levels"):
        codec.decode(out[:size], TWO_LAYERS, span, np.zeros(TWO_LAYERS.size(5), np.uint8))


@pytest.mark.parametrize(
    ("at", "value", "reason"),
    [(176, b"\x80\x7f", "no positive number"), (178, bytes(4), "a state of 0")],
)
def test_what_no_encoder_of_cachegen_leaves_is_corrupt(at: int, value: bytes, reason: str) -> None:
    layout = layout_of(1, 1, 1, 64)
    codec = Cachegen(Book(profile_of(layout)))
    bitstream = encoded(codec, real_chunk(layout, 5), layout).copy()
    bitstream[at : at + len(value)] = np.frombuffer(value, np.uint8)
    span = Span(start=0, num_tokens=5)
    with pytest.raises(Corrupt, match=reason):
        codec.decode(sealed(bitstream, 1), layout, span, np.zeros(layout.size(5), np.uint8))


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (7, 33), (64, 96)])
@pytest.mark.parametrize("seed", range(3))
def test_cachegen_kernels_agree(shape: tuple[int, int], seed: int) -> None:
    tokens, channels = shape
    rows = 1 + (noise(2 * channels * 256, seed) % np.uint64(63)).astype(np.int64)
    rows = rows.reshape(2, channels, 256)
    rows[..., 128] += 2**14 - rows.sum(-1)
    cumulative = np.zeros((2, channels, 257), np.uint16)
    np.cumsum(rows, axis=-1, out=cumulative[..., 1:])
    symbols = np.clip(128 + 20 * bell(tokens * channels, seed), 0, 255).astype(np.uint8)
    symbols = symbols.reshape(shape)
    kinds = (np.arange(tokens) % 10 == 0).astype(np.uint8)
    coded = reference_cachegen.encode(symbols, kinds, cumulative)
    fast = numba_cachegen.encode(symbols, kinds, cumulative)
    assert all(np.array_equal(one, other) for one, other in zip(coded, fast, strict=True))
    kernels: Any
    for kernels in (reference_cachegen, numba_cachegen):
        found = kernels.decode(*coded, kinds, cumulative, is_whole=True)
        assert np.array_equal(found, symbols)
        first = kernels.decode(*coded, kinds[:1], cumulative, is_whole=False)
        assert np.array_equal(first, symbols[:1])
        if coded[1].size:
            for words in (coded[1][:-1], np.append(coded[1], np.uint16(0))):
                with pytest.raises(Corrupt):
                    kernels.decode(coded[0], words, kinds, cumulative, is_whole=True)


def test_cachegen_without_a_profile_is_unsupported() -> None:
    layout = layout_of(2, 2, 1, 64)
    chunk = real_chunk(layout, 20)
    with pytest.raises(Unsupported, match="no profile of cachegen/1"):
        encoded(Cachegen(Book(None)), chunk, layout)
    bitstream = encoded(Cachegen(Book(profile_of(layout))), chunk, layout)
    span = Span(start=0, num_tokens=20)
    with pytest.raises(Unsupported, match="no profile of cachegen/1"):
        Cachegen(Book(None)).decode(bitstream, layout, span, np.empty_like(chunk))
    with pytest.raises(Unsupported, match="another shape"):
        encoded(Cachegen(Book(profile_of(layout_of(2, 2, 2, 64)))), chunk, layout)


def test_cachegen_keeps_early_layers_finer() -> None:
    layout = layout_of(3, 1, 1, 16)
    profile = profile_of(layout)
    steps = calibrate([real_chunk(layout, 60, seed) for seed in (21, 22)], layout, bins=(1,)).steps
    for layer, size in enumerate(BINS):
        assert np.allclose(profile.steps[layer], steps[layer] * size)


def test_a_profile_that_cannot_be_is_refused() -> None:
    profile = profile_of(layout_of(1, 1, 1, 4))
    frequencies = profile.frequencies.copy()
    frequencies[0, 0, 0, 0, 0, 0] = 0
    for changes in (
        {"frequencies": frequencies},
        {"frequencies": profile.frequencies + np.uint16(1)},
        {"steps": -profile.steps},
        {"steps": profile.steps[:, :, :, :1]},
    ):
        with pytest.raises(InvalidRequest):
            replace(profile, **changes)


GOLDEN = {
    "int8": "66a4cbfa2c270823d63be84064bacb5f0352d24c88a79dfee83fdbfdf12b16a9",
    "fp8": "4ce48bd0b6a39750fed5cadf1ecb6f6f37876e04f02bdbf279a467e12881f8c1",
    "cachegen": "08d2231df73f0ab22dd969d337167eb4342282151d0181950b96b5a868ce577f",
}


def golden_codec(name: str, layout: KVLayout) -> Codec:
    if name != "cachegen":
        return open_codec(name)
    with np.load(FIXTURES / "cachegen-profile.npz", allow_pickle=False) as arrays:
        profile = CachegenProfile(
            layout=layout, steps=arrays["steps"], frequencies=arrays["frequencies"]
        )
    return Cachegen(Book(profile))


@pytest.mark.parametrize("name", GOLDEN)
def test_bitstreams_of_a_released_version_decode_for_ever(name: str) -> None:
    layout = layout_of(2, 2, 2, 8)
    golden = np.fromfile(FIXTURES / f"{name}-tiny.bin", np.uint8)
    codec = golden_codec(name, layout)
    chunk = real_chunk(layout, 23)
    assert encoded(codec, chunk, layout, start=512).tobytes() == golden.tobytes()
    out = np.empty_like(chunk)
    codec.decode(golden, layout, Span(start=512, num_tokens=23), out)
    assert sha256(out.tobytes()).hexdigest() == GOLDEN[name]


def test_a_spec_is_a_name_and_perhaps_a_level() -> None:
    assert parse("raw") == ("raw", None)
    assert parse("kvq:2") == ("kvq", "2")
    assert parse("kvq:2-head") == ("kvq", "2-head")
    for spec in ("", ":2", "kvq:"):
        with pytest.raises(Unsupported, match="a codec like"):
            parse(spec)


def test_our_own_codecs_are_there() -> None:
    assert codec_names() == ["bf16", "cachegen", "fp8", "int8", "kvq", "raw"]
    names = [open_codec(name, Book(None)).name for name in codec_names()]
    assert names == ["bf16/1", "cachegen/1", "fp8/1", "int8/1", "kvq/1", "raw"]


def test_a_level_where_there_are_none_is_unsupported() -> None:
    with pytest.raises(Unsupported, match="bf16 has no levels"):
        open_codec("bf16:2")


def test_a_codec_that_needs_profiles_says_so() -> None:
    for spec in ("kvq:2", "cachegen"):
        with pytest.raises(Unsupported, match="needs profiles"):
            open_codec(spec)


def installed(monkeypatch: pytest.MonkeyPatch, *points: EntryPoint) -> None:
    """Another package's entry points, as the installer would have put them."""
    found = EntryPoints(points)
    monkeypatch.setattr(registry, "entry_points", lambda **by: found.select(**by))


class Theirs(Raw):
    """A codec of another package."""

    def __init__(self, level: str | None, profiles: object) -> None:
        self.level = level


def test_a_codec_of_another_package_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, EntryPoint("theirs", f"{__name__}:Theirs", registry.GROUP))
    codec = open_codec("theirs:fast")
    assert type(codec).__name__ == "Theirs"
    assert vars(codec) == {"level": "fast"}
    assert "theirs" in codec_names()


def test_a_name_that_is_none_lists_those_that_are(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Unsupported, match="'zip' does not exist here; there is: bf16, cachegen"):
        open_codec("zip")
    installed(monkeypatch, EntryPoint("broken", "kvd.nowhere:Codec", registry.GROUP))
    with pytest.raises(Unsupported, match="'broken' cannot be loaded"):
        open_codec("broken")


@pytest.mark.parametrize("spec", ["bf16", "fp8", "int8"])
def test_any_bitstream_is_decoded_by_the_codec_it_names(spec: str) -> None:
    layout = layout_of(2, 2, 1, 64)
    chunk = real_chunk(layout, 9)
    codec = open_codec(spec)
    bitstream = encoded(codec, chunk, layout)
    span = Span(start=0, num_tokens=9)
    expected, found = np.zeros_like(chunk), np.zeros_like(chunk)
    codec.decode(bitstream, layout, span, expected, Part(token_end=5))
    decode_any(bitstream, layout, span, found, Part(token_end=5))
    assert expected.tobytes() == found.tobytes()


@pytest.mark.parametrize("name", [b"int8/2", b"zip/1"])
def test_a_codec_or_a_version_that_is_not_here_is_unsupported(name: bytes) -> None:
    layout = layout_of(1, 1, 1, 64)
    bitstream = encoded(int8(), real_chunk(layout, 2), layout).copy()
    bitstream[16:32] = np.frombuffer(name.ljust(16, b"\0"), np.uint8)
    with pytest.raises(Unsupported):
        decode_any(
            sealed(bitstream, 1),
            layout,
            Span(start=0, num_tokens=2),
            np.empty(layout.size(2), np.uint8),
        )


def test_importing_the_registry_loads_no_kernels() -> None:
    code = "import sys, kvd.codecs.registry; print('numba' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
