"""Triton kernels of the statistics of rows and channels: two passes over the data, without a wider copy of it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["mean_squares_of", "moments_of"]

# Rows and channels of a tile; what is pooled afterwards takes a sixteenth of the bytes of a bf16 tensor.
_ROWS, _CHANNELS = 64, 64


@triton.jit
def _mean_squares_kernel(x_ptr, out_ptr, rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
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
    scale_ptr,
    mean_ptr,
    variance_ptr,
    rows,
    width,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    part, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = part * ROWS + tl.arange(0, ROWS)
    column = tile * BLOCK + tl.arange(0, BLOCK)
    scale = tl.load(scale_ptr + row, mask=row < rows, other=0.0)
    total = tl.minimum(rows - part * ROWS, ROWS).to(tl.float32)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    x = tl.load(x_ptr + row[:, None] * width + column[None, :], mask=inside, other=0.0).to(tl.float32)
    x = x * scale[:, None]
    mean = tl.sum(x, axis=0) / total
    away = tl.where(inside, x - mean[None, :], 0.0)
    variance = tl.sum(away * away, axis=0) / total
    tl.store(mean_ptr + part * width + column, mean, mask=column < width)
    tl.store(variance_ptr + part * width + column, variance, mask=column < width)


def mean_squares_of(rows: Tensor) -> Tensor:
    """Return the mean square of each of `rows` [n, width]: fp32 [n]."""
    count, width = rows.shape
    squares = rows.new_empty(count, dtype=torch.float32)
    with torch.cuda.device_of(rows):
        _mean_squares_kernel[(triton.cdiv(count, 8),)](rows, squares, count, width, ROWS=8, BLOCK=512)
    return squares


def moments_of(rows: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rows [parts], and mean and variance per channel [parts, width], of parts of `rows` [n, width] times `scale`.

    Args:
        rows: contiguous.
        scale: fp32 [n, 1].
    """
    count, width = rows.shape
    parts = triton.cdiv(count, _ROWS)
    total = torch.full((parts,), _ROWS, dtype=torch.float32, device=rows.device)
    total[-1:] = count - (parts - 1) * _ROWS
    mean, variance = (rows.new_empty((parts, width), dtype=torch.float32) for _ in range(2))
    with torch.cuda.device_of(rows):
        _moments_kernel[(parts, triton.cdiv(width, _CHANNELS))](
            rows, scale, mean, variance, count, width, ROWS=_ROWS, BLOCK=_CHANNELS
        )
    return total, mean, variance
