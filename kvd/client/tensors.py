"""Bytes of a chunk as arrays and tensors, and the one copy into or out of the arena.

Works with numpy arrays and torch tensors of any strides; torch is touched only when it is there
already.
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kvd.client.copies import copy
from kvd.errors import InvalidRequest

if TYPE_CHECKING:
    import torch

# numpy has no bfloat16 and no float8: their bytes show as unsigned integers of the same size.
NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(np.uint16),
    "float8_e4m3fn": np.dtype(np.uint8),
    "float8_e5m2": np.dtype(np.uint8),
    "int8": np.dtype(np.int8),
    "uint8": np.dtype(np.uint8),
}


def as_array(raw: NDArray[np.uint8], dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """`raw`, `uint8 [size]`, as `dtype [shape]`. Never copies."""
    return raw.view(NUMPY_DTYPES[dtype]).reshape(shape)


def as_tensor(raw: NDArray[np.uint8], dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """`raw`, `uint8 [size]`, as a torch tensor `dtype [shape]` on the CPU. Never copies."""
    import torch

    found = getattr(torch, dtype)
    assert isinstance(found, torch.dtype)
    return torch.from_numpy(raw).view(found).view(shape)


def copy_in(raw: NDArray[np.uint8], dtype: str, shape: tuple[int, ...], source: Any) -> None:
    """Copy `source`, an array or tensor `dtype [shape]`, or bytes of that size, into `raw`. One
    pass, no GIL held.
    """
    if _is_tensor(source):
        _check(str(source.dtype).removeprefix("torch."), tuple(source.shape), dtype, shape)
        as_tensor(raw, dtype, shape).copy_(source.detach())
        return
    if isinstance(source, (bytes, bytearray, memoryview)):
        source = np.frombuffer(source, dtype=np.uint8)
    array = np.asarray(source)
    if array.dtype == np.uint8 and array.shape == raw.shape:
        copy(raw, array)
        return
    target = as_array(raw, dtype, shape)
    copy(target, _as_stored(array, target, dtype, shape))


def copy_out(raw: NDArray[np.uint8], dtype: str, shape: tuple[int, ...], out: Any) -> None:
    """Copy `raw` into `out`, an array or tensor `dtype [shape]` or `uint8 [size]`. One pass, no GIL
    held.
    """
    if _is_tensor(out):
        _check(str(out.dtype).removeprefix("torch."), tuple(out.shape), dtype, shape)
        out.copy_(as_tensor(raw, dtype, shape))
        return
    if isinstance(out, (bytearray, memoryview)):
        out = np.frombuffer(out, dtype=np.uint8)
    if out.dtype == np.uint8 and out.shape == raw.shape:
        copy(out, raw)
        return
    source = as_array(raw, dtype, shape)
    copy(_as_stored(out, source, dtype, shape), source)


def bytes_of(out: Any, dtype: str, shape: tuple[int, ...]) -> NDArray[np.uint8] | None:
    """The bytes of `out`, an array or tensor `dtype [shape]` or `uint8 [size]`, as `uint8 [size]`
    without a copy; None where they are not in one piece of this process's memory.
    """
    if _is_tensor(out):
        _check(str(out.dtype).removeprefix("torch."), tuple(out.shape), dtype, shape)
        if is_on_gpu(out) or not out.is_contiguous():
            return None
        flat: NDArray[np.uint8] = out.detach().view(-1).view(sys.modules["torch"].uint8).numpy()
        return flat
    if isinstance(out, (bytearray, memoryview)):
        out = np.frombuffer(out, dtype=np.uint8)
    size = math.prod(shape) * NUMPY_DTYPES[dtype].itemsize
    if out.dtype != np.uint8 or out.shape != (size,):
        _as_stored(out, np.empty(0, NUMPY_DTYPES[dtype]), dtype, shape)
    return out.reshape(-1).view(np.uint8) if out.flags.c_contiguous else None


def is_on_gpu(value: Any) -> bool:
    """Whether `value` is a tensor in the memory of another device."""
    return _is_tensor(value) and value.device.type != "cpu"


def _as_stored(
    array: NDArray[Any], like: NDArray[Any], dtype: str, shape: tuple[int, ...]
) -> NDArray[Any]:
    # An extension type (ml_dtypes.bfloat16) or plain uint16 for bfloat16: the same bytes under
    # another name.
    if array.dtype != like.dtype and str(array.dtype) == dtype:
        array = array.view(like.dtype)
    found = dtype if array.dtype == like.dtype else str(array.dtype)
    _check(found, array.shape, dtype, shape)
    return array


def _check(found: str, found_shape: tuple[int, ...], dtype: str, shape: tuple[int, ...]) -> None:
    if found != dtype or found_shape != shape:
        raise InvalidRequest(f"{dtype} {list(shape)} expected, found {found} {list(found_shape)}")


def _is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)
