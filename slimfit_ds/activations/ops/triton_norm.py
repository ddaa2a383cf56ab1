"""LayerNorm and RMSNorm with x_hat in groups of absmax integers: a pass over x forward, a pass over dy backward.

Forward normalises a row and packs its x_hat without writing it out; backward unpacks it in registers. While scale or bias
train, each program goes through rows that lie far apart and adds up in registers what they give to both; the sums of the
programs are added by torch. Without atomics, so that equal inputs give equal bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from slimfit_ds.activations.codecs.base import TINY_PEAK
from slimfit_ds.activations.codecs.packing import low_and_high
from slimfit_ds.activations.codecs.triton_absmax import load_groups, store_groups

__all__ = ["encode_norm", "norm_gradients"]

# The number of a group that is in no tensor.
_NOWHERE = tl.constexpr(1 << 40)

# Programs that add up gradients of scale and bias: the same on every device, so that sums are formed in the same order.
_PROGRAMS = 512


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
    ZERO: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    BITS: tl.constexpr,
    HIGH_BITS: tl.constexpr,
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
    # Groups beyond the width are this program's alone: they go nowhere.
    real = group < WIDTH // GROUP
    row = tl.where(real, token * (WIDTH // GROUP) + group, _NOWHERE)
    store_groups(
        x * rstd,
        codes_ptr,
        high_ptr,
        steps_ptr,
        row,
        real,
        stored_bytes,
        high_bytes,
        reciprocal,
        tiny_peak,
        ZERO,
        GROUP,
        GROUP,
        GROUPS,
        BITS,
        HIGH_BITS,
    )


@triton.jit
def _mean_of_rows(x, WIDTH: tl.constexpr):
    """Return the means [ROWS, 1, 1] of rows of `WIDTH` elements in `x` [ROWS, GROUPS, GROUP], which is 0 beyond them."""
    return (tl.sum(tl.sum(x, axis=2), axis=1) / WIDTH)[:, None, None]


@triton.jit
def _input_gradient(g, x_hat, rstd, CENTRED: tl.constexpr, WIDTH: tl.constexpr):
    """Return the fp32 dx of rows from `g`, the scaled dy; both 0 beyond the width, where dx is not defined."""
    dx = g - x_hat * _mean_of_rows(g * x_hat, WIDTH)
    if CENTRED:
        dx = dx - _mean_of_rows(g, WIDTH)
    return dx * rstd


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
    OFFSET: tl.constexpr,
    CENTRED: tl.constexpr,
    SCALED: tl.constexpr,
    TO_INPUT: tl.constexpr,
    TO_SCALE: tl.constexpr,
    TO_BIAS: tl.constexpr,
    WIDTH: tl.constexpr,
    ZERO: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    BITS: tl.constexpr,
    HIGH_BITS: tl.constexpr,
    ROWS: tl.constexpr,
):
    program = tl.program_id(0)
    # Groups of the rows of the norm that are in flight together, one row after the other.
    index = tl.arange(0, ROWS * GROUPS)
    group = index % GROUPS
    column = (tl.arange(0, GROUPS)[:, None] * GROUP + tl.arange(0, GROUP)[None, :])[None, :, :]
    scale = tl.zeros([1, GROUPS, GROUP], tl.float32)
    if SCALED:
        scale = tl.load(scale_ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32) + OFFSET
    to_scale = tl.zeros([ROWS, GROUPS, GROUP], tl.float32)
    to_bias = tl.zeros([ROWS, GROUPS, GROUP], tl.float32)
    for first in range(program * ROWS, tokens, programs * ROWS):
        token = first + (index // GROUPS).to(tl.int64)
        real = (group < WIDTH // GROUP) & (token < tokens)
        row = tl.where(real, token * (WIDTH // GROUP) + group, _NOWHERE)
        token = first + tl.arange(0, ROWS).to(tl.int64)[:, None, None]
        inside = (column < WIDTH) & (token < tokens)
        x_hat = load_groups(
            codes_ptr,
            high_ptr,
            steps_ptr,
            row,
            real,
            stored_bytes,
            high_bytes,
            ZERO,
            GROUP,
            GROUP,
            ROWS * GROUPS,
            BITS,
            HIGH_BITS,
        )
        x_hat = tl.reshape(x_hat, [ROWS, GROUPS, GROUP])
        g = tl.load(dy_ptr + token * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
        if TO_SCALE:
            to_scale += g * x_hat
        if TO_BIAS:
            to_bias += g
        if TO_INPUT:
            if SCALED:
                g = g * scale
            rstd = tl.load(rstd_ptr + token, mask=token < tokens, other=0.0)
            dx = _input_gradient(g, x_hat, rstd, CENTRED, WIDTH)
            tl.store(dx_ptr + token * WIDTH + column, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    place = program.to(tl.int64) * WIDTH + column
    if TO_SCALE:
        tl.store(partial_ptr + place, tl.sum(to_scale, axis=0)[None, :, :], mask=column < WIDTH)
        place += programs * WIDTH
    if TO_BIAS:
        tl.store(partial_ptr + place, tl.sum(to_bias, axis=0)[None, :, :], mask=column < WIDTH)


def encode_norm(x: Tensor, kept: tuple[Tensor, ...], rstd: Tensor, kind: Any, codec: Any) -> None:
    """Fill `kept` (laid out as `codec.storage` says) with x_hat of `x`, and `rstd`.

    Args:
        x: fp32, bf16 or fp16 [tokens, width], contiguous; `width` is a multiple of the codec's group.
        rstd: fp32, `tokens` elements.
    """
    codes, steps = kept
    (low_bits, low), (high_bits, high) = low_and_high(codes, x.numel(), codec.bits)
    with torch.cuda.device_of(x):
        _encode_kernel[(x.shape[0],)](
            x,
            low,
            high,
            steps,
            rstd,
            kind.eps,
            low.numel(),
            high.numel(),
            1.0 / codec.half_width,
            TINY_PEAK,
            CENTRED=kind.centred,
            **_constants(x.shape[1], codec, low_bits, high_bits, 1, 1024),
            enable_fp_fusion=False,
        )


def norm_gradients(
    dy: Tensor,
    kept: tuple[Tensor, ...],
    rstd: Tensor,
    scale: Tensor | None,
    dx: Tensor | None,
    to_scale: bool,
    to_bias: bool,
    kind: Any,
    codec: Any,
) -> Tensor:
    """Fill `dx` (if there is one), and return the gradients of scale and bias that are wanted: fp32 [0 to 2, width].

    Args:
        dy: [tokens, width], contiguous; so is `dx`.
        kept, rstd: what `encode_norm` stored.
        scale: the norm's weight [width], or `None`.
        to_scale, to_bias: which gradients are wanted.
    """
    tokens, width = dy.shape
    # Without sums each row has a program of its own. With them a narrow row would be too little to have in flight.
    sums = to_scale or to_bias
    rows = min(max(4096 // triton.next_power_of_2(width), 1), 4) if sums else 1
    programs = min(triton.cdiv(tokens, rows), _PROGRAMS) if sums else tokens
    partial = dy.new_empty((to_scale + to_bias, programs, width), dtype=torch.float32)
    codes, steps = kept
    (low_bits, low), (high_bits, high) = low_and_high(codes, dy.numel(), codec.bits)
    with torch.cuda.device_of(dy):
        _gradients_kernel[(programs,)](
            dy,
            low,
            high,
            steps,
            rstd,
            dy if scale is None else scale,
            dy if dx is None else dx,
            partial if sums else dy,
            tokens,
            programs,
            low.numel(),
            high.numel(),
            OFFSET=kind.offset,
            CENTRED=kind.centred,
            SCALED=scale is not None,
            TO_INPUT=dx is not None,
            TO_SCALE=to_scale,
            TO_BIAS=to_bias,
            ROWS=rows,
            # Of the sums a thread holds at most 16 elements of a row, in a few copies, in registers.
            **_constants(width, codec, low_bits, high_bits, rows, 512 if sums else 1024),
        )
    return partial.sum(1)


def _constants(
    width: int, codec: Any, low_bits: int, high_bits: int, rows: int, per_warp: int
) -> dict[str, int]:
    padded = triton.next_power_of_2(width)
    return {
        "WIDTH": width,
        "ZERO": codec.zero,
        "GROUP": codec.group,
        "GROUPS": padded // codec.group,
        "BITS": low_bits,
        "HIGH_BITS": high_bits,
        "num_warps": min(max(rows * padded // per_warp, 1), 32),
    }
