"""Rounding in Triton kernels, the same compiled and in Triton's interpreter."""

from __future__ import annotations

import os

import triton
import triton.language as tl

__all__ = ["INTERPRETED", "round_to"]

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def round_to(value, dtype: tl.constexpr):
    """Round fp32 `value` to the nearest `dtype` number, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        # The interpreter's own cast truncates.
        pattern = value.to(tl.int32, bitcast=True)
        nearest = (pattern + 0x7FFF + ((pattern >> 16) & 1)) >> 16
        # The sum would carry NaN patterns into other numbers.
        nearest = tl.where(value == value, nearest, 0x7FC0)
        rounded = nearest.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        rounded = value.to(dtype)
    return rounded
