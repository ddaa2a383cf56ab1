"""Triton twins of the absmax codecs: one pass over the data, bit for bit equal to the torch version.

Equal only without fused multiply-adds, which round once where torch rounds twice: hence `enable_fp_fusion`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slimfit_ds.activations.codecs.channel_affine import ChannelAffine
from slimfit_ds.activations.codecs.packing import low_and_high
from slimfit_ds.activations.codecs.triton_channels import apply_channels, channel_arguments
from slimfit_ds.activations.codecs.triton_packing import load_plane, store_plane
from slimfit_ds.activations.codecs.triton_rounding import round_to

__all__ = [
    "TILE",
    "decode_absmax",
    "decode_kernel",
    "encode_absmax",
    "encode_kernel",
    "step_of",
    "to_nearest",
]

TILE = 4096
"""Elements of a program."""


@triton.jit
def step_of(x, reciprocal, tiny_peak, ROWS: tl.constexpr):
    """fp32 step (a bf16 value) and inverse step [ROWS] of fp32 groups `x` [ROWS, BLOCK]."""
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


@triton.jit
def to_nearest(y):
    """int32 of fp32 values below 2^22."""
    # Adding 1.5 * 2^23 leaves no bits for a fraction: round to nearest, ties to even.
    return ((y + 12582912.0) - 12582912.0).to(tl.int32)


@triton.jit
def encode_kernel(
    x_ptr,
    noise_ptr,
    codes_ptr,
    high_ptr,
    steps_ptr,
    numel,
    stored_bytes,
    high_bytes,
    groups,
    reciprocal,
    tiny_peak,
    scale_ptr,
    offset_ptr,
    head_stride,
    width_stride,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BITS: tl.constexpr,
    HIGH_BITS: tl.constexpr,
    WHOLE: tl.constexpr,
    FRACTION: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    offset = row[:, None] * GROUP + column
    inside = offset < numel
    if GROUP < BLOCK:
        inside = inside & (column < GROUP)
    x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    if WIDTH > 0:
        x = apply_channels(
            x,
            offset,
            inside,
            scale_ptr,
            offset_ptr,
            head_stride,
            width_stride,
            HEADS,
            WIDTH,
            x_ptr.dtype.element_ty,
        )

    step, inverse = step_of(x, reciprocal, tiny_peak, ROWS)
    tl.store(steps_ptr + row, step.to(tl.bfloat16), mask=row < groups)

    y = x * inverse[:, None]
    if FRACTION != 0.0:
        y = y + FRACTION
    if STOCHASTIC:
        noise = tl.load(noise_ptr + offset, mask=inside, other=0).to(tl.float32)
        y = y + noise * (1.0 / 65536.0)
        y = tl.minimum(tl.maximum(y, LOW - WHOLE), HIGH - WHOLE)
    code = to_nearest(y) + WHOLE
    if BITS == 8:
        tl.store(codes_ptr + offset, code.to(codes_ptr.dtype.element_ty), mask=inside)
    else:
        store_plane(codes_ptr, code, row, stored_bytes, BITS, ROWS, GROUP, BLOCK)
        if HIGH_BITS > 0:
            store_plane(high_ptr, code >> BITS, row, high_bytes, HIGH_BITS, ROWS, GROUP, BLOCK)


@triton.jit
def decode_kernel(
    codes_ptr,
    high_ptr,
    steps_ptr,
    out_ptr,
    numel,
    stored_bytes,
    high_bytes,
    groups,
    scale_ptr,
    offset_ptr,
    head_stride,
    width_stride,
    ZERO: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BITS: tl.constexpr,
    HIGH_BITS: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    code = load_plane(codes_ptr, row, stored_bytes, BITS, ROWS, GROUP, BLOCK)
    if HIGH_BITS > 0:
        code += load_plane(high_ptr, row, high_bytes, HIGH_BITS, ROWS, GROUP, BLOCK) << BITS
    step = tl.load(steps_ptr + row, mask=row < groups, other=0.0).to(tl.float32)
    value = (code.to(tl.float32) - ZERO) * step[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    offset = row[:, None] * GROUP + column
    inside = offset < numel
    if GROUP < BLOCK:
        inside = inside & (column < GROUP)
    if WIDTH > 0:
        value = round_to(value, out_ptr.dtype.element_ty).to(tl.float32)
        value = apply_channels(
            value,
            offset,
            inside,
            scale_ptr,
            offset_ptr,
            head_stride,
            width_stride,
            HEADS,
            WIDTH,
            out_ptr.dtype.element_ty,
        )
    tl.store(out_ptr + offset, round_to(value, out_ptr.dtype.element_ty), mask=inside)


def encode_absmax(
    flat: Tensor,
    codes: Tensor,
    steps: Tensor,
    noise: Tensor | None,
    channels: ChannelAffine | None,
    *,
    group: int,
    bits: int,
    zero: float,
    half_width: float,
    tiny_peak: float,
) -> None:
    """Fill `codes` and `steps` from `flat`.

    Args:
        flat: fp32, bf16 or fp16 [numel].
        codes: int8 or uint8, as `packing.packed_bytes` counts them.
        steps: bf16 [ceil(numel / group)].
        noise: odd int16 [numel or more] for stochastic rounding, None for nearest.
        channels: applied to `flat` first, or None.
        group: elements per step, a multiple of 8.
        bits, zero, half_width: the integer grid.
        tiny_peak: groups whose absmax is below get step 0.
    """
    whole, fraction = divmod(zero, 1)
    (width, low), (high_width, high) = low_and_high(codes, flat.numel(), bits)
    block = triton.next_power_of_2(group)
    rows = max(TILE // block, 1)
    with torch.cuda.device_of(flat):
        encode_kernel[(triton.cdiv(steps.numel(), rows),)](
            flat,
            flat if noise is None else noise,
            low,
            high,
            steps,
            flat.numel(),
            low.numel(),
            high.numel(),
            steps.numel(),
            1.0 / half_width,
            tiny_peak,
            GROUP=group,
            BLOCK=block,
            ROWS=rows,
            BITS=width,
            HIGH_BITS=high_width,
            WHOLE=int(whole),
            FRACTION=fraction,
            LOW=round(zero - half_width),
            HIGH=round(zero + half_width),
            STOCHASTIC=noise is not None,
            **channel_arguments(channels, steps),
            enable_fp_fusion=False,
        )


def decode_absmax(
    codes: Tensor,
    steps: Tensor,
    out: Tensor,
    channels: ChannelAffine | None,
    *,
    group: int,
    bits: int,
    zero: float,
) -> None:
    """Fill `out` [numel] from what `encode_absmax` stored; `channels` are applied to it last, if given."""
    block = triton.next_power_of_2(group)
    rows = max(TILE // block, 1)
    (width, low), (high_width, high) = low_and_high(codes, out.numel(), bits)
    with torch.cuda.device_of(out):
        decode_kernel[(triton.cdiv(steps.numel(), rows),)](
            low,
            high,
            steps,
            out,
            out.numel(),
            low.numel(),
            high.numel(),
            steps.numel(),
            ZERO=zero,
            GROUP=group,
            BLOCK=block,
            ROWS=rows,
            BITS=width,
            HIGH_BITS=high_width,
            **channel_arguments(channels, steps),
            enable_fp_fusion=False,
        )
