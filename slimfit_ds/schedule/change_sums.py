"""The sums of a change of weights on a CPU, by `change_sums.c`, where that compiles."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from slimfit_ds import native

__all__ = ["change_sums", "runs_in_c"]

_SOURCE = Path(__file__).with_name("change_sums.c")
_NAMES = {torch.float32: "f32", torch.bfloat16: "b16"}
# Elements that one thread takes at a time.
_PIECE = 1 << 16


def runs_in_c(weight: Tensor, other: Tensor) -> bool:
    """True for real, contiguous CPU tensors of one dtype that the kernel takes, where it compiles."""
    return (
        weight.device.type == other.device.type == "cpu"
        and weight.dtype == other.dtype
        and weight.dtype in _NAMES
        and weight.is_contiguous()
        and other.is_contiguous()
        and not isinstance(weight, FakeTensor)
        and _library() is not None
    )


@cache
def _library() -> ctypes.CDLL | None:
    library = native.load(_SOURCE)
    if library is not None:
        pointer, count = ctypes.c_void_p, ctypes.c_int64
        for name in _NAMES.values():
            function = getattr(library, f"change_sums_{name}")
            function.argtypes = [pointer, pointer, ctypes.c_int, count, count, pointer]
            function.restype = None
    return library


def change_sums(weight: Tensor, other: Tensor, *, moved: bool) -> Tensor:
    """The sums of |dW| / max(|W|, |dW|), dW^2 and W^2 over all elements.

    Args:
        weight: W before the change, any shape.
        other: the change dW, or where `moved` the weight after it; as `weight`.
        moved: which of the two `other` is.

    Returns:
        Float32 [3]; the same bits whatever the number of threads.
    """
    pieces = -(-weight.numel() // _PIECE)
    sums = torch.empty(pieces, 3, dtype=torch.float64)
    function = getattr(_library(), f"change_sums_{_NAMES[weight.dtype]}")
    function(weight.data_ptr(), other.data_ptr(), moved, weight.numel(), _PIECE, sums.data_ptr())
    return sums.sum(0).float()
