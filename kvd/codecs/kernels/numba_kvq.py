"""The kernels of `kvq` in Numba: the bits of reference.py, one core at a time, without the GIL.

Here arrays are made and checked. numba_kvq_encode.py does all that encoding takes in one call, and
numba_kvq_sections.py all that decoding takes; numba_kvq_numbers.py and numba_kvq_coder.py have the
steps of one section by themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvd.codecs.bitstream import SECTION_ALIGN
from kvd.codecs.kernels import numba_kvq_choice, numba_kvq_classes, numba_kvq_pack
from kvd.codecs.kernels import numba_kvq_coder as coder
from kvd.codecs.kernels import numba_kvq_encode as encoding
from kvd.codecs.kernels import numba_kvq_numbers as loops
from kvd.codecs.kernels import numba_kvq_sections as sections
from kvd.codecs.kernels.kvq import (
    LANES,
    Coded,
    Dither,
    Place,
    Scales,
    Tokens,
    Window,
)
from kvd.codecs.kernels.numba_kvq_rows import tiles_of
from kvd.codecs.tables import CLASS_FACTORS, CLASS_RAW, tables
from kvd.errors import Corrupt

_NO_ROWS = np.empty(0, np.uint32)

_PROBLEMS = {
    coder.TOO_SHORT: "a stream of symbols ends too early",
    coder.TOO_MANY_ESCAPES: "there are more escaped symbols than escapes",
    coder.TOO_LONG: "a stream of symbols is longer than its tokens",
    coder.BAD_END: "a stream of symbols does not end where it should",
}


def normalise(
    kv: NDArray[np.uint16], window: Window, scales: Scales, out: NDArray[np.float32]
) -> NDArray[np.bool_]:
    """`Kernels.normalise`."""
    is_finite = np.empty(kv.shape[2], np.bool_)
    loops.normalise(
        kv,
        (window.layers.start, window.layers.stop),
        (window.heads.start, window.heads.stop),
        scales.means,
        scales.steps,
        *_turns(scales),
        (scales.is_half, scales.exponent_mask),
        out,
        is_finite,
    )
    return is_finite


def quantise(
    numbers: NDArray[np.float32], classes: NDArray[np.uint8], dither: Dither | None
) -> NDArray[np.int16]:
    """`Kernels.quantise`."""
    symbols = np.empty(numbers.shape, np.int16)
    rows, start = _dithered(dither)
    loops.quantise(numbers, classes, CLASS_FACTORS, rows, start, symbols)
    return symbols


def choose_tables(symbols: NDArray[np.int16], classes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """`Kernels.choose_tables`."""
    found: NDArray[np.uint8] = _room_of(symbols, classes).ids
    return found


def encode(symbols: NDArray[np.int16], classes: NDArray[np.uint8], ids: NDArray[np.uint8]) -> Coded:
    """`Kernels.encode`."""
    room = _room_of(symbols, classes)
    room.ids[:] = ids
    begin = int(encoding.encode_symbols(_books(), room))
    num_escapes = numba_kvq_pack.collect_escapes(_books(), room)
    return Coded(
        states=room.states[: len(symbols)],
        words=room.words[begin:],
        escapes=room.escapes[:num_escapes],
    )


def _room_of(symbols: NDArray[np.int16], classes: NDArray[np.uint8]) -> encoding.Room:
    """Symbols as sections have them, their tables chosen."""
    num_tokens, num_channels = symbols.shape
    room: encoding.Room = encoding.make_room(num_tokens, num_channels, 1)
    room.symbols[:] = 0
    room.symbols[:, :num_tokens] = symbols.T
    room.classes[:] = classes
    room.bad[:] = room.holes[:] = 0
    encoding.settle_classes(room)
    numba_kvq_choice.choose_tables(room.symbols, room.flags, _books().costs, room.ids, room.highest)
    return room


def decode(
    coded: Coded, classes: NDArray[np.uint8], ids: NDArray[np.uint8], num_tokens: int
) -> NDArray[np.int16]:
    """`Kernels.decode`."""
    num_decoded = min(-(-num_tokens // LANES) * LANES, len(classes))
    symbols = np.zeros((num_decoded, len(ids)), np.int16)
    # A step may look at as many words behind the end as there are lanes.
    words = np.zeros(len(coded.words) + LANES, np.uint16)
    words[: len(coded.words)] = coded.words
    states = coded.states.astype(np.uint64)
    answer = coder.decode(
        words,
        coded.escapes,
        states,
        classes,
        ids,
        tables().by_class,
        tables().slots.reshape(-1),
        num_tokens,
        symbols,
    )
    if answer != coder.WHOLE:
        raise Corrupt(_PROBLEMS[answer])
    return symbols[:num_tokens]


def dequantise(
    symbols: NDArray[np.int16], classes: NDArray[np.uint8], dither: Dither | None
) -> NDArray[np.float32]:
    """`Kernels.dequantise`."""
    numbers = np.empty(symbols.shape, np.float32)
    rows, start = _dithered(dither)
    loops.dequantise(symbols, classes, CLASS_FACTORS, rows, start, numbers)
    return numbers


def restore(
    numbers: NDArray[np.float32],
    section: Window,
    part: Window,
    scales: Scales,
    raws: dict[int, NDArray[np.uint16]],
    kv: NDArray[np.uint16],
) -> None:
    """`Kernels.restore`."""
    loops.restore(
        numbers,
        (section.layers.start, len(section.heads), section.heads.start),
        (part.layers.start, part.layers.stop),
        (part.heads.start, part.heads.stop),
        scales.means,
        scales.steps,
        *_turns(scales),
        scales.is_half,
        kv,
    )
    if raws:
        _copy_raws(raws, section, part, kv)


def restore_sections(
    bitstream: NDArray[np.uint8],
    places: Sequence[Place],
    tokens: Tokens,
    scales: Scales,
    kv: NDArray[np.uint16],
) -> int | None:
    """`SectionKernels.restore_sections`."""
    job, bitstream = job_of(tokens, scales), _frozen(bitstream)
    numbers = np.array([_numbers_of(place) for place in places], np.int64).reshape(-1, 10)
    if all(place.basis is None for place in places):
        answer = int(sections.restore_sections(bitstream, numbers, job, kv))
        return None if answer < 0 else answer
    bases = [place.basis for place in places if place.basis is not None]
    assert len(bases) == len(places)
    # Memory that has been touched: new pages would cost as much as decoding.
    room = np.zeros((2, max(map(len, bases)), _rounded_up(tokens.count)), np.float32)
    for index, basis in enumerate(bases):
        if not _restore_transformed(bitstream, numbers[index], basis, job, room, kv):
            return index
    return None


def token_classes(
    kv: NDArray[np.uint16], scales: Scales, scores: NDArray[np.float32], class_max: int
) -> NDArray[np.uint8]:
    """`SectionEncoder.token_classes`."""
    layers, _, num_tokens, heads, _ = kv.shape
    found = np.empty((layers, num_tokens, heads), np.uint8)
    numba_kvq_classes.token_classes(
        _frozen(kv),
        scales.is_half,
        scales.exponent_mask,
        *_turns_back(scales, num_tokens),
        _turns(scales)[2],
        _frozen(np.ascontiguousarray(scores, np.float32)),
        class_max,
        found,
    )
    return found


def encode_sections(
    kv: NDArray[np.uint16],
    windows: Sequence[Window],
    bases: Sequence[NDArray[np.float32] | None],
    classes: NDArray[np.uint8],
    tokens: Tokens,
    scales: Scales,
    out: NDArray[np.uint8],
) -> list[int]:
    """`SectionEncoder.encode_sections`."""
    task, kv = _task(tokens, scales), _frozen(kv)
    ends = [(one.layers.start, one.layers.stop, one.heads.start, one.heads.stop) for one in windows]
    places, sizes = np.array(ends, np.int64), np.empty(len(ends), np.int64)
    if all(basis is None for basis in bases):
        encoding.encode_sections(kv, places, task, classes, SECTION_ALIGN, out, sizes)
        return [int(size) for size in sizes]
    at, found = 0, [basis for basis in bases if basis is not None]
    assert len(found) == len(places)
    room, numbers = _room_behind(found[0], tokens, kv)
    for index, (place, basis) in enumerate(zip(places, found, strict=True)):
        if len(basis) != len(room.ids):
            # The last layers may be fewer.
            room, numbers = _room_behind(basis, tokens, kv)
        encoding.read_numbers(kv, place, task, classes, numbers[0], room)
        # What overflows does not fit a symbol, and its token becomes raw.
        with np.errstate(over="ignore", invalid="ignore"):
            np.matmul(basis, numbers[0], out=numbers[1])
        sizes[index] = encoding.encode_numbers(kv, place, task, numbers[1], room, out[at:])
        at += -(-int(sizes[index]) // SECTION_ALIGN) * SECTION_ALIGN
    return [int(size) for size in sizes]


def _room_behind(
    basis: NDArray[np.float32], tokens: Tokens, kv: NDArray[np.uint16]
) -> tuple[encoding.Room, NDArray[np.float32]]:
    """Room for a section with a transform, and for its numbers before and behind it."""
    room: encoding.Room = encoding.make_room(tokens.count, len(basis), kv.shape[4])
    return room, np.empty((2, *room.symbols.shape), np.float32)


def _turns_back(scales: Scales, num_tokens: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosines and negative sines: float32 [pairs, tokens], tokens rounded up to tiles."""
    by = scales.rotation
    width, num_tiles = tiles_of(num_tokens)
    turns = np.zeros((2, by.num_pairs, width * num_tiles), np.float32)
    turns[0, :, :num_tokens], turns[1, :, :num_tokens] = by.cos.T, -by.sin.T
    return turns[0], turns[1]


def _task(tokens: Tokens, scales: Scales) -> encoding.Task:
    cos, sin = _turns_back(scales, tokens.count)
    return encoding.Task(
        start=np.uint32(tokens.start & 0xFFFFFFFF),
        is_dithered=tokens.is_dithered,
        is_half=scales.is_half,
        exponent=scales.exponent_mask,
        factors=CLASS_FACTORS,
        means=_frozen(scales.means),
        steps=_frozen(scales.steps),
        cos=cos,
        sin=sin,
        turns=_turns(scales)[2],
        books=_books(),
    )


@cache
def _books() -> encoding.Books:
    found = tables()
    return encoding.Books(
        spans=found.spans.reshape(-1),
        by_class=found.by_class.reshape(-1),
        supports=found.supports,
        costs=found.costs.astype(np.uint32),
    )


def _restore_transformed(
    bitstream: NDArray[np.uint8],
    place: NDArray[np.int64],
    basis: NDArray[np.float32],
    job: sections.Job,
    room: NDArray[np.float32],
    kv: NDArray[np.uint16],
) -> bool:
    """One section with a transform; False where it is corrupt."""
    # A product of another shape may add in another order: a part has the bits of the whole.
    numbers, restored = room[:, : len(basis)]
    classes = np.empty(job.num_tokens, np.uint8)
    raws = sections.decode_numbers(bitstream, place, job, kv, numbers, classes)
    if raws < 0:
        return False
    with np.errstate(over="ignore", invalid="ignore"):
        np.matmul(basis.T, numbers, out=restored)
    sections.restore_numbers(bitstream, raws, place, job, restored, classes, kv)
    return True


def job_of(tokens: Tokens, scales: Scales) -> sections.Job:
    """What decoding the sections of a chunk takes."""
    by, found = scales.rotation, tables()
    factors = 1 / CLASS_FACTORS
    factors[CLASS_RAW] = 0
    turns = np.zeros((2, by.num_pairs, _rounded_up(tokens.count)), np.float32)
    turns[0, :, : tokens.count], turns[1, :, : tokens.count] = by.cos.T, by.sin.T
    return sections.Job(
        num_tokens=tokens.count,
        num_wanted=tokens.wanted,
        start=np.uint32(tokens.start & 0xFFFFFFFF),
        is_dithered=tokens.is_dithered,
        is_half=scales.is_half,
        slots=found.slots.reshape(-1),
        by_class=found.by_class.reshape(-1),
        factors=factors,
        means=_frozen(scales.means),
        steps=_frozen(scales.steps),
        cos=turns[0],
        sin=turns[1],
        pairs=(by.offset, by.stride, by.reach),
    )


def _numbers_of(place: Place) -> tuple[int, ...]:
    ranges = (
        place.section.layers,
        place.section.heads,
        place.wanted.layers,
        place.wanted.heads,
    )
    return place.offset, place.size, *(end for one in ranges for end in (one.start, one.stop))


def _frozen(array: NDArray[Any]) -> NDArray[Any]:
    """A view that cannot be written: Numba would compile once more for what can."""
    view = array.view()
    view.flags.writeable = False
    return view


def _rounded_up(num_tokens: int) -> int:
    return -(-num_tokens // LANES) * LANES


def _copy_raws(
    raws: dict[int, NDArray[np.uint16]], section: Window, part: Window, kv: NDArray[np.uint16]
) -> None:
    layers, heads = part.layers, part.heads
    shape = (len(section.layers), kv.shape[1], len(section.heads), kv.shape[4])
    skipped = section.layers.start, section.heads.start
    for token, values in raws.items():
        kv[layers.start : layers.stop, :, token, heads.start : heads.stop] = values.reshape(shape)[
            layers.start - skipped[0] : layers.stop - skipped[0],
            :,
            heads.start - skipped[1] : heads.stop - skipped[1],
        ]


def _turns(scales: Scales) -> tuple[Any, Any, tuple[int, int, int]]:
    by = scales.rotation
    return by.cos, by.sin, (by.offset, by.stride, by.reach)


def _dithered(dither: Dither | None) -> tuple[NDArray[np.uint32], np.uint32]:
    if dither is None:
        return _NO_ROWS, np.uint32(0)
    return dither.rows, np.uint32(dither.start & 0xFFFFFFFF)
