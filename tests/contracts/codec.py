"""What every Codec promises. Subclass with `open`, and `numbers_near` where it is not exact."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from kvd.codecs.base import Bytes, Codec, Part, Span
from kvd.codecs.bitstream import HEADER_SIZE, read_header
from kvd.errors import Corrupt, InvalidRequest
from kvd.layout import KVLayout
from tests.codec_chunks import encoded, layout_of, noise, numbers_of, real_chunk, sealed

# Layers, planes, heads, head dim; tokens.
SHAPES = [
    ((2, 2, 3, 64), 33),
    ((1, 1, 1, 64), 1),
    ((1, 2, 1, 128), 256),
    ((3, 1, 1, 80), 5),
    ((2, 2, 2, 96), 2),
    ((1, 2, 4, 256), 7),
    ((2, 2, 1, 3), 11),
]

PARTS = [
    Part(layer_start=1, layer_end=2),
    Part(head_start=1),
    Part(head_start=1, head_end=2, token_end=7),
    Part(token_end=1),
    Part(token_end=32),
    Part(layer_start=2, head_end=1, token_end=11),
]


class CodecContract:
    """Of every codec."""

    def open(self, layout: KVLayout) -> Codec:
        """The codec, ready for chunks of a layout."""
        raise NotImplementedError

    def assert_near(self, found: Bytes, chunk: Bytes, layout: KVLayout) -> None:
        """How close what is decoded must be."""
        assert found.tobytes() == chunk.tobytes()

    def decoded(self, bitstream: Bytes, layout: KVLayout, num_tokens: int, part: Part) -> Bytes:
        out = np.full(layout.size(num_tokens), 0xA5, np.uint8)
        span = Span(start=0, num_tokens=num_tokens)
        self.open(layout).decode(bitstream, layout, span, out, part)
        return out

    @pytest.mark.parametrize(("shape", "num_tokens"), SHAPES)
    def test_a_chunk_comes_back(self, shape: tuple[int, ...], num_tokens: int) -> None:
        layout = layout_of(*shape)
        chunk = real_chunk(layout, num_tokens)
        bitstream = encoded(self.open(layout), chunk, layout)
        self.assert_near(self.decoded(bitstream, layout, num_tokens, Part()), chunk, layout)

    @pytest.mark.parametrize("byte", [0, 0x3F, 0xFF])
    def test_a_constant_chunk_comes_back(self, byte: int) -> None:
        layout = layout_of(2, 2, 2, 64)
        chunk = np.full(layout.size(20), byte, np.uint8)
        bitstream = encoded(self.open(layout), chunk, layout)
        self.assert_near(self.decoded(bitstream, layout, 20, Part()), chunk, layout)

    def test_a_chunk_has_one_bitstream(self) -> None:
        layout = layout_of(2, 2, 2, 64)
        chunk = real_chunk(layout, 40)
        first = encoded(self.open(layout), chunk, layout)
        assert first.tobytes() == encoded(self.open(layout), chunk, layout).tobytes()

    @pytest.mark.parametrize(("shape", "num_tokens"), SHAPES)
    def test_no_bitstream_is_longer_than_said(
        self, shape: tuple[int, ...], num_tokens: int
    ) -> None:
        layout = layout_of(*shape)
        size = self.open(layout).size_bytes_max(layout, num_tokens)
        random = noise(layout.size(num_tokens) // 2, 5).astype(np.uint16).view(np.uint8)
        for chunk in (random, real_chunk(layout, num_tokens)):
            assert encoded(self.open(layout), chunk, layout).size <= size

    @pytest.mark.parametrize("part", PARTS)
    def test_a_part_is_what_it_is_of_the_whole_and_the_rest_stays(self, part: Part) -> None:
        layout = layout_of(3, 2, 3, 64)
        bitstream = encoded(self.open(layout), real_chunk(layout, 33), layout)
        shape = layout.shape(33)
        whole = self.decoded(bitstream, layout, 33, Part()).view(np.uint16).reshape(shape)
        found = self.decoded(bitstream, layout, 33, part).view(np.uint16).reshape(shape)
        layers, heads, tokens = part.within(layout, 33)
        wanted = np.s_[layers.start : layers.stop, :, :tokens, heads.start : heads.stop]
        expected = np.full(shape, 0xA5A5, np.uint16)
        expected[wanted] = whole[wanted]
        assert np.array_equal(found, expected)

    def test_a_part_that_is_not_there_is_refused(self) -> None:
        layout = layout_of(2, 2, 2, 64)
        bitstream = encoded(self.open(layout), real_chunk(layout, 8), layout)
        for part in (Part(layer_end=3), Part(head_start=2), Part(token_end=9), Part(token_end=0)):
            with pytest.raises(InvalidRequest):
                self.decoded(bitstream, layout, 8, part)

    def test_buffers_may_lie_anywhere_and_be_read_only(self) -> None:
        layout = layout_of(2, 2, 2, 64)
        chunk = real_chunk(layout, 12)
        codec = self.open(layout)
        bitstream = encoded(codec, chunk, layout)
        span = Span(start=0, num_tokens=12)
        odd_chunk = np.empty(chunk.size + 1, np.uint8)[1:]
        odd_chunk[:] = chunk
        odd_chunk.setflags(write=False)
        odd = np.empty(codec.size_bytes_max(layout, 12) + 3, np.uint8)[3:]
        size = codec.encode(odd_chunk, layout, span, odd)
        assert odd[:size].tobytes() == bitstream.tobytes()
        odd.setflags(write=False)
        out = np.empty(chunk.size + 1, np.uint8)[1:]
        codec.decode(odd[:size], layout, span, out)
        assert out.tobytes() == self.decoded(bitstream, layout, 12, Part()).tobytes()

    def test_a_bitstream_that_is_cut_off_is_corrupt(self) -> None:
        layout = layout_of(1, 2, 1, 64)
        bitstream = encoded(self.open(layout), real_chunk(layout, 4), layout)
        for size in range(bitstream.size - 15):
            with pytest.raises(Corrupt):
                self.decoded(bitstream[:size], layout, 4, Part())


class ContainedCodecContract(CodecContract):
    """Of every codec whose bitstreams are those of docs/formats/bitstream.md."""

    # From one damaged byte to the next.
    hostile_step = 3

    def assert_corrupt_or_some_chunk(
        self, bitstream: Bytes, layout: KVLayout, num_tokens: int
    ) -> None:
        for part in (Part(), Part(token_end=max(1, num_tokens // 2))):
            try:
                self.decoded(bitstream, layout, num_tokens, part)
            except Corrupt:
                continue

    def test_a_bitstream_names_its_codec(self) -> None:
        layout = layout_of(2, 2, 2, 64)
        codec = self.open(layout)
        header = read_header(encoded(codec, real_chunk(layout, 3), layout))
        assert (header.codec, header.is_exact) == (codec.name, codec.is_exact)

    def test_every_byte_of_a_bitstream_is_guarded(self) -> None:
        layout = layout_of(1, 1, 1, 64)
        chunk = real_chunk(layout, 8)
        bitstream = encoded(self.open(layout), chunk, layout)
        right = self.decoded(bitstream, layout, 8, Part())
        guarded = 0
        for at in range(bitstream.size):
            damaged = bitstream.copy()
            damaged[at] ^= 1 << at % 8
            try:
                assert self.decoded(damaged, layout, 8, Part()).tobytes() == right.tobytes()
            except Corrupt:
                guarded += 1
        # All but the padding.
        assert guarded > bitstream.size - 32

    def test_a_bitstream_of_another_chunk_is_corrupt(self) -> None:
        layout = layout_of(2, 2, 2, 64)
        codec = self.open(layout)
        bitstream = encoded(codec, real_chunk(layout, 8), layout)
        out = np.zeros(layout.size(9), np.uint8)
        for other, span in [
            (layout_of(2, 2, 2, 64, model="other"), Span(start=0, num_tokens=8)),
            (layout, Span(start=8, num_tokens=8)),
            (layout, Span(start=0, num_tokens=9)),
        ]:
            with pytest.raises(Corrupt):
                codec.decode(bitstream, other, span, out[: other.size(span.num_tokens)])

    def test_hostile_sections_with_right_checksums_are_corrupt_or_some_chunk(self) -> None:
        layout = layout_of(1, 2, 1, 64)
        bitstream = encoded(self.open(layout), real_chunk(layout, 40), layout)
        random = noise(bitstream.size, 7)
        for at in range(64, bitstream.size, self.hostile_step):
            damaged = bitstream.copy()
            damaged[at] = random[at] & np.uint64(255)
            self.assert_corrupt_or_some_chunk(sealed(damaged, 1), layout, 40)

    def test_a_section_that_is_cut_off_is_corrupt_whatever_its_checksum(self) -> None:
        layout = layout_of(1, 1, 1, 64)
        bitstream = encoded(self.open(layout), real_chunk(layout, 8), layout)
        size = int(bitstream[HEADER_SIZE : HEADER_SIZE + 4].view(np.uint32)[0])
        for cut in range(0, size, 1 + self.hostile_step // 3):
            total = 176 + -(-cut // 16) * 16
            damaged = bitstream[:total].copy()
            damaged[HEADER_SIZE : HEADER_SIZE + 4] = np.array([cut], "<u4").view(np.uint8)
            damaged[132:140] = np.array([total], "<u8").view(np.uint8)
            with pytest.raises(Corrupt):
                self.decoded(sealed(damaged, 1), layout, 8, Part())

    def test_a_section_of_random_bytes_is_corrupt_or_some_chunk(self) -> None:
        layout = layout_of(2, 2, 1, 64)
        bitstream = encoded(self.open(layout), real_chunk(layout, 16), layout)
        for seed in range(60):
            damaged = bitstream.copy()
            first = 176 + seed % 40
            random = noise(bitstream.size - first, seed)
            damaged[first:] = random.astype(np.uint8)
            self.assert_corrupt_or_some_chunk(sealed(damaged, 2), layout, 16)


def numbers_apart(
    found: Bytes, chunk: Bytes, layout: KVLayout
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Errors, and the numbers they are of."""
    numbers = numbers_of(chunk, layout)
    return np.abs(numbers_of(found, layout) - numbers), np.abs(numbers)
