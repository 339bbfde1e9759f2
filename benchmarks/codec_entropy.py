"""Entropy decoding by itself, for codec_speed.py: the words of a bitstream of `kvq` to symbols,
section after section, and nothing done with them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

from kvd.codecs.base import WHOLE, Bytes, Span
from kvd.codecs.bitstream import read_header, read_sections
from kvd.codecs.kernels import numba_kvq
from kvd.codecs.kernels.kvq import LANES
from kvd.codecs.kernels.numba_kvq_sections import (
    decode_group_of,
    make_scratch,
    parse_section,
)
from kvd.codecs.kvq_plan import Plan
from kvd.codecs.profile import Profile
from kvd.layout import KVLayout


def entropy_decoder(
    bitstream: Bytes, layout: KVLayout, span: Span, profile: Profile
) -> Callable[[], None]:
    """What decodes the symbols of a whole chunk, at a level without a transform."""
    header = read_header(bitstream)
    plan = Plan(header.codec, profile, header.level, layout, span)
    begin = int(bitstream.ctypes.data)
    places = [
        (int(section.content.ctypes.data) - begin, section.content.size)
        for section in read_sections(bitstream, header, layout, span, WHOLE)
    ]
    job = numba_kvq.job_of(plan.tokens(WHOLE), plan.scales)
    num_channels = layout.num_planes * layout.head_dim
    ends = np.array(places, np.int64)

    def decode() -> None:
        assert _decode_symbols(bitstream, ends, num_channels, job) == len(ends)

    return decode


@njit(nogil=True, error_model="numpy")
def _decode_symbols(bitstream: Any, places: Any, num_channels: int, job: Any) -> Any:
    """How many sections there were, all of them whole."""
    scratch = make_scratch(job.num_tokens, num_channels)
    for index in range(len(places)):
        content = bitstream[places[index, 0] : places[index, 0] + places[index, 1]]
        marks = parse_section(content, scratch)
        if marks.num_words < 0:
            return index
        at, used = np.uint64(0), 0
        for group in range(-(-job.num_tokens // LANES)):
            at, used = decode_group_of(content, group, at, used, marks, job, scratch)
            if used < 0:
                return index
    return len(places)
