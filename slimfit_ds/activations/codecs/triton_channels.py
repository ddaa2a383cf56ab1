"""Scale and offset per channel inside the kernels of other codecs, rounded as `torch.addcmul` does."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from slimfit_ds.activations.codecs.channel_affine import ChannelAffine
from slimfit_ds.activations.codecs.triton_rounding import round_to

__all__ = ["apply_channels", "channel_arguments"]


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
    scale = tl.load(scale_ptr + channel)
    offset = tl.load(offset_ptr + channel)
    # Fused by hand, as torch.addcmul is.
    value = round_to(tl.fma(value, scale, offset), dtype).to(tl.float32)
    return tl.where(inside, value, 0.0)


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
