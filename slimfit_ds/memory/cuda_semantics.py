"""What a CUDA device would keep, on tensors that pretend to be on a CPU.

Two things differ in what is saved for backward: CUDA has fused attention for dropout and for every mask, where the
CPU falls back to kept probabilities; and CUDA's autocast runs norms and softmax in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

__all__ = ["CudaSemantics"]


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
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        q, k, v = ctx.saved_tensors[:3]
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None


class CudaSemantics(TorchFunctionMode):
    """While open, attention and autocast keep for backward what they keep on CUDA. For fake tensors only.

    Args:
        autocast: whether the step runs under autocast, so that norms and softmax take fp32 inputs.
    """

    def __init__(self, autocast: bool = False):
        super().__init__()
        self._autocast = autocast

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            q, k, v, *rest = args
            mask = kwargs.get("attn_mask", rest[0] if rest else None)
            dtype = torch.bfloat16 if self._autocast else q.dtype
            return _FusedAttention.apply(q.to(dtype), k.to(dtype), v.to(dtype), mask)
        if self._autocast and func in (
            F.layer_norm,
            F.softmax,
            torch.softmax,
            F.log_softmax,
            F.cross_entropy,
        ):
            args = (args[0].float(), *args[1:])
        return func(*args, **kwargs)
