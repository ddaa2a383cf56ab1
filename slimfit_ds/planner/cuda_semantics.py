"""What a CUDA device would keep, on tensors that pretend to be on a CPU.

Three things differ in what is saved for backward: CUDA has fused attention for dropout and for every mask, where the
CPU falls back to kept probabilities; dropout keeps a mask of bytes; and CUDA's autocast runs norms and softmax in
fp32.
"""

from __future__ import annotations

import functools
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F

__all__ = ["CudaSemantics"]


_FP32_UNDER_AUTOCAST = (
    (F, "layer_norm"),
    (F, "softmax"),
    (F, "log_softmax"),
    (F, "cross_entropy"),
    (torch, "softmax"),
)


class _FusedAttention(torch.autograd.Function):
    """The saved tensors of the flash and memory-efficient kernels: q, k, v, mask, output, log-sum-exp."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        if mask is not None and mask.dtype == torch.bool:
            mask = mask.to(q.dtype)  # the kernel wants an additive mask: a copy for every layer
        out = torch.empty_like(q)
        lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, lse, *([] if mask is None else [mask]))
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        q, k, v = ctx.saved_tensors[:3]
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None


class CudaSemantics:
    """While open, attention and autocast keep for backward what they keep on CUDA. For fake tensors only.

    Functions are replaced where they are looked up: a torch function mode would not reach the recomputation of a
    checkpoint, which runs inside the backward pass.

    Args:
        autocast: whether the step runs under autocast, so that norms and softmax take fp32 inputs.
    """

    def __init__(self, autocast: bool = False):
        self._autocast = autocast
        self._stack = ExitStack()

    def __enter__(self) -> CudaSemantics:
        self._replace(F, "scaled_dot_product_attention", self._attention)
        self._replace(F, "dropout", _dropout)
        if self._autocast:
            for owner, name in _FP32_UNDER_AUTOCAST:
                self._replace(owner, name, _in_fp32(getattr(owner, name)))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _replace(self, owner: Any, name: str, function: Any) -> None:
        self._stack.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, function)

    def _attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        *_: Any,
        **__: Any,
    ) -> torch.Tensor:
        dtype = torch.bfloat16 if self._autocast else query.dtype
        return _FusedAttention.apply(query.to(dtype), key.to(dtype), value.to(dtype), attn_mask)


def _dropout(
    input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> torch.Tensor:
    """CUDA keeps a mask of one byte per element; the CPU keeps one in the dtype of the input."""
    return torch.native_dropout(input, p, training)[0] if training and p > 0 else input


def _in_fp32(function: Any) -> Any:
    @functools.wraps(function)
    def run(input: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return function(input.float(), *args, **kwargs)

    return run
