"""Triton twins of the fixed-point formats: one pass over the data, bit for bit equal to the torch version."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slimfit_ds.activations.codecs.triton_packing import load_plane, store_plane
from slimfit_ds.activations.codecs.triton_rounding import round_to

__all__ = ["decode_fixed_point", "encode_fixed_point"]

_TILE = 4096


@triton.jit
def _encode_kernel(
    x_ptr,
    codes_ptr,
    numel,
    stored_bytes,
    SCALE: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    offset = row[:, None] * TILE + tl.arange(0, TILE)[None, :]
    inside = offset < numel
    y = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32) * SCALE
    y = tl.where(y == y, y, 0.0)
    # The ends are integers, so clamping first changes nothing, and it leaves what the trick below can round.
    y = tl.minimum(tl.maximum(y, LOW), HIGH)
    # Adding 1.5 * 2^23 leaves no bits for a fraction: round to nearest, ties to even.
    y = (y + 12582912.0) - 12582912.0
    # The bits after the last code are zero.
    code = tl.where(inside, y.to(tl.int32) - LOW, 0)
    if BITS == 8:
        tl.store(codes_ptr + offset, code.to(tl.uint8), mask=inside)
    else:
        store_plane(codes_ptr, code, row, stored_bytes, BITS, 1, TILE, TILE)


@triton.jit
def _decode_kernel(
    codes_ptr,
    out_ptr,
    numel,
    stored_bytes,
    STEP: tl.constexpr,
    LOW: tl.constexpr,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    code = load_plane(codes_ptr, row, stored_bytes, BITS, 1, TILE, TILE)
    value = (code + LOW).to(tl.float32) * STEP
    offset = row[:, None] * TILE + tl.arange(0, TILE)[None, :]
    tl.store(out_ptr + offset, round_to(value, out_ptr.dtype.element_ty), mask=offset < numel)


def encode_fixed_point(
    flat: Tensor, packed: Tensor, *, bits: int, fraction_bits: int, low: int, high: int
) -> None:
    """Fill `packed` from `flat`.

    Args:
        flat: fp32, bf16 or fp16 [numel].
        packed: uint8 [ceil(numel * bits / 8)].
        bits: width of a code: 4 or 8.
        fraction_bits: the grid is 2^-fraction_bits.
        low, high: the ends of the range, in steps.
    """
    with torch.cuda.device_of(flat):
        _encode_kernel[(triton.cdiv(flat.numel(), _TILE),)](
            flat,
            packed,
            flat.numel(),
            packed.numel(),
            SCALE=2.0**fraction_bits,
            LOW=low,
            HIGH=high,
            BITS=bits,
            TILE=_TILE,
            enable_fp_fusion=False,
        )


def decode_fixed_point(packed: Tensor, out: Tensor, *, bits: int, fraction_bits: int, low: int) -> None:
    """Fill `out` [numel] from what `encode_fixed_point` stored."""
    with torch.cuda.device_of(out):
        _decode_kernel[(triton.cdiv(out.numel(), _TILE),)](
            packed,
            out,
            out.numel(),
            packed.numel(),
            STEP=2.0**-fraction_bits,
            LOW=low,
            BITS=bits,
            TILE=_TILE,
            enable_fp_fusion=False,
        )
