"""Adam's step and the size of each update in one kernel launch over all the tensors of a step.

Unfused, a step is a dozen passes over the active layers and the statistic four more. Here each element of gradient,
weight and moments is read once: the kernel finds the tensor of its block in a table of addresses, steps it in place, rounds
it into the weights that the model computes with, and leaves one partial sum of the statistic per block.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from slimfit_ds.optim.transfer import to_device
from slimfit_ds.triton_rounding import round_to

__all__ = ["adam_step"]

_BLOCK = 2048
_TINY = torch.finfo(torch.float32).tiny
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _step_block(
    grad_ptr,
    weight_ptr,
    first_ptr,
    second_ptr,
    rounded_ptr,
    offset,
    inside,
    numbers,
    DECOUPLED: tl.constexpr,
    ROUNDS: tl.constexpr,
):
    """Step the elements `offset` of a tensor that are `inside` it (None: all are); return their share of the statistic."""
    root, rate, decay, grad_factor, keep_second, new_first, new_second, eps, l2, tiny = numbers
    grad = tl.load(grad_ptr + offset, mask=inside).to(tl.float32) * grad_factor
    weight = tl.load(weight_ptr + offset, mask=inside)
    first = tl.load(first_ptr + offset, mask=inside)
    second = tl.load(second_ptr + offset, mask=inside)
    if not DECOUPLED:
        grad = grad + l2 * weight
    first = first + new_first * (grad - first)
    second = second * keep_second + new_second * grad * grad
    update = first / (tl.sqrt(second) / root + eps) * rate
    if DECOUPLED:
        update = update + decay * weight
    tl.store(first_ptr + offset, first, mask=inside)
    tl.store(second_ptr + offset, second, mask=inside)
    moved = weight + update
    tl.store(weight_ptr + offset, moved, mask=inside)
    if ROUNDS:
        tl.store(rounded_ptr + offset, round_to(moved, rounded_ptr.dtype.element_ty), mask=inside)
    magnitude = tl.abs(update)
    share = magnitude / tl.maximum(tl.maximum(magnitude, tl.abs(weight)), tiny)
    if inside is not None:
        share = tl.where(inside, share, 0.0)
    return tl.sum(share)


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
    GRADIENT: tl.constexpr,
    ROUNDED: tl.constexpr,
    ROUNDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    tensor = tl.load(owner_ptr + block)
    row = addresses_ptr + 8 * tensor
    start = (block - tl.load(row + 5)) * BLOCK
    grad_ptr = tl.load(row).to(tl.pointer_type(GRADIENT)) + start
    weight_ptr = tl.load(row + 1).to(tl.pointer_type(tl.float32)) + start
    first_ptr = tl.load(row + 2).to(tl.pointer_type(tl.float32)) + start
    second_ptr = tl.load(row + 3).to(tl.pointer_type(tl.float32)) + start
    rounded_ptr = tl.load(row + 4).to(tl.pointer_type(ROUNDED)) + start
    left = tl.load(row + 6) - start
    root = tl.load(factors_ptr + 3 * tensor)
    rate = tl.load(factors_ptr + 3 * tensor + 1)
    decay = tl.load(factors_ptr + 3 * tensor + 2)
    numbers = (root, rate, decay, grad_factor, keep_second, new_first, new_second, eps, l2, tiny)

    offset = tl.arange(0, BLOCK)
    if (left >= BLOCK) & (tl.load(row + 7) != 0):
        # Full and aligned: accesses of 16 bytes.
        share = _step_block(
            tl.multiple_of(grad_ptr, 16),
            tl.multiple_of(weight_ptr, 16),
            tl.multiple_of(first_ptr, 16),
            tl.multiple_of(second_ptr, 16),
            tl.multiple_of(rounded_ptr, 16),
            offset,
            None,
            numbers,
            DECOUPLED,
            ROUNDS,
        )
    else:
        share = _step_block(
            grad_ptr,
            weight_ptr,
            first_ptr,
            second_ptr,
            rounded_ptr,
            offset,
            offset < left,
            numbers,
            DECOUPLED,
            ROUNDS,
        )
    tl.store(sums_ptr + block, share)


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
    rounded: Sequence[Tensor] | None = None,
) -> Tensor:
    """Step `weights` and moments in place, as `rules.RULES["AdamW"]` (or `Adam`) and adding its update do.

    Args:
        gradients: contiguous tensors of one dtype (fp32, bf16, fp16) on one device, of at least one element each; read only.
        weights: contiguous float32, of the same lengths, and so the moments `exp_avg` and `exp_avg_sq` in `states`.
        steps: step of each tensor (first: 1).
        options: `lr`, `betas`, `eps`, `weight_decay`.
        decoupled: AdamW's weight decay; otherwise it is added to the gradient.
        factor: multiplied into the gradients first.
        scales: of each tensor's update; default: all 1.
        rounded: tensors of one dtype that get the new weights too, rounded to nearest.

    Returns:
        fp32 [tensors] on the device: sum of |dW| / max(|W|, |dW|) over the elements, W before the step
        (`schedule.statistics`). Nothing waits for the device.
    """
    beta1, beta2 = options["betas"]
    lr, weight_decay = float(options["lr"]), float(options["weight_decay"])
    device = gradients[0].device
    counts = [triton.cdiv(t.numel(), _BLOCK) for t in gradients]
    columns = gradients, weights, states["exp_avg"], states["exp_avg_sq"], rounded or gradients
    addresses, first_block = [], 0
    for tensors, count in zip(zip(*columns, strict=True), counts, strict=True):
        pointers = [t.data_ptr() for t in tensors]
        aligned = not any(pointer % 16 for pointer in pointers)
        addresses.append([*pointers, first_block, tensors[0].numel(), aligned])
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
            to_device(torch.tensor(addresses), device),
            to_device(torch.tensor(factors, dtype=torch.float32), device),
            to_device(owner, device),
            sums,
            factor,
            beta2,
            1 - beta1,
            1 - beta2,
            float(options["eps"]),
            0.0 if decoupled else weight_decay,
            _TINY,
            DECOUPLED=decoupled,
            GRADIENT=_TYPES[gradients[0].dtype],
            ROUNDED=_TYPES[columns[4][0].dtype],
            ROUNDS=rounded is not None,
            BLOCK=_BLOCK,
        )
    # Adds the blocks of a tensor in order: the same bits every time, where atomic additions would vary.
    return torch.segment_reduce(sums, "sum", lengths=to_device(lengths, device), unsafe=True)
