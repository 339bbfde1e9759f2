"""Registry: codecs by name, our own and those of other packages.

A spec is a name, or a name and a level: `raw`, `bf16`, `kvq:2`, `kvq:2-head`. A bitstream names its
codec with the version of its format, `kvq/1`. What a codec needs is imported when it is opened.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any

from kvd.codecs.base import WHOLE, Bytes, Codec, Part, Span
from kvd.codecs.bitstream import read_header
from kvd.errors import Unsupported
from kvd.layout import KVLayout

# A package adds codecs by entry points of this group: a name, and what makes a codec of a level
# (None for none) and the profiles that this installation has.
GROUP = "kvd.codecs"

Maker = Callable[[str | None, Any], Codec]


def parse(spec: str) -> tuple[str, str | None]:
    """Name and level of a spec. Raises `Unsupported` for what is none."""
    name, colon, level = spec.partition(":")
    if not name or bool(colon) != bool(level):
        raise Unsupported(f"a codec like bf16 or kvq:2 expected, found {spec!r}")
    return name, level or None


def codec_names() -> list[str]:
    """All codecs that this installation has."""
    return sorted({*_OWN, *entry_points(group=GROUP).names})


def open_codec(spec: str, profiles: Any = None) -> Codec:
    """The codec of a spec. `profiles` is where codecs find what they know of models: `for_layout`
    and `by_hash`. A codec decodes all its levels, whichever it is opened at. Raises `Unsupported`
    for a name or level that is none, or whose package is broken.
    """
    name, level = parse(spec)
    if name in _OWN:
        return _OWN[name](level, profiles)
    found = entry_points(group=GROUP, name=name)
    if not found:
        raise Unsupported(
            f"codec {name!r} does not exist here; there is: {', '.join(codec_names())} "
            f"(packages add more by the entry point group {GROUP})"
        )
    try:
        codec: Codec = next(iter(found)).load()(level, profiles)
    except Exception as error:
        raise Unsupported(f"codec {name!r} cannot be loaded: {error!r}") from error
    return codec


def decode_any(
    bitstream: Bytes,
    layout: KVLayout,
    span: Span,
    out: Bytes,
    part: Part = WHOLE,
    profiles: Any = None,
) -> None:
    """Decode with the codec that the bitstream names: as `Codec.decode`. Raises `Unsupported` for
    a codec or a version that is not here. Raw chunks have no header: their placement says so.
    """
    wanted = read_header(bitstream).codec
    name = wanted.partition("/")[0]
    codec = open_codec(name, profiles)
    if codec.name != wanted:
        raise Unsupported(f"a bitstream of {wanted}; this installation has {codec.name}")
    codec.decode(bitstream, layout, span, out, part)


def _make_raw(level: str | None, profiles: Any) -> Codec:
    from kvd.codecs.raw import Raw

    return _without_level("raw", level, Raw)


def _make_bf16(level: str | None, profiles: Any) -> Codec:
    from kvd.codecs.bf16 import Bf16

    return _without_level("bf16", level, Bf16)


def _make_fp8(level: str | None, profiles: Any) -> Codec:
    from kvd.codecs.float8 import fp8

    return _without_level("fp8", level, fp8)


def _make_int8(level: str | None, profiles: Any) -> Codec:
    from kvd.codecs.int8 import int8

    return _without_level("int8", level, int8)


def _make_cachegen(level: str | None, profiles: Any) -> Codec:
    from kvd.codecs.cachegen import Cachegen

    return _without_level("cachegen", level, lambda: Cachegen(_needed("cachegen", profiles)))


def _make_kvq(level: str | None, profiles: Any) -> Codec:
    from kvd.codecs.attention_score import token_classes
    from kvd.codecs.kvq import Kvq

    # A level by its name in the model's profile, or the first.
    return Kvq(level or 0, _needed("kvq", profiles), token_classes=token_classes)


def _without_level(name: str, level: str | None, make: Callable[[], Codec]) -> Codec:
    if level is not None:
        raise Unsupported(f"{name} has no levels, found {name}:{level}")
    return make()


def _needed(name: str, profiles: Any) -> Any:
    if profiles is None:
        raise Unsupported(f"{name} needs profiles of models, and none are given")
    return profiles


_OWN: Mapping[str, Maker] = {
    "bf16": _make_bf16,
    "cachegen": _make_cachegen,
    "fp8": _make_fp8,
    "int8": _make_int8,
    "kvq": _make_kvq,
    "raw": _make_raw,
}
