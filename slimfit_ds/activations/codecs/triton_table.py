"""Triton twins of the magnitude tables (Lloyd-Max codebooks, step derivatives): one pass, equal bit for bit."""

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

__all__ = ["cell_of", "decode_table", "encode_table"]

_TILE = 4096


@triton.jit
def cell_of(
    x,
    thresholds_ptr,
    cells_ptr,
    STEPS: tl.constexpr,
    SHARED_CELLS: tl.constexpr,
    SIGN: tl.constexpr,
    TILE: tl.constexpr,
):
    """int32 code [1, TILE] of each fp32 value in `x` [1, TILE]."""
    pattern = x.to(tl.int32, bitcast=True)
    magnitude = (pattern & 0x7FFFFFFF) >> 16
    # Binary search for the number of thresholds reached: one bit of it per comparison.
    code = tl.zeros([1, TILE], tl.int32)
    if STEPS > 0:
        middle = tl.load(thresholds_ptr + ((1 << (STEPS - 1)) - 1))
        code = tl.where(magnitude >= middle, 1 << (STEPS - 1), 0)
    for k in tl.static_range(1, STEPS):
        threshold = tl.load(thresholds_ptr + code + ((1 << (STEPS - 1 - k)) - 1))
        code += tl.where(magnitude >= threshold, 1 << (STEPS - 1 - k), 0)
    if SHARED_CELLS:
        code = tl.load(cells_ptr + code)
    if SIGN > 0:
        code += tl.where(pattern < 0, SIGN, 0)
    else:
        code = tl.where(pattern < 0, 0, code)
    return code


@triton.jit
def _encode_kernel(
    x_ptr,
    thresholds_ptr,
    cells_ptr,
    inverse_ptr,
    codes_ptr,
    high_ptr,
    numel,
    stored_bytes,
    high_bytes,
    scale_ptr,
    offset_ptr,
    head_stride,
    width_stride,
    STEPS: tl.constexpr,
    SHARED_CELLS: tl.constexpr,
    SIGN: tl.constexpr,
    SCALED: tl.constexpr,
    BITS: tl.constexpr,
    HIGH_BITS: tl.constexpr,
    TILE: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    offset = row[:, None] * TILE + tl.arange(0, TILE)[None, :]
    inside = offset < numel
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
    if SCALED:
        x = x * tl.load(inverse_ptr)
    code = cell_of(x, thresholds_ptr, cells_ptr, STEPS, SHARED_CELLS, SIGN, TILE)
    store_plane(codes_ptr, code, row, stored_bytes, BITS, 1, TILE, TILE)
    if HIGH_BITS > 0:
        store_plane(high_ptr, code >> BITS, row, high_bytes, HIGH_BITS, 1, TILE, TILE)


@triton.jit
def _decode_kernel(
    codes_ptr,
    high_ptr,
    levels_ptr,
    rms_ptr,
    out_ptr,
    numel,
    stored_bytes,
    high_bytes,
    scale_ptr,
    offset_ptr,
    head_stride,
    width_stride,
    SCALED: tl.constexpr,
    BITS: tl.constexpr,
    HIGH_BITS: tl.constexpr,
    TILE: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    code = load_plane(codes_ptr, row, stored_bytes, BITS, 1, TILE, TILE)
    if HIGH_BITS > 0:
        code += load_plane(high_ptr, row, high_bytes, HIGH_BITS, 1, TILE, TILE) << BITS
    value = tl.load(levels_ptr + code)
    if SCALED:
        value = round_to(value.to(tl.float32) * tl.load(rms_ptr), out_ptr.dtype.element_ty)
    offset = row[:, None] * TILE + tl.arange(0, TILE)[None, :]
    inside = offset < numel
    if WIDTH > 0:
        value = apply_channels(
            value.to(tl.float32),
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
        value = value.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offset, value, mask=inside)


def encode_table(
    flat: Tensor,
    packed: Tensor,
    thresholds: Tensor,
    cells: Tensor | None,
    inverse: Tensor | None,
    channels: ChannelAffine | None,
    *,
    bits: int,
    signed: bool,
) -> None:
    """Fill `packed` from `flat`.

    Args:
        flat: fp32, bf16 or fp16 [numel].
        packed: uint8, as `packing.packed_bytes` counts them.
        thresholds: bf16 patterns of the thresholds in ascending order, int32 [2^k - 1].
        cells: code of each interval, int32 [2^k], or None where that is its number.
        inverse: fp32 [1], multiplied into the data first, or None.
        channels: applied to `flat` before that, or None.
        bits: width of a code: 1, 2, 4 or 5.
        signed: the sign bit selects the upper half of the codes; otherwise negative values get code 0.
    """
    (width, low), (high_width, high) = low_and_high(packed, flat.numel(), bits)
    with torch.cuda.device_of(flat):
        _encode_kernel[(triton.cdiv(flat.numel(), _TILE),)](
            flat,
            thresholds,
            thresholds if cells is None else cells,
            thresholds if inverse is None else inverse,
            low,
            high,
            flat.numel(),
            low.numel(),
            high.numel(),
            STEPS=thresholds.numel().bit_length(),
            SHARED_CELLS=cells is not None,
            SIGN=1 << (bits - 1) if signed else 0,
            SCALED=inverse is not None,
            BITS=width,
            HIGH_BITS=high_width,
            TILE=_TILE,
            **channel_arguments(channels, thresholds),
            enable_fp_fusion=False,
        )


def decode_table(
    packed: Tensor,
    levels: Tensor,
    rms: Tensor | None,
    out: Tensor,
    channels: ChannelAffine | None,
    *,
    bits: int,
) -> None:
    """Fill `out` from `packed`.

    Args:
        packed: uint8, as `packing.packed_bytes` counts them.
        levels: what each code stands for, [2^bits] in the dtype of `out`.
        rms: fp32 [1], multiplied into the levels, or None.
        out: fp32, bf16 or fp16 [numel].
        channels: applied to `out` last, or None.
        bits: width of a code: 1, 2, 4 or 5.
    """
    (width, low), (high_width, high) = low_and_high(packed, out.numel(), bits)
    with torch.cuda.device_of(out):
        _decode_kernel[(triton.cdiv(out.numel(), _TILE),)](
            low,
            high,
            levels,
            levels if rms is None else rms,
            out,
            out.numel(),
            low.numel(),
            high.numel(),
            SCALED=rms is not None,
            BITS=width,
            HIGH_BITS=high_width,
            TILE=_TILE,
            **channel_arguments(channels, levels),
            enable_fp_fusion=False,
        )
