"""Decoding in a client: the bitstreams that a pin with codecs has brought.

On the CPU with the codecs of this installation, straight into the caller's array where that is in
one piece. A tensor on a GPU is filled there where that can be.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kvd.client.tensors import bytes_of, copy_in, copy_out, is_on_gpu
from kvd.codecs.base import WHOLE, Part, Span
from kvd.codecs.profile_folder import ProfileFolder
from kvd.codecs.raw import Raw
from kvd.codecs.registry import decode_any
from kvd.errors import Unsupported
from kvd.layout import KVLayout

if TYPE_CHECKING:
    from kvd.codecs.kvq import ProfileBook

# The one that has kernels for GPUs.
GPU_CODEC = "kvq/1"


def decode(
    content: NDArray[np.uint8],
    codec: str,
    layout: KVLayout,
    *,
    start: int,
    num_tokens: int,
    out: Any,
    profiles: ProfileBook | None = None,
    part: Part | None = None,
) -> None:
    """Fill `out`, an array or tensor `dtype [layers, planes, tokens, kv_heads, head_dim]`, where
    `part` says, from the `content` of a chunk that is there in `codec`. Raises `InvalidRequest` for
    an `out` of another kind, and as `Codec.decode`.
    """
    span = Span(start=start, num_tokens=num_tokens)
    part = part or WHOLE
    profiles = profiles or _shipped()
    shape = layout.shape(num_tokens)
    if (
        part == WHOLE
        and is_on_gpu(out)
        and _decode_there(content, codec, layout, span, profiles, out)
    ):
        return
    target = bytes_of(out, layout.dtype, shape)
    chunk = target
    if chunk is None:
        # What the part leaves out stays as it is.
        chunk = np.empty(layout.size(num_tokens), np.uint8)
        if part != WHOLE:
            copy_in(chunk, layout.dtype, shape, out)
    if codec == "raw":
        Raw().decode(content, layout, span, chunk, part)
    else:
        decode_any(content, layout, span, chunk, part, profiles)
    if target is None:
        copy_out(chunk, layout.dtype, shape, out)


def _decode_there(
    content: NDArray[np.uint8],
    codec: str,
    layout: KVLayout,
    span: Span,
    profiles: ProfileBook,
    out: Any,
) -> bool:
    """Fill `out`, a tensor `dtype [layers, planes, tokens, kv_heads, head_dim]` on a GPU, by its
    device; False where the host has to.
    """
    if codec != GPU_CODEC or not out.is_contiguous():
        return False
    # Torch and Triton come with it.
    from kvd.codecs.gpu import decode_to_device

    try:
        decode_to_device([content], layout, [span], profiles, [out])
    except Unsupported:
        # No Triton, or a profile that the host lacks as well, and says so.
        return False
    return True


@cache
def _shipped() -> ProfileBook:
    return ProfileFolder()
