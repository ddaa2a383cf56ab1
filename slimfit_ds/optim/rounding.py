"""Stochastic rounding to bfloat16: weights without a float32 master keep learning on average."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["stochastic_round_bf16"]


def stochastic_round_bf16(values: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Round to one of the two neighbouring bfloat16 numbers, up with the probability of the remainder.

    The expected result is the input. A float32 is a bfloat16 with 16 more mantissa bits: random
    noise of 16 bits is added below the cut, and the carry rounds.

    Args:
        values: float32, any shape; not changed. Infinities and NaN stay what they are.
        generator: source of the noise, on the device of `values`.
    """
    bits = values.contiguous().view(torch.int32)
    noise = torch.randint(
        0, 1 << 16, bits.shape, dtype=torch.int32, device=values.device, generator=generator
    )
    rounded = ((bits + noise) & ~0xFFFF).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)
