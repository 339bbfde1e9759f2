"""bf16/1: every bit pattern comes back, at the rate and in the bytes that its page promises."""

from __future__ import annotations

import heapq
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvd.codecs.base import Bytes, Codec, Part, Span
from kvd.codecs.bf16 import Bf16
from kvd.codecs.kernels import numba_bf16, reference_bf16
from kvd.codecs.kernels.reference_bf16 import CODE_BITS_MAX, NUM_SYMBOLS
from kvd.errors import Corrupt, Unsupported
from kvd.layout import KVLayout
from tests.codec_chunks import bell, encoded, layout_of, noise, real_chunk, sealed, stored
from tests.contracts.codec import ContainedCodecContract

FIXTURES = Path(__file__).parent / "fixtures" / "bitstreams"

# Where the first section of a chunk with one section begins.
BODY = 176
BLOCK = struct.Struct("<4B4I")


class TestNumba(ContainedCodecContract):
    def open(self, layout: KVLayout) -> Codec:
        return Bf16()


class TestReference(ContainedCodecContract):
    hostile_step = 97

    def open(self, layout: KVLayout) -> Codec:
        return Bf16(with_numba=False)


def decoded(codec: Codec, bitstream: Bytes, layout: KVLayout, num_tokens: int) -> Bytes:
    out = np.empty(layout.size(num_tokens), np.uint8)
    codec.decode(bitstream, layout, Span(start=0, num_tokens=num_tokens), out)
    return out


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_bit_pattern_comes_back(dtype: str) -> None:
    layout = layout_of(1, 2, 8, 256, dtype=dtype)
    chunk = stored(bell(layout.size(256) // 2, 3), dtype).copy().view(np.uint16)
    # One in eight, or the plane would be kept as it is.
    chunk[::8] = np.tile(np.arange(65536, dtype=np.uint16), 2)
    bitstream = encoded(Bf16(), chunk.view(np.uint8), layout)
    assert bitstream.size < 0.95 * chunk.nbytes
    assert bitstream[BODY] == 1
    assert decoded(Bf16(), bitstream, layout, 256).tobytes() == chunk.tobytes()


def test_what_looks_like_kv_shrinks_by_a_third() -> None:
    layout = layout_of(4, 2, 4, 128)
    chunk = real_chunk(layout, 256)
    assert chunk.size / encoded(Bf16(), chunk, layout).size > 1.48


def test_float16_shrinks_too() -> None:
    layout = layout_of(2, 2, 4, 128, dtype="float16")
    chunk = real_chunk(layout, 256)
    assert chunk.size / encoded(Bf16(), chunk, layout).size > 1.15


def test_what_does_not_shrink_costs_a_byte_a_plane() -> None:
    layout = layout_of(3, 2, 2, 64)
    chunk = noise(layout.size(16) // 8, 9).view(np.uint8)
    header = -(-(156 + 3 * 8) // 16) * 16
    sections = 3 * (-(-(2 + layout.size(16) // 3) // 16) * 16)
    assert encoded(Bf16(), chunk, layout).size == header + sections
    assert Bf16().size_bytes_max(layout, 16) == header + sections


@pytest.mark.parametrize("dtype", ["float32", "int8", "float8_e4m3fn"])
def test_other_dtypes_are_unsupported(dtype: str) -> None:
    layout = layout_of(1, 2, 1, 64, dtype=dtype)
    with pytest.raises(Unsupported, match=f"the layout has {dtype}"):
        Bf16().encode(
            np.zeros(layout.size(1), np.uint8),
            layout,
            Span(start=0, num_tokens=1),
            np.empty(1000, np.uint8),
        )


@given(
    st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 3), st.integers(1, 70)),
    st.integers(1, 37),
    st.sampled_from(["bfloat16", "float16"]),
    st.integers(0, 16),
    st.integers(0, 999),
)
@settings(max_examples=60, deadline=None)
def test_reference_and_numba_agree_on_every_byte(
    shape: tuple[int, int, int, int], tokens: int, dtype: str, noise_bits: int, seed: int
) -> None:
    layout = layout_of(*shape, dtype=dtype)
    words = real_chunk(layout, tokens, seed).view(np.uint16).copy()
    # From all like KV to all random.
    words ^= noise(words.size, seed).astype(np.uint16) >> np.uint16(16 - noise_bits or 1)
    chunk = words.view(np.uint8)
    bitstream = encoded(Bf16(), chunk, layout)
    assert bitstream.tobytes() == encoded(Bf16(with_numba=False), chunk, layout).tobytes()
    for codec in (Bf16(), Bf16(with_numba=False)):
        assert decoded(codec, bitstream, layout, tokens).tobytes() == chunk.tobytes()


def huffman_cost(counts: list[int]) -> tuple[int, int]:
    """Bits of an optimal code without a limit, and its longest code."""
    heap = [(count, 0, index) for index, count in enumerate(counts) if count]
    heapq.heapify(heap)
    cost = 0
    while len(heap) > 1:
        one, other = heapq.heappop(heap), heapq.heappop(heap)
        cost += one[0] + other[0]
        heapq.heappush(heap, (one[0] + other[0], max(one[1], other[1]) + 1, one[2]))
    return cost, heap[0][1]


@given(
    st.lists(st.integers(0, 1000), min_size=2, max_size=30).filter(lambda c: sum(map(bool, c)) > 1)
)
@settings(deadline=None)
def test_codes_are_optimal_and_complete(found: list[int]) -> None:
    counts = np.zeros(NUM_SYMBOLS, np.int64)
    counts[100 : 100 + len(found)] = found
    lengths = numba_bf16.code_lengths(counts)
    assert np.array_equal(lengths, reference_bf16.code_lengths(counts))
    assert np.array_equal(lengths > 0, counts > 0)
    assert (2.0 ** -lengths[lengths > 0].astype(float)).sum() == 1
    cost, longest = huffman_cost(found)
    if longest <= CODE_BITS_MAX:
        assert counts @ lengths.astype(np.int64) == cost
    assert lengths.max() <= CODE_BITS_MAX


def test_codes_have_a_limit() -> None:
    counts = np.zeros(NUM_SYMBOLS, np.int64)
    counts[:25] = [1 << bit for bit in range(25)]
    lengths = reference_bf16.code_lengths(counts)
    assert lengths.max() == CODE_BITS_MAX
    assert (2.0 ** -lengths[lengths > 0].astype(float)).sum() == 1
    assert lengths[24] == 1
    counts[:] = 1
    assert np.all(reference_bf16.code_lengths(counts) == 8)


def coded_block() -> tuple[KVLayout, Bytes]:
    """A chunk of one coded block, and its bitstream."""
    layout = layout_of(1, 1, 1, 64)
    bitstream = encoded(Bf16(), real_chunk(layout, 64), layout)
    assert bitstream[BODY] == 1
    return layout, bitstream.copy()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda head: [2, *head[1:]], "a block of kind 2"),
        (lambda head: [*head[:2], head[3], head[2], *head[4:]], "have codes"),
        (lambda head: [*head[:3], head[3] - 1, *head[4:]], "prefix code|expected in a section"),
        (lambda head: [*head[:4], head[4] + 1, *head[5:]], "expected in a section"),
        (lambda head: [*head[:4], head[4] - 1, *head[5:]], "a lane|behind the last"),
        (lambda head: [*head[:4], head[4] + 1, head[5] - 1, *head[6:]], "a lane of"),
        (lambda head: [*head[:7], 2**32 - 1], "expected in a section"),
    ],
)
@pytest.mark.parametrize("with_numba", [True, False])
def test_a_block_that_cannot_be_is_corrupt(change: object, reason: str, with_numba: bool) -> None:
    layout, bitstream = coded_block()
    head = list(BLOCK.unpack(bitstream[BODY : BODY + BLOCK.size].tobytes()))
    changed = BLOCK.pack(*change(head))  # type: ignore[operator]
    bitstream[BODY : BODY + BLOCK.size] = np.frombuffer(changed, np.uint8)
    with pytest.raises(Corrupt, match=reason):
        decoded(Bf16(with_numba=with_numba), sealed(bitstream, 1), layout, 64)


@pytest.mark.parametrize("with_numba", [True, False])
def test_a_lane_that_is_too_short_for_a_prefix_is_corrupt(with_numba: bool) -> None:
    layout, bitstream = coded_block()
    head = list(BLOCK.unpack(bitstream[BODY : BODY + BLOCK.size].tobytes()))
    head[4:] = [head[4], 0, 0, sum(head[5:])]
    bitstream[BODY : BODY + BLOCK.size] = np.frombuffer(BLOCK.pack(*head), np.uint8)
    out = np.zeros(layout.size(64), np.uint8)
    span = Span(start=0, num_tokens=64)
    with pytest.raises(Corrupt, match="a lane of 0 bytes"):
        Bf16(with_numba=with_numba).decode(
            sealed(bitstream, 1), layout, span, out, Part(token_end=16)
        )


def test_a_byte_that_no_code_needs_is_corrupt() -> None:
    layout, bitstream = coded_block()
    size = int(bitstream[156:160].view(np.uint32)[0])
    assert size % 16
    bitstream[156:160] = np.frombuffer(struct.pack("<I", size + 1), np.uint8)
    with pytest.raises(Corrupt, match="1 bytes behind the last block"):
        decoded(Bf16(), sealed(bitstream, 1), layout, 64)
    # The same byte as the last lane's.
    bitstream[BODY + 16] += 1
    with pytest.raises(Corrupt, match="a lane of"):
        decoded(Bf16(), sealed(bitstream, 1), layout, 64)


def test_code_lengths_that_make_no_code_are_corrupt() -> None:
    layout, bitstream = coded_block()
    first = BODY + BLOCK.size + 32
    for at, value in ((first, 0), (first, 0xFF), (first + 1, 0x11)):
        damaged = bitstream.copy()
        damaged[at] = value
        with pytest.raises(Corrupt, match="complete prefix code"):
            decoded(Bf16(), sealed(damaged, 1), layout, 64)


def test_a_prefix_reads_no_bit_of_what_is_behind_it() -> None:
    layout, bitstream = coded_block()
    whole = decoded(Bf16(), bitstream, layout, 64)
    sizes = BLOCK.unpack(bitstream[BODY : BODY + BLOCK.size].tobytes())[4:]
    section_end = BODY + int(bitstream[156:160].view(np.uint32)[0])
    # The last half of each lane is of later tokens.
    end = section_end
    for size in reversed(sizes):
        bitstream[end - size // 2 : end] = 0xFF
        end -= size
    out = np.zeros_like(whole)
    span = Span(start=0, num_tokens=64)
    Bf16().decode(sealed(bitstream, 1), layout, span, out, Part(token_end=16))
    assert out[: layout.size(16)].tobytes() == whole[: layout.size(16)].tobytes()


def test_sections_may_have_more_layers_and_fewer_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvd.codecs import bf16
    from kvd.codecs.bitstream import Header

    layout = layout_of(2, 2, 3, 64)
    chunk = real_chunk(layout, 20)

    def narrow(layout: KVLayout) -> Header:
        return Header(codec=bf16.NAME, is_exact=True, section_layers=2, section_heads=2)

    monkeypatch.setattr(bf16, "_header", narrow)
    monkeypatch.setattr(Bf16, "size_bytes_max", lambda *_: 40000)
    bitstream = encoded(Bf16(), chunk, layout)
    monkeypatch.undo()
    assert decoded(Bf16(), bitstream, layout, 20).tobytes() == chunk.tobytes()
    out = np.zeros_like(chunk)
    part = Part(layer_start=1, head_start=1, token_end=9)
    Bf16().decode(bitstream, layout, Span(start=0, num_tokens=20), out, part)
    found, expected = (one.view(np.uint16).reshape(layout.shape(20)).copy() for one in (out, chunk))
    assert np.array_equal(found[1, :, :9, 1:], expected[1, :, :9, 1:])
    found[1, :, :9, 1:] = 0
    assert not found.any()


def test_a_level_or_a_profile_is_corrupt() -> None:
    layout, bitstream = coded_block()
    for at in (12, 40):
        damaged = bitstream.copy()
        damaged[at] = 1
        with pytest.raises(Corrupt, match="neither levels nor profiles"):
            decoded(Bf16(), sealed(damaged, 1), layout, 64)


@pytest.mark.parametrize("name", ["bf16-tiny", "bf16-verbatim", "bf16-float16"])
def test_bitstreams_of_a_released_version_decode_for_ever(name: str) -> None:
    layout, chunk = golden_chunk(name)
    golden = np.fromfile(FIXTURES / f"{name}.bin", np.uint8)
    for codec in (Bf16(), Bf16(with_numba=False)):
        assert encoded(codec, chunk, layout, start=512).tobytes() == golden.tobytes()
        out = np.empty_like(chunk)
        span = Span(start=512, num_tokens=chunk.size // layout.token_size)
        codec.decode(golden, layout, span, out)
        assert out.tobytes() == chunk.tobytes()


def golden_chunk(name: str) -> tuple[KVLayout, Bytes]:
    layout = layout_of(2, 2, 2, 8, dtype="float16" if name == "bf16-float16" else "bfloat16")
    if name == "bf16-verbatim":
        return layout, noise(layout.size(23) // 8, 4).view(np.uint8)
    return layout, real_chunk(layout, 23)


def test_kernels_stay_within_their_arrays(tmp_path: Path) -> None:
    environment = {**os.environ, "NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.codec_hostile"]
    found = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("checked ")
