"""Triton kernels of the absmax codecs: one pass over the data, bit for bit equal to the torch version.

Equal only without fused multiply-adds, which round once where torch rounds twice: hence `enable_fp_fusion`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from slimfit_ds.activations.codecs.base import TINY_PEAK
from slimfit_ds.activations.codecs.packing import low_and_high
from slimfit_ds.activations.codecs.triton_common import (
    apply_channels,
    channel_arguments,
    left_of,
    load_plane,
    store_plane,
)
from slimfit_ds.triton_rounding import round_to

__all__ = ["decode_absmax", "encode_absmax", "load_groups", "store_groups", "to_nearest"]

# Elements of a program.
_TILE = 4096


@triton.jit
def _step_of(x, reciprocal, tiny_peak, ROWS: tl.constexpr):
    """Return the fp32 step (a bf16 value) and inverse step [ROWS] of fp32 groups `x` [ROWS, BLOCK]."""
    # The largest pattern without the sign bit: as an integer maximum it lets NaN and infinity win.
    pattern = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    peak = tl.max(pattern, axis=1).to(tl.float32, bitcast=True)
    raw = (peak * reciprocal).to(tl.int32, bitcast=True)
    step = ((raw + 0xFFFF) & -0x10000).to(tl.float32, bitcast=True)
    tiny = peak < tiny_peak
    inverse = tl.where(tiny, 0.0, tl.div_rn(tl.full([ROWS], 1.0, tl.float32), tl.where(tiny, 1.0, step)))
    step = tl.where(tiny, 0.0, step)
    step = tl.where(peak < float("inf"), step, float("nan"))
    return step, inverse


# 1.5 * 2^23 and its bits. fp32 numbers around it have no bits for a fraction and end in the bits of an integer, so that sums
# with it convert: a GPU's own conversions run at a quarter of the rate of a sum.
_SHIFTER = tl.constexpr(12582912.0)
_SHIFTER_BITS = tl.constexpr(0x4B400000)


@triton.jit
def to_nearest(y):
    """Round fp32 values below 2^22 to int32, ties to even; NaN and infinities give any integer."""
    return (y + _SHIFTER).to(tl.int32, bitcast=True) - _SHIFTER_BITS


@triton.jit
def _to_float(code, ZERO: tl.constexpr):
    """Return fp32 `code - ZERO` of int32 codes below 2^22."""
    return (code + _SHIFTER_BITS).to(tl.float32, bitcast=True) - (_SHIFTER + ZERO)


@triton.jit
def store_groups(
    x,
    codes_ptr,
    high_ptr,
    steps_ptr,
    row,
    real,
    stored_bytes,
    high_bytes,
    reciprocal,
    tiny_peak,
    ZERO: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BITS: tl.constexpr,
    HIGH_BITS: tl.constexpr,
):
    """Store codes and steps of the groups `row` [ROWS] with the fp32 values `x` [ROWS, BLOCK], where they are `real`."""
    step, inverse = _step_of(x, reciprocal, tiny_peak, ROWS)
    tl.store(steps_ptr + row, step.to(tl.bfloat16), mask=real)
    code = to_nearest(x * inverse[:, None]) + ZERO
    if BITS == 8:
        column = tl.arange(0, BLOCK)[None, :]
        offset = row[:, None] * GROUP + column
        inside = (offset < stored_bytes) & (column < GROUP)
        tl.store(codes_ptr + offset, code.to(codes_ptr.dtype.element_ty), mask=inside)
    else:
        store_plane(codes_ptr, code, row, stored_bytes, BITS, ROWS, GROUP, BLOCK)
        if HIGH_BITS > 0:
            store_plane(high_ptr, code >> BITS, row, high_bytes, HIGH_BITS, ROWS, GROUP, BLOCK)


@triton.jit
def load_groups(
    codes_ptr,
    high_ptr,
    steps_ptr,
    row,
    real,
    stored_bytes,
    high_bytes,
    ZERO: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BITS: tl.constexpr,
    HIGH_BITS: tl.constexpr,
):
    """Return the fp32 values [ROWS, BLOCK] of the groups `row` [ROWS]; 0 in those that are not `real`."""
    code = load_plane(codes_ptr, row, stored_bytes, BITS, ROWS, GROUP, BLOCK)
    if HIGH_BITS > 0:
        code += load_plane(high_ptr, row, high_bytes, HIGH_BITS, ROWS, GROUP, BLOCK) << BITS
    step = tl.load(steps_ptr + row, mask=real, other=0.0).to(tl.float32)
    return _to_float(code, ZERO) * step[:, None]


@triton.jit
def _encode_kernel(
    x_ptr,
    codes_ptr,
    high_ptr,
    steps_ptr,
    numel,
    stored_bytes,
    high_bytes,
    groups,
    reciprocal,
    tiny_peak,
    rows_ptr,
    scale_ptr,
    offset_ptr,
    head_stride,
    ZERO: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BITS: tl.constexpr,
    HIGH_BITS: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS_FIRST: tl.constexpr,
):
    # Positions in a tile are of 32 bits, and only its start is of 64.
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    offset = row[:, None] * GROUP + column
    inside = (offset < left_of(numel, first * GROUP)) & (column < GROUP)
    x = tl.load(x_ptr + first * GROUP + offset, mask=inside, other=0.0).to(tl.float32)
    if WIDTH > 0:
        x = apply_channels(
            x,
            first + row,
            inside,
            numel,
            rows_ptr,
            scale_ptr,
            offset_ptr,
            head_stride,
            HEADS,
            WIDTH,
            ROWS_FIRST,
            GROUP,
            BLOCK,
        )
    start, high_start = first * (GROUP * BITS // 8), first * (GROUP * HIGH_BITS // 8)
    store_groups(
        x,
        codes_ptr + start,
        high_ptr + high_start,
        steps_ptr + first,
        row,
        row < left_of(groups, first),
        left_of(stored_bytes, start),
        left_of(high_bytes, high_start),
        reciprocal,
        tiny_peak,
        ZERO,
        GROUP,
        BLOCK,
        ROWS,
        BITS,
        HIGH_BITS,
    )


@triton.jit
def _decode_kernel(
    codes_ptr,
    high_ptr,
    steps_ptr,
    out_ptr,
    numel,
    stored_bytes,
    high_bytes,
    groups,
    rows_ptr,
    scale_ptr,
    offset_ptr,
    head_stride,
    ZERO: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BITS: tl.constexpr,
    HIGH_BITS: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS_FIRST: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    start, high_start = first * (GROUP * BITS // 8), first * (GROUP * HIGH_BITS // 8)
    value = load_groups(
        codes_ptr + start,
        high_ptr + high_start,
        steps_ptr + first,
        row,
        row < left_of(groups, first),
        left_of(stored_bytes, start),
        left_of(high_bytes, high_start),
        ZERO,
        GROUP,
        BLOCK,
        ROWS,
        BITS,
        HIGH_BITS,
    )
    column = tl.arange(0, BLOCK)[None, :]
    offset = row[:, None] * GROUP + column
    inside = (offset < left_of(numel, first * GROUP)) & (column < GROUP)
    if WIDTH > 0:
        value = apply_channels(
            value,
            first + row,
            inside,
            numel,
            rows_ptr,
            scale_ptr,
            offset_ptr,
            head_stride,
            HEADS,
            WIDTH,
            ROWS_FIRST,
            GROUP,
            BLOCK,
        )
    tl.store(out_ptr + first * GROUP + offset, round_to(value, out_ptr.dtype.element_ty), mask=inside)


def encode_absmax(flat: Tensor, kept: tuple[Tensor, ...], codec: Any, channels: Any = None) -> None:
    """Fill `kept` (laid out as `codec.storage` says) from `flat` [numel], to which `channels` are applied first."""
    steps = kept[1]
    block, rows, planes, sizes, widths = _layout(kept, flat.numel(), codec)
    with torch.cuda.device_of(flat):
        _encode_kernel[(triton.cdiv(steps.numel(), rows),)](
            flat,
            *planes,
            steps,
            flat.numel(),
            *sizes,
            steps.numel(),
            1.0 / codec.half_width,
            TINY_PEAK,
            ZERO=codec.zero,
            GROUP=codec.group,
            BLOCK=block,
            ROWS=rows,
            **widths,
            **channel_arguments(channels, steps),
            enable_fp_fusion=False,
        )


def decode_absmax(kept: tuple[Tensor, ...], out: Tensor, codec: Any, channels: Any = None) -> None:
    """Fill `out` [numel] from what `encode_absmax` stored; `channels` are applied to it last."""
    steps = kept[1]
    block, rows, planes, sizes, widths = _layout(kept, out.numel(), codec)
    with torch.cuda.device_of(out):
        _decode_kernel[(triton.cdiv(steps.numel(), rows),)](
            *planes,
            steps,
            out,
            out.numel(),
            *sizes,
            steps.numel(),
            ZERO=codec.zero,
            GROUP=codec.group,
            BLOCK=block,
            ROWS=rows,
            **widths,
            **channel_arguments(channels, steps),
            enable_fp_fusion=False,
        )


def _layout(
    kept: tuple[Tensor, ...], numel: int, codec: Any
) -> tuple[int, int, tuple[Tensor, Tensor], tuple[int, int], dict[str, int]]:
    """Return columns and rows of a tile, the low and high plane, their bytes, and their widths in bits."""
    block = triton.next_power_of_2(codec.group)
    (width, low), (high_width, high) = low_and_high(kept[0], numel, codec.bits)
    widths = {"BITS": width, "HIGH_BITS": high_width}
    return block, max(_TILE // block, 1), (low, high), (low.numel(), high.numel()), widths
