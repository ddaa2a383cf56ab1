"""Dropout whose mask is a function of a seed and a position: a pass forward, and the same pass over dy backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slimfit_ds.triton_rounding import round_to

__all__ = ["counters_for", "drop"]

# Counters of a program; each gives four elements, which lie this far apart, so that loads are wide.
_TILE = 1024


@triton.jit
def _keep_or_drop(x_ptr, y_ptr, offset, numel, random, threshold, scale):
    x = tl.load(x_ptr + offset, mask=offset < numel, other=0.0).to(tl.float32)
    y = tl.where(random >= threshold, x * scale, 0.0)
    tl.store(y_ptr + offset, round_to(y, y_ptr.dtype.element_ty), mask=offset < numel)


# Numbers that differ at every call must not be built into the code.
@triton.jit(do_not_specialize=["seed", "first", "threshold"])
def _drop_kernel(x_ptr, y_ptr, numel, seed, first, threshold, scale, TILE: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    counter = tl.arange(0, TILE)
    a, b, c, d = tl.randint4x(seed, first + program * TILE + counter)
    # 64 bits: a threshold may be up to 2^32.
    threshold = threshold.to(tl.int64)
    offset = program * (4 * TILE) + counter
    _keep_or_drop(x_ptr, y_ptr, offset, numel, a.to(tl.uint32).to(tl.int64), threshold, scale)
    _keep_or_drop(x_ptr, y_ptr, offset + TILE, numel, b.to(tl.uint32).to(tl.int64), threshold, scale)
    _keep_or_drop(x_ptr, y_ptr, offset + 2 * TILE, numel, c.to(tl.uint32).to(tl.int64), threshold, scale)
    _keep_or_drop(x_ptr, y_ptr, offset + 3 * TILE, numel, d.to(tl.uint32).to(tl.int64), threshold, scale)


def counters_for(numel: int) -> int:
    """Return how many counters of the generator a mask of `numel` elements takes."""
    return triton.cdiv(numel, 4 * _TILE) * _TILE


def drop(x: Tensor, y: Tensor, p: float, seed: int, first: int) -> None:
    """Fill `y` with `x / (1 - p)`, or 0 with probability `p` (to 2^-33), both [numel] and contiguous.

    Args:
        x: fp32, bf16 or fp16.
        y: of the same dtype.
        p: in [0, 1).
        seed: key of the generator (Philox 4x32-10, Salmon et al. 2011), 64 bits.
        first: counter of the first element; masks with counters apart are independent.
    """
    with torch.cuda.device_of(x):
        _drop_kernel[(triton.cdiv(x.numel(), 4 * _TILE),)](
            x, y, x.numel(), seed, first, round(p * 2**32), 1 / (1 - p), TILE=_TILE
        )
