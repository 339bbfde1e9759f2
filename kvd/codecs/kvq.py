"""kvq/1: entropy-coded scalar quantisation of KV, at the levels of a model's profile.

Keys are un-rotated, means subtracted, steps divided out; from some levels on an orthonormal
transform takes out what channels have in common; the rest is rounded and coded with canned tables.
Attention sinks, and what is not finite, stay as they are. Sections are coded apart, on as many
threads as there may be; the bytes are the same on any count of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import accumulate
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from kvd.codecs import attention_score, kvq_section
from kvd.codecs.base import WHOLE, Bytes, Part, Span
from kvd.codecs.bitstream import (
    SECTION_ALIGN,
    Header,
    Section,
    body_offset,
    read_header,
    read_sections,
    write_head,
)
from kvd.codecs.kernels.kvq import (
    Coded,
    Kernels,
    Scales,
    SectionKernels,
    Tokens,
    Window,
    kernels,
)
from kvd.codecs.kvq_plan import Plan, level_index
from kvd.codecs.kvq_section import Content
from kvd.codecs.profile import Profile
from kvd.codecs.tables import CLASS_RAW
from kvd.errors import Corrupt, InvalidRequest, Unsupported
from kvd.layout import KVLayout

_T = TypeVar("_T")
_R = TypeVar("_R")

NAME = "kvq/1"
# Positions that every token attends to: an error there is an error everywhere.
NUM_SINKS = 4

# float32 is rounded to bfloat16 first, and coded as that.
_DTYPES = ("bfloat16", "float16", "float32")


class ProfileBook(Protocol):
    """Where profiles are found."""

    def for_layout(self, layout: KVLayout) -> Profile | None:
        """The profile to encode with, if the model has one."""
        ...

    def by_hash(self, hash: bytes) -> Profile | None:
        """The profile that a bitstream names."""
        ...


# Which tokens deserve finer steps: un-rotated keys float32 [tokens, heads, head_dim] of a layer ->
# uint8 [tokens, heads], each 0, 1 (a quarter of the step) or 2 (a sixteenth).
TokenClasses = Callable[[NDArray[np.float32], Profile, int], NDArray[np.uint8]]


@runtime_checkable
class SectionEncoder(Protocol):
    """Kernels that write sections as they stand, many in a call."""

    def token_classes(
        self,
        kv: NDArray[np.uint16],
        scales: Scales,
        scores: NDArray[np.float32],
        class_max: int,
    ) -> NDArray[np.uint8]:
        """`uint8 [layers, tokens, heads]`: those of attention_score.py, bit for bit."""
        ...

    def encode_sections(
        self,
        kv: NDArray[np.uint16],
        windows: Sequence[Window],
        bases: Sequence[NDArray[np.float32] | None],
        classes: NDArray[np.uint8],
        tokens: Tokens,
        scales: Scales,
        out: NDArray[np.uint8],
    ) -> list[int]:
        """Sections of a chunk into `out`, each from a multiple of `SECTION_ALIGN` on; their sizes.
        `classes`: uint8 [layers, tokens, heads], the finest of a section's counts.
        """
        ...


class Kvq:
    """A lossy codec at one level, by index or name in the profile; decodes every level."""

    name = NAME
    is_exact = False

    def __init__(
        self,
        level: int | str,
        profiles: ProfileBook,
        *,
        token_classes: TokenClasses | None = None,
        num_threads: int = 1,
        compute: Kernels | None = None,
    ) -> None:
        self._level = level
        self._profiles = profiles
        self._token_classes = token_classes
        self._num_threads = num_threads
        self._compute = compute or kernels()

    def size_bytes_max(self, layout: KVLayout, num_tokens: int) -> int:
        # Sections are smallest, and most, with one layer and one head each; larger ones only take
        # less, but for their last bytes of padding.
        header = Header(codec=NAME, is_exact=False)
        rows, columns = header.num_sections(layout)
        num_channels = layout.num_planes * layout.head_dim
        section = kvq_section.size_max(num_tokens, num_channels) + SECTION_ALIGN
        return body_offset(header, layout) + rows * columns * section

    def encode(self, kv: Bytes, layout: KVLayout, span: Span, out: Bytes) -> int:
        _check_dtype(layout)
        profile = self._profiles.for_layout(layout)
        if profile is None:
            raise Unsupported(f"no profile of {layout.model}: kvd calibrate makes one")
        plan = Plan(NAME, profile, level_index(self._level, profile), layout, span)
        chunk, _ = _elements(kv, layout, span)
        assert out.size >= self.size_bytes_max(layout, span.num_tokens)

        classes = self._classes(chunk, plan, profile)
        classes[:, : max(0, NUM_SINKS - span.start)] = CLASS_RAW
        if isinstance(self._compute, SectionEncoder):
            sizes = self._encode_together(self._compute, chunk, plan, classes, out)
        else:
            sizes = self._encode_each(chunk, plan, classes, out)
        return write_head(plan.header, layout, span, sizes, out)

    def _encode_together(
        self,
        compute: SectionEncoder,
        chunk: NDArray[np.uint16],
        plan: Plan,
        classes: NDArray[np.uint8],
        out: Bytes,
    ) -> list[int]:
        """A call for each thread, each to where it is in nobody's way; then side by side."""
        windows, tokens = list(plan.windows()), plan.tokens(WHOLE)
        count = -(-len(windows) // self._num_threads)
        rooms = [
            _aligned(kvq_section.size_max(tokens.count, plan.num_channels(window)))
            for window in windows
        ]
        starts = [*accumulate(rooms, initial=body_offset(plan.header, plan.layout))]

        def encoded(first: int) -> list[int]:
            share = windows[first : first + count]
            bases, target = [plan.basis(window) for window in share], out[starts[first] :]
            return compute.encode_sections(
                chunk, share, bases, classes, tokens, plan.scales, target
            )

        sizes: list[int] = []
        end = starts[0]
        for found in self._mapped(encoded, range(0, len(windows), count)):
            begin, size = starts[len(sizes)], sum(map(_aligned, found))
            if begin != end:
                out[end : end + size] = out[begin : begin + size]
            sizes, end = sizes + found, end + size
        return sizes

    def _encode_each(
        self, chunk: NDArray[np.uint16], plan: Plan, classes: NDArray[np.uint8], out: Bytes
    ) -> list[int]:
        """A kernel at a time."""

        def encoded(window: Window) -> Bytes:
            section = kvq_section.pack(self._content(chunk, plan, window, _finest(classes, window)))
            if section.size <= kvq_section.size_max(chunk.shape[2], plan.num_channels(window)):
                return section
            # Symbols that take more room than what they stand for.
            return kvq_section.pack(_verbatim(chunk, window))

        offset, sizes = body_offset(plan.header, plan.layout), []
        for section in self._mapped(encoded, plan.windows()):
            out[offset : offset + section.size] = section
            sizes.append(section.size)
            offset += _aligned(section.size)
        return sizes

    def decode(
        self, bitstream: Bytes, layout: KVLayout, span: Span, out: Bytes, part: Part = WHOLE
    ) -> None:
        _check_dtype(layout)
        header = read_header(bitstream)
        plan = self._plan_of(header, layout, span)
        chunk, is_copy = _elements(out, layout, span)
        sections = read_sections(bitstream, header, layout, span, part)
        if isinstance(self._compute, SectionKernels):
            self._decode_together(self._compute, bitstream, list(sections), plan, part, chunk)
        else:
            for _ in self._mapped(
                lambda section: self._decode_section(section, plan, part, chunk), sections
            ):
                pass
        if layout.dtype == "float32":
            _widen_into(out, chunk, layout, span, part)
        elif is_copy:
            out[:] = chunk.reshape(-1).view(np.uint8)

    def _decode_together(
        self,
        compute: SectionKernels,
        bitstream: Bytes,
        sections: Sequence[Section],
        plan: Plan,
        part: Part,
        chunk: NDArray[np.uint16],
    ) -> None:
        """A call for each thread."""
        tokens = plan.tokens(part)
        places = [plan.place(section, part, _offset(section, bitstream)) for section in sections]
        count = -(-len(places) // self._num_threads)

        def restore(first: int) -> int | None:
            shares = places[first : first + count]
            found = compute.restore_sections(bitstream, shares, tokens, plan.scales, chunk)
            return None if found is None else first + found

        for corrupt in self._mapped(restore, range(0, len(places), count)):
            if corrupt is not None:
                # What is wrong with it is found, and said, once more.
                self._decode_section(sections[corrupt], plan, part, chunk)
                raise Corrupt("a section whose symbols do not fit it")

    def _decode_section(
        self, section: Section, plan: Plan, part: Part, chunk: NDArray[np.uint16]
    ) -> None:
        """A kernel at a time."""
        place, tokens = plan.place(section, part, 0), plan.tokens(part)
        window = place.section
        content = kvq_section.parse(section.content, tokens.count, plan.num_channels(window))
        numbers = self._numbers(content, plan, window, tokens.wanted)
        raws = content.raws_by_token(tokens.wanted)
        self._compute.restore(numbers, window, place.wanted, plan.scales, raws, chunk)

    def _content(
        self,
        chunk: NDArray[np.uint16],
        plan: Plan,
        window: Window,
        classes: NDArray[np.uint8],
    ) -> Content:
        num_tokens = chunk.shape[2]
        numbers = np.empty((num_tokens, plan.num_channels(window)), np.float32)
        is_finite = self._compute.normalise(chunk, window, plan.scales, numbers)
        classes[~is_finite] = CLASS_RAW
        basis = plan.basis(window)
        if basis is not None:
            # What overflows does not fit a symbol, and its token becomes raw.
            with np.errstate(over="ignore", invalid="ignore"):
                numbers = numbers @ basis.T
        symbols = self._compute.quantise(numbers, classes, plan.dither(window))
        ids = self._compute.choose_tables(symbols, classes)
        coded = self._compute.encode(symbols, classes, ids)
        raws = _raws(chunk, window, classes)
        return Content(ids=ids, classes=classes, coded=coded, raws=raws)

    def _classes(
        self, chunk: NDArray[np.uint16], plan: Plan, profile: Profile
    ) -> NDArray[np.uint8]:
        """`uint8 [layers, tokens, heads]`: what tokens ask for."""
        layers, _, num_tokens, heads, _ = chunk.shape
        classes = np.zeros((layers, num_tokens, heads), np.uint8)
        if self._token_classes is None:
            return classes
        is_own = self._token_classes is attention_score.token_classes
        if is_own and isinstance(self._compute, SectionEncoder):
            if not profile.scores.size:
                return classes
            class_max = attention_score.CLASS_MAX
            return self._compute.token_classes(chunk, plan.scales, profile.scores, class_max)
        for layer in range(layers):
            wanted = self._token_classes(self._keys(chunk, plan, layer), profile, layer)
            classes[layer] = np.minimum(wanted, CLASS_RAW - 1)
        return classes

    def _keys(self, chunk: NDArray[np.uint16], plan: Plan, layer: int) -> NDArray[np.float32]:
        """Un-rotated keys of a layer; 0 for tokens that are not finite."""
        layers, _, num_tokens, heads, dim = chunk.shape
        keys = np.empty((num_tokens, heads * dim), np.float32)
        shape = (layers, 1, heads, dim)
        scales = replace(
            plan.scales, means=np.zeros(shape, np.float32), steps=np.ones(shape, np.float32)
        )
        window = Window(layers=range(layer, layer + 1), heads=range(heads))
        self._compute.normalise(chunk[:, :1], window, scales, keys)
        return keys.reshape(num_tokens, heads, dim)

    def _numbers(
        self, content: Content, plan: Plan, window: Window, num_tokens: int
    ) -> NDArray[np.float32]:
        symbols = self._compute.decode(content.coded, content.classes, content.ids, num_tokens)
        numbers = self._compute.dequantise(symbols, content.classes, plan.dither(window))
        basis = plan.basis(window)
        if basis is None:
            return numbers
        # A product of another shape may add in another order: a part has the bits of the whole.
        padded = np.zeros((len(content.classes), numbers.shape[1]), np.float32)
        padded[:num_tokens] = numbers
        with np.errstate(over="ignore", invalid="ignore"):
            return (padded @ basis)[:num_tokens]

    def _plan_of(self, header: Header, layout: KVLayout, span: Span) -> Plan:
        if header.codec != NAME or header.is_exact:
            raise Corrupt(f"a bitstream of {NAME} expected, found {header.codec}")
        profile = self._profiles.by_hash(header.profile)
        if profile is None:
            raise Unsupported(f"profile {header.profile.hex()[:8]} is not here")
        if header.level >= len(profile.levels):
            raise Corrupt(f"level {header.level}, the profile has {len(profile.levels)}")
        plan = Plan(NAME, profile, header.level, layout, span)
        if plan.header != header:
            raise Corrupt("the sections are not those of the level")
        return plan

    def _mapped(self, function: Callable[[_T], _R], items: Iterable[_T]) -> Iterator[_R]:
        """In order, on the codec's threads."""
        if self._num_threads == 1:
            yield from map(function, items)
            return
        with ThreadPoolExecutor(self._num_threads) as pool:
            yield from pool.map(function, items)


def _check_dtype(layout: KVLayout) -> None:
    if layout.dtype not in _DTYPES:
        raise Unsupported(f"{NAME} keeps {' and '.join(_DTYPES)}, not {layout.dtype}")


def _elements(kv: Bytes, layout: KVLayout, span: Span) -> tuple[NDArray[np.uint16], bool]:
    """A chunk's elements as they stand in `kv`, and whether they had to be copied: kernels want
    them aligned.
    """
    size = layout.size(span.num_tokens)
    if span.num_tokens < 1 or kv.size != size:
        raise InvalidRequest(f"{size} bytes of {span.num_tokens} tokens expected, found {kv.size}")
    if layout.dtype == "float32":
        bits = (kv.copy() if kv.ctypes.data % layout.itemsize else kv).view(np.uint32)
        return _to_bfloat16(bits).reshape(layout.shape(span.num_tokens)), True
    is_copy = kv.ctypes.data % layout.itemsize != 0
    elements = (kv.copy() if is_copy else kv).view(np.uint16)
    return elements.reshape(layout.shape(span.num_tokens)), is_copy


def _to_bfloat16(bits: NDArray[np.uint32]) -> NDArray[np.uint16]:
    """float32 to the nearest bfloat16, ties to even; infinities and NaNs stay what they are."""
    rounded = bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return (np.where(is_nan, bits | np.uint32(0x00400000), rounded) >> 16).astype(np.uint16)


def _widen_into(
    out: Bytes, chunk: NDArray[np.uint16], layout: KVLayout, span: Span, part: Part
) -> None:
    """Put the wanted part of a bfloat16 chunk into a float32 one; the rest stays as it is."""
    layers, heads, num_tokens = part.within(layout, span.num_tokens)
    place = (_slice(layers), slice(None), slice(num_tokens), _slice(heads))
    is_copy = out.ctypes.data % layout.itemsize != 0
    whole = (out.copy() if is_copy else out).view(np.uint32)
    whole.reshape(layout.shape(span.num_tokens))[place] = chunk[place].astype(np.uint32) << 16
    if is_copy:
        out[:] = whole.view(np.uint8)


def _verbatim(chunk: NDArray[np.uint16], window: Window) -> Content:
    """A section of raw tokens alone."""
    classes = np.full(chunk.shape[2], CLASS_RAW, np.uint8)
    raws = _raws(chunk, window, classes)
    nothing = Coded(
        states=np.empty(0, np.uint32), words=np.empty(0, np.uint16), escapes=np.empty(0, np.int16)
    )
    ids = np.zeros(raws.shape[1], np.uint8)
    return Content(ids=ids, classes=classes, coded=nothing, raws=raws)


def _raws(
    chunk: NDArray[np.uint16], window: Window, classes: NDArray[np.uint8]
) -> NDArray[np.uint16]:
    """`uint16 [raw tokens, channels]`."""
    tokens = np.flatnonzero(classes == CLASS_RAW)
    by_token = chunk[_slice(window.layers), :, :, _slice(window.heads)].transpose(2, 0, 1, 3, 4)
    return by_token[tokens].reshape(len(tokens), by_token[0].size)


def _finest(classes: NDArray[np.uint8], window: Window) -> NDArray[np.uint8]:
    """The finest class of each token that any layer or head of a section asks for; a copy."""
    found: NDArray[np.uint8] = classes[_slice(window.layers), :, _slice(window.heads)].max((0, 2))
    return found


def _aligned(size: int) -> int:
    return -(-size // SECTION_ALIGN) * SECTION_ALIGN


def _offset(section: Section, bitstream: Bytes) -> int:
    """Where the section stands: its content is a view."""
    return int(section.content.ctypes.data) - int(bitstream.ctypes.data)


def _slice(indices: range) -> slice:
    return slice(indices.start, indices.stop)
