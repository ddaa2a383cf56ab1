"""Triton kernels of the paper's codecs: bit for bit equal to the torch version.

Pruning takes only the k-th largest magnitude from torch. Each tile counts what lies above it and what equals it; sums over
those counts tell each tile where to write, so that neither an index list nor a copy of the magnitudes is made.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from slimfit_ds.activations.codecs.triton_absmax import to_nearest
from slimfit_ds.activations.codecs.triton_common import load_plane, store_plane
from slimfit_ds.triton_rounding import round_to

__all__ = ["decode_fixed_point", "encode_fixed_point", "prune", "restore"]

_TILE = 4096
_PRUNE_TILE = 1024


@triton.jit
def _fixed_encode_kernel(
    x_ptr,
    codes_ptr,
    numel,
    stored_bytes,
    SCALE: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    offset = row[:, None] * TILE + tl.arange(0, TILE)[None, :]
    inside = offset < numel
    y = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32) * SCALE
    y = tl.where(y == y, y, 0.0)
    # The ends are integers, so clamping first changes nothing, and it leaves what the trick below can round.
    y = tl.minimum(tl.maximum(y, LOW), HIGH)
    # The bits after the last code are zero.
    code = tl.where(inside, to_nearest(y) - LOW, 0)
    if BITS == 8:
        tl.store(codes_ptr + offset, code.to(tl.uint8), mask=inside)
    else:
        store_plane(codes_ptr, code, row, stored_bytes, BITS, 1, TILE, TILE)


@triton.jit
def _fixed_decode_kernel(
    codes_ptr,
    out_ptr,
    numel,
    stored_bytes,
    STEP: tl.constexpr,
    LOW: tl.constexpr,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    code = load_plane(codes_ptr, row, stored_bytes, BITS, 1, TILE, TILE)
    value = (code + LOW).to(tl.float32) * STEP
    offset = row[:, None] * TILE + tl.arange(0, TILE)[None, :]
    tl.store(out_ptr + offset, round_to(value, out_ptr.dtype.element_ty), mask=offset < numel)


def encode_fixed_point(flat: Tensor, packed: Tensor, codec: Any) -> None:
    """Fill `packed`, uint8 [ceil(numel * bits / 8)], from `flat` [numel]."""
    with torch.cuda.device_of(flat):
        _fixed_encode_kernel[(triton.cdiv(flat.numel(), _TILE),)](
            flat,
            packed,
            flat.numel(),
            packed.numel(),
            SCALE=2.0**codec.fraction_bits,
            LOW=codec.low,
            HIGH=codec.high,
            BITS=codec.bits,
            TILE=_TILE,
            enable_fp_fusion=False,
        )


def decode_fixed_point(packed: Tensor, out: Tensor, codec: Any) -> None:
    """Fill `out` [numel] from what `encode_fixed_point` stored."""
    with torch.cuda.device_of(out):
        _fixed_decode_kernel[(triton.cdiv(out.numel(), _TILE),)](
            packed,
            out,
            out.numel(),
            packed.numel(),
            STEP=2.0**-codec.fraction_bits,
            LOW=codec.low,
            BITS=codec.bits,
            TILE=_TILE,
            enable_fp_fusion=False,
        )


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
    tiles = triton.cdiv(flat.numel(), _PRUNE_TILE)
    above, equal = flat.new_empty(2, tiles, dtype=torch.int64)
    low = torch.iinfo(keys.dtype).max
    with torch.cuda.device_of(flat):
        _count_kernel[(tiles,)](keys, kth, above, equal, flat.numel(), LOW=low, TILE=_PRUNE_TILE)
        missing = len(values) - above.sum()
        before = torch.stack([above, equal]).cumsum(1) - torch.stack([above, equal])
        _select_kernel[(tiles,)](
            flat,
            keys,
            kth,
            before[0],
            before[1],
            missing,
            values,
            indices,
            flat.numel(),
            LOW=low,
            TILE=_PRUNE_TILE,
        )


def restore(values: Tensor, indices: Tensor, out: Tensor) -> None:
    """Fill `out` [numel] with zeros and the kept values."""
    out.zero_()
    if len(values):
        with torch.cuda.device_of(out):
            _restore_kernel[(triton.cdiv(len(values), _PRUNE_TILE),)](
                values, indices, out, len(values), TILE=_PRUNE_TILE
            )
