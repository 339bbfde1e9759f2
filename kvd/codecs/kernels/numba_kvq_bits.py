"""What is true of the 32 lanes of a group, as the bits of a number: one compare of a vector.

Bits of several things are combined by AND, and counted by one instruction: so a histogram of small
numbers takes less than an instruction an element, whatever the classes of the tokens.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.core import cgutils as untyped_cgutils
from numba.extending import intrinsic

from kvd.codecs.kernels.kvq import LANES
from kvd.codecs.kernels.memory import IS_CHECKED
from kvd.codecs.tables import NUM_TABLES

# Numba's own helpers have no types.
cgutils: Any = untyped_cgutils

_I16, _I32, _I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
_SHORTS = ir.VectorType(_I16, LANES)
_COSTS = ir.VectorType(_I32, NUM_TABLES)


def _comparing(relation: str) -> Any:
    """What Numba needs to compare 32 numbers of an int16 array, from `at` on, with one."""

    def typed(_context: Any, array: Any, at: Any, number: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
            place = builder.gep(data, [arguments[1]])
            found = builder.load(builder.bitcast(place, _SHORTS.as_pointer()))
            found.align = 2
            single = ir.Constant(_SHORTS, ir.Undefined)
            single = builder.insert_element(single, arguments[2], _I32(0))
            wanted = builder.shuffle_vector(
                single, single, ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES)
            )
            return builder.bitcast(builder.icmp_signed(relation, found, wanted), _I32)

        return types.uint32(array, types.int64, types.int16), generate

    return intrinsic(typed)


_equal: Any = _comparing("==")
_above: Any = _comparing(">")


@intrinsic
def _ones(_context: Any, bits: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.uint32(types.uint32), generate


count_ones: Any = _ones


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def bits_equal(numbers: Any, at: int, wanted: Any) -> Any:
    """Which of 32 numbers, int16, are `wanted`."""
    if IS_CHECKED:
        _ = numbers[at] + numbers[at + LANES - 1]
    return _equal(numbers, at, wanted)


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def bits_above(numbers: Any, at: int, limit: Any) -> Any:
    """Which of 32 numbers, int16, are above `limit`."""
    if IS_CHECKED:
        _ = numbers[at] + numbers[at + LANES - 1]
    return _above(numbers, at, limit)


def _adding(is_product: bool) -> Any:
    """What Numba needs to add rows of costs: each as often as a number says, or those it names."""

    def typed(_context: Any, numbers: Any, count: Any, costs: Any, sums: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            numbers, costs, sums = (
                context.make_array(signature.args[index])(context, builder, arguments[index]).data
                for index in (0, 2, 3)
            )
            total = cgutils.alloca_once_value(builder, ir.Constant(_COSTS, [0] * NUM_TABLES))
            with cgutils.for_range(builder, arguments[1], intp=_I64) as loop:
                number = builder.load(builder.gep(numbers, [loop.index]))
                row = loop.index if is_product else builder.zext(number, _I64)
                place = builder.gep(costs, [builder.mul(row, _I64(NUM_TABLES))])
                found = builder.load(builder.bitcast(place, _COSTS.as_pointer()))
                found.align = 4
                if is_product:
                    single = ir.Constant(_COSTS, ir.Undefined)
                    single = builder.insert_element(single, number, _I32(0))
                    order = ir.Constant(_COSTS, [0] * NUM_TABLES)
                    found = builder.mul(found, builder.shuffle_vector(single, single, order))
                builder.store(builder.add(builder.load(total), found), total)
            target = builder.bitcast(sums, _COSTS.as_pointer())
            builder.store(builder.load(total), target).align = 4
            return context.get_dummy_value()

        return types.void(numbers, types.int64, costs, sums), generate

    return intrinsic(typed)


_products: Any = _adding(True)
_rows: Any = _adding(False)


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def sum_products(counts: Any, count: int, costs: Any, sums: Any) -> None:
    """`sums`, uint32 [tables], of the first rows of `costs`, uint32 [magnitudes, tables], each
    times its number in `counts`, uint32.
    """
    if IS_CHECKED:
        _ = counts[count - 1] + costs[count - 1, NUM_TABLES - 1] + sums[NUM_TABLES - 1]
    _products(counts, count, costs, sums)


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def sum_rows(rows: Any, count: int, costs: Any, sums: Any) -> None:
    """`sums`, uint32 [tables], of the rows of `costs`, uint32 [magnitudes, tables], that `rows`,
    uint32, names.
    """
    if IS_CHECKED:
        for index in range(count):
            _ = costs[rows[index], NUM_TABLES - 1] + sums[NUM_TABLES - 1]
    _rows(rows, count, costs, sums)
