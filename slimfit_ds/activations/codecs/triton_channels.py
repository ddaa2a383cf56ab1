"""Scale and offset per channel inside the kernels of other codecs, rounded as `torch.addcmul` does."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from slimfit_ds.activations.codecs.channel_affine import ChannelAffine
from slimfit_ds.activations.codecs.triton_rounding import round_to

__all__ = ["apply_channels", "channel_arguments", "standardisation"]

_TILE = 1024


@triton.jit
def apply_channels(
    value,
    element,
    inside,
    scale_ptr,
    offset_ptr,
    head_stride,
    width_stride,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    dtype: tl.constexpr,
):
    """`value * scale + offset` of the elements at positions `element` in memory, rounded to fp32, then to `dtype`.

    Elements that are not `inside` become 0.
    """
    channel = (element // width_stride) % WIDTH
    if HEADS > 1:
        channel += (element // head_stride) % HEADS * WIDTH
    scale = tl.load(scale_ptr + channel).to(tl.float32)
    offset = tl.load(offset_ptr + channel).to(tl.float32)
    # Fused by hand, as torch.addcmul is.
    value = round_to(tl.fma(value, scale, offset), dtype).to(tl.float32)
    return tl.where(inside, value, 0.0)


@triton.jit
def _standardisation_kernel(
    mean_ptr, std_ptr, deviation_ptr, inverse_ptr, offset_ptr, channels, TILE: tl.constexpr
):
    channel = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = channel < channels
    std = tl.load(std_ptr + channel, mask=inside, other=1.0)
    deviation = tl.where(std.to(tl.float32) > 0.0, std.to(tl.float32), 1.0)
    inverse = tl.div_rn(tl.full([TILE], 1.0, tl.float32), deviation)
    offset = -tl.load(mean_ptr + channel, mask=inside, other=0.0).to(tl.float32) * inverse
    tl.store(deviation_ptr + channel, round_to(deviation, deviation_ptr.dtype.element_ty), mask=inside)
    tl.store(inverse_ptr + channel, inverse, mask=inside)
    tl.store(offset_ptr + channel, offset, mask=inside)


def standardisation(mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Deviation, 1 where it is not positive, its inverse and `-mean / deviation` of each channel.

    Args:
        mean: fp32, bf16 or fp16, of any shape.
        std: of the same shape and dtype.

    Returns:
        The deviation in the dtype of `std`, and the others, fp32, all of its shape.
    """
    mean, std = mean.contiguous(), std.contiguous()
    deviation = torch.empty_like(std)
    inverse, offset = (torch.empty_like(std, dtype=torch.float32) for _ in range(2))
    with torch.cuda.device_of(std):
        _standardisation_kernel[(triton.cdiv(std.numel(), _TILE),)](
            mean, std, deviation, inverse, offset, std.numel(), TILE=_TILE, enable_fp_fusion=False
        )
    return deviation, inverse, offset


def channel_arguments(channels: ChannelAffine | None, placeholder: Tensor) -> dict[str, Any]:
    """The kernel's arguments; without `channels` a width of 0, and `placeholder` for pointers that are not read."""
    if channels is None:
        return {
            "scale_ptr": placeholder,
            "offset_ptr": placeholder,
            "head_stride": 1,
            "width_stride": 1,
            "HEADS": 1,
            "WIDTH": 0,
        }
    return {
        "scale_ptr": channels.scale,
        "offset_ptr": channels.offset,
        "head_stride": channels.head_stride,
        "width_stride": channels.width_stride,
        "HEADS": channels.heads,
        "WIDTH": channels.width,
    }
