"""The container of every bitstream: a header, a directory, sections. docs/formats/bitstream.md.

    header | directory: size and checksum of each section | section | section | ...

A section holds `section_layers` layers and `section_heads` heads of all tokens, layers outermost: a
layer is a contiguous range, a tensor-parallel rank a set of sections, a token prefix the beginning
of each section's tokens. What stands in a section is its codec's.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import xxhash
from numpy.typing import NDArray

from kvd.codecs.base import Bytes, Part, Span
from kvd.errors import Corrupt, InvalidRequest, TooLarge
from kvd.layout import DTYPE_SIZES, KVLayout

MAGIC = b"KVD-KVB\0"
VERSION = 1
HASH_SIZE = 32
NO_PROFILE = bytes(HASH_SIZE)

# Magic, version, flags, level; codec, profile, layout; start, tokens, layers; planes, dtype, heads,
# dim; layers and heads of a section; size, checksum of the directory.
_HEAD = struct.Struct("<8sHHI16s32s32sQIIHHIIIIQQ")
_CHECKSUM = struct.Struct("<Q")
HEADER_SIZE = _HEAD.size + _CHECKSUM.size

# Size and the low half of the checksum of a section.
_ENTRY = np.dtype([("size", "<u4"), ("checksum", "<u4")])

SECTIONS_MAX = 1 << 16
SECTION_SIZE_MAX = (1 << 32) - 1
SECTION_ALIGN = 16
CODEC_SIZE_MAX = 16
LEVEL_MAX = (1 << 32) - 1
# What the header has 16 bits for.
PLANES_MAX = (1 << 16) - 1

_FLAG_EXACT = 1
# Codes of dtypes, for ever.
_DTYPES = {name: code for code, name in enumerate(DTYPE_SIZES, start=1)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What a bitstream says of itself. `level` is the codec's own."""

    codec: str
    is_exact: bool
    level: int = 0
    profile: bytes = NO_PROFILE
    section_layers: int = 1
    section_heads: int = 1

    def __post_init__(self) -> None:
        if len(self.codec) > CODEC_SIZE_MAX or not _is_name(self.codec.encode()):
            raise InvalidRequest(f"a codec's name is 1 to {CODEC_SIZE_MAX} letters: {self.codec!r}")
        assert 0 <= self.level <= LEVEL_MAX
        assert len(self.profile) == HASH_SIZE
        assert self.section_layers > 0
        assert self.section_heads > 0

    def num_sections(self, layout: KVLayout) -> tuple[int, int]:
        """How many sections there are along layers and along heads."""
        return (
            -(-layout.num_layers // self.section_layers),
            -(-layout.num_kv_heads // self.section_heads),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A section's bytes, and what of the chunk they are."""

    index: tuple[int, int]
    layers: range
    heads: range
    content: Bytes


def body_offset(header: Header, layout: KVLayout) -> int:
    """Where the first section begins."""
    rows, columns = header.num_sections(layout)
    return _aligned(HEADER_SIZE + rows * columns * _ENTRY.itemsize)


def section_ranges(header: Header, layout: KVLayout) -> Iterator[tuple[range, range]]:
    """Layers and heads of each section, in the directory's order."""
    rows, columns = header.num_sections(layout)
    for row in range(rows):
        for column in range(columns):
            yield _section_range(header, layout, row, column)


def total_size(header: Header, layout: KVLayout, sizes: Sequence[int]) -> int:
    """The size of a bitstream whose sections have `sizes`. Raises `TooLarge` for what no bitstream
    can say.
    """
    rows, columns = header.num_sections(layout)
    assert len(sizes) == rows * columns
    if rows * columns > SECTIONS_MAX:
        raise TooLarge(f"{rows * columns} sections, a bitstream has at most {SECTIONS_MAX}")
    if max(sizes) > SECTION_SIZE_MAX:
        raise TooLarge(f"a section of {max(sizes)} bytes, at most {SECTION_SIZE_MAX} can be")
    if layout.num_planes > PLANES_MAX:
        raise TooLarge(f"{layout.num_planes} planes, a bitstream has at most {PLANES_MAX}")
    return _offsets(body_offset(header, layout), sizes)[-1]


def write_bitstream(
    header: Header,
    layout: KVLayout,
    span: Span,
    out: Bytes,
    write_section: Callable[[range, range, Bytes], int],
) -> int:
    """Write all of a bitstream, section after section: `write_section` gets layers, heads and what
    is left of `out`, and says how much it wrote. The size of the whole.
    """
    offset = body_offset(header, layout)
    sizes = []
    for layers, heads in section_ranges(header, layout):
        sizes.append(write_section(layers, heads, out[offset:]))
        offset += _aligned(sizes[-1])
    return write_head(header, layout, span, sizes, out)


def write_head(
    header: Header, layout: KVLayout, span: Span, sizes: Sequence[int], out: Bytes
) -> int:
    """Write header and directory before sections that stand in `out` already, from `body_offset`,
    each from a multiple of `SECTION_ALIGN`; the size of the whole.
    """
    assert out.size >= total_size(header, layout, sizes)
    directory = np.zeros(len(sizes), _ENTRY)
    directory["size"] = sizes
    offsets = _offsets(body_offset(header, layout), sizes)
    for index, (offset, end) in enumerate(pairwise(offsets)):
        behind = offset + sizes[index]
        directory["checksum"][index] = _checksum(out[offset:behind])
        # What lies between two sections is 0.
        out[behind:end] = 0
    encoded = directory.tobytes()
    head = _HEAD.pack(
        MAGIC,
        VERSION,
        _FLAG_EXACT if header.is_exact else 0,
        header.level,
        header.codec.encode("ascii"),
        header.profile,
        *_shape(layout, span),
        header.section_layers,
        header.section_heads,
        offsets[-1],
        xxhash.xxh3_64_intdigest(encoded),
    )
    head += _CHECKSUM.pack(xxhash.xxh3_64_intdigest(head))
    start = body_offset(header, layout)
    out[:start] = np.frombuffer((head + encoded).ljust(start, b"\0"), np.uint8)
    return offsets[-1]


def read_header(bitstream: Bytes) -> Header:
    """The header of a bitstream, of whatever chunk. Raises `Corrupt`."""
    return _parse(bitstream)[0]


def read_header_of(bitstream: Bytes, codec: str, *, is_exact: bool) -> Header:
    """The header of a bitstream of `codec`, without a level or a profile. Raises `Corrupt`."""
    header = read_header(bitstream)
    if header.codec != codec or header.is_exact != is_exact:
        raise Corrupt(f"codec {codec} expected, the bitstream is of {header.codec}")
    if header.level or header.profile != NO_PROFILE:
        raise Corrupt(f"{codec} has neither levels nor profiles, the bitstream names one")
    return header


def read_sections(
    bitstream: Bytes, header: Header, layout: KVLayout, span: Span, part: Part
) -> Iterator[Section]:
    """The sections that hold some of `part`, in order; each is verified when it is reached. Raises
    `Corrupt`, at once where the bitstream is of another chunk.
    """
    found, shape, total, checksum = _parse(bitstream)
    assert found == header
    if shape != _shape(layout, span):
        raise Corrupt("the bitstream is of another chunk: layout, position or shape differ")
    layers, heads, _ = part.within(layout, span.num_tokens)
    directory = _read_directory(bitstream, header, layout, total, checksum)
    sizes = [int(size) for size in directory["size"]]
    offsets = _offsets(body_offset(header, layout), sizes)
    if offsets[-1] != total:
        raise Corrupt(f"sections end at {offsets[-1]}, the bitstream at {total}")
    contents = [bitstream[at : at + size] for at, size in zip(offsets, sizes, strict=False)]
    rows = range(
        layers.start // header.section_layers, (layers.stop - 1) // header.section_layers + 1
    )
    columns = range(
        heads.start // header.section_heads, (heads.stop - 1) // header.section_heads + 1
    )
    return _verified(header, layout, rows, columns, contents, directory["checksum"])


def _verified(
    header: Header,
    layout: KVLayout,
    rows: range,
    columns: range,
    contents: Sequence[Bytes],
    checksums: NDArray[np.uint32],
) -> Iterator[Section]:
    width = header.num_sections(layout)[1]
    for row in rows:
        for column in columns:
            content = contents[row * width + column]
            if _checksum(content) != checksums[row * width + column]:
                raise Corrupt(f"section {row},{column} does not match its checksum")
            layers, heads = _section_range(header, layout, row, column)
            yield Section(index=(row, column), layers=layers, heads=heads, content=content)


def _read_directory(
    bitstream: Bytes, header: Header, layout: KVLayout, total: int, checksum: int
) -> NDArray[np.void]:
    rows, columns = header.num_sections(layout)
    if rows * columns > SECTIONS_MAX:
        raise Corrupt(f"{rows * columns} sections, a bitstream has at most {SECTIONS_MAX}")
    if not body_offset(header, layout) <= total <= bitstream.size:
        raise Corrupt(f"a bitstream of {total} bytes, found {bitstream.size}")
    encoded = bitstream[HEADER_SIZE : HEADER_SIZE + rows * columns * _ENTRY.itemsize].tobytes()
    if xxhash.xxh3_64_intdigest(encoded) != checksum:
        raise Corrupt("the directory does not match its checksum")
    return np.frombuffer(encoded, _ENTRY)


def _parse(bitstream: Bytes) -> tuple[Header, tuple[object, ...], int, int]:
    if bitstream.size < HEADER_SIZE:
        raise Corrupt(f"a bitstream has {HEADER_SIZE} bytes or more, found {bitstream.size}")
    head = bitstream[: _HEAD.size].tobytes()
    (checksum,) = _CHECKSUM.unpack(bitstream[_HEAD.size : HEADER_SIZE].tobytes())
    magic, version, flags, level, codec, profile, *rest = _HEAD.unpack(head)
    if magic != MAGIC:
        raise Corrupt(f"no bitstream: it begins with {magic!r}")
    if version != VERSION:
        raise Corrupt(f"a bitstream of version {version}; this reader knows version {VERSION}")
    if xxhash.xxh3_64_intdigest(head) != checksum:
        raise Corrupt("the bitstream's header does not match its checksum")
    name = codec.rstrip(b"\0")
    if flags & ~_FLAG_EXACT or not _is_name(name):
        raise Corrupt(f"a bitstream with flags {flags:#x} of codec {codec!r}")
    section_layers, section_heads, total, directory_checksum = rest[8:]
    if not section_layers or not section_heads:
        raise Corrupt("a bitstream whose sections are empty")
    header = Header(
        codec=name.decode("ascii"),
        is_exact=bool(flags & _FLAG_EXACT),
        level=level,
        profile=profile,
        section_layers=section_layers,
        section_heads=section_heads,
    )
    return header, tuple(rest[:8]), total, directory_checksum


def _shape(layout: KVLayout, span: Span) -> tuple[object, ...]:
    """What a header says of its chunk, in the header's order."""
    return (
        layout.fingerprint,
        span.start,
        span.num_tokens,
        layout.num_layers,
        layout.num_planes,
        _DTYPES[layout.dtype],
        layout.num_kv_heads,
        layout.head_dim,
    )


def _section_range(header: Header, layout: KVLayout, row: int, column: int) -> tuple[range, range]:
    layer, head = row * header.section_layers, column * header.section_heads
    return (
        range(layer, min(layer + header.section_layers, layout.num_layers)),
        range(head, min(head + header.section_heads, layout.num_kv_heads)),
    )


def _is_name(name: bytes) -> bool:
    return len(name) > 0 and name.isascii() and name.decode("ascii").isprintable()


def _offsets(start: int, sizes: Sequence[int]) -> list[int]:
    """Where each section begins, and where the last one ends."""
    return [*accumulate((_aligned(size) for size in sizes), initial=start)]


def _aligned(size: int) -> int:
    return -(-size // SECTION_ALIGN) * SECTION_ALIGN


def _checksum(content: Bytes) -> int:
    return xxhash.xxh3_64_intdigest(content) & 0xFFFFFFFF
