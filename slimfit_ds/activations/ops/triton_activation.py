"""Activation functions that pack what their backward pass needs while they compute, and that backward pass.

Forward reads x once and writes y and the code; backward reads dy and the code and writes dx. Apart, that is two kernels
and two reads of x forward, and a derivative (or an input) written out and read again backward.

A function is written the way PyTorch evaluates it on a device, rounding where PyTorch rounds: a module made of several
operations (transformers' `NewGELUActivation`) rounds each of them to the tensor's dtype. `ops.activation` finds out by
trying which form is a module's own.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from slimfit_ds.activations.codecs.absmax import AbsmaxCodec
from slimfit_ds.activations.codecs.base import TINY_PEAK
from slimfit_ds.activations.codecs.packing import low_and_high
from slimfit_ds.activations.codecs.step_derivative import StepDerivative
from slimfit_ds.activations.codecs.triton_absmax import load_groups, store_groups
from slimfit_ds.activations.codecs.triton_table import TILE, encode_arguments, load_levels, store_cells
from slimfit_ds.triton_rounding import INTERPRETED, round_to

__all__ = ["FORMS", "apply", "forward_and_pack", "gradient"]


# The interpreter has no libdevice; compiled, only libdevice rounds as CUDA's own functions do.
@triton.jit
def _exp(x):
    if INTERPRETED:
        y = tl.exp(x)
    else:
        y = libdevice.exp(x)
    return y


@triton.jit
def _tanh(x):
    if INTERPRETED:
        # Of the magnitude: the exponential must not overflow.
        shrunk = tl.exp(-2.0 * tl.abs(x))
        y = tl.where(x < 0, -1.0, 1.0) * (1.0 - shrunk) / (1.0 + shrunk)
    else:
        y = libdevice.tanh(x)
    return y


@triton.jit
def _sigmoid(x):
    denominator = 1.0 + _exp(-x)
    return tl.div_rn(tl.full(x.shape, 1.0, tl.float32), denominator)


@triton.jit
def _as(value, dtype: tl.constexpr):
    """Round as if stored in `dtype`."""
    return round_to(value, dtype).to(tl.float32)


@triton.jit
def gelu(x, dtype: tl.constexpr):
    return x * 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_tanh(x, dtype: tl.constexpr):
    inner = 0.7978845608028654 * tl.fma(x * x * x, tl.full(x.shape, 0.044715, tl.float32), x)
    return 0.5 * x * (1.0 + _tanh(inner))


@triton.jit
def gelu_tanh_unfused(x, dtype: tl.constexpr):
    cube = _as(_as(x * x, dtype) * x, dtype)
    inner = _as(0.7978845608028654 * _as(x + _as(0.044715 * cube, dtype), dtype), dtype)
    return _as(0.5 * x, dtype) * _as(1.0 + _as(_tanh(inner), dtype), dtype)


@triton.jit
def silu(x, dtype: tl.constexpr):
    return tl.div_rn(x, 1.0 + _exp(-x))


@triton.jit
def quick_gelu_unfused(x, dtype: tl.constexpr):
    return x * _as(_sigmoid(_as(1.702 * x, dtype)), dtype)


@triton.jit
def relu(x, dtype: tl.constexpr):
    return tl.where(x <= 0.0, 0.0, x)


@triton.jit
def _gelu_slope(x):
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * _exp(-0.5 * x * x) * 0.3989422804014327


@triton.jit
def _gelu_tanh_slope(x):
    square = x * x
    tanh = _tanh(0.7978845608028654 * x * (1.0 + 0.044715 * square))
    # Where tanh is 1 the square of x may be infinite.
    rest = 1.0 - tanh * tanh
    bend = 0.5 * x * rest * 0.7978845608028654 * (1.0 + 0.134145 * square)
    return 0.5 * (1.0 + tanh) + tl.where(rest > 0.0, bend, 0.0)


@triton.jit
def _gate(x):
    """The sigmoid to two units in the last place: a slope is of bf16 inputs, so division need not be correctly rounded."""
    return 1.0 / (1.0 + _exp(-x))


@triton.jit
def _silu_slope(x):
    gate = _gate(x)
    return gate * (1.0 + x * (1.0 - gate))


@triton.jit
def _quick_gelu_slope(x):
    gate = _gate(1.702 * x)
    return gate * (1.0 + 1.702 * x * (1.0 - gate))


@triton.jit
def _relu_slope(x):
    return tl.where(x > 0.0, 1.0, 0.0)


FORMS = {
    "gelu": (gelu,),
    "gelu_tanh": (gelu_tanh, gelu_tanh_unfused),
    "silu": (silu,),
    "quick_gelu": (quick_gelu_unfused,),
    "relu": (relu,),
}
"""Name -> the ways the function is evaluated in the wild, on fp32 values; the last rounding is the caller's."""

_SLOPES = {
    "gelu": _gelu_slope,
    "gelu_tanh": _gelu_tanh_slope,
    "silu": _silu_slope,
    "quick_gelu": _quick_gelu_slope,
    "relu": _relu_slope,
}


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
    table_ptr,
    codes_ptr,
    high_ptr,
    numel,
    stored_bytes,
    high_bytes,
    FUNCTION: tl.constexpr,
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
    store_cells(
        x,
        table_ptr,
        codes_ptr,
        high_ptr,
        row,
        stored_bytes,
        high_bytes,
        BITS,
        HIGH_BITS,
        TILE,
    )


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
    slope = load_levels(codes_ptr, high_ptr, levels_ptr, row, stored_bytes, high_bytes, BITS, HIGH_BITS, TILE)
    offset = row[:, None] * TILE + tl.arange(0, TILE)[None, :]
    inside = offset < numel
    dx = tl.load(dy_ptr + offset, mask=inside, other=0.0).to(tl.float32) * slope.to(tl.float32)
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
    ZERO: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BITS: tl.constexpr,
    HIGH_BITS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    offset = row[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = offset < numel
    x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    y = FUNCTION(x, y_ptr.dtype.element_ty)
    tl.store(y_ptr + offset, round_to(y, y_ptr.dtype.element_ty), mask=inside)
    store_groups(
        x,
        codes_ptr,
        high_ptr,
        steps_ptr,
        row,
        row < groups,
        stored_bytes,
        high_bytes,
        reciprocal,
        tiny_peak,
        ZERO,
        GROUP,
        GROUP,
        ROWS,
        BITS,
        HIGH_BITS,
    )


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
    x = load_groups(
        codes_ptr,
        high_ptr,
        steps_ptr,
        row,
        row < groups,
        stored_bytes,
        high_bytes,
        ZERO,
        GROUP,
        GROUP,
        ROWS,
        BITS,
        HIGH_BITS,
    )
    # The slope is taken where the decoded input, rounded to its dtype, would lie.
    x = round_to(x, dx_ptr.dtype.element_ty).to(tl.float32)
    offset = row[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = offset < numel
    dy = tl.load(dy_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx_ptr + offset, round_to(dy * SLOPE(x), dx_ptr.dtype.element_ty), mask=inside)


def apply(x: Tensor, y: Tensor, form: Any) -> None:
    """Fill `y` with `form`, one of `FORMS`, of `x`, both [numel] and contiguous."""
    with torch.cuda.device_of(x):
        _apply_kernel[(triton.cdiv(x.numel(), TILE),)](
            x, y, x.numel(), FUNCTION=form, TILE=TILE, enable_fp_fusion=False
        )


def forward_and_pack(
    x: Tensor, y: Tensor, kept: tuple[Tensor, ...], codec: StepDerivative | AbsmaxCodec, form: Any
) -> None:
    """Fill `y` with `form`, one of `FORMS`, of `x`, and `kept` (laid out as `codec.storage` says) from `x`.

    Args:
        x: fp32, bf16 or fp16 [numel].
        y: as `x`.
        codec: one that `fits_kernels`.
    """
    with torch.cuda.device_of(x):
        if isinstance(codec, StepDerivative):
            arguments, constants = encode_arguments(codec, kept[0], x)
            _table_forward_kernel[(triton.cdiv(x.numel(), TILE),)](
                x, y, *arguments, FUNCTION=form, **constants, TILE=TILE, enable_fp_fusion=False
            )
            return
        grid, arguments, constants = _groups(kept, x.numel(), codec)
        _integer_forward_kernel[grid](
            x,
            y,
            *arguments,
            1.0 / codec.half_width,
            TINY_PEAK,
            FUNCTION=form,
            **constants,
            enable_fp_fusion=False,
        )


def gradient(
    dy: Tensor,
    kept: tuple[Tensor, ...],
    dx: Tensor,
    codec: StepDerivative | AbsmaxCodec,
    function: str,
) -> None:
    """Fill `dx` with `dy` times the derivative of the function, stored or at the stored input.

    Args:
        dy: fp32, bf16 or fp16 [numel].
        kept: what `forward_and_pack` or the codec stored.
        dx: as `dy`.
        function: name in `FORMS`.
    """
    with torch.cuda.device_of(dy):
        if isinstance(codec, StepDerivative):
            (width, low), (high_width, high) = low_and_high(kept[0], dy.numel(), codec.cells.bits)
            _table_gradient_kernel[(triton.cdiv(dy.numel(), TILE),)](
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
                TILE=TILE,
                enable_fp_fusion=False,
            )
            return
        grid, (low, high, steps, *sizes), constants = _groups(kept, dy.numel(), codec)
        _integer_gradient_kernel[grid](
            dy,
            low,
            high,
            steps,
            dx,
            *sizes,
            SLOPE=_SLOPES[function],
            **constants,
            enable_fp_fusion=False,
        )


def _groups(
    kept: tuple[Tensor, ...], numel: int, codec: AbsmaxCodec
) -> tuple[tuple[int], list[Any], dict[str, int]]:
    """Return programs, arguments from `codes_ptr` to `groups` and constants of a kernel over groups of integers."""
    codes, steps = kept
    rows = max(TILE // codec.group, 1)
    (width, low), (high_width, high) = low_and_high(codes, numel, codec.bits)
    constants = {
        "ZERO": codec.zero,
        "GROUP": codec.group,
        "ROWS": rows,
        "BITS": width,
        "HIGH_BITS": high_width,
    }
    arguments = [low, high, steps, numel, low.numel(), high.numel(), steps.numel()]
    return (triton.cdiv(steps.numel(), rows),), arguments, constants
