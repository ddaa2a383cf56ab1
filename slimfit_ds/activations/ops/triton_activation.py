"""Activation functions that pack what their backward pass needs while they compute, and that backward pass.

Forward reads x once and writes y and the code; backward reads dy and the code and writes dx. Apart, that is two kernels
and two reads of x forward, and a derivative (or an input) written out and read again backward.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from slimfit_ds.activations.codecs.absmax import TINY_PEAK, AbsmaxCodec
from slimfit_ds.activations.codecs.magnitude_table import MagnitudeTableCodec
from slimfit_ds.activations.codecs.packing import low_and_high
from slimfit_ds.activations.codecs.triton_absmax import step_of, to_nearest
from slimfit_ds.activations.codecs.triton_packing import load_plane, store_plane
from slimfit_ds.activations.codecs.triton_rounding import round_to
from slimfit_ds.activations.codecs.triton_table import cell_of

__all__ = ["apply", "integer_forward", "integer_gradient", "table_forward", "table_gradient"]

_TILE = 4096


@triton.jit
def _apply_kernel(x_ptr, y_ptr, numel, FUNCTION: tl.constexpr, TILE: tl.constexpr):
    offset = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    x = tl.load(x_ptr + offset, mask=offset < numel, other=0.0).to(tl.float32)
    y = FUNCTION(x, y_ptr.dtype.element_ty)
    tl.store(y_ptr + offset, round_to(y, y_ptr.dtype.element_ty), mask=offset < numel)


@triton.jit
def _table_forward_kernel(
    x_ptr,
    y_ptr,
    thresholds_ptr,
    cells_ptr,
    codes_ptr,
    high_ptr,
    numel,
    stored_bytes,
    high_bytes,
    FUNCTION: tl.constexpr,
    STEPS: tl.constexpr,
    SHARED_CELLS: tl.constexpr,
    SIGN: tl.constexpr,
    BITS: tl.constexpr,
    HIGH_BITS: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    offset = row[:, None] * TILE + tl.arange(0, TILE)[None, :]
    inside = offset < numel
    x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    y = FUNCTION(x, y_ptr.dtype.element_ty)
    tl.store(y_ptr + offset, round_to(y, y_ptr.dtype.element_ty), mask=inside)
    code = cell_of(x, thresholds_ptr, cells_ptr, STEPS, SHARED_CELLS, SIGN, TILE)
    store_plane(codes_ptr, code, row, stored_bytes, BITS, 1, TILE, TILE)
    if HIGH_BITS > 0:
        store_plane(high_ptr, code >> BITS, row, high_bytes, HIGH_BITS, 1, TILE, TILE)


@triton.jit
def _table_gradient_kernel(
    dy_ptr,
    codes_ptr,
    high_ptr,
    levels_ptr,
    dx_ptr,
    numel,
    stored_bytes,
    high_bytes,
    BITS: tl.constexpr,
    HIGH_BITS: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    code = load_plane(codes_ptr, row, stored_bytes, BITS, 1, TILE, TILE)
    if HIGH_BITS > 0:
        code += load_plane(high_ptr, row, high_bytes, HIGH_BITS, 1, TILE, TILE) << BITS
    offset = row[:, None] * TILE + tl.arange(0, TILE)[None, :]
    inside = offset < numel
    dy = tl.load(dy_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    dx = dy * tl.load(levels_ptr + code).to(tl.float32)
    tl.store(dx_ptr + offset, round_to(dx, dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _integer_forward_kernel(
    x_ptr,
    y_ptr,
    codes_ptr,
    high_ptr,
    steps_ptr,
    numel,
    stored_bytes,
    high_bytes,
    groups,
    reciprocal,
    tiny_peak,
    FUNCTION: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BITS: tl.constexpr,
    HIGH_BITS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    offset = row[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = offset < numel
    x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    y = FUNCTION(x, y_ptr.dtype.element_ty)
    tl.store(y_ptr + offset, round_to(y, y_ptr.dtype.element_ty), mask=inside)
    step, inverse = step_of(x, reciprocal, tiny_peak, ROWS)
    tl.store(steps_ptr + row, step.to(tl.bfloat16), mask=row < groups)
    code = to_nearest(x * inverse[:, None]) + WHOLE
    if BITS == 8:
        tl.store(codes_ptr + offset, code.to(codes_ptr.dtype.element_ty), mask=inside)
    else:
        store_plane(codes_ptr, code, row, stored_bytes, BITS, ROWS, GROUP, GROUP)
        if HIGH_BITS > 0:
            store_plane(high_ptr, code >> BITS, row, high_bytes, HIGH_BITS, ROWS, GROUP, GROUP)


@triton.jit
def _integer_gradient_kernel(
    dy_ptr,
    codes_ptr,
    high_ptr,
    steps_ptr,
    dx_ptr,
    numel,
    stored_bytes,
    high_bytes,
    groups,
    SLOPE: tl.constexpr,
    ZERO: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BITS: tl.constexpr,
    HIGH_BITS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    code = load_plane(codes_ptr, row, stored_bytes, BITS, ROWS, GROUP, GROUP)
    if HIGH_BITS > 0:
        code += load_plane(high_ptr, row, high_bytes, HIGH_BITS, ROWS, GROUP, GROUP) << BITS
    step = tl.load(steps_ptr + row, mask=row < groups, other=0.0).to(tl.float32)
    # The slope is taken where the decoded input, rounded to its dtype, would lie.
    x = round_to((code.to(tl.float32) - ZERO) * step[:, None], dx_ptr.dtype.element_ty).to(tl.float32)
    offset = row[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = offset < numel
    dy = tl.load(dy_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx_ptr + offset, round_to(dy * SLOPE(x), dx_ptr.dtype.element_ty), mask=inside)


def apply(x: Tensor, y: Tensor, form: Any) -> None:
    """Fill `y` with `form` of `x`, both [numel] and contiguous.

    Args:
        form: one of `triton_elementwise.FORMS`.
    """
    with torch.cuda.device_of(x):
        _apply_kernel[(triton.cdiv(x.numel(), _TILE),)](
            x, y, x.numel(), FUNCTION=form, TILE=_TILE, enable_fp_fusion=False
        )


def table_forward(
    x: Tensor, y: Tensor, kept: tuple[Tensor, ...], codec: MagnitudeTableCodec, form: Any
) -> None:
    """Fill `y` with `form` of `x`, and `kept` (laid out as `codec.storage` says) with its cells.

    Args:
        x: fp32, bf16 or fp16 [numel].
        y: as `x`.
        codec: without a stored root mean square.
        form: one of `triton_elementwise.FORMS`.
    """
    cells = codec.cells
    thresholds, cell_table = codec.search_tables(x.device)
    (width, low), (high_width, high) = low_and_high(kept[0], x.numel(), cells.bits)
    with torch.cuda.device_of(x):
        _table_forward_kernel[(triton.cdiv(x.numel(), _TILE),)](
            x,
            y,
            thresholds,
            thresholds if cell_table is None else cell_table,
            low,
            high,
            x.numel(),
            low.numel(),
            high.numel(),
            FUNCTION=form,
            STEPS=thresholds.numel().bit_length(),
            SHARED_CELLS=cell_table is not None,
            SIGN=1 << (cells.bits - 1) if cells.signed else 0,
            BITS=width,
            HIGH_BITS=high_width,
            TILE=_TILE,
            enable_fp_fusion=False,
        )


def table_gradient(dy: Tensor, kept: tuple[Tensor, ...], dx: Tensor, codec: MagnitudeTableCodec) -> None:
    """Fill `dx` with `dy` times the stored derivative, both [numel], contiguous and of one dtype."""
    (width, low), (high_width, high) = low_and_high(kept[0], dy.numel(), codec.cells.bits)
    with torch.cuda.device_of(dy):
        _table_gradient_kernel[(triton.cdiv(dy.numel(), _TILE),)](
            dy,
            low,
            high,
            codec.levels(dy.device, dy.dtype),
            dx,
            dy.numel(),
            low.numel(),
            high.numel(),
            BITS=width,
            HIGH_BITS=high_width,
            TILE=_TILE,
            enable_fp_fusion=False,
        )


def integer_forward(x: Tensor, y: Tensor, kept: tuple[Tensor, ...], codec: AbsmaxCodec, form: Any) -> None:
    """Fill `y` with `form` of `x`, and `kept` with the input in groups of integers.

    Args:
        x: fp32, bf16 or fp16 [numel].
        y: as `x`.
        codec: rounds to nearest, has a whole zero and groups of a power of two.
        form: one of `triton_elementwise.FORMS`.
    """
    codes, steps = kept
    grid, rows = codec.grid, max(_TILE // codec.group, 1)
    (width, low), (high_width, high) = low_and_high(codes, x.numel(), grid.bits)
    with torch.cuda.device_of(x):
        _integer_forward_kernel[(triton.cdiv(steps.numel(), rows),)](
            x,
            y,
            low,
            high,
            steps,
            x.numel(),
            low.numel(),
            high.numel(),
            steps.numel(),
            1.0 / grid.half_width,
            TINY_PEAK,
            FUNCTION=form,
            GROUP=codec.group,
            ROWS=rows,
            BITS=width,
            HIGH_BITS=high_width,
            WHOLE=int(grid.zero),
            enable_fp_fusion=False,
        )


def integer_gradient(
    dy: Tensor, kept: tuple[Tensor, ...], dx: Tensor, codec: AbsmaxCodec, slope: Any
) -> None:
    """Fill `dx` with `dy` times the derivative at the stored input, both [numel], contiguous and of one dtype.

    Args:
        slope: one of `triton_elementwise.SLOPES`.
    """
    codes, steps = kept
    grid, rows = codec.grid, max(_TILE // codec.group, 1)
    (width, low), (high_width, high) = low_and_high(codes, dy.numel(), grid.bits)
    with torch.cuda.device_of(dy):
        _integer_gradient_kernel[(triton.cdiv(steps.numel(), rows),)](
            dy,
            low,
            high,
            steps,
            dx,
            dy.numel(),
            low.numel(),
            high.numel(),
            steps.numel(),
            SLOPE=slope,
            ZERO=grid.zero,
            GROUP=codec.group,
            ROWS=rows,
            BITS=width,
            HIGH_BITS=high_width,
            enable_fp_fusion=False,
        )
