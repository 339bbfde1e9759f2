"""Eight bytes at any offset, for Numba kernels: one load or store where numpy would need eight.

Numba does not check what these touch. Under NUMBA_BOUNDSCHECK they look at both ends first.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import config, njit, types
from numba.extending import intrinsic

IS_CHECKED = bool(getattr(config, "BOUNDSCHECK", None))


@intrinsic
def _load_unchecked(_context: Any, array: Any, offset: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value = builder.load(_pointer(context, builder, signature, arguments))
        value.align = 1
        return value

    return types.uint64(array, types.intp), generate


@intrinsic
def _store_unchecked(_context: Any, array: Any, offset: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        target = _pointer(context, builder, signature, arguments)
        builder.store(arguments[2], target).align = 1
        return context.get_dummy_value()

    return types.void(array, types.intp, types.uint64), generate


# What numba's own types do not say: the first argument is the compiler's.
_load: Any = _load_unchecked
_store: Any = _store_unchecked


def _pointer(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    array = context.make_array(signature.args[0])(context, builder, arguments[0])
    address = builder.gep(array.data, [arguments[1]])
    return builder.bitcast(address, ir.IntType(64).as_pointer())


@njit(nogil=True, cache=True, inline="always")
def load64(array: Any, offset: Any) -> Any:
    """The uint64 at `offset` of a uint8 array, lowest byte first."""
    if IS_CHECKED:
        _ = array[offset] + array[offset + 7]
    return _load(array, offset)


@njit(nogil=True, cache=True, inline="always")
def store64(array: Any, offset: Any, value: Any) -> None:
    """Write a uint64 at `offset` of a uint8 array, lowest byte first."""
    if IS_CHECKED:
        array[offset] = array[offset + 7]
    _store(array, offset, value)
