"""kvq/1 in Triton: the same bytes and bits as numpy's reference, and nothing touched outside.

Here are two kinds of tests. Triton's interpreter has to be on before triton is imported, so those
that need it stand in a class that is collected in a process of its own. The compiler needs no GPU
to compile for one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks import codecs_gpu
from kvd.codecs import gpu
from kvd.codecs.base import Bytes, Span
from kvd.codecs.bitstream import body_offset, read_header
from kvd.codecs.kernels import reference
from kvd.codecs.kvq import Kvq
from kvd.codecs.profile import Rope
from kvd.errors import Corrupt, InvalidRequest, KvdError, Unsupported
from kvd.layout import KVLayout
from tests.codec_chunks import bell, encoded, layout_of, noise, real_chunk, sealed, stored
from tests.codec_data import Book, OneProfile
from tests.test_codecs_kvq import FIXTURES, GOLDEN, GOLDEN_DIGESTS, golden

ROOT = Path(__file__).parents[1]
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

pytest.importorskip("torch")
pytest.importorskip("triton", reason="triton is not installed")


# In this process.


@pytest.mark.skipif(IS_INTERPRETED, reason="this is the other process")
def test_the_kernels_do_what_the_reference_does() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", f"{__file__}::TestInterpreted"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout[-6000:] + found.stderr[-2000:]


@pytest.mark.skipif(IS_INTERPRETED, reason="an interpreter compiles nothing")
def test_the_kernels_compile_for_a_gpu_and_fuse_nothing(tmp_path: Path) -> None:
    code = "from tests import test_codecs_triton as t; t.compile_all()"
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr[-6000:]


@pytest.mark.skipif(IS_INTERPRETED, reason="an interpreter needs no GPU")
def test_without_a_gpu_it_says_so() -> None:
    layout, span = layout_of(1, 2, 1, 4), Span(start=0, num_tokens=2)
    with pytest.raises(Unsupported, match="not on cpu"):
        gpu.encode_on_device([chunk_of(layout, 2)], layout, [span], Book(), "none")


@pytest.mark.skipif(IS_INTERPRETED, reason="nothing is measured then")
def test_the_benchmark_says_that_there_is_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert codecs_gpu.main([]) == 0
    assert capsys.readouterr().out.count("no CUDA device") == len(codecs_gpu.TARGETS)


def test_without_triton_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kvd.codecs.kernels.triton_kvq", None)
    monkeypatch.delattr("kvd.codecs.kernels.triton_kvq", raising=False)
    layout, span = layout_of(1, 2, 1, 4), Span(start=0, num_tokens=2)
    with pytest.raises(Unsupported, match="needs torch and triton"):
        gpu.encode_on_device([chunk_of(layout, 2)], layout, [span], Book(), "none")


# Compiled.

TYPES = {
    **dict.fromkeys(("stream", "classes", "by_class", "ids"), "*u8"),
    **dict.fromkeys(("sections", "parts", "offsets"), "*i64"),
    **dict.fromkeys(("order", "slots", "ranks", "costs", "spans", "states", "counts"), "*i32"),
    **dict.fromkeys(("supports", "turns"), "*i32"),
    **dict.fromkeys(("symbols", "room"), "*i16"),
    **dict.fromkeys(("means", "steps", "cos", "sin", "bases"), "*fp32"),
}


def compile_all() -> None:
    """For an H100. Whoever calls a kernel without its options finds fused sums."""
    from kvd.codecs.kernels import triton_kvq as launched
    from kvd.codecs.kernels import triton_kvq_coder as coder
    from kvd.codecs.kernels import triton_kvq_numbers as numbers
    from kvd.codecs.kernels import triton_kvq_side as side

    one, row = dict(launched.ONE_WARP), {"num_warps": 4, **launched.EXACT}
    block = {"BLOCK_TOKENS": 16, "BLOCK_DIM": 16}
    tile = {"BLOCK_TOKENS": 16, "BLOCK_CHANNELS": 16, "BLOCK_SUM": 16}
    compiled(side.read_side, one, BLOCK=32)
    compiled(coder.decode, one)
    compiled(coder.choose_tables, one, BLOCK=16)
    compiled(coder.encode, one)
    compiled(coder.escape, one, BLOCK=32)
    compiled(coder.collect, {}, {"out": "*i16"}, BLOCK=256)
    for has_basis in (False, True):
        kind = "*fp32" if has_basis else "*i16"
        flags = {"HAS_BASIS": has_basis, "IS_DITHERED": not has_basis, "IS_HALF": has_basis}
        ptx = compiled(numbers.restore, row, {"source": kind}, **flags, **block)
        assert "fma." not in ptx
        ptx = compiled(numbers.normalise, row, {"out": kind}, **flags, **block)
        assert "fma." not in ptx
        assert "div.rn.f32" in ptx
    loose = compiled(
        numbers.restore,
        {**row, "enable_fp_fusion": True},
        {"source": "*i16"},
        HAS_BASIS=False,
        IS_DITHERED=False,
        IS_HALF=False,
        **block,
    )
    assert "fma." in loose, "this test would not see a fused sum"
    for is_inverse in (False, True):
        types = (
            {"source": "*i16", "out": "*fp32"} if is_inverse else {"source": "*fp32", "out": "*i16"}
        )
        ptx = compiled(
            numbers.transform, {}, types, IS_INVERSE=is_inverse, IS_DITHERED=True, **tile
        )
        assert "tf32" not in ptx


def compiled(
    kernel: Any, options: dict[str, Any], types: dict[str, str] | None = None, **constants: Any
) -> str:
    """The PTX of a kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    known = {**TYPES, **(types or {})}
    signature = {
        found.name: "constexpr" if found.is_constexpr else known.get(found.name, "i32")
        for found in kernel.params
    }
    source = ASTSource(kernel, signature, constexprs=constants)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert len(built.asm["cubin"])
    return str(built.asm["ptx"])


# Interpreted.

# Layers, planes, heads, dim | tokens, start | level, dtype, style | what the chunk holds.
CASES = [
    ((1, 1, 1, 1), 1, 500, "none", "bfloat16", "half", "real"),
    ((1, 2, 1, 3), 33, 0, "none", "bfloat16", "half", "real"),
    ((2, 2, 2, 4), 5, 2, "dithered", "float16", "pairs", "holes"),
    ((1, 1, 1, 16), 40, 9, "none", "bfloat16", "half", "outliers"),
    ((1, 2, 1, 8), 4, 9, "fine", "bfloat16", "half", "real"),
    ((1, 1, 1, 4), 34, (1 << 32) - 3, "dithered", "bfloat16", "half", "wide"),
    ((1, 1, 1, 4), 9, 1, "none", "float16", "half", "wide"),
    ((1, 2, 1, 8), 6, 7, "none", "bfloat16", "half", "zero"),
]
TRANSFORMS = [
    ((3, 2, 1, 4), 6, 7, "cross", "bfloat16", "half", "real"),
    ((2, 2, 2, 4), 5, 2, "head", "float16", "pairs", "holes"),
    ((1, 2, 2, 9), 3, 70, "layer", "bfloat16", "half", "real"),
]
HOSTILE_TOKENS = 35


class TestInterpreted:
    __test__ = IS_INTERPRETED

    @pytest.fixture(autouse=True)
    def _bounds(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        # What is masked out, and what is not finite, may compute to anything.
        self.bounds = Bounds(monkeypatch)
        with np.errstate(all="ignore"):
            yield
        assert self.bounds.num_seen, "no kernel ran"

    @pytest.mark.parametrize("name", GOLDEN)
    def test_bytes_of_a_release_decode_to_the_same_bits(self, name: str) -> None:
        layout, span, chunk, book = golden(name)
        bitstream = np.fromfile(FIXTURES / f"{name}.bin", np.uint8)
        (found,) = self.decode([bitstream], layout, [span], book)
        if GOLDEN[name][0] in ("none", "dithered"):
            assert sha256(found.tobytes()).hexdigest() == GOLDEN_DIGESTS[name]
        wanted = np.zeros(chunk.size, np.uint8)
        Kvq(0, book, compute=reference).decode(bitstream, layout, span, wanted)
        assert_near(found, wanted)

    def test_the_encoder_writes_what_a_release_wrote(self) -> None:
        for name in ("kvq-latent", "kvq-token"):
            layout, span, chunk, book = golden(name)
            classes = np.zeros((layout.num_layers, span.num_tokens, layout.num_kv_heads), np.uint8)
            classes[:, ::3] = 1
            classes[:, 1::9] = 2
            level = GOLDEN[name][0]
            found = self.encode([chunk], layout, [span], book, level, [classes])
            assert found[0].tobytes() == (FIXTURES / f"{name}.bin").read_bytes()

    @pytest.mark.parametrize("case", [*CASES, *TRANSFORMS])
    def test_both_ways_are_the_references(self, case: tuple[Any, ...]) -> None:
        layout, span, chunk, book = made(case)
        codec = Kvq(case[3], book, compute=reference)
        bitstream = encoded(codec, chunk, layout, start=span.start)
        (found,) = self.encode([chunk], layout, [span], book, case[3])
        # With a transform a symbol could differ; of so few none does.
        assert found.tobytes() == bitstream.tobytes()
        wanted = np.zeros(chunk.size, np.uint8)
        codec.decode(bitstream, layout, span, wanted)
        (decoded,) = self.decode([bitstream], layout, [span], book)
        if case in CASES:
            assert decoded.tobytes() == wanted.tobytes()
        assert_near(decoded, wanted)

    def test_a_basis_that_is_not_symmetric_is_used_the_right_way_round(self) -> None:
        layout, span, chunk, book = made(((1, 2, 1, 4), 6, 40, "head", "bfloat16", "half", "real"))
        profile = book.for_layout(layout)
        bases = {"head": np.roll(profile.bases["head"], 1, axis=-2)}
        turned = OneProfile(replace(profile, bases=bases))
        codec = Kvq("head", turned, compute=reference)
        bitstream = encoded(codec, chunk, layout, start=span.start)
        (found,) = self.encode([chunk], layout, [span], turned, "head")
        assert found.tobytes() == bitstream.tobytes()
        wanted = np.zeros(chunk.size, np.uint8)
        codec.decode(bitstream, layout, span, wanted)
        assert_near(self.decode([bitstream], layout, [span], turned)[0], wanted)

    def test_the_largest_symbol_is_the_references(self) -> None:
        means = [32766.5, 32767, 32767.49, 32767.5, 32768, 1e9]
        # Channels of zeros beside it, or no section would be worth coding.
        layout, span = layout_of(6, 1, 2, 8), Span(start=9, num_tokens=8)
        profile = Book().for_layout(layout)
        signed = np.zeros_like(profile.means)
        signed[:, 0, 0, 0], signed[:, 0, 1, 0] = means, [-mean for mean in means]
        steps = np.ones_like(signed)
        book = OneProfile(replace(profile, means=signed, steps=steps, rope=Rope()))
        chunk = np.zeros(layout.size(8), np.uint8)
        wanted = encoded(Kvq("none", book, compute=reference), chunk, layout, start=9)
        (found,) = self.encode([chunk], layout, [span], book, "none")
        assert found.tobytes() == wanted.tobytes()

    def test_ties_go_to_the_even_neighbour(self) -> None:
        layout, span = layout_of(1, 1, 1, 4), Span(start=9, num_tokens=2)
        profile = Book().for_layout(layout)
        ones = np.ones_like(profile.means)
        changed = replace(profile, means=ones, steps=2 * ones, rope=Rope())
        book = OneProfile(changed)
        # 301, 301, 305, 305 behind the codec: in bfloat16 between two neighbours.
        numbers = np.array([[300, 302, 304, 306]] * 2, np.float32)
        chunk = stored(numbers, "bfloat16").copy()
        bitstream = encoded(Kvq("none", book, compute=reference), chunk, layout, start=9)
        (found,) = self.decode([bitstream], layout, [span], book)
        wanted = np.array([[300, 300, 304, 304]] * 2, np.float32)
        assert found.tobytes() == stored(wanted, "bfloat16").tobytes()

    def test_chunks_of_many_lengths_and_levels_go_together(self) -> None:
        layout = layout_of(2, 2, 1, 4)
        book = Book("cross")
        spans = [Span(start=at, num_tokens=n) for at, n in ((0, 5), (5, 33), (100, 1), (7, 2))]
        chunks = [real_chunk(layout, span.num_tokens, seed) for seed, span in enumerate(spans)]
        codecs = [
            Kvq(level, book, compute=reference) for level in ("none", "none", "dithered", "cross")
        ]
        bitstreams, wanted = [], []
        for codec, chunk, span in zip(codecs, chunks, spans, strict=True):
            bitstreams.append(encoded(codec, chunk, layout, start=span.start))
            wanted.append(np.zeros(chunk.size, np.uint8))
            codec.decode(bitstreams[-1], layout, span, wanted[-1])
        found = self.decode(bitstreams, layout, spans, book)
        for index in range(3):
            assert found[index].tobytes() == wanted[index].tobytes()
        assert_near(found[3], wanted[3])
        written = self.encode(chunks[:2], layout, spans[:2], book, "none")
        assert [one.tobytes() for one in written] == [one.tobytes() for one in bitstreams[:2]]

    def test_hostile_sections_are_corrupt_where_the_reference_says_so(self) -> None:
        layout, bitstream, book = hostile()
        span = Span(start=9, num_tokens=HOSTILE_TOKENS)
        codec = Kvq(0, book, compute=reference)
        outcomes = set()
        for damaged in damages(bitstream, body_offset(read_header(bitstream), layout)):
            wanted = np.zeros(layout.size(HOSTILE_TOKENS), np.uint8)
            is_corrupt = fails(codec.decode, damaged, layout, span, wanted)
            outcomes.add(is_corrupt)
            if is_corrupt:
                with pytest.raises(Corrupt):
                    self.decode([damaged], layout, [span], book)
            else:
                (found,) = self.decode([damaged], layout, [span], book)
                assert found.tobytes() == wanted.tobytes()
        assert outcomes == {True, False}

    def test_a_checksum_counts_unless_the_transport_compared_it(self) -> None:
        layout, bitstream, book = hostile()
        spans = [Span(start=9, num_tokens=HOSTILE_TOKENS)]
        damaged = bitstream.copy()
        # In the raw token, the last of the section.
        (size,) = damaged[156:160].view("<u4")
        damaged[body_offset(read_header(bitstream), layout) + int(size) - 2] ^= 1
        with pytest.raises(Corrupt, match="checksum"):
            self.decode([damaged], layout, spans, book)
        found = self.decode([damaged], layout, spans, book, is_verified=True)[0]
        wanted = self.decode([bitstream], layout, spans, book)[0]
        assert (found != wanted).sum() == 1

    def test_what_does_not_fit_is_refused(self) -> None:
        layout, bitstream, book = hostile()
        span = Span(start=9, num_tokens=HOSTILE_TOKENS)
        other = OneProfile(replace(book.for_layout(layout), hash=bytes(32)))
        with pytest.raises(Unsupported, match="profile"):
            self.decode([bitstream], layout, [span], other)
        with pytest.raises(Corrupt, match="another chunk"):
            self.decode([bitstream], layout, [replace(span, start=10)], book)
        with pytest.raises(Corrupt, match=r"kvq/1"):
            self.decode([header_with(bitstream, 16, ord("x"))], layout, [span], book)
        with pytest.raises(Corrupt, match="level 99"):
            self.decode([header_with(bitstream, 12, 99)], layout, [span], book)
        with pytest.raises(InvalidRequest, match="expected, found"):
            gpu.decode_to_device([bitstream], layout, [span], book, [chunk_of(layout, 3)])
        target = [chunk_of(layout, HOSTILE_TOKENS)]
        with pytest.raises(InvalidRequest, match="2 bitstreams"):
            gpu.decode_to_device([bitstream] * 2, layout, [span], book, target)
        wide = replace(layout, dtype="float32")
        with pytest.raises(Unsupported, match="float32"):
            gpu.encode_on_device(target, wide, [span], book, 0)
        self.decode([bitstream], layout, [span], book)

    @pytest.mark.parametrize("shape", [((1, 2, 1, 40_000), 1), ((1, 1, 1, 1), 70_000)])
    def test_what_no_grid_has_room_for_is_refused(self, shape: tuple[Any, int]) -> None:
        layout, num_tokens = layout_of(*shape[0]), shape[1]
        with pytest.raises(Unsupported, match="at most on a GPU"):
            gpu.encode_on_device(
                [chunk_of(layout, num_tokens)],
                layout,
                [Span(start=0, num_tokens=num_tokens)],
                Book(),
                "none",
            )
        self.bounds.num_seen += 1

    @pytest.mark.parametrize("level", ["none", "layer"])
    def test_the_benchmark_runs(self, level: str) -> None:
        scale = codecs_gpu.Scale(
            num_layers=1, num_heads=1, dim=2, num_tokens=2, num_chunks=2, rounds=1, levels=(level,)
        )
        figures, rows = codecs_gpu.measure("cpu", scale)
        assert len(figures) == (len(codecs_gpu.TARGETS) if level == "none" else 0)
        assert rows[0]["same"]
        assert all(value for value in rows[0].values())

    def decode(
        self,
        bitstreams: list[Bytes],
        layout: KVLayout,
        spans: list[Span],
        book: Any,
        **options: bool,
    ) -> list[NDArray[np.uint16]]:
        outs = [chunk_of(layout, span.num_tokens) for span in spans]
        with self.bounds.around(*outs):
            gpu.decode_to_device(bitstreams, layout, spans, book, outs, **options)
        return [bits_of(out) for out in outs]

    def encode(
        self,
        chunks: list[Bytes],
        layout: KVLayout,
        spans: list[Span],
        book: Any,
        level: int | str,
        classes: list[NDArray[np.uint8]] | None = None,
    ) -> list[Bytes]:
        given = [
            chunk_of(layout, span.num_tokens, chunk)
            for chunk, span in zip(chunks, spans, strict=True)
        ]
        with self.bounds.around(*given):
            return gpu.encode_on_device(given, layout, spans, book, level, classes=classes)


class Bounds:
    """Fails a kernel that reads or writes outside of the tensors that it was given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from triton.runtime import interpreter

        self.num_seen = 0
        self._chunks: list[Any] = []
        self._is_on = False
        self._ranges = np.empty((0, 2), np.uint64)
        launch = interpreter.GridExecutor.__call__
        load = interpreter.InterpreterBuilder.create_masked_load
        store = interpreter.InterpreterBuilder.create_masked_store

        def launched(executor: Any, *args: Any, **kwargs: Any) -> Any:
            if executor.fn.__name__ in ("normalise", "restore"):
                assert kwargs["enable_fp_fusion"] is False, "sums would be fused on a GPU"
            tensors = [arg for arg in (*args, *self._chunks) if hasattr(arg, "data_ptr")]
            ends = [(one.data_ptr(), one.data_ptr() + one.nbytes) for one in tensors]
            self._ranges = np.array(ends, np.uint64)
            return launch(executor, *args, **kwargs)

        def loaded(builder: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
            self._check(ptrs, mask)
            return load(builder, ptrs, mask, *rest)

        def written(builder: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self._check(ptrs, mask)
            return store(builder, ptrs, value, mask, *rest)

        monkeypatch.setattr(interpreter.GridExecutor, "__call__", launched)
        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", loaded)
        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_store", written)

    @contextmanager
    def around(self, *chunks: Any) -> Iterator[None]:
        """Kernels may touch these too: they have their addresses."""
        self._chunks, self._is_on = list(chunks), True
        try:
            yield
        finally:
            self._is_on = False

    def _check(self, ptrs: Any, mask: Any) -> None:
        self.num_seen += 1
        if not self._is_on:
            return
        size = ptrs.get_element_ty().primitive_bitwidth // 8
        found = np.broadcast_to(ptrs.data, mask.data.shape)[mask.data.astype(bool)]
        starts, ends = self._ranges[:, 0, None], self._ranges[:, 1, None]
        inside = ((found >= starts) & (found + np.uint64(size) <= ends)).any(axis=0)
        assert inside.all(), "a kernel reaches outside of its tensors"


def made(case: tuple[Any, ...]) -> tuple[KVLayout, Span, Bytes, Book]:
    shape, num_tokens, start, level, dtype, style, kind = case
    layout = layout_of(*shape, dtype=dtype)
    chunk = values(kind, layout, num_tokens)
    return layout, Span(start=start, num_tokens=num_tokens), chunk, Book(level, style)


def values(kind: str, layout: KVLayout, num_tokens: int) -> Bytes:
    count = layout.size(num_tokens) // 2
    if kind == "zero":
        return np.zeros(2 * count, np.uint8)
    if kind == "wide":
        exponents = (noise(count, 7) % np.uint64(32)).astype(np.int32) - 14
        return stored(np.ldexp(bell(count, 7), exponents), layout.dtype).copy()
    chunk = real_chunk(layout, num_tokens, 7).copy()
    if kind == "outliers":
        chunk.view(np.uint16)[::97] = 0x447A
    if kind == "holes":
        chunk.view(np.uint16)[[3, count // 2, count - 1]] = [0x7F81, 0xFC00, 0x7C01]
    return chunk


def hostile() -> tuple[KVLayout, Bytes, Book]:
    """A section with all there can be: classes, escapes, a raw token, a channel of zeros."""
    layout, book = layout_of(1, 1, 1, 5, model="hostile"), Book()
    span = Span(start=9, num_tokens=HOSTILE_TOKENS)
    numbers = bell(5 * HOSTILE_TOKENS, 8).reshape(1, 1, HOSTILE_TOKENS, 1, 5).copy()
    numbers[0, 0, 7, 0, 1], numbers[0, 0, 33, 0, 3] = 2000, -900
    numbers[0, 0, 11, 0, 2] = np.inf
    numbers[..., 4] = book.for_layout(layout).means[..., 4]
    chunk = stored(numbers, "bfloat16").copy()

    def classes(keys: Any, profile: Any, layer: int) -> NDArray[np.uint8]:
        found = np.zeros(keys.shape[:2], np.uint8)
        found[8], found[34] = 1, 2
        return found

    codec = Kvq("none", book, compute=reference, token_classes=classes)
    return layout, encoded(codec, chunk, layout, start=span.start), book


def damages(bitstream: Bytes, begin: int) -> Iterator[Bytes]:
    """Sealed again: a flip in each byte, counts that are shifted, tails of noise, cuts."""
    (size,) = (int(found) for found in bitstream[156:160].view("<u4"))
    yield bitstream
    # Each byte before the words, every third behind.
    for at in (*range(begin, begin + 40), *range(begin + 40, begin + size, 3)):
        yield with_bytes(bitstream, at, bytes([int(bitstream[at]) ^ (1 << at % 8)]))
    for seed in range(12):
        counts = bitstream[begin : begin + 8].view("<u4").astype(np.int64)
        counts = (counts + np.array([1, -1]) * (seed - 6)) & 0xFFFFFFFF
        yield with_bytes(bitstream, begin, counts.astype("<u4").tobytes())
        first = begin + 16 + int(noise(1, seed)[0] % np.uint64(size - 16))
        tail = noise(begin + size - first, seed).astype(np.uint8).tobytes()
        yield with_bytes(bitstream, first, tail)
    for at, value in ((0, 1 << 31), (4, 0xFFFFFFFF), (8, 10), (8, 0), (12, 6), (12, 0xFFFFFFF8)):
        yield with_bytes(bitstream, begin + at, value.to_bytes(4, "little"))
    for less in (1, size - 17, size - 15, size):
        yield with_bytes(bitstream, 156, (size - less).to_bytes(4, "little"), cut=less)


def with_bytes(bitstream: Bytes, at: int, found: bytes, *, cut: int = 0) -> Bytes:
    image = bitstream.copy()
    image[at : at + len(found)] = np.frombuffer(found, np.uint8)
    end = -(-(image.size - cut) // 16) * 16
    image[132:140] = np.frombuffer(total(image).to_bytes(8, "little"), np.uint8)
    assert total(image) <= end
    return sealed(image[: total(image)], 1)


def total(image: Bytes) -> int:
    (size,) = (int(found) for found in image[156:160].view("<u4"))
    return 176 + -(-size // 16) * 16


def header_with(bitstream: Bytes, at: int, value: int) -> Bytes:
    return with_bytes(bitstream, at, bytes([value]))


def fails(function: Any, *args: Any) -> bool:
    try:
        function(*args)
    except Corrupt:
        return True
    except KvdError as error:
        raise AssertionError from error
    return False


def chunk_of(layout: KVLayout, num_tokens: int, chunk: Bytes | None = None) -> Any:
    """A tensor on the CPU."""
    import torch

    held = np.zeros(layout.size(num_tokens), np.uint8) if chunk is None else chunk.copy()
    dtype = getattr(torch, layout.dtype)
    return torch.from_numpy(held).view(dtype).reshape(layout.shape(num_tokens))


def bits_of(chunk: Any) -> NDArray[np.uint16]:
    import torch

    found: NDArray[np.uint16] = chunk.view(torch.int16).numpy().view(np.uint16).reshape(-1)
    return found


def assert_near(found: NDArray[np.uint16], wanted: Bytes) -> None:
    """Within one unit in the last place: neighbours as integers, on either side of 0."""
    ordered = [ordinal(bits) for bits in (found, wanted.view(np.uint16))]
    assert np.abs(ordered[0] - ordered[1]).max() <= 1


def ordinal(bits: NDArray[np.uint16]) -> NDArray[np.int64]:
    magnitude = (bits & np.uint16(0x7FFF)).astype(np.int64)
    return np.where(bits >> np.uint16(15), -magnitude, magnitude)
