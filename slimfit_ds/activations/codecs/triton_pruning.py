"""Triton twin of the pruning to the largest magnitudes: the selection is written in one pass over the data.

Only the k-th largest magnitude comes from torch. Each tile counts what lies above it and what equals it; sums over
those counts tell each tile where to write, so that neither an index list nor a copy of the magnitudes is made.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["prune", "restore"]

_TILE = 1024


@triton.jit
def _count_kernel(keys_ptr, kth_ptr, above_ptr, equal_ptr, numel, LOW: tl.constexpr, TILE: tl.constexpr):
    tile = tl.program_id(0)
    offset = tile.to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = offset < numel
    key = tl.load(keys_ptr + offset, mask=inside, other=0) & LOW
    kth = tl.load(kth_ptr)
    tl.store(above_ptr + tile, tl.sum((inside & (key > kth)).to(tl.int32)))
    tl.store(equal_ptr + tile, tl.sum((inside & (key == kth)).to(tl.int32)))


@triton.jit
def _select_kernel(
    x_ptr,
    keys_ptr,
    kth_ptr,
    above_ptr,
    equal_ptr,
    missing_ptr,
    values_ptr,
    index_ptr,
    numel,
    LOW: tl.constexpr,
    TILE: tl.constexpr,
):
    tile = tl.program_id(0)
    offset = tile.to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = offset < numel
    key = tl.load(keys_ptr + offset, mask=inside, other=0) & LOW
    kth = tl.load(kth_ptr)
    missing = tl.load(missing_ptr)
    above = (inside & (key > kth)).to(tl.int64)
    equal = (inside & (key == kth)).to(tl.int64)
    above_before = tl.load(above_ptr + tile) + tl.cumsum(above) - above
    equal_before = tl.load(equal_ptr + tile) + tl.cumsum(equal) - equal
    chosen = (above > 0) | ((equal > 0) & (equal_before < missing))
    place = above_before + tl.minimum(equal_before, missing)
    value = tl.load(x_ptr + offset, mask=chosen)
    tl.store(values_ptr + place, value, mask=chosen)
    tl.store(index_ptr + place, offset.to(tl.int32), mask=chosen)


@triton.jit
def _restore_kernel(values_ptr, index_ptr, out_ptr, count, TILE: tl.constexpr):
    offset = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = offset < count
    place = tl.load(index_ptr + offset, mask=inside)
    tl.store(out_ptr + place, tl.load(values_ptr + offset, mask=inside), mask=inside)


def prune(flat: Tensor, keys: Tensor, kth: Tensor, values: Tensor, indices: Tensor) -> None:
    """Fill `values` and `indices` (int32), both [kept], from `flat` [numel], in the order of `flat`.

    Args:
        flat: the values.
        keys: the same memory as integers.
        kth: integer key of the smallest magnitude kept, 0-d; of equals the first are kept.
    """
    tiles = triton.cdiv(flat.numel(), _TILE)
    above, equal = flat.new_empty(2, tiles, dtype=torch.int64)
    low = torch.iinfo(keys.dtype).max
    with torch.cuda.device_of(flat):
        _count_kernel[(tiles,)](keys, kth, above, equal, flat.numel(), LOW=low, TILE=_TILE)
        missing = len(values) - above.sum()
        before = torch.stack([above, equal]).cumsum(1) - torch.stack([above, equal])
        _select_kernel[(tiles,)](
            flat, keys, kth, before[0], before[1], missing, values, indices, flat.numel(), LOW=low, TILE=_TILE
        )


def restore(values: Tensor, indices: Tensor, out: Tensor) -> None:
    """Fill `out` [numel] with zeros and the kept values."""
    out.zero_()
    if len(values):
        with torch.cuda.device_of(out):
            _restore_kernel[(triton.cdiv(len(values), _TILE),)](values, indices, out, len(values), TILE=_TILE)
