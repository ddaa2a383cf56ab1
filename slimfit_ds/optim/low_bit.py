"""Storage in fewer bits: Adam's moments in 8 bits, and bfloat16 weights that keep learning without a float32 master.

The moments go through torchao's block-wise dynamic quantisation. Source: Dettmers et al., "8-bit Optimizers via Block-wise
Quantization", arXiv 2110.02861.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

__all__ = [
    "BLOCK",
    "dequantize",
    "dequantize_cut",
    "is_signed",
    "nearest",
    "quantize",
    "stochastic_round_bf16",
]

BLOCK = 256
"""Elements that share a scale."""


@cache
def _map(signed: bool, device: torch.device) -> Tensor:
    from torchao.optim.quant_utils import create_dynamic_map

    return torch.tensor(create_dynamic_map(signed), device=device)


def quantize(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """float32 `[n]` -> codes uint8 `[n rounded up to BLOCK]`, scale float32 `[blocks]`."""
    from torchao.optim.quant_utils import scale_tensor

    padded = torch.nn.functional.pad(values, (0, -values.numel() % BLOCK))
    scaled, scale = scale_tensor(padded, BLOCK)
    return nearest(scaled, _map(signed, values.device)), scale


def nearest(values: Tensor, levels: Tensor) -> Tensor:
    """float32 `[n]` -> uint8 `[n]`, positions of the nearest of the sorted `levels` `[256]`."""
    from torchao.optim.quant_utils import quantize_8bit_with_qmap

    return quantize_8bit_with_qmap(values, levels)


def dequantize(codes: Tensor, scale: Tensor, numel: int, signed: bool) -> Tensor:
    """The float32 values `[numel]` of `quantize`."""
    from torchao.optim.quant_utils import dequant_with_qmap

    return dequant_with_qmap(codes, _map(signed, codes.device), scale)[:numel]


def dequantize_cut(codes: Tensor, scale: Tensor, offset: int, signed: bool) -> Tensor:
    """The float32 values `[n]` of codes `[n]` cut out of blocks: the first stands at `offset` of the block of `scale[0]`."""
    padded = torch.nn.functional.pad(codes, (offset, -(offset + codes.numel()) % BLOCK))
    return dequantize(padded, scale, offset + codes.numel(), signed)[offset:]


def is_signed(name: str) -> bool:
    """Whether a moment has negative values."""
    return name != "exp_avg_sq"


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
