"""What coding a chunk at a level takes: its sections, and the profile's numbers for each."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kvd.codecs.base import Part, Span
from kvd.codecs.bitstream import Header, Section
from kvd.codecs.kernels.kvq import Dither, Place, Scales, Tokens, Window
from kvd.codecs.profile import Level, Profile, Rope
from kvd.codecs.rope import Rotation, rotation
from kvd.errors import Unsupported
from kvd.layout import KVLayout

# Of 128 KiB each, where heads have 128 dims.
ROTATIONS_MAX = 64


class Plan:
    """One level of a profile at one chunk. Raises `Unsupported` where the profile is of a model of
    another shape.
    """

    def __init__(
        self, codec: str, profile: Profile, level_index: int, layout: KVLayout, span: Span
    ) -> None:
        self.level = profile.levels[level_index]
        self.span = span
        self._profile = profile
        self.layout = layout
        _check_shape(profile, layout)
        self.header = Header(
            codec=codec,
            is_exact=False,
            level=level_index,
            profile=profile.hash,
            section_layers=self.level.section_layers if self.level.transform == "cross" else 1,
            section_heads=_section_heads(self.level, layout),
        )
        self.scales = Scales(
            means=np.ascontiguousarray(profile.means, np.float32),
            steps=np.ascontiguousarray(profile.steps, np.float32) * np.float32(self.level.scale),
            rotation=_rotation(profile.rope, span),
            is_half=layout.dtype == "float16",
        )

    def windows(self) -> Iterator[Window]:
        """What each section holds, in their order."""
        num_layers, num_heads = self.layout.num_layers, self.layout.num_kv_heads
        layers, heads = self.header.section_layers, self.header.section_heads
        for layer in range(0, num_layers, layers):
            for head in range(0, num_heads, heads):
                yield Window(
                    layers=range(layer, min(layer + layers, num_layers)),
                    heads=range(head, min(head + heads, num_heads)),
                )

    def num_channels(self, window: Window) -> int:
        """Channels of a section."""
        row = self.layout.num_planes * self.layout.head_dim
        return len(window.layers) * len(window.heads) * row

    def tokens(self, part: Part) -> Tokens:
        """Those of the chunk."""
        _, _, num_wanted = part.within(self.layout, self.span.num_tokens)
        return Tokens(
            count=self.span.num_tokens,
            wanted=num_wanted,
            start=self.span.start,
            is_dithered=self.level.is_dithered,
        )

    def place(self, section: Section, part: Part, offset: int) -> Place:
        """A section that stands at `offset` of a bitstream, and what of it is in `part`."""
        layers, heads, _ = part.within(self.layout, self.span.num_tokens)
        window = Window(layers=section.layers, heads=section.heads)
        return Place(
            offset=offset,
            size=section.content.size,
            section=window,
            wanted=Window(layers=_both(layers, window.layers), heads=_both(heads, window.heads)),
            basis=self.basis(window),
        )

    def basis(self, window: Window) -> NDArray[np.float32] | None:
        """`float32 [channels, channels]`, rows are components; None where there is no transform."""
        if self.level.transform == "none":
            return None
        bases = self._profile.bases.get(self.level.transform)
        group = (
            window.layers.start // self.header.section_layers,
            window.heads.start // self.header.section_heads,
        )
        count = self.num_channels(window)
        # The last group of layers may have fewer channels than the others.
        if bases is None or any(
            have <= want
            for have, want in zip(bases.shape, (*group, count - 1, count - 1), strict=True)
        ):
            raise Unsupported(f"the profile has no basis for {self.level.transform} {group}")
        found: NDArray[np.float32] = bases[group][:count, :count]
        return found

    def dither(self, window: Window) -> Dither | None:
        """What is added to the window's symbols, if the level has it."""
        if not self.level.is_dithered:
            return None
        planes, heads = self.layout.num_planes, self.layout.num_kv_heads
        rows = [
            ((layer * planes + plane) * heads + head) * self.layout.head_dim
            for layer in window.layers
            for plane in range(planes)
            for head in window.heads
        ]
        return Dither(rows=np.array(rows, np.uint32), start=self.span.start)


def _rotation(rope: Rope, span: Span) -> Rotation:
    return _kept_rotation(rope.frequencies.tobytes(), rope.style, rope.offset, span)


# Chunks of all sequences begin at the same positions; sines take as long as a tenth of decoding.
@lru_cache(maxsize=ROTATIONS_MAX)
def _kept_rotation(
    frequencies: bytes, style: Literal["half", "pairs"], offset: int, span: Span
) -> Rotation:
    rope = Rope(frequencies=np.frombuffer(frequencies), style=style, offset=offset)
    return rotation(rope, span)


def _both(wanted: range, held: range) -> range:
    return range(max(wanted.start, held.start), min(wanted.stop, held.stop))


def level_index(level: int | str, profile: Profile) -> int:
    """The level of that index or name. Raises `Unsupported` where the profile has none."""
    names = [known.name for known in profile.levels]
    if isinstance(level, str) and level in names:
        return names.index(level)
    if isinstance(level, int) and 0 <= level < len(names):
        return level
    raise Unsupported(f"level {level!r}, the profile has {', '.join(names)}")


def _section_heads(level: Level, layout: KVLayout) -> int:
    return 1 if level.transform in ("none", "head") else layout.num_kv_heads


def _check_shape(profile: Profile, layout: KVLayout) -> None:
    shape = (layout.num_layers, layout.num_planes, layout.num_kv_heads, layout.head_dim)
    if profile.means.shape != shape or profile.steps.shape != shape:
        raise Unsupported(f"the profile is of {profile.means.shape}, the chunk of {shape}")
