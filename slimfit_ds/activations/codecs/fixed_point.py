"""The paper's fixed-point formats, for a faithful comparison."""

from __future__ import annotations

import torch
from torch import Tensor

from slimfit_ds.activations.codecs.base import FloatCodec, StorageLayout, chunks
from slimfit_ds.activations.codecs.packing import byte_table, gather_bytes, pack, packed_bytes
from slimfit_ds.activations.codecs.triton_support import runs_in_triton

__all__ = ["FixedPoint"]


class FixedPoint(FloatCodec):
    """Rounds to a fixed grid of 2^-fraction_bits and saturates at the ends of the range; NaN becomes 0.

    Source: SlimFit paper, section on static activations: 8 bits (3 integer, 4 fraction, sign) for linear and
    attention operands, 4 bits (2 integer, 1 fraction, sign) for the GELU input, 8 fraction bits without a
    sign for softmax probabilities.

    Args:
        name: the registered name.
        integer_bits: bits before the binary point.
        fraction_bits: bits after it.
        signed: one more bit for the sign. 8 or 4 bits in all.
    """

    def __init__(self, name: str, integer_bits: int, fraction_bits: int, signed: bool = True):
        self.bits = integer_bits + fraction_bits + signed
        if self.bits not in (4, 8):
            raise ValueError(f"a fixed-point format takes 4 or 8 bits in all, got {self.bits}")
        self.name = name
        self.fraction_bits = fraction_bits
        self.low = -(1 << (self.bits - 1)) if signed else 0
        self.high = self.low + (1 << self.bits) - 1
        self._tables: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def storage(self, numel: int, dtype: torch.dtype) -> StorageLayout:
        return ((torch.uint8, packed_bytes(numel, self.bits)),)

    def _encode(self, flat: Tensor, kept: tuple[Tensor, ...], generator: torch.Generator | None) -> None:
        (packed,) = kept
        if runs_in_triton(flat):
            from slimfit_ds.activations.codecs.triton_fixed_point import encode_fixed_point

            encode_fixed_point(
                flat, packed, bits=self.bits, fraction_bits=self.fraction_bits, low=self.low, high=self.high
            )
            return
        for start, stop in chunks(flat.numel(), flat.device, 8):
            scaled = flat[start:stop].float() * 2.0**self.fraction_bits
            # nan_to_num would turn infinities into fp32's extremes: harmless, the clamp follows.
            scaled.nan_to_num_().round_().clamp_(self.low, self.high).sub_(self.low)
            codes = scaled.to(torch.uint8)
            pack(codes, self.bits, packed[start * self.bits // 8 : packed_bytes(stop, self.bits)])

    def _decode(self, kept: tuple[Tensor, ...], out: Tensor) -> None:
        (packed,) = kept
        if runs_in_triton(out):
            from slimfit_ds.activations.codecs.triton_fixed_point import decode_fixed_point

            decode_fixed_point(packed, out, bits=self.bits, fraction_bits=self.fraction_bits, low=self.low)
            return
        for start, stop in chunks(out.numel(), out.device, 8):
            block = packed[start * self.bits // 8 : packed_bytes(stop, self.bits)]
            whole = len(block) * (8 // self.bits)
            target = out[start:stop] if whole == stop - start else out.new_empty(whole)
            gather_bytes(block, self._table(out.device, out.dtype), target)
            if whole != stop - start:
                out[start:stop] = target[: stop - start]

    def _table(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        key = device, dtype
        if key not in self._tables:
            levels = torch.arange(self.low, self.high + 1, device=device) * 2.0**-self.fraction_bits
            self._tables[key] = byte_table(levels.to(dtype), self.bits)
        return self._tables[key]
