"""The codecs of the SlimFit paper, for a faithful comparison: fixed-point numbers and pruning to the largest magnitudes."""

from __future__ import annotations

import torch
from torch import Tensor

from slimfit_ds.activations.codecs.base import FloatCodec, StorageLayout, chunks
from slimfit_ds.activations.codecs.packing import byte_table, gather_bytes, pack, packed_bytes

__all__ = ["FixedPoint", "TopK"]

_INT32_MAX = 2**31 - 1
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class FixedPoint(FloatCodec):
    """Round to a fixed grid of 2^-fraction_bits and saturate at the ends of the range; NaN becomes 0.

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

    def _encode(self, flat: Tensor, kept: tuple[Tensor, ...]) -> None:
        (packed,) = kept
        for start, stop in chunks(flat.numel(), flat.device, 8):
            scaled = flat[start:stop].float() * 2.0**self.fraction_bits
            # nan_to_num would turn infinities into fp32's extremes: harmless, the clamp follows.
            scaled.nan_to_num_().round_().clamp_(self.low, self.high).sub_(self.low)
            codes = scaled.to(torch.uint8)
            pack(codes, self.bits, packed[start * self.bits // 8 : packed_bytes(stop, self.bits)])

    def _decode(self, kept: tuple[Tensor, ...], out: Tensor) -> None:
        (packed,) = kept
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

    def _encode_in_triton(self, flat: Tensor, kept: tuple[Tensor, ...]) -> None:
        from slimfit_ds.activations.codecs.triton_paper import encode_fixed_point

        encode_fixed_point(flat, kept[0], self)

    def _decode_in_triton(self, kept: tuple[Tensor, ...], out: Tensor) -> None:
        from slimfit_ds.activations.codecs.triton_paper import decode_fixed_point

        decode_fixed_point(kept[0], out, self)


class TopK(FloatCodec):
    """Keep the largest magnitudes of the whole tensor as values and int32 indices; the rest decodes to 0.

    They are stored in the order of the tensor; of equal magnitudes the first are kept. NaN counts as the largest.

    Source: SlimFit paper (LayerNorm with a frozen weight, 10 %); its code selects over the flattened tensor.

    Args:
        name: the registered name.
        share: share of the elements that is kept, in (0, 1].
    """

    def __init__(self, name: str, share: float = 0.1):
        if not 0 < share <= 1:
            raise ValueError(f"share must be in (0, 1], got {share}")
        self.name = name
        self.share = share

    def storage(self, numel: int, dtype: torch.dtype) -> StorageLayout:
        kept = int(numel * self.share)
        return (dtype, kept), (torch.int32, kept)

    def _encode(self, flat: Tensor, kept: tuple[Tensor, ...]) -> None:
        values, indices = kept
        if not len(values):
            return
        magnitudes, kth = self._threshold(flat, len(values))
        above, equal = magnitudes > kth, magnitudes == kth
        missing = len(values) - above.sum()
        # How many there are is known: `nonzero` would make the host wait for the device to count them.
        chosen = torch.nonzero_static(above | (equal & (equal.cumsum(0) <= missing)), size=len(values))
        indices.copy_(chosen.view(-1))
        torch.index_select(flat, 0, chosen.view(-1), out=values)

    def _decode(self, kept: tuple[Tensor, ...], out: Tensor) -> None:
        values, indices = kept
        out.zero_().scatter_(0, indices.to(torch.int64), values)

    def _encode_in_triton(self, flat: Tensor, kept: tuple[Tensor, ...]) -> None:
        from slimfit_ds.activations.codecs.triton_paper import prune

        values, indices = kept
        if len(values):
            kth = self._threshold(flat, len(values))[1]
            prune(flat, flat.view(_INTEGERS[flat.element_size()]), kth, values, indices)

    def _decode_in_triton(self, kept: tuple[Tensor, ...], out: Tensor) -> None:
        from slimfit_ds.activations.codecs.triton_paper import restore

        values, indices = kept
        restore(values, indices, out)

    def _threshold(self, flat: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return integer keys that order by magnitude [numel], and the smallest of the `count` largest, 0-d."""
        if flat.numel() > _INT32_MAX:
            raise ValueError(f"{self.name} indexes up to {_INT32_MAX} elements, got {flat.numel()}")
        # Without its sign bit a float orders by magnitude as an integer does, NaN above infinity.
        keys = flat.view(_INTEGERS[flat.element_size()])
        magnitudes = keys & torch.iinfo(keys.dtype).max
        # A GPU finds the k-th value of one long row in a single block of threads, the k largest in thousands.
        return magnitudes, magnitudes.topk(count, sorted=False).values.amin()
