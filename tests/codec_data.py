"""Profiles for the tests of `kvq`: any layout has one, the same on every machine."""

from __future__ import annotations

from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kvd.codecs.profile import Level, Profile, Rope, canonical
from kvd.layout import KVLayout
from tests.codec_chunks import bell, noise

LEVELS = (
    Level(name="none", scale=1.0),
    Level(name="dithered", scale=1.0, is_dithered=True),
    Level(name="head", scale=1.0, transform="head", is_dithered=True),
    Level(name="layer", scale=1.0, transform="layer"),
    Level(name="cross", scale=1.0, transform="cross", section_layers=2),
    Level(name="fine", scale=2.0**-16),
)


class Book:
    """Profiles of whatever layout is asked for, at some level: a basis is made if it needs one."""

    def __init__(self, level: str = "none", style: Literal["half", "pairs"] = "half") -> None:
        self._level = next(known for known in LEVELS if known.name == level)
        self._style: Literal["half", "pairs"] = style
        self._made: dict[bytes, Profile] = {}

    def for_layout(self, layout: KVLayout) -> Profile:
        hash = blake2b(canonical(layout).fingerprint + self._style.encode(), digest_size=32)
        if hash.digest() not in self._made:
            found = profile_of(layout, hash.digest(), self._level, self._style)
            self._made[hash.digest()] = found
        return self._made[hash.digest()]

    def by_hash(self, hash: bytes) -> Profile | None:
        return self._made.get(hash)


def profile_of(
    layout: KVLayout, hash: bytes, level: Level, style: Literal["half", "pairs"]
) -> Profile:
    """Means of about a step, steps that differ by channel, a rope on most dims."""
    shape = (layout.num_layers, layout.num_planes, layout.num_kv_heads, layout.head_dim)
    count = int(np.prod(shape))
    exponents = (noise(count, 11) % np.uint64(3)).astype(np.int32) - 2
    return Profile(
        hash=hash,
        layout=canonical(layout),
        rope=rope_of(layout.head_dim, style),
        means=bell(count, 12).reshape(shape),
        steps=np.ldexp(np.float32(1), exponents).astype(np.float32).reshape(shape),
        levels=LEVELS,
        bases=bases_of(layout, level),
    )


def rope_of(dim: int, style: Literal["half", "pairs"]) -> Rope:
    """Pairs of a few dims are left out, at the front."""
    offset = 2 if dim > 8 else 0
    num_pairs = (dim - offset) // 2
    return Rope(
        frequencies=0.7 ** np.arange(num_pairs, dtype=np.float64), style=style, offset=offset
    )


def bases_of(layout: KVLayout, level: Level) -> dict[str, NDArray[np.float32]]:
    """A reflection: orthonormal, and every component has something of every channel."""
    if level.transform == "none":
        return {}
    layers = level.section_layers if level.transform == "cross" else 1
    heads = 1 if level.transform == "head" else layout.num_kv_heads
    count = min(layers, layout.num_layers) * layout.num_planes * heads * layout.head_dim
    groups = (-(-layout.num_layers // layers), layout.num_kv_heads // heads)
    bases = np.empty((*groups, count, count), np.float32)
    for seed, group in enumerate(np.ndindex(groups)):
        bases[group] = _reflection(count, seed)
        # The last group of layers may have fewer channels: a basis of its own in the corner.
        left = layout.num_layers - group[0] * layers
        few = min(layers, left) * layout.num_planes * heads * layout.head_dim
        bases[group][:few, :few] = _reflection(few, seed)
    return {level.transform: bases}


def _reflection(count: int, seed: int) -> NDArray[np.float32]:
    axis = bell(count, 20 + seed).astype(np.float64)
    return (np.eye(count) - 2 * np.outer(axis, axis) / (axis @ axis)).astype(np.float32)


def save_profile(profile: Profile, path: Path) -> None:
    """Without pickle; levels stand in this file."""
    rope = profile.rope
    arrays: dict[str, Any] = {f"basis_{name}": basis for name, basis in profile.bases.items()}
    np.savez_compressed(
        path,
        hash=np.frombuffer(profile.hash, np.uint8),
        means=profile.means,
        steps=profile.steps,
        frequencies=rope.frequencies,
        style=np.array(rope.style),
        offset=np.array(rope.offset),
        **arrays,
    )


def load_profile(path: Path, layout: KVLayout, levels: tuple[Level, ...]) -> Profile:
    with np.load(path, allow_pickle=False) as saved:
        return Profile(
            hash=saved["hash"].tobytes(),
            layout=canonical(layout),
            rope=Rope(
                frequencies=saved["frequencies"],
                style=str(saved["style"]),  # type: ignore[arg-type]
                offset=int(saved["offset"]),
            ),
            means=saved["means"],
            steps=saved["steps"],
            levels=levels,
            bases={
                name.removeprefix("basis_"): saved[name]
                for name in saved.files
                if name.startswith("basis_")
            },
        )


class OneProfile:
    """A book of one profile."""

    def __init__(self, profile: Profile) -> None:
        self._profile = profile

    def for_layout(self, layout: KVLayout) -> Profile | None:
        return self._profile if canonical(layout) == self._profile.layout else None

    def by_hash(self, hash: bytes) -> Profile | None:
        return self._profile if hash == self._profile.hash else None


def as_dtype(layout: KVLayout, dtype: str) -> KVLayout:
    return replace(layout, dtype=dtype)
