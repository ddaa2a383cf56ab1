"""What several Triton kernels share: bit planes laid out as in `packing`, and scale and offset per channel."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

__all__ = ["apply_channels", "channel_arguments", "left_of", "load_plane", "store_plane"]


@triton.jit
def left_of(total, start):
    """Return what of `total` lies from `start` on, up to 2^30, as an int32: more than any tile has."""
    return tl.minimum(total - start, 1 << 30).to(tl.int32)


@triton.jit
def store_plane(
    plane_ptr,
    codes,
    row,
    stored_bytes,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Pack the lowest `BITS` bits of the first `GROUP` columns of int32 `codes` [ROWS, BLOCK], the first code lowest."""
    PER_BYTE: tl.constexpr = 8 // BITS
    codes = tl.reshape(codes & ((1 << BITS) - 1), [ROWS, BLOCK // PER_BYTE, PER_BYTE])
    shift = tl.arange(0, PER_BYTE) * BITS
    packed = tl.sum(codes << shift[None, None, :], axis=2)
    column = tl.arange(0, BLOCK // PER_BYTE)[None, :]
    byte = row[:, None] * (GROUP // PER_BYTE) + column
    inside = byte < stored_bytes
    if GROUP < BLOCK:
        inside = inside & (column < GROUP // PER_BYTE)
    tl.store(plane_ptr + byte, packed.to(tl.uint8), mask=inside)


@triton.jit
def load_plane(
    plane_ptr,
    row,
    stored_bytes,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return int32 codes [ROWS, BLOCK], `GROUP` of each row stored in `BITS` bits; 8 bits keep the sign of the stored type."""
    PER_BYTE: tl.constexpr = 8 // BITS
    column = tl.arange(0, BLOCK // PER_BYTE)[None, :]
    byte = row[:, None] * (GROUP // PER_BYTE) + column
    inside = byte < stored_bytes
    if GROUP < BLOCK:
        inside = inside & (column < GROUP // PER_BYTE)
    codes = tl.load(plane_ptr + byte, mask=inside, other=0).to(tl.int32)
    if BITS < 8:
        shift = tl.arange(0, PER_BYTE) * BITS
        codes = (codes[:, :, None] >> shift[None, None, :]) & ((1 << BITS) - 1)
        codes = tl.reshape(codes, [ROWS, BLOCK])
    return codes


@triton.jit
def apply_channels(
    value,
    row,
    inside,
    numel,
    rows_ptr,
    scale_ptr,
    offset_ptr,
    head_stride,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS_FIRST: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return fp32 `value * scale + offset` per channel, times the scale of the row before or after it.

    `value` [ROWS, BLOCK] are the groups `row` [ROWS] of memory; what is not `inside` becomes 0.
    """
    # Where groups do not cross rows there is one row of `x` for a group, and one 64-bit division.
    WHOLE: tl.constexpr = (WIDTH % GROUP == 0) & (GROUP == BLOCK)
    column = tl.arange(0, BLOCK)[None, :]
    place = row[:, None] * GROUP
    if not WHOLE:
        place += column
    line = place // WIDTH
    channel = (place - line * WIDTH).to(tl.int32)
    if HEADS > 1:
        channel += ((place // head_stride) % HEADS).to(tl.int32) * WIDTH
    if WHOLE:
        channel += column
    scale = tl.load(scale_ptr + channel).to(tl.float32)
    offset = tl.load(offset_ptr + channel).to(tl.float32)
    factor = tl.load(rows_ptr + line, mask=place < numel, other=0.0).to(tl.float32)
    if ROWS_FIRST:
        value = value * factor
    # Fused by hand, as torch.addcmul is.
    value = tl.fma(value, scale, offset)
    if not ROWS_FIRST:
        value = value * factor
    return tl.where(inside, value, 0.0)


def channel_arguments(channels: Any, placeholder: Tensor) -> dict[str, Any]:
    """Return the arguments of `apply_channels`; without `channels` a width of 0, and `placeholder` for pointers that are not read."""
    if channels is None:
        return {
            "rows_ptr": placeholder,
            "scale_ptr": placeholder,
            "offset_ptr": placeholder,
            "head_stride": 1,
            "HEADS": 1,
            "WIDTH": 0,
            "ROWS_FIRST": False,
        }
    return {
        "rows_ptr": channels.rows,
        "scale_ptr": channels.scale,
        "offset_ptr": channels.offset,
        "head_stride": channels.head_stride,
        "HEADS": channels.heads,
        "WIDTH": channels.width,
        "ROWS_FIRST": channels.rows_first,
    }
