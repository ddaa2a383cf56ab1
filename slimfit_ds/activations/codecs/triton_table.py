"""Triton kernels of the step derivatives: one pass over the data, bit for bit equal to the torch version."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from slimfit_ds.activations.codecs.packing import low_and_high
from slimfit_ds.activations.codecs.triton_common import load_plane, store_plane
from slimfit_ds.triton_rounding import round_to

__all__ = ["TILE", "decode_table", "encode_arguments", "encode_table", "load_levels", "store_cells"]

TILE = 4096
"""Elements of a program."""


@triton.jit
def load_levels(
    codes_ptr,
    high_ptr,
    levels_ptr,
    row,
    stored_bytes,
    high_bytes,
    BITS: tl.constexpr,
    HIGH_BITS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Return the levels [1, TILE] of the codes in the tile `row` [1]."""
    code = load_plane(codes_ptr, row, stored_bytes, BITS, 1, TILE, TILE)
    if HIGH_BITS > 0:
        code += load_plane(high_ptr, row, high_bytes, HIGH_BITS, 1, TILE, TILE) << BITS
    return tl.load(levels_ptr + code)


@triton.jit
def store_cells(
    x,
    table_ptr,
    codes_ptr,
    high_ptr,
    row,
    stored_bytes,
    high_bytes,
    BITS: tl.constexpr,
    HIGH_BITS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Store the cells of the fp32 values `x` [1, TILE] of the tile `row` [1]: one look-up by the upper 16 bits."""
    upper = (x.to(tl.int32, bitcast=True) >> 16) & 0xFFFF
    code = tl.load(table_ptr + upper, eviction_policy="evict_last").to(tl.int32)
    store_plane(codes_ptr, code, row, stored_bytes, BITS, 1, TILE, TILE)
    if HIGH_BITS > 0:
        store_plane(high_ptr, code >> BITS, row, high_bytes, HIGH_BITS, 1, TILE, TILE)


@triton.jit
def _encode_kernel(
    x_ptr,
    inverse_ptr,
    table_ptr,
    codes_ptr,
    high_ptr,
    numel,
    stored_bytes,
    high_bytes,
    SCALED: tl.constexpr,
    BITS: tl.constexpr,
    HIGH_BITS: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    offset = row[:, None] * TILE + tl.arange(0, TILE)[None, :]
    x = tl.load(x_ptr + offset, mask=offset < numel, other=0.0).to(tl.float32)
    if SCALED:
        x = x * tl.load(inverse_ptr)
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
def _decode_kernel(
    codes_ptr,
    high_ptr,
    levels_ptr,
    rms_ptr,
    out_ptr,
    numel,
    stored_bytes,
    high_bytes,
    SCALED: tl.constexpr,
    BITS: tl.constexpr,
    HIGH_BITS: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    value = load_levels(codes_ptr, high_ptr, levels_ptr, row, stored_bytes, high_bytes, BITS, HIGH_BITS, TILE)
    if SCALED:
        value = round_to(value.to(tl.float32) * tl.load(rms_ptr), out_ptr.dtype.element_ty)
    offset = row[:, None] * TILE + tl.arange(0, TILE)[None, :]
    tl.store(out_ptr + offset, value, mask=offset < numel)


def encode_table(flat: Tensor, packed: Tensor, codec: Any, inverse: Tensor | None) -> None:
    """Fill `packed` (laid out as `codec.storage` says) from `flat` [numel], times `inverse`, fp32 [1], if given."""
    arguments, constants = encode_arguments(codec, packed, flat)
    with torch.cuda.device_of(flat):
        _encode_kernel[(triton.cdiv(flat.numel(), TILE),)](
            flat,
            flat if inverse is None else inverse,
            *arguments,
            SCALED=inverse is not None,
            **constants,
            TILE=TILE,
            enable_fp_fusion=False,
        )


def encode_arguments(codec: Any, packed: Tensor, flat: Tensor) -> tuple[list[Any], dict[str, Any]]:
    """Return the arguments of a kernel that stores cells of `flat` [numel], from `table_ptr` to `high_bytes`, and
    its constants."""
    (width, low), (high_width, high) = low_and_high(packed, flat.numel(), codec.cells.bits)
    arguments = [codec.code_table(flat.device), low, high]
    constants = {"BITS": width, "HIGH_BITS": high_width}
    return [*arguments, flat.numel(), low.numel(), high.numel()], constants


def decode_table(packed: Tensor, out: Tensor, codec: Any, rms: Tensor | None) -> None:
    """Fill `out` [numel] from `packed`, times `rms`, fp32 [1], if given."""
    (width, low), (high_width, high) = low_and_high(packed, out.numel(), codec.cells.bits)
    levels = codec.levels(out.device, out.dtype)
    with torch.cuda.device_of(out):
        _decode_kernel[(triton.cdiv(out.numel(), TILE),)](
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
            TILE=TILE,
            enable_fp_fusion=False,
        )
