"""fp32 to narrower floats, rounded the same way compiled and in Triton's interpreter."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["round_to"]


@triton.jit
def round_to(value, dtype: tl.constexpr):
    """fp32 `value` to the nearest `dtype` number, ties to even; the interpreter's own cast to bf16 truncates."""
    if dtype == tl.bfloat16:
        pattern = value.to(tl.int32, bitcast=True)
        nearest = (pattern + 0x7FFF + ((pattern >> 16) & 1)) >> 16
        # The sum would carry NaN patterns into other numbers.
        nearest = tl.where(value == value, nearest, 0x7FC0)
        rounded = nearest.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        rounded = value.to(dtype)
    return rounded
