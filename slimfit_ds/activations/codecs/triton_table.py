"""Triton twins of the magnitude tables (Lloyd-Max codebooks, step derivatives): one pass, equal bit for bit."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slimfit_ds.activations.codecs.triton_rounding import round_to

__all__ = ["decode_table", "encode_table"]

_TILE = 4096


@triton.jit
def _encode_kernel(
    x_ptr,
    thresholds_ptr,
    inverse_ptr,
    packed_ptr,
    numel,
    stored_bytes,
    CELL_BITS: tl.constexpr,
    SIGNED: tl.constexpr,
    SCALED: tl.constexpr,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
):
    PER_BYTE: tl.constexpr = 8 // BITS
    start = tl.program_id(0).to(tl.int64) * TILE
    offset = start + tl.arange(0, TILE)
    x = tl.load(x_ptr + offset, mask=offset < numel, other=0.0).to(tl.float32)
    if SCALED:
        x = x * tl.load(inverse_ptr)
    pattern = x.to(tl.int32, bitcast=True)
    magnitude = (pattern & 0x7FFFFFFF) >> 16
    # Binary search for the number of thresholds reached: one bit of the code per comparison.
    code = tl.zeros([TILE], tl.int32)
    if CELL_BITS > 0:
        middle = tl.load(thresholds_ptr + ((1 << (CELL_BITS - 1)) - 1))
        code = tl.where(magnitude >= middle, 1 << (CELL_BITS - 1), 0)
    for k in tl.static_range(1, CELL_BITS):
        threshold = tl.load(thresholds_ptr + code + ((1 << (CELL_BITS - 1 - k)) - 1))
        code += tl.where(magnitude >= threshold, 1 << (CELL_BITS - 1 - k), 0)
    if SIGNED:
        code += tl.where(pattern < 0, 1 << (BITS - 1), 0)
    else:
        code = tl.where(pattern < 0, 0, code)
    code = tl.reshape(code, [TILE // PER_BYTE, PER_BYTE])
    shift = tl.arange(0, PER_BYTE) * BITS
    packed = tl.sum(code << shift[None, :], axis=1)
    byte = start // PER_BYTE + tl.arange(0, TILE // PER_BYTE)
    tl.store(packed_ptr + byte, packed.to(tl.uint8), mask=byte < stored_bytes)


@triton.jit
def _decode_kernel(
    packed_ptr,
    levels_ptr,
    rms_ptr,
    out_ptr,
    numel,
    stored_bytes,
    SCALED: tl.constexpr,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
):
    PER_BYTE: tl.constexpr = 8 // BITS
    start = tl.program_id(0).to(tl.int64) * TILE
    byte = start // PER_BYTE + tl.arange(0, TILE // PER_BYTE)
    packed = tl.load(packed_ptr + byte, mask=byte < stored_bytes, other=0).to(tl.int32)
    shift = tl.arange(0, PER_BYTE) * BITS
    code = tl.reshape((packed[:, None] >> shift[None, :]) & ((1 << BITS) - 1), [TILE])
    value = tl.load(levels_ptr + code)
    if SCALED:
        value = round_to(value.to(tl.float32) * tl.load(rms_ptr), out_ptr.dtype.element_ty)
    offset = start + tl.arange(0, TILE)
    tl.store(out_ptr + offset, value, mask=offset < numel)


def encode_table(
    flat: Tensor, packed: Tensor, thresholds: Tensor, inverse: Tensor | None, *, bits: int, signed: bool
) -> None:
    """Fill `packed` from `flat`.

    Args:
        flat: fp32, bf16 or fp16 [numel].
        packed: uint8 [ceil(numel * bits / 8)].
        thresholds: bf16 patterns of the thresholds, int32 [cells - 1].
        inverse: fp32 [1], multiplied into the data first, or None.
        bits: width of a code: 1, 2 or 4.
        signed: the sign bit selects the upper half of the codes; otherwise negative values get code 0.
    """
    with torch.cuda.device_of(flat):
        _encode_kernel[(triton.cdiv(flat.numel(), _TILE),)](
            flat,
            thresholds,
            thresholds if inverse is None else inverse,
            packed,
            flat.numel(),
            packed.numel(),
            CELL_BITS=thresholds.numel().bit_length(),
            SIGNED=signed,
            SCALED=inverse is not None,
            BITS=bits,
            TILE=_TILE,
            enable_fp_fusion=False,
        )


def decode_table(packed: Tensor, levels: Tensor, rms: Tensor | None, out: Tensor, *, bits: int) -> None:
    """Fill `out` [numel] from `packed`; `levels` [2^bits] in the dtype of `out`, times fp32 `rms` [1] if given."""
    with torch.cuda.device_of(out):
        _decode_kernel[(triton.cdiv(out.numel(), _TILE),)](
            packed,
            levels,
            levels if rms is None else rms,
            out,
            out.numel(),
            packed.numel(),
            SCALED=rms is not None,
            BITS=bits,
            TILE=_TILE,
            enable_fp_fusion=False,
        )
