"""A section of `kvq/1`: bytes of one window of a chunk. docs/formats/bitstream-kvq.md.

    counts | table ids | classes | states | words | escapes | raw tokens

What stands here decodes without any other section. Lengths follow from the counts, which a reader
compares with the section's size before it looks at anything else.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvd.codecs.base import Bytes
from kvd.codecs.kernels.ids import LOW_BITS_MAX
from kvd.codecs.kernels.kvq import LANES, STATE_BITS, Coded
from kvd.codecs.kvq_side import (
    CLASS_BITS,
    ids_size_max,
    pack_classes,
    pack_ids,
    packed_size,
    unpack_classes,
    unpack_ids,
)
from kvd.codecs.tables import CLASS_RAW
from kvd.errors import Corrupt

# Words, escapes, bytes of classes; low bits of the table ids (3 bits), bytes of them all.
_COUNTS = struct.Struct("<IIII")
_LOW_BITS_BITS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """What a section says. `ids` uint8 [channels], `classes` uint8 [tokens], `raws` uint16 [raw
    tokens, channels], in the order of their tokens.
    """

    ids: NDArray[np.uint8]
    classes: NDArray[np.uint8]
    coded: Coded
    raws: NDArray[np.uint16]

    def raws_by_token(self, num_tokens: int) -> dict[int, NDArray[np.uint16]]:
        """Those of the first tokens."""
        tokens = np.flatnonzero(self.classes[:num_tokens] == CLASS_RAW)
        return {int(token): values for token, values in zip(tokens, self.raws, strict=False)}


def size_max(num_tokens: int, num_channels: int) -> int:
    """No section is longer: one that would be holds raw tokens alone."""
    return (
        _COUNTS.size
        + ids_size_max(num_channels)
        + packed_size(num_tokens, CLASS_BITS)
        + 2 * num_tokens * num_channels
    )


def pack(content: Content) -> Bytes:
    """The section."""
    coded = content.coded
    (ids, num_low_bits), classes = pack_ids(content.ids), pack_classes(content.classes)
    id_counts = len(ids) << _LOW_BITS_BITS | num_low_bits
    counts = _COUNTS.pack(len(coded.words), len(coded.escapes), len(classes), id_counts)
    parts = [
        np.frombuffer(counts, np.uint8),
        ids,
        classes,
        _bytes(coded.states[: None if content.ids.any() else 0], "<u4"),
        _bytes(coded.words, "<u2"),
        _bytes(coded.escapes, "<i2"),
        _bytes(content.raws, "<u2"),
    ]
    return np.concatenate(parts)


def parse(section: Bytes, num_tokens: int, num_channels: int) -> Content:
    """What a section of so many tokens and channels says; copies. Raises `Corrupt` where it cannot
    be one.
    """
    if section.size < _COUNTS.size:
        raise Corrupt(f"a section has {_COUNTS.size} bytes or more, found {section.size}")
    counts = _COUNTS.unpack(section[: _COUNTS.size].tobytes())
    num_words, num_escapes, num_classes, id_counts = counts
    num_low_bits, num_ids = id_counts & ((1 << _LOW_BITS_BITS) - 1), id_counts >> _LOW_BITS_BITS
    if num_classes > packed_size(num_tokens, CLASS_BITS):
        raise Corrupt(f"{num_classes} bytes of classes for {num_tokens} tokens")
    if num_low_bits > LOW_BITS_MAX:
        raise Corrupt(f"table ids with {num_low_bits} low bits")
    reader = _Reader(section, _COUNTS.size)
    ids = unpack_ids(reader.take(num_ids), num_low_bits, num_channels)
    classes = unpack_classes(reader.take(num_classes), num_tokens)
    num_raws = int((classes == CLASS_RAW).sum())
    num_states = min(LANES, num_tokens) if ids.any() else 0
    states = reader.take(4 * num_states).view("<u4").astype(np.uint32, copy=False)
    if (states < 1 << STATE_BITS).any():
        raise Corrupt("a coder's state is below its minimum")
    if num_words + num_escapes and not num_states:
        raise Corrupt("a section has symbols, and no channel that they are of")
    content = Content(
        ids=ids,
        classes=classes,
        coded=Coded(
            states=states,
            words=reader.take(2 * num_words).view("<u2").astype(np.uint16, copy=False),
            escapes=reader.take(2 * num_escapes).view("<i2").astype(np.int16, copy=False),
        ),
        raws=reader.take(2 * num_raws * num_channels)
        .view("<u2")
        .astype(np.uint16, copy=False)
        .reshape(num_raws, num_channels),
    )
    reader.end()
    return content


class _Reader:
    """Takes bytes from the front; never more than there are."""

    def __init__(self, section: Bytes, offset: int) -> None:
        self._section = section
        self._offset = offset

    def take(self, count: int) -> Bytes:
        start, self._offset = self._offset, self._offset + count
        if self._offset > self._section.size:
            raise Corrupt(f"{self._offset} bytes of a section expected, found {self._section.size}")
        # A copy is aligned to whatever it holds.
        return self._section[start : self._offset].copy()

    def end(self) -> None:
        if self._offset != self._section.size:
            raise Corrupt(f"a section of {self._offset} bytes expected, found {self._section.size}")


def _bytes(array: NDArray[np.generic], kind: str) -> Bytes:
    return np.ascontiguousarray(array, kind).reshape(-1).view(np.uint8)
