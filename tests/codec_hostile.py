"""Good and hostile bitstreams for the Numba kernels, to be run under NUMBA_BOUNDSCHECK=1: an access
out of bounds is then an IndexError, and ends this.
"""

from __future__ import annotations

import numpy as np

from kvd.codecs.base import Bytes, Codec, Part, Span
from kvd.codecs.bf16 import Bf16
from kvd.codecs.cachegen import Cachegen
from kvd.codecs.cachegen_profile import CachegenProfile, calibrate
from kvd.codecs.kernels import memory
from kvd.errors import Corrupt
from kvd.layout import KVLayout
from tests.codec_chunks import encoded, layout_of, noise, real_chunk, sealed

BODY = 176
ROUNDS = 1500


class Book:
    """One profile."""

    def __init__(self, profile: CachegenProfile) -> None:
        self.profile = profile

    def for_layout(self, layout: KVLayout) -> CachegenProfile:
        return self.profile

    def by_hash(self, profile_hash: bytes) -> CachegenProfile:
        return self.profile


def attack(codec: Codec, layout: KVLayout, num_tokens: int) -> int:
    """Damage a bitstream in many ways; how many were found out."""
    chunk = real_chunk(layout, num_tokens)
    bitstream = encoded(codec, chunk, layout)
    decode(codec, bitstream, layout, num_tokens)
    corrupt = 0
    for seed in range(ROUNDS):
        damaged = bitstream.copy()
        random = noise(bitstream.size, seed)
        if seed % 3 == 0:
            # All from somewhere on.
            first = BODY + int(random[0] % np.uint64(bitstream.size - BODY))
            damaged[first:] = random.astype(np.uint8)[first:]
        else:
            # Single bytes, most of them near the front.
            reach = 60 if seed % 3 == 1 else bitstream.size - BODY
            for at in random[:3] % np.uint64(reach):
                damaged[BODY + int(at)] = int(random[5] >> (at % np.uint64(56))) & 255
        try:
            decode(codec, sealed(damaged, 1), layout, num_tokens)
        except Corrupt:
            corrupt += 1
    return corrupt


def decode(codec: Codec, bitstream: Bytes, layout: KVLayout, num_tokens: int) -> None:
    out = np.empty(layout.size(num_tokens), np.uint8)
    for part in (Part(token_end=num_tokens // 2 + 1), Part()):
        codec.decode(bitstream, layout, Span(start=0, num_tokens=num_tokens), out, part)


def main() -> None:
    assert memory.IS_CHECKED, "NUMBA_BOUNDSCHECK=1 is not set"
    try:
        memory.load64(np.zeros(8, np.uint8), 1)
    except IndexError:
        pass
    else:
        raise AssertionError("loads are not checked")
    layout = layout_of(1, 2, 1, 64)
    corrupt = attack(Bf16(), layout, 41)
    corrupt += attack(Bf16(), layout_of(1, 1, 3, 5), 37)
    profile = calibrate([real_chunk(layout, 50, 21)], layout)
    corrupt += attack(Cachegen(Book(profile)), layout, 21)
    assert corrupt > ROUNDS
    print(f"checked {3 * ROUNDS} bitstreams, {corrupt} corrupt")


if __name__ == "__main__":
    main()
