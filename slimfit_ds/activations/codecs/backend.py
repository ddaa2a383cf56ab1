"""Which code computes on a tensor: PyTorch's operators, Triton's kernels, or none where there is no data.

Memory estimates run a training step on fake tensors. Codecs and operations then allocate what they return and compute
nothing, as a device with fused kernels does, which needs no temporaries either. This file is the only place that knows
of fake tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

__all__ = [
    "backend_of",
    "fakes_stand_for_a_cpu",
    "has_fused_kernels",
    "real_tensors",
    "runs_in_triton",
]

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_fakes_on_cpu = False


def backend_of(x: Tensor) -> Literal["torch", "triton", "none"]:
    """Return what computes on `x`; `none` for empty, fake and meta tensors: their results are only allocated."""
    if not x.numel() or _is_fake(x):
        return "none"
    return "triton" if runs_in_triton(x) else "torch"


def runs_in_triton(x: Tensor) -> bool:
    """Return whether `x` is a CUDA tensor of a dtype that the kernels take, and Triton is installed."""
    return x.is_cuda and x.dtype in _KERNEL_DTYPES and not _is_fake(x) and _triton_is_installed()


def has_fused_kernels(x: Tensor) -> bool:
    """Return whether operations on `x` run as one kernel with their codec; fake tensors stand for a device with those."""
    if _is_fake(x):
        return x.numel() > 0 and x.dtype in _KERNEL_DTYPES and not _fakes_on_cpu
    return backend_of(x) == "triton"


@contextmanager
def fakes_stand_for_a_cpu() -> Iterator[None]:
    """Let fake tensors stand for those of this CPU, whose operations are not fused, instead of a device's."""
    global _fakes_on_cpu
    before, _fakes_on_cpu = _fakes_on_cpu, True
    try:
        yield
    finally:
        _fakes_on_cpu = before


def real_tensors() -> AbstractContextManager[Any]:
    """Return a context in which new tensors hold data, also while an estimate runs on fake ones."""
    return _disable_current_modes()


def _is_fake(x: Tensor) -> bool:
    return x.is_meta or isinstance(x, FakeTensor)


@cache
def _triton_is_installed() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True
