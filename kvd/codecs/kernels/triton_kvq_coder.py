"""Words to symbols and back: the coder of `kvq` in Triton, one warp a section, a lane a token.

Which word a lane takes follows from a running sum over the lanes that need one. Symbols lie as
int16 `[sections, channels, tokens]`, so that the lanes of a step are neighbours in memory. Tables
are in global memory, 512 KiB for all: they stay in L2, and what a section uses mostly in L1.
"""

from __future__ import annotations

from typing import Any

import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]

from kvd.codecs.kernels.kvq import LANES, STATE_BITS
from kvd.codecs.kernels.triton_kvq_side import (
    CODED,
    ESCAPES,
    ESCAPES_AT,
    FIELDS,
    IS_BAD,
    LAYERS,
    ORDER_MASK,
    ORDER_SHIFT,
    PART_FIELDS,
    STATES_AT,
    TOKENS,
    WORDS,
    WORDS_AT,
    jit,
    jit_part,
    load_pair,
)
from kvd.codecs.tables import (
    BIAS_SHIFT,
    CLASS_RAW,
    ESCAPE,
    FREQUENCY_MASK,
    NUM_SYMBOLS,
    NUM_TABLES,
    SUPPORT_MAX,
    SYMBOL_OFFSET,
    SYMBOL_SHIFT,
    TOTAL_BITS,
)

_FIELDS, _PART_FIELDS = tl.constexpr(FIELDS), tl.constexpr(PART_FIELDS)
_LANES, _RAW = tl.constexpr(LANES), tl.constexpr(CLASS_RAW)
_STATE_MIN = tl.constexpr(1 << STATE_BITS)
_TOTAL_BITS, _SLOT_MASK = tl.constexpr(TOTAL_BITS), tl.constexpr(FREQUENCY_MASK)
_BIAS_SHIFT, _SYMBOL_SHIFT = tl.constexpr(BIAS_SHIFT), tl.constexpr(SYMBOL_SHIFT)
# A state is full where it has so many bits more than the frequency.
_ROOM_BITS = tl.constexpr(32 - TOTAL_BITS)
_ESCAPE, _TABLES = tl.constexpr(ESCAPE), tl.constexpr(NUM_TABLES)
_SYMBOLS, _SYMBOL_OFFSET = tl.constexpr(NUM_SYMBOLS), tl.constexpr(SYMBOL_OFFSET)
_MAGNITUDES = tl.constexpr(SUPPORT_MAX + 2)


@jit
def decode(
    stream: tl.tensor,
    sections: tl.tensor,
    parts: tl.tensor,
    order: tl.tensor,
    classes: tl.tensor,
    by_class: tl.tensor,
    slots: tl.tensor,
    symbols: tl.tensor,
    ranks: tl.tensor,
    channels_max: tl.tensor,
    tokens_max: tl.tensor,
) -> None:
    """Reads the stream, writes 2 bytes an element; a step of a section takes some 300 cycles, most
    of them waiting, so that many warps should run side by side. `symbols` hold zeros before;
    `ranks` int32 `[sections, tokens]`: which of the raw tokens a token is. Sets IS_BAD.
    """
    section = tl.program_id(0).to(tl.int64)
    parts += section * _PART_FIELDS
    order += section * channels_max
    classes += section * tokens_max
    ranks += section * tokens_max
    symbols += section * channels_max * tokens_max
    num_tokens = tl.load(sections + section * _FIELDS + TOKENS).to(tl.int32)
    num_words = tl.load(parts + WORDS).to(tl.int32)
    num_escapes = tl.load(parts + ESCAPES).to(tl.int32)
    words = stream + tl.load(parts + WORDS_AT)
    escapes = stream + tl.load(parts + ESCAPES_AT)
    num_coded = tl.load(parts + CODED).to(tl.int32)
    lane = tl.arange(0, _LANES)
    state = _first_states(stream + tl.load(parts + STATES_AT), lane, num_tokens, num_coded > 0)
    is_bad = tl.max((state < _STATE_MIN).to(tl.int32), 0)
    num_coded = tl.where(is_bad == 0, num_coded, 0)
    at, next_escape, num_raws = num_words * 0, num_words * 0, num_words * 0
    for first in range(0, num_tokens, _LANES):
        token = first + lane
        is_lane = token < num_tokens
        # What is raw or not there has table 0, which leaves its state as it is.
        kind = tl.load(classes + token, mask=is_lane, other=_RAW).to(tl.int32)
        is_raw = (is_lane & (kind == _RAW)).to(tl.int32)
        tl.store(ranks + token, num_raws + tl.cumsum(is_raw, 0) - is_raw, mask=is_lane)
        num_raws += tl.sum(is_raw, 0)
        num_escaped = lane * 0
        item = tl.load(order, mask=num_coded > 0, other=0)
        table = tl.load(by_class + kind * _TABLES + (item & ORDER_MASK)).to(tl.int32)
        for index in range(num_coded):
            # The words that may be wanted, before it is known which: a wait less in each step.
            window = load_pair(words + (at + lane).to(tl.int64) * 2, at + lane < num_words)
            slot = (state & _SLOT_MASK).to(tl.int32)
            entry = tl.load(slots + (table << _TOTAL_BITS) + slot)
            channel = item >> ORDER_SHIFT
            item = tl.load(order + index + 1, mask=index + 1 < num_coded, other=0)
            table = tl.load(by_class + kind * _TABLES + (item & ORDER_MASK)).to(tl.int32)
            frequency = ((entry & _SLOT_MASK) + 1).to(tl.uint32)
            bias = ((entry >> _BIAS_SHIFT) & _SLOT_MASK).to(tl.uint32)
            state = frequency * (state >> _TOTAL_BITS) + bias
            is_low = (state < _STATE_MIN).to(tl.int32)
            taken = tl.cumsum(is_low, 0)
            word = tl.gather(window, taken - is_low, 0).to(tl.uint32)
            state = tl.where(is_low == 1, (state << 16) | word, state)
            at += tl.sum(is_low, 0)
            symbol = entry >> _SYMBOL_SHIFT
            num_escaped += (symbol == _ESCAPE).to(tl.int32)
            target = symbols + channel.to(tl.int64) * tokens_max + token
            tl.store(target, symbol.to(tl.int16), mask=is_lane)
        num_found = tl.sum(num_escaped, 0)
        if num_found > 0:
            tl.debug_barrier()
            place = next_escape + tl.cumsum(num_escaped, 0) - num_escaped
            _unescape(
                symbols + token, is_lane, order, num_coded, escapes, num_escapes, place, tokens_max
            )
            next_escape += num_found
    is_bad |= ((at != num_words) | (next_escape != num_escapes)).to(tl.int32)
    is_bad |= tl.max((state != _STATE_MIN).to(tl.int32), 0)
    tl.store(parts + IS_BAD, tl.load(parts + IS_BAD) | is_bad)


@jit_part
def _first_states(
    source: tl.tensor, lane: tl.tensor, num_tokens: tl.tensor, has_states: tl.tensor
) -> Any:
    """Lanes that no token has stay at the minimum."""
    is_there = (lane < num_tokens) & has_states
    low = load_pair(source + 4 * lane, is_there).to(tl.uint32)
    high = load_pair(source + 4 * lane + 2, is_there).to(tl.uint32)
    return tl.where(is_there, low | (high << 16), _STATE_MIN).to(tl.uint32)


@jit_part
def _unescape(
    symbols: tl.tensor,
    is_lane: tl.tensor,
    order: tl.tensor,
    num_coded: tl.tensor,
    escapes: tl.tensor,
    num_escapes: tl.tensor,
    place: tl.tensor,
    tokens_max: tl.tensor,
) -> None:
    """Put escapes where the tables had no symbol; `place` is where each lane's begin."""
    for index in range(num_coded):  # pyright: ignore[reportArgumentType]
        channel = (tl.load(order + index) >> ORDER_SHIFT).to(tl.int64)
        source = symbols + channel * tokens_max
        is_escape = tl.load(source, mask=is_lane, other=0).to(tl.int32) == _ESCAPE
        is_there = is_escape & (place < num_escapes)
        found = load_pair(escapes + place.to(tl.int64) * 2, is_there)
        tl.store(source, found.to(tl.int16), mask=is_there)
        place += is_escape.to(tl.int32)


@jit
def choose_tables(
    sections: tl.tensor,
    symbols: tl.tensor,
    classes: tl.tensor,
    costs: tl.tensor,
    ids: tl.tensor,
    row_size: tl.tensor,
    channels_max: tl.tensor,
    tokens_max: tl.tensor,
    BLOCK: tl.constexpr,  # noqa: N803
) -> None:
    """The cheapest table of a channel; one program a channel. Reads 256 bytes of costs a symbol,
    in L1: some 4 times what the symbols' own bytes take from memory.
    """
    section, channel = tl.program_id(0).to(tl.int64), tl.program_id(1)
    num_tokens = tl.load(sections + section * _FIELDS + TOKENS).to(tl.int32)
    num_channels = (tl.load(sections + section * _FIELDS + LAYERS) * row_size).to(tl.int32)
    classes += section * tokens_max
    symbols += (section * channels_max + channel) * tokens_max
    table = tl.arange(0, _TABLES)
    sums = tl.zeros([_TABLES], tl.int64)
    highest = num_tokens * 0
    if channel < num_channels:
        for first in range(0, num_tokens, BLOCK):
            token = first + tl.arange(0, BLOCK)
            is_token = token < num_tokens
            kind = tl.load(classes + token, mask=is_token, other=_RAW).to(tl.int32)
            is_coded = is_token & (kind != _RAW)
            magnitude = tl.abs(tl.load(symbols + token, mask=is_coded, other=0).to(tl.int32))
            highest = tl.maximum(highest, tl.max(magnitude, 0))
            row = kind * _MAGNITUDES + tl.minimum(magnitude, _MAGNITUDES - 1)
            cost = tl.load(
                costs + row[:, None] * _TABLES + table[None, :], mask=is_coded[:, None], other=0
            )
            sums += tl.sum(cost.to(tl.int64), 0)
        least = tl.min(sums, 0)
        best = tl.min(tl.where(sums == least, table, _TABLES), 0)
        chosen = tl.where(highest > 0, best, 0)
        tl.store(ids + section * channels_max + channel, chosen.to(tl.uint8))


@jit
def encode(
    sections: tl.tensor,
    symbols: tl.tensor,
    classes: tl.tensor,
    ids: tl.tensor,
    by_class: tl.tensor,
    spans: tl.tensor,
    room: tl.tensor,
    room_size: tl.tensor,
    states: tl.tensor,
    counts: tl.tensor,
    row_size: tl.tensor,
    channels_max: tl.tensor,
    tokens_max: tl.tensor,
) -> None:
    """From the last token to the first. Words go to the end of a section's `room` (int16), so that
    they stand in a decoder's order; `counts` int32 `[sections, 2]`: how many, and escapes.
    """
    section = tl.program_id(0).to(tl.int64)
    sections += section * _FIELDS
    num_tokens = tl.load(sections + TOKENS).to(tl.int32)
    num_channels = (tl.load(sections + LAYERS) * row_size).to(tl.int32)
    symbols += section * channels_max * tokens_max
    classes += section * tokens_max
    ids += section * channels_max
    room += section * room_size
    lane = tl.arange(0, _LANES)
    state = (lane * 0 + _STATE_MIN).to(tl.uint32)
    num_words = num_tokens * 0
    num_groups = (num_tokens + _LANES - 1) // _LANES
    for group in range(num_groups):
        token = (num_groups - 1 - group) * _LANES + lane
        is_lane = token < num_tokens
        kind = tl.load(classes + token, mask=is_lane, other=_RAW).to(tl.int32)
        for index in range(num_channels):
            channel = num_channels - 1 - index
            id = tl.load(ids + channel).to(tl.int32)
            if id != 0:
                source = symbols + channel.to(tl.int64) * tokens_max + token
                symbol = tl.load(source, mask=kind != _RAW, other=0).to(tl.int32)
                known = tl.minimum(tl.maximum(symbol, -_SYMBOL_OFFSET), _SYMBOL_OFFSET - 1)
                table = tl.load(by_class + kind * _TABLES + id).to(tl.int32)
                span = tl.load(spans + table * _SYMBOLS + known + _SYMBOL_OFFSET).to(tl.uint32)
                frequency = (span >> 16) + 1
                is_full = ((state >> _ROOM_BITS) >= frequency).to(tl.int32)
                taken = tl.cumsum(is_full, 0)
                num_words += tl.sum(is_full, 0)
                target = room + (room_size - num_words).to(tl.int64) + taken - is_full
                tl.store(target, (state & 0xFFFF).to(tl.int16), mask=is_full == 1)
                state = tl.where(is_full == 1, state >> 16, state)
                quotient = state // frequency
                rest = state - quotient * frequency
                state = (quotient << _TOTAL_BITS) + rest + (span & 0xFFFF)
    tl.store(states + section * _LANES + lane, state.to(tl.int32, bitcast=True))
    tl.store(counts + section * 2, num_words)


@jit
def escape(
    sections: tl.tensor,
    symbols: tl.tensor,
    classes: tl.tensor,
    ids: tl.tensor,
    by_class: tl.tensor,
    supports: tl.tensor,
    room: tl.tensor,
    room_size: tl.tensor,
    counts: tl.tensor,
    row_size: tl.tensor,
    channels_max: tl.tensor,
    tokens_max: tl.tensor,
    BLOCK: tl.constexpr,  # noqa: N803
) -> None:
    """What the tables do not know, token by token, to the front of a section's `room`. Reads the
    symbols once, twice where a group has escapes.
    """
    section = tl.program_id(0).to(tl.int64)
    sections += section * _FIELDS
    num_tokens = tl.load(sections + TOKENS).to(tl.int32)
    num_channels = (tl.load(sections + LAYERS) * row_size).to(tl.int32)
    symbols += section * channels_max * tokens_max
    classes += section * tokens_max
    ids += section * channels_max
    room += section * room_size
    lane = tl.arange(0, _LANES)
    num_escapes = num_tokens * 0
    for first in range(0, num_tokens, _LANES):
        token = first + lane
        kind = tl.load(classes + token, mask=token < num_tokens, other=_RAW).to(tl.int32)
        num_found = lane * 0
        for channel in range(0, num_channels, BLOCK):
            _, is_escape = _escaped(
                symbols,
                token,
                kind,
                ids,
                by_class,
                supports,
                channel,
                num_channels,
                tokens_max,
                BLOCK,
            )
            num_found += tl.sum(is_escape, 0)
        total = tl.sum(num_found, 0)
        if total > 0:
            place = num_escapes + tl.cumsum(num_found, 0) - num_found
            for channel in range(0, num_channels, BLOCK):
                symbol, is_escape = _escaped(
                    symbols,
                    token,
                    kind,
                    ids,
                    by_class,
                    supports,
                    channel,
                    num_channels,
                    tokens_max,
                    BLOCK,
                )
                target = room + (place[None, :] + tl.cumsum(is_escape, 0) - is_escape)
                tl.store(target, symbol.to(tl.int16), mask=is_escape == 1)
                place += tl.sum(is_escape, 0)
            num_escapes += total
    tl.store(counts + section * 2 + 1, num_escapes)


@jit_part
def _escaped(
    symbols: tl.tensor,
    token: tl.tensor,
    kind: tl.tensor,
    ids: tl.tensor,
    by_class: tl.tensor,
    supports: tl.tensor,
    first: tl.tensor,
    num_channels: tl.tensor,
    tokens_max: tl.tensor,
    BLOCK: tl.constexpr,  # noqa: N803
) -> Any:
    """Symbols `[channels, lanes]` of a block, and which of them are escapes."""
    channel = first + tl.arange(0, BLOCK)
    is_there = (channel < num_channels)[:, None] & (kind != _RAW)[None, :]
    source = symbols + channel.to(tl.int64)[:, None] * tokens_max + token[None, :]
    symbol = tl.load(source, mask=is_there, other=0).to(tl.int32)
    id = tl.load(ids + channel, mask=channel < num_channels, other=0).to(tl.int32)
    table = tl.load(by_class + kind[None, :] * _TABLES + id[:, None]).to(tl.int32)
    return symbol, (tl.abs(symbol) > tl.load(supports + table)).to(tl.int32)


@jit
def collect(
    room: tl.tensor,
    room_size: tl.tensor,
    counts: tl.tensor,
    offsets: tl.tensor,
    out: tl.tensor,
    BLOCK: tl.constexpr,  # noqa: N803
) -> None:
    """Words and behind them escapes of each section, from its `room` to its offset in `out`."""
    section = tl.program_id(0).to(tl.int64)
    num_words, num_escapes = tl.load(counts + section * 2), tl.load(counts + section * 2 + 1)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_word = index < num_words
    source = tl.where(is_word, room_size - num_words + index, index - num_words)
    is_there = index < num_words + num_escapes
    found = tl.load(room + section * room_size + source, mask=is_there, other=0)
    tl.store(out + tl.load(offsets + section) + index, found, mask=is_there)
