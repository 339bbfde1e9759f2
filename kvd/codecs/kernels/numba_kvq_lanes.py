"""The 32 lanes of the coder of `kvq` side by side, in two vectors of AVX-512.

A step of 16 lanes is one gather from the table, one product, one compare; the lanes that want a
word get the next ones in their order by one expand. What a step waits for is the step before: about
50 cycles for 32 symbols, where one lane after the other takes 160.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.core import cgutils as untyped_cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from kvd.codecs.kernels.kvq import LANES, STATE_BITS
from kvd.codecs.kernels.memory import IS_CHECKED
from kvd.codecs.tables import (
    BIAS_SHIFT,
    CLASS_RAW,
    FREQUENCY_MASK,
    NUM_CLASSES,
    NUM_SYMBOLS,
    NUM_TABLES,
    SYMBOL_OFFSET,
    SYMBOL_SHIFT,
    TOTAL,
    TOTAL_BITS,
)

# Whether what Numba compiles for has vectors of 16 numbers, and expands them.
_CONTEXT: Any = cpu_target.target_context
IS_WIDE = "+avx512f" in _CONTEXT.codegen().magic_tuple()[2].split(",")

# Numba's own helpers have no types.
cgutils: Any = untyped_cgutils

_WIDTH = 16
# Rows and columns of a block that is turned at once.
BLOCK = _WIDTH
_I16, _I32, _I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
_NUMBERS = ir.VectorType(_I32, _WIDTH)
_FLAGS = ir.VectorType(ir.IntType(1), _WIDTH)
_SHORTS = ir.VectorType(_I16, _WIDTH)
_FLOATS = ir.VectorType(ir.FloatType(), _WIDTH)
# What is subtracted from a quotient of float32 so that it is never too large.
_DOWN = 0.4

SYMBOLS_BITS = NUM_SYMBOLS.bit_length() - 1


def _over_channels(loop: Callable[[_Group, Any], Any]) -> Any:
    """What Numba needs to put such a loop into its code."""

    def typed(
        _context: Any,
        table: Any,
        words: Any,
        bound: Any,
        at: Any,
        states: Any,
        classes: Any,
        by_class: Any,
        ids: Any,
        symbols: Any,
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            arrays = [
                context.make_array(kind)(context, builder, value)
                if isinstance(kind, types.Array)
                else value
                for kind, value in zip(signature.args, arguments, strict=True)
            ]
            count = builder.extract_value(arrays[7].shape, 0)
            found = [getattr(array, "data", array) for array in arrays]
            return loop(_Group(builder, *found), count)

        number = types.uint64
        arguments = (table, words, number, number, states, classes, by_class, ids, symbols)
        return number(*arguments), generate

    return intrinsic(typed)


class _Group:
    """Writes the loops over the channels of a group of 32 tokens; an encoder's goes backward."""

    def __init__(
        self,
        builder: Any,
        table: Any,
        words: Any,
        bound: Any,
        at: Any,
        states: Any,
        classes: Any,
        by_class: Any,
        ids: Any,
        symbols: Any,
    ) -> None:
        self._builder = builder
        # Of a decoder: how many words there are; of an encoder: how far channels are apart.
        self._table, self._words, self._bound = table, words, bound
        self._states, self._by_class, self._ids, self._symbols = states, by_class, ids, symbols
        self._at = cgutils.alloca_once_value(builder, at)
        # Vectors in variables: LLVM keeps them in registers.
        self._lanes = [
            cgutils.alloca_once_value(builder, self._load(states, half, _NUMBERS))
            for half in range(2)
        ]
        found = [self._load(classes, half, _NUMBERS) for half in range(2)]
        self._is_class = [
            [builder.icmp_unsigned("==", numbers, _all(index)) for index in range(1, CLASS_RAW + 1)]
            for numbers in found
        ]

    def loop(self, count: Any) -> Any:
        builder = self._builder
        with cgutils.for_range(builder, count, intp=_I64) as loop:
            table = builder.zext(self._entry(self._ids, loop.index), _I64)
            target = builder.gep(self._symbols, [builder.mul(loop.index, _I64(LANES))])
            is_coded = builder.icmp_unsigned("!=", table, _I64(0))
            with builder.if_else(is_coded) as (then, otherwise):
                with then:
                    bases = self._bases(table, 0)
                    for half in range(2):
                        self._step(self._base_of(bases, half), half, target)
                with otherwise:
                    for half in range(2):
                        self._store(target, half, ir.Constant(_SHORTS, [0] * _WIDTH))
            is_over = builder.icmp_unsigned(">", builder.load(self._at), self._bound)
            with builder.if_then(is_over, likely=False):
                loop.do_break()
        for half in range(2):
            self._store(self._states, half, builder.load(self._lanes[half]))
        return builder.load(self._at)

    def _step(self, base: Any, half: int, target: Any) -> None:
        builder = self._builder
        state, at = builder.load(self._lanes[half]), builder.load(self._at)
        slot = builder.and_(state, _all(FREQUENCY_MASK))
        entry = self._gather(builder.add(base, slot))
        symbol = builder.trunc(builder.ashr(entry, _all(SYMBOL_SHIFT)), _SHORTS)
        self._store(target, half, symbol)
        frequency = builder.add(builder.and_(entry, _all(FREQUENCY_MASK)), _all(1))
        bias = builder.and_(builder.lshr(entry, _all(BIAS_SHIFT)), _all(FREQUENCY_MASK))
        state = builder.add(builder.mul(frequency, builder.lshr(state, _all(TOTAL_BITS))), bias)
        is_low = builder.icmp_unsigned("<", state, _all(1 << STATE_BITS))
        found = self._load(builder.gep(self._words, [at]), 0, _SHORTS)
        taken = self._call(
            "llvm.x86.avx512.mask.expand.v16i32",
            _NUMBERS,
            [builder.zext(found, _NUMBERS), _all(0), is_low],
        )
        refilled = builder.or_(builder.shl(state, _all(STATE_BITS)), taken)
        builder.store(builder.select(is_low, refilled, state), self._lanes[half])
        num_taken = builder.ctpop(builder.bitcast(is_low, _I16))
        builder.store(builder.add(at, builder.zext(num_taken, _I64)), self._at)

    def loop_back(self, count: Any) -> Any:
        """The encoder's."""
        builder = self._builder
        with cgutils.for_range_slice(
            builder, builder.sub(count, _I64(1)), _I64(-1), _I64(-1), intp=_I64, inc=False
        ) as (channel, _):
            table = builder.zext(self._entry(self._ids, channel), _I64)
            source = builder.gep(self._symbols, [builder.mul(channel, self._bound)])
            with builder.if_then(builder.icmp_unsigned("!=", table, _I64(0))):
                # Tables of symbols have a quarter of the entries that tables of slots have.
                bases = self._bases(table, TOTAL_BITS - SYMBOLS_BITS)
                for half in (1, 0):
                    self._step_back(self._base_of(bases, half), half, source)
        for half in range(2):
            self._store(self._states, half, builder.load(self._lanes[half]))
        return builder.load(self._at)

    def _step_back(self, base: Any, half: int, source: Any) -> None:
        builder = self._builder
        state, at = builder.load(self._lanes[half]), builder.load(self._at)
        symbol = builder.sext(self._load(source, half, _SHORTS), _NUMBERS)
        low, high = _all(-SYMBOL_OFFSET), _all(SYMBOL_OFFSET - 1)
        symbol = builder.select(builder.icmp_signed("<", symbol, low), low, symbol)
        symbol = builder.select(builder.icmp_signed(">", symbol, high), high, symbol)
        entry = self._gather(builder.add(base, builder.add(symbol, _all(SYMBOL_OFFSET))))
        frequency = builder.add(builder.lshr(entry, _all(STATE_BITS)), _all(1))
        is_full = builder.icmp_unsigned(">=", builder.lshr(state, _all(32 - TOTAL_BITS)), frequency)
        self._put(state, is_full, at)
        state = builder.select(is_full, builder.lshr(state, _all(STATE_BITS)), state)
        # A quotient is below 2^21, a float32 has 24 bits: three roundings are off by less than 0.4.
        # What is left without `_DOWN` is the quotient, or one less.
        reciprocal = builder.fdiv(_floats(1.0), builder.uitofp(frequency, _FLOATS))
        product = builder.fmul(builder.uitofp(state, _FLOATS), reciprocal)
        quotient = builder.fptosi(builder.fsub(product, _floats(_DOWN)), _NUMBERS)
        rest = builder.sub(state, builder.mul(quotient, frequency))
        is_less = builder.icmp_unsigned(">=", rest, frequency)
        start = builder.and_(entry, _all((1 << STATE_BITS) - 1))
        state = builder.add(builder.shl(quotient, _all(TOTAL_BITS)), builder.add(rest, start))
        more = builder.sub(_all(TOTAL), frequency)
        state = builder.add(state, builder.select(is_less, more, _all(0)))
        builder.store(state, self._lanes[half])

    def _put(self, state: Any, is_full: Any, at: Any) -> None:
        """The low words of full states before `at`, the first lane's first. What stands before them
        is written in vain.
        """
        builder = self._builder
        order = builder.bitcast(is_full, _I16)
        count = builder.ctpop(order)
        packed = self._call(
            "llvm.x86.avx512.mask.compress.v16i32", _NUMBERS, [state, _all(0), is_full]
        )
        # They are in the first lanes, and go to the last ones.
        lanes = ir.Constant(_NUMBERS, list(range(_WIDTH)))
        moved = builder.add(lanes, _spread(builder, builder.zext(count, _I32)))
        last = self._call("llvm.x86.avx512.permvar.si.512", _NUMBERS, [packed, moved])
        found = builder.trunc(last, _SHORTS)
        self._store(builder.gep(self._words, [builder.sub(at, _I64(_WIDTH))]), 0, found)
        builder.store(builder.sub(at, builder.zext(count, _I64)), self._at)

    def _bases(self, table: Any, shift: int) -> list[Any]:
        """Where a table begins for tokens of each class."""
        builder, found = self._builder, []
        for index in range(CLASS_RAW + 1):
            entry = self._entry(self._by_class, builder.add(table, _I64(index * NUM_TABLES)))
            number = builder.shl(builder.zext(entry, _I32), _I32(TOTAL_BITS - shift))
            found.append(_spread(builder, number))
        return found

    def _base_of(self, bases: list[Any], half: int) -> Any:
        """Where each lane's table begins: its class shifts it."""
        base = bases[0]
        for is_class, other in zip(self._is_class[half], bases[1:], strict=True):
            base = self._builder.select(is_class, other, base)
        return base

    def _gather(self, indices: Any) -> Any:
        table = self._builder.bitcast(self._table, ir.IntType(8).as_pointer())
        flags = ir.Constant(_FLAGS, [1] * _WIDTH)
        return self._call(
            "llvm.x86.avx512.mask.gather.dpi.512",
            _NUMBERS,
            [ir.Constant(_NUMBERS, ir.Undefined), table, indices, flags, _I32(4)],
        )

    def _call(self, name: str, result: Any, arguments: list[Any]) -> Any:
        kind = ir.FunctionType(result, [argument.type for argument in arguments])
        function = cgutils.get_or_insert_function(self._builder.module, kind, name)
        return self._builder.call(function, arguments)

    def _entry(self, array: Any, index: Any) -> Any:
        return self._builder.load(self._builder.gep(array, [index]))

    def _load(self, array: Any, half: int, kind: Any) -> Any:
        value = self._builder.load(self._at_half(array, half, kind))
        value.align = kind.element.width // 8
        return value

    def _store(self, array: Any, half: int, value: Any) -> None:
        target = self._at_half(array, half, value.type)
        self._builder.store(value, target).align = value.type.element.width // 8

    def _at_half(self, array: Any, half: int, kind: Any) -> Any:
        address = self._builder.gep(array, [_I64(half * _WIDTH)])
        return self._builder.bitcast(address, kind.as_pointer())


def _all(number: int) -> Any:
    return ir.Constant(_NUMBERS, [number] * _WIDTH)


def _spread(builder: Any, number: Any) -> Any:
    """A number in all lanes."""
    single = builder.insert_element(ir.Constant(_NUMBERS, ir.Undefined), number, _I32(0))
    return builder.shuffle_vector(single, single, ir.Constant(_NUMBERS, [0] * _WIDTH))


def _floats(number: float) -> Any:
    return ir.Constant(_FLOATS, [number] * _WIDTH)


_decode = _over_channels(_Group.loop)
_encode = _over_channels(_Group.loop_back)


@njit(nogil=True, cache=True, error_model="numpy")
def decode_group(
    slots: Any,
    words: Any,
    num_words: Any,
    at: Any,
    states: Any,
    classes: Any,
    by_class: Any,
    ids: Any,
    symbols: Any,
) -> Any:
    """One group, from word `at` of `num_words` on; where the next word is. `slots` uint32 [tables *
    TOTAL], `words` uint16, LANES more than count, `states` and `classes` uint32 [LANES], `by_class`
    uint8 [classes * tables], `ids` uint8 [channels], `symbols` int16 [channels * LANES]. It ends
    behind the channel that asks for more words than there are.
    """
    if IS_CHECKED:
        _ = slots[NUM_TABLES * TOTAL - 1] + states[LANES - 1] + classes[LANES - 1]
        _ = words[num_words + np.uint64(LANES - 1)] + symbols[len(ids) * LANES - 1]
        _ = by_class[NUM_CLASSES * NUM_TABLES - 1] + words[at]
    return _decode(slots, words, num_words, at, states, classes, by_class, ids, symbols)


@njit(nogil=True, cache=True, error_model="numpy")
def encode_group(
    spans: Any,
    words: Any,
    at: Any,
    states: Any,
    classes: Any,
    by_class: Any,
    ids: Any,
    symbols: Any,
    stride: int,
) -> Any:
    """The inverse: writes words before `at`, and up to 16 more before them; where they begin.
    `spans` uint32 [tables * symbols]; a channel's symbols come every `stride`.
    """
    if IS_CHECKED:
        assert at >= len(ids) * LANES + BLOCK
        _ = spans[NUM_TABLES * NUM_SYMBOLS - 1] + states[LANES - 1] + classes[LANES - 1]
        _ = words[at - np.uint64(1)] + symbols[(len(ids) - 1) * stride + LANES - 1]
        _ = by_class[NUM_CLASSES * NUM_TABLES - 1]
    return _encode(spans, words, np.uint64(stride), at, states, classes, by_class, ids, symbols)


@intrinsic
def _turn_unchecked(
    _context: Any,
    source: Any,
    at: Any,
    stride: Any,
    target: Any,
    offset: Any,
    width: Any,
) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, target = (
            context.make_array(signature.args[index])(context, builder, arguments[index]).data
            for index in (0, 3)
        )
        rows = _read_rows(builder, source, arguments[1], arguments[2])
        _write_rows(builder, _turned(builder, rows), target, arguments[4], arguments[5])
        return context.get_dummy_value()

    number = types.int64
    return types.void(source, number, number, target, number, number), generate


_turn: Any = _turn_unchecked


def _read_rows(builder: Any, source: Any, at: Any, stride: Any) -> list[Any]:
    rows = []
    for index in range(BLOCK):
        place = builder.gep(source, [builder.add(at, builder.mul(stride, _I64(index)))])
        rows.append(builder.load(builder.bitcast(place, _NUMBERS.as_pointer())))
        rows[-1].align = 2
    return rows


def _turned(builder: Any, rows: list[Any]) -> list[Any]:
    """Columns: four rounds in which the two halves of all rows are interleaved."""
    orders = [
        ir.Constant(_NUMBERS, [first + index // 2 + BLOCK * (index % 2) for index in range(BLOCK)])
        for first in (0, BLOCK // 2)
    ]
    for _ in range(BLOCK.bit_length() - 1):
        rows = [
            builder.shuffle_vector(one, other, order)
            for one, other in zip(rows[: BLOCK // 2], rows[BLOCK // 2 :], strict=True)
            for order in orders
        ]
    return rows


def _write_rows(builder: Any, rows: list[Any], target: Any, offset: Any, stride: Any) -> None:
    for index, row in enumerate(rows):
        moved = builder.add(offset, builder.mul(stride, _I64(index)))
        place = builder.bitcast(builder.gep(target, [moved]), _NUMBERS.as_pointer())
        builder.store(row, place).align = 2


@njit(nogil=True, cache=True, error_model="numpy")
def transpose(source: Any, at: int, target: Any, offset: int, stride: int) -> None:
    """16 x 16 pairs of elements: of `source`, uint32 [.., LANES] flat, from `at` on, the columns to
    `target`, uint16 flat: from `offset` on, each `stride` further.
    """
    if IS_CHECKED:
        _ = source[at] + source[at + (BLOCK - 1) * LANES + BLOCK - 1]
        _ = target[offset] + target[offset + (BLOCK - 1) * stride + 2 * BLOCK - 1]
    _turn(source, at, LANES, target, offset, stride)


@intrinsic
def _gather_unchecked(
    _context: Any,
    source: Any,
    at: Any,
    stride: Any,
    target: Any,
    offset: Any,
    width: Any,
    mask: Any,
    shift: Any,
) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, target = (
            context.make_array(signature.args[index])(context, builder, arguments[index]).data
            for index in (0, 3)
        )
        mask, shift = (_spread(builder, number) for number in arguments[6:])
        bad = ir.Constant(_FLAGS, [0] * _WIDTH)
        columns = []
        for pair in _turned(builder, _read_rows(builder, source, arguments[1], arguments[2])):
            for bits in (builder.and_(pair, _all(0xFFFF)), builder.lshr(pair, _all(16))):
                exponent = builder.and_(bits, mask)
                bad = builder.or_(bad, builder.icmp_unsigned("==", exponent, mask))
                columns.append(builder.shl(bits, shift))
        _write_rows(builder, columns, target, arguments[4], arguments[5])
        return builder.zext(builder.bitcast(bad, _I16), _I32)

    number, word = types.int64, types.uint32
    return word(source, number, number, target, number, number, word, word), generate


_gather: Any = _gather_unchecked


@njit(nogil=True, cache=True, error_model="numpy")
def gather_columns(
    source: Any, offset: int, stride: int, target: Any, at: int, width: int, mask: Any, shift: Any
) -> Any:
    """The inverse of `transpose`: 16 rows of 32 elements each of `source`, uint16 flat, from
    `offset` on, each `stride` further, to 32 columns of `target`, uint32 flat, from `at` on, each
    `width` further; shifted to the left. Which rows have all bits of `mask` set somewhere.
    """
    if IS_CHECKED:
        _ = source[offset] + source[offset + (BLOCK - 1) * stride + 2 * BLOCK - 1]
        _ = target[at] + target[at + (2 * BLOCK - 1) * width + BLOCK - 1]
    return _gather(source, offset, stride, target, at, width, mask, shift)
