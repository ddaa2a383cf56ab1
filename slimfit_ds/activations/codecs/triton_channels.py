"""Triton kernels of the channels' statistics: two passes over the data, without a wider copy of it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["loudness_of", "moments_of"]

# Rows and channels of a tile; what is pooled afterwards takes a sixteenth of the bytes of a bf16 tensor.
_ROWS, _CHANNELS = 64, 64


@triton.jit
def _loudness_kernel(x_ptr, out_ptr, rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        inside = (row < rows)[:, None] & (column < width)
        x = tl.load(x_ptr + row[:, None] * width + column, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(x * x, axis=1)
    tl.store(out_ptr + row, total / width, mask=row < rows)


@triton.jit
def _moments_kernel(
    x_ptr,
    weights_ptr,
    total_ptr,
    mean_ptr,
    variance_ptr,
    rows,
    width,
    tiny,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    part, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = part * ROWS + tl.arange(0, ROWS)
    column = tile * BLOCK + tl.arange(0, BLOCK)
    weight = tl.load(weights_ptr + row, mask=row < rows, other=0.0)
    total = tl.maximum(tl.sum(weight, axis=0), tiny)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    x = tl.load(x_ptr + row[:, None] * width + column[None, :], mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x * weight[:, None], axis=0) / total
    away = x - mean[None, :]
    variance = tl.sum(away * away * weight[:, None], axis=0) / total
    tl.store(mean_ptr + part * width + column, mean, mask=column < width)
    tl.store(variance_ptr + part * width + column, variance, mask=column < width)
    if tile == 0:
        tl.store(total_ptr + part, total)


def loudness_of(rows: Tensor) -> Tensor:
    """Return the mean square of each of `rows` [n, width]: fp32 [n, 1]."""
    count, width = rows.shape
    loudness = rows.new_empty((count, 1), dtype=torch.float32)
    with torch.cuda.device_of(rows):
        _loudness_kernel[(triton.cdiv(count, 8),)](rows, loudness, count, width, ROWS=8, BLOCK=512)
    return loudness


def moments_of(rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return total weight [parts], and mean and variance per channel [parts, width], of parts of `rows` [n, width].

    Args:
        rows: contiguous.
        weights: fp32 [n, 1], what each row counts for.
    """
    count, width = rows.shape
    parts = triton.cdiv(count, _ROWS)
    total = rows.new_empty(parts, dtype=torch.float32)
    mean, variance = (rows.new_empty((parts, width), dtype=torch.float32) for _ in range(2))
    with torch.cuda.device_of(rows):
        _moments_kernel[(parts, triton.cdiv(width, _CHANNELS))](
            rows,
            weights,
            total,
            mean,
            variance,
            count,
            width,
            torch.finfo(torch.float32).tiny,
            ROWS=_ROWS,
            BLOCK=_CHANNELS,
        )
    return total, mean, variance
