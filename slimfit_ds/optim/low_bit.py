"""8-bit storage of Adam's moments, by torchao's block-wise dynamic quantisation.

Source: Dettmers et al., "8-bit Optimizers via Block-wise Quantization", arXiv 2110.02861.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

__all__ = ["BLOCK", "dequantize", "quantize"]

BLOCK = 256
"""Elements that share a scale."""


@cache
def _map(signed: bool, device: torch.device) -> Tensor:
    from torchao.optim.quant_utils import create_dynamic_map

    return torch.tensor(create_dynamic_map(signed), device=device)


def quantize(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """float32 `[n]` -> codes uint8 `[n rounded up to BLOCK]`, scale float32 `[blocks]`."""
    from torchao.optim.quant_utils import quantize_8bit_with_qmap, scale_tensor

    padded = torch.nn.functional.pad(values, (0, -values.numel() % BLOCK))
    scaled, scale = scale_tensor(padded, BLOCK)
    return quantize_8bit_with_qmap(scaled, _map(signed, values.device)), scale


def dequantize(codes: Tensor, scale: Tensor, numel: int, signed: bool) -> Tensor:
    """The float32 values `[numel]` of `quantize`."""
    from torchao.optim.quant_utils import dequant_with_qmap

    return dequant_with_qmap(codes, _map(signed, codes.device), scale)[:numel]
