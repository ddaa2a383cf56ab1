"""Whether a tensor's codec runs as a Triton kernel."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

__all__ = ["runs_in_triton"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.bool)


def runs_in_triton(x: Tensor) -> bool:
    """True for CUDA tensors of a dtype that the kernels take, where Triton is installed."""
    return x.is_cuda and x.dtype in _DTYPES and _triton_is_installed()


@cache
def _triton_is_installed() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True
