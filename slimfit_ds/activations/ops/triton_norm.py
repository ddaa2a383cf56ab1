"""LayerNorm and RMSNorm with x_hat in groups of absmax integers: a pass over x forward, a pass over dy backward.

Forward normalises a row and packs its x_hat without writing it out; backward unpacks it in registers. The torch way
writes x_hat in fp32 and reads it again, both times.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slimfit_ds.activations.codecs.absmax import TINY_PEAK, IntegerGrid
from slimfit_ds.activations.codecs.packing import low_and_high
from slimfit_ds.activations.codecs.triton_absmax import step_of, to_nearest
from slimfit_ds.activations.codecs.triton_packing import load_plane, store_plane

__all__ = ["NOWHERE", "encode_norm", "input_gradient", "load_x_hat", "norm_gradient", "warps_for"]

NOWHERE = tl.constexpr(1 << 40)
"""The number of a group that is in no tensor."""


@triton.jit
def _encode_kernel(
    x_ptr,
    codes_ptr,
    high_ptr,
    steps_ptr,
    rstd_ptr,
    eps,
    stored_bytes,
    high_bytes,
    reciprocal,
    tiny_peak,
    CENTRED: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    BITS: tl.constexpr,
    HIGH_BITS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = column < WIDTH
    x = tl.load(x_ptr + token * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    if CENTRED:
        x = tl.where(inside, x - tl.sum(x) / WIDTH, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x) / WIDTH + eps)
    tl.store(rstd_ptr + token, rstd)
    x_hat = x * rstd
    step, inverse = step_of(x_hat, reciprocal, tiny_peak, GROUPS)
    # Groups beyond the width are this program's alone: they go nowhere.
    real = group < WIDTH // GROUP
    row = tl.where(real, token * (WIDTH // GROUP) + group, NOWHERE)
    tl.store(steps_ptr + row, step.to(tl.bfloat16), mask=real)
    code = to_nearest(x_hat * inverse[:, None]) + WHOLE
    if BITS == 8:
        tl.store(codes_ptr + token * WIDTH + column, code.to(codes_ptr.dtype.element_ty), mask=inside)
    else:
        store_plane(codes_ptr, code, row, stored_bytes, BITS, GROUPS, GROUP, GROUP)
        if HIGH_BITS > 0:
            store_plane(high_ptr, code >> BITS, row, high_bytes, HIGH_BITS, GROUPS, GROUP, GROUP)


@triton.jit
def load_x_hat(
    codes_ptr,
    high_ptr,
    steps_ptr,
    row,
    real,
    stored_bytes,
    high_bytes,
    ZERO: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    BITS: tl.constexpr,
    HIGH_BITS: tl.constexpr,
):
    """fp32 x_hat [GROUPS, GROUP] of the groups `row`; 0 in those that are not `real`."""
    code = load_plane(codes_ptr, row, stored_bytes, BITS, GROUPS, GROUP, GROUP)
    if HIGH_BITS > 0:
        code += load_plane(high_ptr, row, high_bytes, HIGH_BITS, GROUPS, GROUP, GROUP) << BITS
    step = tl.load(steps_ptr + row, mask=real, other=0.0).to(tl.float32)
    return (code.to(tl.float32) - ZERO) * step[:, None]


@triton.jit
def input_gradient(g, x_hat, rstd, CENTRED: tl.constexpr, WIDTH: tl.constexpr):
    """fp32 dx of a row from `g`, the scaled dy; both 0 beyond the width, where dx is not defined."""
    dx = g - x_hat * (tl.sum(g * x_hat) / WIDTH)
    if CENTRED:
        dx = dx - tl.sum(g) / WIDTH
    return dx * rstd


@triton.jit
def _gradient_kernel(
    dy_ptr,
    codes_ptr,
    high_ptr,
    steps_ptr,
    rstd_ptr,
    scale_ptr,
    dx_ptr,
    stored_bytes,
    high_bytes,
    ZERO: tl.constexpr,
    OFFSET: tl.constexpr,
    CENTRED: tl.constexpr,
    SCALED: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    BITS: tl.constexpr,
    HIGH_BITS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = column < WIDTH
    real = group < WIDTH // GROUP
    row = tl.where(real, token * (WIDTH // GROUP) + group, NOWHERE)
    x_hat = load_x_hat(
        codes_ptr,
        high_ptr,
        steps_ptr,
        row,
        real,
        stored_bytes,
        high_bytes,
        ZERO,
        GROUP,
        GROUPS,
        BITS,
        HIGH_BITS,
    )
    g = tl.load(dy_ptr + token * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        g = g * (tl.load(scale_ptr + column, mask=inside, other=0.0).to(tl.float32) + OFFSET)
    dx = input_gradient(g, x_hat, tl.load(rstd_ptr + token), CENTRED, WIDTH)
    tl.store(dx_ptr + token * WIDTH + column, dx.to(dx_ptr.dtype.element_ty), mask=inside)


def warps_for(width: int) -> int:
    """Warps for a row, so that a thread holds at most 16 elements of it, in a few copies, in registers."""
    return min(max(triton.next_power_of_2(width) // 512, 4), 32)


def encode_norm(
    x: Tensor,
    codes: Tensor,
    steps: Tensor,
    rstd: Tensor,
    *,
    centred: bool,
    eps: float,
    grid: IntegerGrid,
    group: int,
) -> None:
    """Fill `codes` and `steps` with x_hat of `x`, and `rstd`.

    Args:
        x: fp32, bf16 or fp16 [tokens, width], contiguous; `width` is a multiple of `group`.
        codes: int8 or uint8, and `steps`: bf16, as `AbsmaxCodec.storage` lays them out.
        rstd: fp32 [tokens].
        centred: LayerNorm; otherwise RMSNorm.
        eps: added to the variance or mean square.
        grid: of the codes, with a whole zero.
        group: elements per step, a power of two of at least 8.
    """
    (low_bits, low), (high_bits, high) = low_and_high(codes, x.numel(), grid.bits)
    with torch.cuda.device_of(x):
        _encode_kernel[(x.shape[0],)](
            x,
            low,
            high,
            steps,
            rstd,
            eps,
            low.numel(),
            high.numel(),
            1.0 / grid.half_width,
            TINY_PEAK,
            CENTRED=centred,
            WIDTH=x.shape[1],
            GROUP=group,
            GROUPS=triton.next_power_of_2(x.shape[1]) // group,
            BITS=low_bits,
            HIGH_BITS=high_bits,
            WHOLE=int(grid.zero),
            enable_fp_fusion=False,
            num_warps=warps_for(x.shape[1]),
        )


def norm_gradient(
    dy: Tensor,
    codes: Tensor,
    steps: Tensor,
    rstd: Tensor,
    scale: Tensor | None,
    dx: Tensor,
    *,
    centred: bool,
    offset: float,
    grid: IntegerGrid,
    group: int,
) -> None:
    """Fill `dx` [tokens, width] from `dy` [tokens, width], both contiguous, and what `encode_norm` stored.

    Args:
        scale: the norm's weight [width], or `None`.
        offset: added to it (1 for Gemma's RMSNorm).
    """
    (low_bits, low), (high_bits, high) = low_and_high(codes, dy.numel(), grid.bits)
    with torch.cuda.device_of(dy):
        _gradient_kernel[(dy.shape[0],)](
            dy,
            low,
            high,
            steps,
            rstd,
            dy if scale is None else scale,
            dx,
            low.numel(),
            high.numel(),
            ZERO=grid.zero,
            OFFSET=offset,
            CENTRED=centred,
            SCALED=scale is not None,
            WIDTH=dy.shape[1],
            GROUP=group,
            GROUPS=triton.next_power_of_2(dy.shape[1]) // group,
            BITS=low_bits,
            HIGH_BITS=high_bits,
            num_warps=warps_for(dy.shape[1]),
        )
