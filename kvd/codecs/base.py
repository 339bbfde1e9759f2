"""What a codec is: chunk <-> bitstream, pure and synchronous.

A chunk is `dtype [layers, planes, tokens, kv_heads, head_dim]` in C order, here as a flat view of
its bytes; a bitstream is what docs/formats/bitstream.md says. A codec does no I/O and keeps no
state between calls: any thread may call it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kvd.errors import InvalidRequest
from kvd.layout import KVLayout

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Which tokens of a sequence a chunk holds: `num_tokens` from position `start`."""

    start: int
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What of a chunk is wanted; half-open ranges, None for the last end. Tokens are a prefix."""

    layer_start: int = 0
    layer_end: int | None = None
    head_start: int = 0
    head_end: int | None = None
    token_end: int | None = None

    def within(self, layout: KVLayout, num_tokens: int) -> tuple[range, range, int]:
        """Layers, heads and the count of tokens. Raises `InvalidRequest` for what is not there."""
        layers = _range("layer", self.layer_start, self.layer_end, layout.num_layers)
        heads = _range("head", self.head_start, self.head_end, layout.num_kv_heads)
        tokens = _range("token", 0, self.token_end, num_tokens)
        return layers, heads, len(tokens)


WHOLE = Part()


class Codec(Protocol):
    """One codec at one level. `name` has the version of its bitstream: bytes of a released version
    decode for ever.
    """

    @property
    def name(self) -> str:
        """As it stands in the bitstream and in a placement, such as `kvq/1`."""
        ...

    @property
    def is_exact(self) -> bool:
        """Whether what is decoded is what was encoded, bit for bit."""
        ...

    def size_bytes_max(self, layout: KVLayout, num_tokens: int) -> int:
        """No bitstream of so many tokens is longer."""
        ...

    def encode(self, kv: Bytes, layout: KVLayout, span: Span, out: Bytes) -> int:
        """Write the bitstream of a chunk into `out`; how many bytes it has. The same chunk gives
        the same bytes. Raises `Unsupported` for a layout that this codec cannot keep: a dtype, or a
        model without a profile.
        """
        ...

    def decode(
        self, bitstream: Bytes, layout: KVLayout, span: Span, out: Bytes, part: Part = WHOLE
    ) -> None:
        """Fill `out`, a whole chunk in C order, where `part` says; the rest stays as it is.

        Raises `Corrupt` for bytes that are no bitstream of this chunk, `Unsupported` where its
        profile is missing; `out` may then hold anything.
        """
        ...


def _range(name: str, start: int, end: int | None, count: int) -> range:
    end = count if end is None else end
    if not 0 <= start < end <= count:
        raise InvalidRequest(f"{name}s {start}..{end} wanted, the chunk has {count}")
    return range(start, end)
