"""Adam's step and the size of each update in one kernel launch over all the tensors of a step.

Unfused, a step is a dozen passes over the active layers and the statistic four more. Here each element of gradient,
weight and moments is read once: the kernel finds the tensor of its block in a table of addresses, steps it in place
and leaves one partial sum of the statistic per block.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["adam_step"]

_BLOCK = 2048
_TINY = torch.finfo(torch.float32).tiny


@triton.jit
def _adam_kernel(
    addresses_ptr,
    factors_ptr,
    owner_ptr,
    sums_ptr,
    grad_factor,
    keep_second,
    new_first,
    new_second,
    eps,
    l2,
    tiny,
    DECOUPLED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    tensor = tl.load(owner_ptr + block).to(tl.int64)
    row = addresses_ptr + 6 * tensor
    grad_ptr = tl.load(row).to(tl.pointer_type(tl.float32))
    weight_ptr = tl.load(row + 1).to(tl.pointer_type(tl.float32))
    first_ptr = tl.load(row + 2).to(tl.pointer_type(tl.float32))
    second_ptr = tl.load(row + 3).to(tl.pointer_type(tl.float32))
    numel = tl.load(row + 4)
    start = (block - tl.load(row + 5)) * BLOCK
    root = tl.load(factors_ptr + 3 * tensor)
    rate = tl.load(factors_ptr + 3 * tensor + 1)
    decay = tl.load(factors_ptr + 3 * tensor + 2)

    offset = start + tl.arange(0, BLOCK)
    inside = offset < numel
    grad = tl.load(grad_ptr + offset, mask=inside, other=0.0) * grad_factor
    weight = tl.load(weight_ptr + offset, mask=inside, other=0.0)
    first = tl.load(first_ptr + offset, mask=inside, other=0.0)
    second = tl.load(second_ptr + offset, mask=inside, other=0.0)
    if not DECOUPLED:
        grad = grad + l2 * weight
    first = first + new_first * (grad - first)
    second = second * keep_second + new_second * grad * grad
    update = first / (tl.sqrt(second) / root + eps) * rate
    if DECOUPLED:
        update = update + decay * weight
    tl.store(first_ptr + offset, first, mask=inside)
    tl.store(second_ptr + offset, second, mask=inside)
    tl.store(weight_ptr + offset, weight + update, mask=inside)

    # Elements outside have weight 0 and update 0: they add nothing.
    magnitude = tl.abs(update)
    share = magnitude / tl.maximum(tl.maximum(magnitude, tl.abs(weight)), tiny)
    tl.store(sums_ptr + block, tl.sum(share))


def adam_step(
    gradients: Sequence[Tensor],
    weights: Sequence[Tensor],
    states: Mapping[str, Sequence[Tensor]],
    steps: Sequence[int],
    options: Mapping[str, Any],
    *,
    decoupled: bool,
    factor: float = 1.0,
    scales: Sequence[float] | None = None,
) -> Tensor:
    """Step `weights` and moments in place, as `rules.RULES["AdamW"]` (or `Adam`) and adding its update do.

    Args:
        gradients: contiguous float32 tensors on one device, of at least one element each; read only.
        weights: contiguous float32, of the same lengths, and so the moments `exp_avg` and `exp_avg_sq` in `states`.
        steps: step of each tensor (first: 1).
        options: `lr`, `betas`, `eps`, `weight_decay`.
        decoupled: AdamW's weight decay; otherwise it is added to the gradient.
        factor: multiplied into the gradients first.
        scales: of each tensor's update; default: all 1.

    Returns:
        fp32 [tensors] on the device: sum of |dW| / max(|W|, |dW|) over the elements, W before the step
        (`schedule.statistics`). Nothing waits for the device.
    """
    beta1, beta2 = options["betas"]
    lr, weight_decay = float(options["lr"]), float(options["weight_decay"])
    device = gradients[0].device
    counts = [triton.cdiv(t.numel(), _BLOCK) for t in gradients]
    moments = states["exp_avg"], states["exp_avg_sq"]
    addresses, first_block = [], 0
    for tensors, count in zip(zip(gradients, weights, *moments, strict=True), counts, strict=True):
        addresses.append([*(t.data_ptr() for t in tensors), tensors[0].numel(), first_block])
        first_block += count
    factors = [
        [math.sqrt(1 - beta2**step), -lr * scale / (1 - beta1**step), -lr * weight_decay * scale]
        for step, scale in zip(steps, scales or [1.0] * len(steps), strict=True)
    ]
    lengths = torch.tensor(counts)
    owner = torch.arange(len(counts), dtype=torch.int32).repeat_interleave(lengths)
    sums = torch.empty(first_block, device=device)
    with torch.cuda.device_of(gradients[0]):
        _adam_kernel[(first_block,)](
            _sent(torch.tensor(addresses), device),
            _sent(torch.tensor(factors, dtype=torch.float32), device),
            _sent(owner, device),
            sums,
            factor,
            beta2,
            1 - beta1,
            1 - beta2,
            float(options["eps"]),
            0.0 if decoupled else weight_decay,
            _TINY,
            DECOUPLED=decoupled,
            BLOCK=_BLOCK,
        )
    # Adds the blocks of a tensor in order: the same bits every time, where atomic additions would vary.
    return torch.segment_reduce(sums, "sum", lengths=_sent(lengths, device), unsafe=True)


def _sent(table: Tensor, device: torch.device) -> Tensor:
    """A small host tensor on the device, without waiting for it."""
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table
