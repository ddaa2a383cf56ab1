"""Loads and stores of bit planes in Triton kernels, laid out as `packing` does."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["load_plane", "store_plane"]


@triton.jit
def store_plane(
    plane_ptr,
    codes,
    row,
    stored_bytes,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Pack the lowest `BITS` bits of the first `GROUP` columns of int32 `codes` [ROWS, BLOCK], the first code lowest."""
    PER_BYTE: tl.constexpr = 8 // BITS
    codes = tl.reshape(codes & ((1 << BITS) - 1), [ROWS, BLOCK // PER_BYTE, PER_BYTE])
    shift = tl.arange(0, PER_BYTE) * BITS
    packed = tl.sum(codes << shift[None, None, :], axis=2)
    column = tl.arange(0, BLOCK // PER_BYTE)[None, :]
    byte = row[:, None] * (GROUP // PER_BYTE) + column
    inside = byte < stored_bytes
    if GROUP < BLOCK:
        inside = inside & (column < GROUP // PER_BYTE)
    tl.store(plane_ptr + byte, packed.to(tl.uint8), mask=inside)


@triton.jit
def load_plane(
    plane_ptr,
    row,
    stored_bytes,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """int32 codes [ROWS, BLOCK], `GROUP` of each row stored in `BITS` bits; 8 bits keep the sign of the stored type."""
    PER_BYTE: tl.constexpr = 8 // BITS
    column = tl.arange(0, BLOCK // PER_BYTE)[None, :]
    byte = row[:, None] * (GROUP // PER_BYTE) + column
    inside = byte < stored_bytes
    if GROUP < BLOCK:
        inside = inside & (column < GROUP // PER_BYTE)
    codes = tl.load(plane_ptr + byte, mask=inside, other=0).to(tl.int32)
    if BITS < 8:
        shift = tl.arange(0, PER_BYTE) * BITS
        codes = (codes[:, :, None] >> shift[None, None, :]) & ((1 << BITS) - 1)
        codes = tl.reshape(codes, [ROWS, BLOCK])
    return codes
