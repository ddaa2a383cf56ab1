"""Gradients of LayerNorm and RMSNorm while scale or bias train: one pass over dy and the packed x_hat for all three.

Each program goes through rows that lie far apart and adds up what they give to scale and bias in registers; the sums of
the programs, a few per thousand of the rows, are added by torch. Without atomics, so that equal inputs give equal bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slimfit_ds.activations.codecs.absmax import IntegerGrid
from slimfit_ds.activations.codecs.packing import low_and_high
from slimfit_ds.activations.ops.triton_norm import NOWHERE, input_gradient, load_x_hat, warps_for

__all__ = ["norm_gradients"]

# The same on every device, so that sums are formed in the same order.
_PROGRAMS = 512


@triton.jit
def _gradients_kernel(
    dy_ptr,
    codes_ptr,
    high_ptr,
    steps_ptr,
    rstd_ptr,
    scale_ptr,
    dx_ptr,
    partial_ptr,
    tokens,
    programs,
    stored_bytes,
    high_bytes,
    ZERO: tl.constexpr,
    OFFSET: tl.constexpr,
    CENTRED: tl.constexpr,
    SCALED: tl.constexpr,
    TO_INPUT: tl.constexpr,
    TO_SCALE: tl.constexpr,
    TO_BIAS: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    BITS: tl.constexpr,
    HIGH_BITS: tl.constexpr,
):
    program = tl.program_id(0)
    group = tl.arange(0, GROUPS)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = column < WIDTH
    real = group < WIDTH // GROUP
    scale = tl.zeros([GROUPS, GROUP], tl.float32)
    if SCALED:
        scale = tl.load(scale_ptr + column, mask=inside, other=0.0).to(tl.float32) + OFFSET
    to_scale = tl.zeros([GROUPS, GROUP], tl.float32)
    to_bias = tl.zeros([GROUPS, GROUP], tl.float32)
    token = program.to(tl.int64)
    for _ in range(program, tokens, programs):
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
        to_scale += g * x_hat
        to_bias += g
        if TO_INPUT:
            if SCALED:
                g = g * scale
            dx = input_gradient(g, x_hat, tl.load(rstd_ptr + token), CENTRED, WIDTH)
            tl.store(dx_ptr + token * WIDTH + column, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        token += programs
    place = program.to(tl.int64) * WIDTH + column
    if TO_SCALE:
        tl.store(partial_ptr + place, to_scale, mask=inside)
        place += programs * WIDTH
    if TO_BIAS:
        tl.store(partial_ptr + place, to_bias, mask=inside)


def norm_gradients(
    dy: Tensor,
    codes: Tensor,
    steps: Tensor,
    rstd: Tensor,
    scale: Tensor | None,
    dx: Tensor | None,
    *,
    to_scale: bool,
    to_bias: bool,
    centred: bool,
    offset: float,
    grid: IntegerGrid,
    group: int,
) -> Tensor:
    """Fill `dx` (if there is one), and return the gradients of scale and bias that are wanted: fp32 [1 or 2, width].

    Args:
        dy: [tokens, width], contiguous; so is `dx`.
        codes, steps, rstd: what `encode_norm` stored.
        scale: the norm's weight [width], or `None`.
        offset: added to it (1 for Gemma's RMSNorm).
        to_scale, to_bias: which gradients are wanted, at least one.
    """
    tokens, width = dy.shape
    programs = min(tokens, _PROGRAMS)
    partial = dy.new_empty((to_scale + to_bias, programs, width), dtype=torch.float32)
    (low_bits, low), (high_bits, high) = low_and_high(codes, dy.numel(), grid.bits)
    with torch.cuda.device_of(dy):
        _gradients_kernel[(programs,)](
            dy,
            low,
            high,
            steps,
            rstd,
            dy if scale is None else scale,
            dy if dx is None else dx,
            partial,
            tokens,
            programs,
            low.numel(),
            high.numel(),
            ZERO=grid.zero,
            OFFSET=offset,
            CENTRED=centred,
            SCALED=scale is not None,
            TO_INPUT=dx is not None,
            TO_SCALE=to_scale,
            TO_BIAS=to_bias,
            WIDTH=width,
            GROUP=group,
            GROUPS=triton.next_power_of_2(width) // group,
            BITS=low_bits,
            HIGH_BITS=high_bits,
            num_warps=warps_for(width),
        )
    return partial.sum(1)
