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
    THRESHOLDS: tl.constexpr,
    SIGNED: tl.constexpr,
    SCALED: tl.constexpr,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
):
    PER_BYTE: tl.constexpr = 8 // BITS
    start = tl.program_id(0).to(tl.int64) * TILE
    offset = start + tl.arange(0, TILE)
    inside = offset < numel
    x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        x = x * tl.load(inverse_ptr)
    pattern = x.to(tl.int32, bitcast=True)
    magnitude = (pattern & 0x7FFFFFFF) >> 16
    code = tl.zeros([TILE], tl.int32)
    for k in tl.static_range(THRESHOLDS):
        code += (magnitude >= tl.load(thresholds_ptr + k)).to(tl.int32)
    if SIGNED:
        code += tl.where(pattern < 0, 1 << (BITS - 1), 0)
    else:
        code = tl.where(pattern < 0, 0, code)
    code = tl.where(inside, code, 0)
    code = tl.reshape(code, [TILE // PER_BYTE, PER_BYTE])
    shift = tl.arange(0, PER_BYTE) * BITS
    packed = tl.sum(code << shift[None, :], axis=1)
    byte = start // PER_BYTE + tl.arange(0, TILE // PER_BYTE)
    tl.store(packed_ptr + byte, packed.to(tl.uint8), mask=byte * PER_BYTE < numel)


@triton.jit
def _decode_kernel(
    packed_ptr,
    levels_ptr,
    rms_ptr,
    out_ptr,
    numel,
    SCALED: tl.constexpr,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
):
    PER_BYTE: tl.constexpr = 8 // BITS
    offset = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = offset < numel
    byte = tl.load(packed_ptr + offset // PER_BYTE, mask=inside, other=0).to(tl.int32)
    code = (byte >> ((offset % PER_BYTE) * BITS).to(tl.int32)) & ((1 << BITS) - 1)
    value = tl.load(levels_ptr + code)
    if SCALED:
        value = round_to(value.to(tl.float32) * tl.load(rms_ptr), out_ptr.dtype.element_ty)
    tl.store(out_ptr + offset, value, mask=inside)


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
            THRESHOLDS=thresholds.numel(),
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
            SCALED=rms is not None,
            BITS=bits,
            TILE=_TILE,
            enable_fp_fusion=False,
        )
