"""A profile as a file: safetensors, named by the hash of its bytes. docs/calibration.md.

    tensors    means, steps, scores (float32), frequencies (float64), basis.NAME (float16 or 32)
    metadata   one entry, `kvd.profile`: canonical JSON of layout, weights, rope, levels, what the
               gate measured; one entry, because several would stand in no fixed order

Whoever reads trusts nothing: shapes follow from the layout, numbers are finite, steps positive.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from hashlib import blake2b
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from kvd.codecs.profile import Level, Profile, Rope, Transform
from kvd.errors import Corrupt, InvalidRequest
from kvd.layout import KVLayout

FORMAT = 1
KEY = "kvd.profile"
HASH_SIZE = 32
# A profile of a 70B model with joint bases stays below; a reader's memory does too.
SIZE_MAX = 1 << 30
LEVELS_MAX = 256
SCALE_MAX = 2.0**40

_BASIS = "basis."
_FLOATS = ("float16", "float32")


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What the gate measured of a level on held-out text. `bits` are those of whole bitstreams, an
    element; `kl` is in nats, `kl_se` its standard error over blocks of tokens. Of `num_codes` facts
    in a long text `codes_exact` are found with exact KV; the level loses some and gains some.
    """

    level: str
    bits: float
    kl: float
    kl_se: float
    dnll: float
    top1: float
    num_next: int
    num_codes: int
    codes_exact: int
    codes_lost: int
    codes_gained: int

    def is_safe(self, kl_max: float) -> bool:
        """Whether KL and its standard error together stay within `kl_max`, and no loss of facts can
        be told from chance.
        """
        changed = self.codes_lost + self.codes_gained
        has_lost = self.codes_lost - self.codes_gained > max(1.0, 2 * math.sqrt(changed))
        return self.kl + self.kl_se <= kl_max and not has_lost


@dataclass(frozen=True, kw_only=True)
class StoredProfile:
    """A profile with what its file says beside it. `weights` name the models that it was measured
    with, as a layout's revision names them; the same in another dtype has another name.
    """

    profile: Profile
    weights: tuple[str, ...] = ()
    judged: tuple[Judged, ...] = ()


def pack(stored: StoredProfile) -> bytes:
    """The file. The same profile gives the same bytes; the hash in it does not count."""
    profile = stored.profile
    told = {
        "format": FORMAT,
        "layout": asdict(profile.layout),
        "weights": list(stored.weights),
        "rope": {"style": profile.rope.style, "offset": profile.rope.offset},
        "levels": [asdict(level) for level in profile.levels],
        "judged": [asdict(found) for found in stored.judged],
    }
    tensors: dict[str, NDArray[Any]] = {
        "means": np.ascontiguousarray(profile.means, np.float32),
        "steps": np.ascontiguousarray(profile.steps, np.float32),
        "scores": np.ascontiguousarray(profile.scores, np.float32),
        "frequencies": np.ascontiguousarray(profile.rope.frequencies, np.float64),
    }
    for name, basis in profile.bases.items():
        tensors[_BASIS + name] = _narrowed(basis)
    return save(tensors, {KEY: json.dumps(told, sort_keys=True, separators=(",", ":"))})


def content_hash(content: bytes) -> bytes:
    """The name of a profile: 32 bytes of BLAKE2b over its file."""
    return blake2b(content, digest_size=HASH_SIZE).digest()


def parse(content: bytes) -> StoredProfile:
    """What a file says. Raises `Corrupt` for bytes that are no profile."""
    if len(content) > SIZE_MAX:
        raise Corrupt(f"a profile of {len(content)} bytes, at most {SIZE_MAX} expected")
    try:
        tensors = load(content)
        told = json.loads(_metadata(content)[KEY])
        stored = _stored(tensors, told, content_hash(content))
    except (
        SafetensorError,
        InvalidRequest,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        OverflowError,
        RecursionError,
    ) as error:
        raise Corrupt(f"no profile: {error!r}") from error
    _check(stored.profile)
    return stored


def _narrowed(basis: NDArray[np.float32]) -> NDArray[Any]:
    """In half the room where that loses nothing."""
    half = basis.astype(np.float16)
    return np.ascontiguousarray(half if np.array_equal(half, basis) else basis)


def _metadata(content: bytes) -> Mapping[str, str]:
    # `load` has checked the length before.
    size = int.from_bytes(content[:8], "little")
    found: Mapping[str, str] = json.loads(content[8 : 8 + size])["__metadata__"]
    return found


def _stored(
    tensors: Mapping[str, NDArray[Any]], told: Mapping[str, Any], name: bytes
) -> StoredProfile:
    if told["format"] != FORMAT:
        raise ValueError(f"format {told['format']!r}, this reader knows {FORMAT}")
    layout = KVLayout(**told["layout"])
    if asdict(layout) != told["layout"]:
        raise ValueError("the layout has fields that this reader does not know")
    rope = Rope(
        frequencies=_typed(tensors, "frequencies", ("float64",)),
        style=told["rope"]["style"],
        offset=told["rope"]["offset"],
    )
    bases = {
        key.removeprefix(_BASIS): _typed(tensors, key, _FLOATS).astype(np.float32)
        for key in tensors
        if key.startswith(_BASIS)
    }
    profile = Profile(
        hash=name,
        layout=layout,
        rope=rope,
        means=_typed(tensors, "means", ("float32",)),
        steps=_typed(tensors, "steps", ("float32",)),
        levels=tuple(Level(**level) for level in told["levels"]),
        bases=bases,
        scores=_typed(tensors, "scores", ("float32",)),
    )
    weights = tuple(told["weights"])
    if not all(isinstance(word, str) for word in weights):
        raise ValueError("weights are not named")
    judged = tuple(_judged(found) for found in told["judged"])
    return StoredProfile(profile=profile, weights=weights, judged=judged)


def _judged(told: Mapping[str, Any]) -> Judged:
    found = Judged(**told)
    kinds: dict[str, Any] = {"str": str, "int": int, "float": (int, float)}
    for field in fields(found):
        if not isinstance(getattr(found, field.name), kinds[str(field.type)]):
            raise ValueError(f"{field.name} of a judged level is {getattr(found, field.name)!r}")
    return found


def _typed(tensors: Mapping[str, NDArray[Any]], name: str, dtypes: tuple[str, ...]) -> NDArray[Any]:
    found = tensors[name]
    if found.dtype.name not in dtypes:
        raise ValueError(f"{name} as {' or '.join(dtypes)} expected, found {found.dtype}")
    return found


def _check(profile: Profile) -> None:
    layout = profile.layout
    shape = (layout.num_layers, layout.num_planes, layout.num_kv_heads, layout.head_dim)
    if not all(map(_is_count, shape)):
        raise Corrupt(f"a layout of {shape}")
    _check_array("means", profile.means, shape)
    _check_array("steps", profile.steps, shape)
    if not (profile.steps > 0).all():
        raise Corrupt("a profile's steps are positive")
    if profile.scores.size:
        scores = (layout.num_layers, layout.num_kv_heads, layout.head_dim + 1)
        _check_array("scores", profile.scores, scores)
    _check_rope(profile.rope, layout)
    if not 1 <= len(profile.levels) <= LEVELS_MAX:
        raise Corrupt(f"1 to {LEVELS_MAX} levels expected, found {len(profile.levels)}")
    for level in profile.levels:
        _check_level(level, profile)
    if len({level.name for level in profile.levels}) != len(profile.levels):
        raise Corrupt("two levels have one name")
    if set(profile.bases) - {level.transform for level in profile.levels}:
        raise Corrupt("a profile has a basis that no level uses")


def _check_array(name: str, found: NDArray[Any], shape: tuple[int, ...]) -> None:
    if found.shape != shape:
        raise Corrupt(f"{name} {list(shape)} expected, found {list(found.shape)}")
    if not np.isfinite(found).all():
        raise Corrupt(f"{name} of a profile are not finite")


def _check_rope(rope: Rope, layout: KVLayout) -> None:
    if rope.style not in ("half", "pairs") or not _is_count(rope.offset):
        raise Corrupt(f"a rope of style {rope.style!r} at {rope.offset!r}")
    if rope.frequencies.ndim != 1:
        raise Corrupt("frequencies of a rope are a list")
    _check_array("frequencies", rope.frequencies, rope.frequencies.shape)
    if rope.offset + 2 * rope.frequencies.size > layout.head_dim:
        raise Corrupt(f"a rope of {rope.frequencies.size} pairs in {layout.head_dim} dims")


def _check_level(level: Level, profile: Profile) -> None:
    if not isinstance(level.name, str) or level.transform not in get_args(Transform):
        raise Corrupt(f"a level {level.name!r} with transform {level.transform!r}")
    is_scale = isinstance(level.scale, (int, float)) and math.isfinite(level.scale)
    if not is_scale or not 1 / SCALE_MAX <= level.scale <= SCALE_MAX:
        raise Corrupt(f"level {level.name} has scale {level.scale!r}")
    if not isinstance(level.is_dithered, bool):
        raise Corrupt(f"level {level.name} is dithered: {level.is_dithered!r}")
    layout = profile.layout
    if not _is_count(level.section_layers) or not 1 <= level.section_layers <= layout.num_layers:
        raise Corrupt(f"level {level.name} has sections of {level.section_layers!r} layers")
    if level.transform == "none":
        return
    if level.transform not in profile.bases:
        raise Corrupt(f"level {level.name} has no basis")
    layers = level.section_layers if level.transform == "cross" else 1
    heads = 1 if level.transform == "head" else layout.num_kv_heads
    channels = layers * layout.num_planes * heads * layout.head_dim
    shape = (-(-layout.num_layers // layers), layout.num_kv_heads // heads, channels, channels)
    _check_array(f"basis {level.transform}", profile.bases[level.transform], shape)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def named(stored: StoredProfile) -> tuple[bytes, StoredProfile]:
    """The file of a profile, and the profile with the hash that the file gives it."""
    content = pack(stored)
    profile = replace(stored.profile, hash=content_hash(content))
    return content, replace(stored, profile=profile)
