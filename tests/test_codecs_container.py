"""The container of bitstreams: what goes in comes out, bad bytes are found before they count."""

from __future__ import annotations

import re
import struct
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvd.codecs import bitstream as container
from kvd.codecs.base import WHOLE, Bytes, Part, Span
from kvd.codecs.bf16 import Bf16
from kvd.codecs.bitstream import (
    CODEC_SIZE_MAX,
    HEADER_SIZE,
    PLANES_MAX,
    SECTION_ALIGN,
    SECTION_SIZE_MAX,
    SECTIONS_MAX,
    VERSION,
    Header,
    Section,
    body_offset,
    read_header,
    read_header_of,
    read_sections,
    section_ranges,
    total_size,
    write_bitstream,
    write_head,
)
from kvd.errors import Corrupt, InvalidRequest, TooLarge
from kvd.layout import DTYPE_SIZES, KVLayout
from tests.codec_chunks import (
    ENTRY_SIZE,
    encoded,
    layout_of,
    noise,
    real_chunk,
    sealed,
)

PAGE = Path(__file__).parent.parent / "docs" / "formats" / "bitstream.md"

HEADER = Header(
    codec="test/1",
    is_exact=False,
    level=3,
    profile=bytes(range(32)),
    section_layers=2,
    section_heads=2,
)
LAYOUT = layout_of(5, 2, 3, 8)
SPAN = Span(start=768, num_tokens=7)


def content_of(layers: range, heads: range) -> Bytes:
    """A section's content, of a size and bytes that are its own."""
    seed = 100 * layers.start + heads.start
    return noise(20, seed).view(np.uint8)[: 5 + seed % 90]


def written(header: Header = HEADER, layout: KVLayout = LAYOUT, span: Span = SPAN) -> Bytes:
    out = np.full(100_000, 0xEE, np.uint8)

    def write_section(layers: range, heads: range, target: Bytes) -> int:
        content = content_of(layers, heads)
        target[: content.size] = content
        return content.size

    size = write_bitstream(header, layout, span, out, write_section)
    assert np.all(out[size:] == 0xEE) or size % SECTION_ALIGN == 0
    return out[:size].copy()


def read(
    found: Bytes, header: Header = HEADER, layout: KVLayout = LAYOUT, part: Part = WHOLE
) -> Iterator[Section]:
    return read_sections(found, header, layout, SPAN, part)


def assert_sections_are_right(sections: Iterator[Section]) -> list[tuple[int, int]]:
    """Their indices."""
    indices = []
    for section in sections:
        expected = content_of(section.layers, section.heads)
        assert section.content.tobytes() == expected.tobytes()
        indices.append(section.index)
    return indices


def test_what_is_written_is_read() -> None:
    found = written()
    assert read_header(found) == HEADER
    assert found.size % SECTION_ALIGN == 0
    indices = assert_sections_are_right(read(found))
    assert indices == [(row, column) for row in range(3) for column in range(2)]


@given(
    st.tuples(st.integers(1, 9), st.integers(1, 3), st.integers(1, 5), st.integers(1, 9)),
    st.integers(1, 10),
    st.integers(1, 6),
    st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), min_size=1, max_size=16),
    st.booleans(),
    st.integers(0, 2**32 - 1),
    st.binary(min_size=32, max_size=32),
    st.data(),
)
@settings(deadline=None)
def test_sections_cover_the_part_and_no_more(
    shape: tuple[int, ...],
    section_layers: int,
    section_heads: int,
    codec: str,
    is_exact: bool,
    level: int,
    profile: bytes,
    data: st.DataObject,
) -> None:
    header = Header(
        codec=codec,
        is_exact=is_exact,
        level=level,
        profile=profile,
        section_layers=section_layers,
        section_heads=section_heads,
    )
    layout = layout_of(*shape)
    found = written(header, layout)
    assert read_header(found) == header
    layer = data.draw(st.integers(0, shape[0] - 1))
    head = data.draw(st.integers(0, shape[2] - 1))
    part = Part(
        layer_start=layer,
        layer_end=data.draw(st.integers(layer + 1, shape[0])),
        head_start=head,
        head_end=data.draw(st.integers(head + 1, shape[2])),
    )
    layers, heads, _ = part.within(layout, SPAN.num_tokens)
    sections = list(read(found, header, layout, part))
    covered = [(a, b) for one in sections for a in one.layers for b in one.heads]
    assert len(covered) == len(set(covered))
    assert {(a, b) for a in layers for b in heads} <= set(covered)
    for one in sections:
        assert set(one.layers) & set(layers)
        assert set(one.heads) & set(heads)
    whole = [(one.layers, one.heads) for one in read(found, header, layout)]
    assert whole == list(section_ranges(header, layout))
    assert_sections_are_right(iter(sections))


def test_every_byte_of_header_and_directory_is_guarded() -> None:
    found = written()
    directory_end = HEADER_SIZE + 6 * ENTRY_SIZE
    for at in range(directory_end):
        for bit in range(8):
            damaged = found.copy()
            damaged[at] ^= 1 << bit
            with pytest.raises(Corrupt):
                list(read(damaged))


def test_every_byte_of_a_section_is_guarded_and_padding_means_nothing() -> None:
    found = written()
    padding = 0
    for at in range(HEADER_SIZE + 6 * ENTRY_SIZE, found.size):
        damaged = found.copy()
        damaged[at] ^= 0xFF
        try:
            assert_sections_are_right(read(damaged))
            padding += 1
        except Corrupt:
            continue
    sections = sum(content_of(*ranges).size for ranges in section_ranges(HEADER, LAYOUT))
    assert padding == found.size - HEADER_SIZE - 6 * ENTRY_SIZE - sections


def test_flips_behind_right_checksums_are_corrupt_or_harmless() -> None:
    found = written()
    harmless = set()
    for at in range(HEADER_SIZE + 6 * ENTRY_SIZE):
        for value in (0, 1, 0x7F, 0x80, 0xFF):
            damaged = found.copy()
            if damaged[at] == value:
                continue
            damaged[at] = value
            damaged = sealed(damaged, 6)
            try:
                sections = [*read_sections(damaged, read_header(damaged), LAYOUT, SPAN, WHOLE)]
                assert all(one.content.base is not None for one in sections)
                assert sum(one.content.size for one in sections) <= found.size
                harmless.add(at)
            except Corrupt:
                continue
    # Exactness, level, codec and profile say nothing of the container; checksums were repaired; a
    # section may take some of its padding.
    free = {10, *range(12, 64), *range(HEADER_SIZE - 16, HEADER_SIZE)}
    entries = [HEADER_SIZE + ENTRY_SIZE * entry for entry in range(6)]
    free |= {entry + byte for entry in entries for byte in (0, 4, 5, 6, 7)}
    assert harmless <= free


def test_a_bitstream_that_is_cut_off_is_corrupt() -> None:
    found = written()
    for size in range(found.size):
        with pytest.raises(Corrupt):
            list(read(found[:size]))


def test_bytes_behind_the_end_mean_nothing() -> None:
    found = written()
    longer = np.concatenate([found, noise(10, 1).view(np.uint8)])
    assert len(assert_sections_are_right(read(longer))) == 6


@given(st.binary(max_size=600))
def test_random_bytes_are_corrupt(content: bytes) -> None:
    with pytest.raises(Corrupt):
        read_header(np.frombuffer(content, np.uint8))


def patched(at: int, value: bytes, found: Bytes | None = None) -> Bytes:
    """A bitstream with other bytes at an offset and right checksums."""
    changed = (written() if found is None else found).copy()
    changed[at : at + len(value)] = np.frombuffer(value, np.uint8)
    return sealed(changed, 6)


@pytest.mark.parametrize(
    ("at", "value", "reason"),
    [
        (0, b"KVD-LOG\0", "no bitstream"),
        (8, b"\2\0", "version 2"),
        (10, b"\2\0", "flags 0x2"),
        (16, bytes(16), "codec"),
        (16, b"a\0b", "codec"),
        (16, b"a\xe9", "codec"),
        (16, b"a\n", "codec"),
        (64, b"\0", "another chunk"),
        (96, b"\1", "another chunk"),
        (104, b"\1", "another chunk"),
        (108, b"\6", "another chunk"),
        (112, b"\1", "another chunk"),
        (114, b"\1", "another chunk"),
        (116, b"\1", "another chunk"),
        (120, b"\1", "another chunk"),
        (124, bytes(4), "sections are empty"),
        (128, bytes(4), "sections are empty"),
        (132, bytes(8), "a bitstream of 0 bytes"),
        (132, b"\xff" * 8, "a bitstream of 18446744073709551615 bytes"),
        (132, b"\x00\x01", "sections end at"),
        (HEADER_SIZE, b"\xff" * 4, "sections end at"),
        (HEADER_SIZE, b"\x00" * 4, "sections end at"),
    ],
)
def test_a_value_that_cannot_be_is_corrupt(at: int, value: bytes, reason: str) -> None:
    damaged = patched(at, value)
    with pytest.raises(Corrupt, match=reason):
        list(read_sections(damaged, read_header(damaged), LAYOUT, SPAN, WHOLE))


def test_a_directory_of_too_many_sections_is_corrupt_and_costs_nothing() -> None:
    layout = layout_of(1 << 20, 1, 1 << 20, 1)
    header = replace(HEADER, section_layers=1, section_heads=1)
    small = written(HEADER)
    struct.pack_into("<32sQIIHHIIII", image := bytearray(small.tobytes()), 64,
                     *container._shape(layout, SPAN), 1, 1)  # fmt: skip
    damaged = sealed(np.frombuffer(bytes(image), np.uint8), 6)
    tracemalloc.start()
    with pytest.raises(Corrupt, match="sections, a bitstream has at most"):
        read_sections(damaged, header, layout, SPAN, WHOLE)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_bitstream_of_another_chunk_is_corrupt_at_once() -> None:
    found = written()
    for layout, span in [
        (layout_of(5, 2, 3, 8, model="other"), SPAN),
        (LAYOUT, Span(start=769, num_tokens=7)),
        (LAYOUT, Span(start=768, num_tokens=8)),
        (layout_of(5, 2, 3, 8, dtype="float16"), SPAN),
    ]:
        with pytest.raises(Corrupt, match="another chunk"):
            read_sections(found, HEADER, layout, span, Part())


def test_a_section_that_is_not_wanted_is_not_looked_at() -> None:
    found = written()
    found[-1 - SECTION_ALIGN] ^= 1
    part = Part(layer_end=4)
    assert len(assert_sections_are_right(read(found, part=part))) == 4
    with pytest.raises(Corrupt, match="section 2,1"):
        list(read(found))


def test_the_directory_is_guarded_where_no_section_of_it_is_wanted() -> None:
    found = written()
    found[HEADER_SIZE + 6 * ENTRY_SIZE - 1] ^= 1
    with pytest.raises(Corrupt, match="directory"):
        read(found, part=Part(layer_end=1))


def test_a_header_that_cannot_be_is_refused() -> None:
    for name in ("", "x" * (CODEC_SIZE_MAX + 1), "codéc", "a\0"):
        with pytest.raises(InvalidRequest):
            Header(codec=name, is_exact=True)


def test_what_no_bitstream_can_say_is_too_large() -> None:
    header = Header(codec="test/1", is_exact=True)
    many = layout_of(SECTIONS_MAX + 1, 1, 1, 1)
    with pytest.raises(TooLarge, match="sections"):
        total_size(header, many, [0] * (SECTIONS_MAX + 1))
    with pytest.raises(TooLarge, match="a section of"):
        total_size(header, layout_of(1, 1, 1, 1), [SECTION_SIZE_MAX + 1])
    with pytest.raises(TooLarge, match="planes"):
        total_size(header, layout_of(1, PLANES_MAX + 1, 1, 1), [1])
    with pytest.raises(TooLarge):
        write_head(header, many, SPAN, [0] * (SECTIONS_MAX + 1), np.zeros(1 << 20, np.uint8))


def test_an_exact_codec_without_levels_takes_no_other_header() -> None:
    plain = Header(codec="test/1", is_exact=True)
    assert read_header_of(written(plain), "test/1", is_exact=True) == plain
    for other in (
        replace(plain, codec="test/2"),
        replace(plain, is_exact=False),
        replace(plain, level=1),
        replace(plain, profile=bytes(31) + b"\1"),
    ):
        with pytest.raises(Corrupt):
            read_header_of(written(other), "test/1", is_exact=True)


def hex_dump() -> bytes:
    """The bytes of the page's worked example; rows of zeros are left out."""
    text = PAGE.read_text().split("## Worked example", 1)[1].split("```")[1]
    image = bytearray()
    for line in text.strip().splitlines():
        match = re.match(r"([0-9a-f]{4})  ((?:[0-9a-f]{2} ?)+)", line)
        assert match, line
        image.extend(bytes(int(match[1], 16) - len(image)))
        image.extend(bytes.fromhex(match[2]))
    return bytes(image)


def example() -> tuple[KVLayout, Span, Bytes]:
    """What the page's example is of: powers of two, in the channels' order, signs in turn."""
    layout = layout_of(1, 1, 1, 4)
    exponents = np.array([127, 127, 128, 120]) + (np.arange(16) % 3 == 0)[:, None]
    signs = np.where(np.arange(16) % 2, 0x8000, 0)[:, None]
    words = (exponents << 7 | signs | 0x40).astype(np.uint16)
    return layout, Span(start=256, num_tokens=16), words.reshape(-1).view(np.uint8)


def test_the_pages_example_is_what_the_code_writes() -> None:
    layout, span, chunk = example()
    golden = np.frombuffer(hex_dump(), np.uint8)
    found = encoded(Bf16(with_numba=False), chunk, layout, start=span.start)
    assert golden.tobytes() == found.tobytes()
    out = np.empty_like(chunk)
    Bf16(with_numba=False).decode(golden, layout, span, out)
    assert out.tobytes() == chunk.tobytes()


def test_the_page_names_the_real_limits() -> None:
    text = PAGE.read_text()
    for number in (HEADER_SIZE, SECTIONS_MAX, SECTION_SIZE_MAX, SECTION_ALIGN, CODEC_SIZE_MAX):
        assert f"{number:,}" in text
    assert f"version {VERSION}" in text
    for code, name in enumerate(DTYPE_SIZES, start=1):
        assert f"{code} {name}" in text


def test_sections_begin_where_the_page_says() -> None:
    layout = layout_of(2, 2, 2, 64)
    found = encoded(Bf16(), real_chunk(layout, 9), layout)
    header = read_header(found)
    assert body_offset(header, layout) == 176
    assert found[176] in (0, 1)
