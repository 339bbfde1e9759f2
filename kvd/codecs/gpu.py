"""kvq/1 on a GPU: bitstreams to tensors and back, many chunks in one launch.

The bytes are those of kvq.py. The host reads headers, directories and, unless the transport did,
checksums; what stands in a section is read on the device, where a bad value is a flag. One copy
brings all bitstreams and the table of their sections up; one comes back with the flags.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvd.codecs import kvq_section
from kvd.codecs.base import WHOLE, Bytes, Span
from kvd.codecs.bitstream import (
    HEADER_SIZE,
    SECTION_ALIGN,
    Header,
    body_offset,
    read_header,
    read_sections,
    write_head,
)
from kvd.codecs.kernels.kvq import LANES, Coded, Window
from kvd.codecs.kvq import NAME, NUM_SINKS, ProfileBook
from kvd.codecs.kvq_plan import Plan, level_index
from kvd.codecs.kvq_section import Content
from kvd.codecs.kvq_side import CLASS_BITS, ids_size_max, packed_size
from kvd.codecs.profile import Profile
from kvd.codecs.rope import Rotation
from kvd.codecs.tables import CLASS_RAW
from kvd.errors import Corrupt, InvalidRequest, Unsupported
from kvd.layout import KVLayout

# A grid has at most so many programs along its second and third dimension: channels of a section,
# blocks of 1,024 of its elements, blocks of tokens.
CHANNELS_MAX = (1 << 16) - 1
SECTION_ELEMENTS_MAX = 1 << 25
TOKENS_MAX = (1 << 16) - 1
# Levels whose tensors stay on the device: a joint basis takes up to hundreds of megabytes.
LEVELS_MAX = 4

_DTYPES = ("bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class _Job:
    """A chunk to decode: its bitstream on the host, and as it was given."""

    stream: Bytes
    given: Any
    plan: Plan
    profile: Profile
    out: Any


def decode_to_device(
    bitstreams: Sequence[Any],
    layout: KVLayout,
    spans: Sequence[Span],
    profiles: ProfileBook,
    out: Any,
    *,
    is_verified: bool = False,
) -> None:
    """Fill `out`: a tensor of the layout's dtype `[layers, planes, tokens, kv_heads, head_dim]` for
    each bitstream, in a list or along the first dimension of one tensor; all on one device.

    Bitstreams are uint8, numpy arrays or tensors on the host or the device; those on a device are
    copied to the host as well, for their headers. `is_verified`: the transport has compared
    checksums. Raises as `Kvq.decode`; chunks may then hold anything. Returns when all is written.
    """
    launches = prepare_decode(bitstreams, layout, spans, profiles, out, is_verified=is_verified)
    flags = [launch() for launch in launches]
    num_bad = sum(int((found != 0).sum()) for found in flags)
    if num_bad:
        raise Corrupt(f"{num_bad} sections do not say what their channels and tokens are")


def prepare_decode(
    bitstreams: Sequence[Any],
    layout: KVLayout,
    spans: Sequence[Span],
    profiles: ProfileBook,
    out: Any,
    *,
    is_verified: bool = False,
) -> list[Callable[[], Any]]:
    """What `decode_to_device` does on the host, and the copy to the device. Each function that is
    returned does the rest, as often as it is called, and returns without waiting which sections of
    a profile and level are bad: int64 `[sections]` on the device, 0 where they are not.
    """
    torch, kernels = _loaded()
    outs = _chunks(out, layout, spans)
    if len(bitstreams) != len(spans):
        raise InvalidRequest(f"{len(bitstreams)} bitstreams for {len(spans)} spans")
    groups: dict[tuple[bytes, int], list[_Job]] = {}
    for given, span, target in zip(bitstreams, spans, outs, strict=True):
        stream = _on_host(given)
        header = read_header(stream)
        profile = _profile_of(header, profiles)
        plan = _plan_of(header, profile, layout, span)
        # All but the checksums of sections is looked at before the first of them.
        sections = read_sections(stream, header, layout, span, WHOLE)
        if not is_verified:
            for _ in sections:
                pass
        job = _Job(stream, given, plan, profile, target)
        groups.setdefault((header.profile, header.level), []).append(job)
    return [_decoding(torch, kernels, layout, jobs) for jobs in groups.values()]


def encode_on_device(
    chunks: Any,
    layout: KVLayout,
    spans: Sequence[Span],
    profiles: ProfileBook,
    level: int | str,
    *,
    classes: Sequence[NDArray[np.uint8]] | None = None,
) -> list[Bytes]:
    """The bitstreams of chunks, as `Kvq(level, profiles)` writes them; of levels with a transform
    a symbol may differ where a number lies between two. `chunks` as `out` of `decode_to_device`;
    `classes`: of each chunk uint8 `[layers, tokens, kv_heads]`, what `TokenClasses` gives for its
    layers. The device codes; the host packs what comes back.
    """
    launch, pack = prepare_encode(chunks, layout, spans, profiles, level, classes=classes)
    return pack(launch())


def prepare_encode(
    chunks: Any,
    layout: KVLayout,
    spans: Sequence[Span],
    profiles: ProfileBook,
    level: int | str,
    *,
    classes: Sequence[NDArray[np.uint8]] | None = None,
) -> tuple[Callable[[], Any], Callable[[Any], list[Bytes]]]:
    """The two halves of `encode_on_device`: what the device does, as often as it is called and
    without waiting, and what makes bitstreams of it.
    """
    _, kernels = _loaded()
    found = _chunks(chunks, layout, spans)
    profile = profiles.for_layout(layout)
    if profile is None:
        raise Unsupported(f"no profile of {layout.model}: kvd calibrate makes one")
    index = level_index(level, profile)
    plans = [Plan(NAME, profile, index, layout, span) for span in spans]
    geometry = _geometry(kernels, plans, layout)
    device = found[0].device
    table = _uploaded(_table(plans, found, layout), device)
    first = _uploaded(_first_classes(plans, geometry.tokens_max, classes), device)
    tensors = _level_tensors(kernels, plans[0], profile, layout, device)
    rotation = _rotations(plans, device)

    def launch() -> Any:
        with _on(device):
            # The kernels write what became raw.
            return kernels.encode(
                table, first.clone(), tensors, *rotation, geometry, _room_size(geometry)
            )

    def pack(encoded: Any) -> list[Bytes]:
        with _on(device):
            return _packed(kernels, encoded, plans, found, layout)

    return launch, pack


def _decoding(torch: Any, kernels: Any, layout: KVLayout, jobs: list[_Job]) -> Callable[[], Any]:
    plans = [job.plan for job in jobs]
    outs = [job.out for job in jobs]
    geometry = _geometry(kernels, plans, layout)
    table = _table(plans, outs, layout)
    offsets = np.cumsum([0] + [_aligned(job.stream.size) for job in jobs])
    places = [
        _places(job.stream, job.plan.header, layout) + np.array([offset, 0])
        for job, offset in zip(jobs, offsets, strict=False)
    ]
    table[:, :2] = np.concatenate(places)
    device = outs[0].device
    tensors = _level_tensors(kernels, plans[0], jobs[0].profile, layout, device)
    stream = _gathered(torch, jobs, offsets, device)
    sections, rotation = _uploaded(table, device), _rotations(plans, device)

    def launch() -> Any:
        # `outs` are named by their addresses alone, and have to be there.
        assert outs[0].device == device
        with _on(device):
            return kernels.decode(stream, sections, tensors, *rotation, geometry)

    return launch


def _gathered(torch: Any, jobs: list[_Job], offsets: NDArray[np.int64], device: Any) -> Any:
    """All bitstreams in one buffer on the device: in one copy those that come from the host."""
    on_device = [isinstance(job.given, torch.Tensor) and job.given.is_cuda for job in jobs]
    staging = torch.empty(int(offsets[-1]), dtype=torch.uint8, pin_memory=device.type == "cuda")
    view = staging.numpy()
    for job, offset, is_there in zip(jobs, offsets, on_device, strict=False):
        if not is_there:
            view[offset : offset + job.stream.size] = job.stream
    found = torch.empty_like(staging, device=device) if any(on_device) else None
    if found is None:
        return staging.to(device, non_blocking=True)
    found.copy_(staging, non_blocking=True)
    for job, offset, is_there in zip(jobs, offsets, on_device, strict=False):
        if is_there:
            found[offset : offset + job.stream.size].copy_(job.given)
    return found


def _packed(
    kernels: Any,
    encoded: Any,
    plans: list[Plan],
    chunks: list[Any],
    layout: KVLayout,
) -> list[Bytes]:
    """Bitstreams of what the device found; a section that does not shrink is its raw tokens."""
    import torch

    counts = encoded.counts.cpu().numpy().astype(np.int64)
    lengths = counts.sum(axis=1)
    ids, classes = encoded.ids.cpu().numpy(), encoded.classes.cpu().numpy()
    states = encoded.states.cpu().numpy().view(np.uint32)
    # What cannot be kept is not worth its way.
    is_kept = lengths <= encoded.room.shape[1]
    offsets = np.concatenate([[0], np.cumsum(np.where(is_kept, lengths, 0))])
    encoded.counts[torch.from_numpy(~is_kept).to(encoded.counts.device)] = 0
    coded = np.empty(0, np.uint16)
    if offsets[-1]:
        longest = int(lengths[is_kept].max())
        places = _uploaded(offsets[:-1], encoded.counts.device)
        found = kernels.collect(encoded, places, int(offsets[-1]), longest)
        coded = found.cpu().numpy().view(np.uint16)
    bitstreams, row = [], 0
    for plan, chunk in zip(plans, chunks, strict=True):
        sections = []
        for window in plan.windows():
            num_channels, num_tokens = plan.num_channels(window), plan.span.num_tokens
            at, num_words = int(offsets[row]), int(counts[row, 0])
            content = Content(
                ids=ids[row, :num_channels],
                classes=classes[row, :num_tokens],
                coded=Coded(
                    states=states[row, : min(LANES, num_tokens)],
                    words=coded[at : at + num_words],
                    escapes=coded[at + num_words : at + int(lengths[row])].view(np.int16),
                ),
                raws=_raws(chunk, window, classes[row, :num_tokens]),
            )
            section = kvq_section.pack(content) if is_kept[row] else None
            if section is None or section.size > kvq_section.size_max(num_tokens, num_channels):
                section = kvq_section.pack(_verbatim(chunk, window, num_tokens, num_channels))
            sections.append(section)
            row += 1
        bitstreams.append(_bitstream(plan, layout, sections))
    assert row == len(lengths)
    return bitstreams


def _bitstream(plan: Plan, layout: KVLayout, sections: list[Bytes]) -> Bytes:
    offset = body_offset(plan.header, layout)
    out = np.empty(offset + sum(_aligned(section.size) for section in sections), np.uint8)
    for section in sections:
        out[offset : offset + section.size] = section
        offset += _aligned(section.size)
    size = write_head(plan.header, layout, plan.span, [found.size for found in sections], out)
    return out[:size]


def _verbatim(chunk: Any, window: Window, num_tokens: int, num_channels: int) -> Content:
    """A section of raw tokens alone."""
    classes = np.full(num_tokens, CLASS_RAW, np.uint8)
    nothing = Coded(
        states=np.empty(0, np.uint32), words=np.empty(0, np.uint16), escapes=np.empty(0, np.int16)
    )
    ids = np.zeros(num_channels, np.uint8)
    return Content(ids=ids, classes=classes, coded=nothing, raws=_raws(chunk, window, classes))


def _raws(chunk: Any, window: Window, classes: NDArray[np.uint8]) -> NDArray[np.uint16]:
    """`uint16 [raw tokens, channels]`, from the device."""
    import torch

    tokens = np.flatnonzero(classes == CLASS_RAW)
    layers, heads = window.layers, window.heads
    held = chunk[layers.start : layers.stop, :, :, heads.start : heads.stop]
    num_channels = held[:, :, 0].numel()
    if not len(tokens):
        return np.empty((0, num_channels), np.uint16)
    wanted = held.index_select(2, torch.from_numpy(tokens).to(chunk.device))
    rows = wanted.permute(2, 0, 1, 3, 4).contiguous().view(torch.int16)
    found: NDArray[np.uint16] = rows.cpu().numpy().view(np.uint16).reshape(-1, num_channels)
    return found


def _profile_of(header: Header, profiles: ProfileBook) -> Profile:
    if header.codec != NAME or header.is_exact:
        raise Corrupt(f"a bitstream of {NAME} expected, found {header.codec}")
    profile = profiles.by_hash(header.profile)
    if profile is None:
        raise Unsupported(f"profile {header.profile.hex()[:8]} is not here")
    return profile


def _plan_of(header: Header, profile: Profile, layout: KVLayout, span: Span) -> Plan:
    if header.level >= len(profile.levels):
        raise Corrupt(f"level {header.level}, the profile has {len(profile.levels)}")
    plan = Plan(NAME, profile, header.level, layout, span)
    if plan.header != header:
        raise Corrupt("the sections are not those of the level")
    return plan


def _geometry(kernels: Any, plans: list[Plan], layout: KVLayout) -> Any:
    header = plans[0].header
    geometry = kernels.Geometry(
        num_planes=layout.num_planes,
        num_heads=layout.num_kv_heads,
        section_heads=header.section_heads,
        dim=layout.head_dim,
        layers_max=min(header.section_layers, layout.num_layers),
        tokens_max=max(plan.span.num_tokens for plan in plans),
        is_half=layout.dtype == "float16",
        is_dithered=plans[0].level.is_dithered,
    )
    num_elements = geometry.channels_max * max(geometry.tokens_max, LANES)
    if geometry.channels_max > CHANNELS_MAX or num_elements > SECTION_ELEMENTS_MAX:
        raise Unsupported(
            f"sections of {CHANNELS_MAX} channels and {SECTION_ELEMENTS_MAX} elements at most on a "
            f"GPU, found {geometry.channels_max} and {num_elements}"
        )
    if geometry.tokens_max > TOKENS_MAX:
        raise Unsupported(f"{TOKENS_MAX} tokens at most on a GPU, found {geometry.tokens_max}")
    return geometry


def _table(plans: list[Plan], chunks: list[Any], layout: KVLayout) -> NDArray[np.int64]:
    """The table of sections (triton_kvq_side.py), without where they stand in a bitstream."""
    header = plans[0].header
    rows, columns = header.num_sections(layout)
    layer = np.repeat(np.arange(rows) * header.section_layers, columns)
    head = np.tile(np.arange(columns) * header.section_heads, rows)
    num_layers = np.minimum(header.section_layers, layout.num_layers - layer)
    group = np.arange(rows * columns)
    side = layout.num_planes * layout.head_dim * header.section_heads * header.section_layers
    tables, turn = [], 0
    for plan, chunk in zip(plans, chunks, strict=True):
        span = plan.span
        fields = (0, 0, span.num_tokens, span.start & 0xFFFFFFFF, layer, num_layers, head)
        tail = (group * side * side, turn, chunk.data_ptr())
        columns_of = [np.broadcast_to(np.int64(field), group.shape) for field in (*fields, *tail)]
        tables.append(np.stack(columns_of, axis=1))
        turn += span.num_tokens
    return np.concatenate(tables)


def _places(stream: Bytes, header: Header, layout: KVLayout) -> NDArray[np.int64]:
    """Offset and size of each section; the directory has been checked."""
    rows, columns = header.num_sections(layout)
    entries = stream[HEADER_SIZE : HEADER_SIZE + 8 * rows * columns].tobytes()
    sizes = np.frombuffer(entries, "<u4").reshape(-1, 2)[:, 0].astype(np.int64)
    ends = body_offset(header, layout) + np.cumsum(_aligned(sizes))
    return np.stack([ends - _aligned(sizes), sizes], axis=1)


def _first_classes(
    plans: list[Plan], tokens_max: int, wanted: Sequence[NDArray[np.uint8]] | None
) -> NDArray[np.uint8]:
    """`[sections, tokens]`: the finest class that is wanted in a section; sinks are raw."""
    rows = []
    for index, plan in enumerate(plans):
        for window in plan.windows():
            row = np.zeros(tokens_max, np.uint8)
            if wanted is not None:
                layers, heads = window.layers, window.heads
                held = wanted[index][layers.start : layers.stop, :, heads.start : heads.stop]
                row[: plan.span.num_tokens] = np.minimum(held.max(axis=(0, 2)), CLASS_RAW - 1)
            row[: max(0, NUM_SINKS - plan.span.start)] = CLASS_RAW
            rows.append(row)
    return np.stack(rows)


def _room_size(geometry: Any) -> int:
    """What no section that is kept has more of, in 16 bits: with more it would be verbatim."""
    side = ids_size_max(geometry.channels_max) + packed_size(geometry.tokens_max, CLASS_BITS)
    return int(geometry.channels_max * geometry.tokens_max + side)


def _rotations(plans: list[Plan], device: Any) -> tuple[Any, Any]:
    """Cosines and sines, float32 [tokens of all chunks, pairs]."""
    turns = [plan.scales.rotation for plan in plans]
    return (
        _uploaded(np.concatenate([turn.cos for turn in turns]), device),
        _uploaded(np.concatenate([turn.sin for turn in turns]), device),
    )


# The tensors of levels, the last used behind; a profile is held, so that its id stays its own.
_known: OrderedDict[tuple[int, int, str, str], tuple[Profile, Any]] = OrderedDict()


def _level_tensors(
    kernels: Any, plan: Plan, profile: Profile, layout: KVLayout, device: Any
) -> Any:
    key = (id(profile), plan.header.level, str(device), layout.dtype)
    if key in _known:
        _known.move_to_end(key)
        return _known[key][1]
    bases = None
    if plan.level.transform != "none":
        for window in plan.windows():
            plan.basis(window)
        bases = _uploaded(profile.bases[plan.level.transform], device)
    found = kernels.LevelTensors(
        means=_uploaded(plan.scales.means, device),
        steps=_uploaded(plan.scales.steps, device),
        turns=_uploaded(_turns(plan.scales.rotation, layout.head_dim), device),
        bases=bases,
    )
    _known[key] = profile, found
    if len(_known) > LEVELS_MAX:
        _known.popitem(last=False)
    return found


def _turns(rotation: Rotation, dim: int) -> NDArray[np.int32]:
    """`[3, head_dim]`: each dim's pair or -1, the other dim of the pair, the sign of its sine."""
    found = np.zeros((3, dim), np.int32)
    found[0], found[2] = -1, 1
    first, second = rotation.pairs()
    found[0, first] = found[0, second] = np.arange(rotation.num_pairs)
    found[1, first], found[1, second] = second, first
    found[2, first] = -1
    return found


def _chunks(given: Any, layout: KVLayout, spans: Sequence[Span]) -> list[Any]:
    """A tensor for each span. Raises `InvalidRequest` for another shape, dtype or device."""
    import torch

    if layout.dtype not in _DTYPES:
        raise Unsupported(f"{NAME} keeps {' and '.join(_DTYPES)}, not {layout.dtype}")
    found = list(given)
    if not spans or len(found) != len(spans):
        raise InvalidRequest(f"{len(found)} chunks for {len(spans)} spans")
    for chunk, span in zip(found, spans, strict=True):
        shape = layout.shape(span.num_tokens)
        if chunk.dtype != getattr(torch, layout.dtype) or tuple(chunk.shape) != shape:
            raise InvalidRequest(
                f"{layout.dtype} {list(shape)} expected, found {chunk.dtype} {list(chunk.shape)}"
            )
        if not chunk.is_contiguous() or chunk.device != found[0].device:
            raise InvalidRequest("chunks are contiguous, and on one device")
    _check_device(found[0].device)
    return found


def _check_device(device: Any) -> None:
    from triton import knobs  # type: ignore[import-untyped, import-not-found, unused-ignore]

    if device.type != "cuda" and not knobs.runtime.interpret:
        raise Unsupported(f"kvq on a GPU, not on {device}; TRITON_INTERPRET=1 tries it without")


def _loaded() -> tuple[Any, Any]:
    """torch, and our kernels."""
    try:
        import torch

        from kvd.codecs.kernels import triton_kvq
    except ImportError as error:
        raise Unsupported(f"kvq on a GPU needs torch and triton: {error}") from error
    return torch, triton_kvq


@contextmanager
def _on(device: Any) -> Iterator[None]:
    """Kernels are launched on the device that is current."""
    import torch

    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        yield


def _on_host(given: Any) -> Bytes:
    return given if isinstance(given, np.ndarray) else given.cpu().numpy()


def _uploaded(array: NDArray[Any], device: Any) -> Any:
    import torch

    held = np.ascontiguousarray(array)
    # torch takes no arrays that are read only.
    return torch.from_numpy(held if held.flags.writeable else held.copy()).to(device)


def _aligned(size: Any) -> Any:
    return -(-size // SECTION_ALIGN) * SECTION_ALIGN
