"""The paper's pruning of a normalised input to its largest magnitudes."""

from __future__ import annotations

import torch
from torch import Tensor

from slimfit_ds.activations.codecs.base import FloatCodec, StorageLayout
from slimfit_ds.activations.codecs.triton_support import runs_in_triton

__all__ = ["TopK"]

_INT32_MAX = 2**31 - 1
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class TopK(FloatCodec):
    """Keeps the largest magnitudes of the whole tensor as values and int32 indices; the rest decodes to 0.

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

    def _encode(self, flat: Tensor, kept: tuple[Tensor, ...], generator: torch.Generator | None) -> None:
        values, indices = kept
        if flat.numel() > _INT32_MAX:
            raise ValueError(f"{self.name} indexes up to {_INT32_MAX} elements, got {flat.numel()}")
        if not len(values):
            return
        # Without its sign bit a float orders by magnitude as an integer does, NaN above infinity.
        keys = flat.view(_INTEGERS[flat.element_size()])
        magnitudes = keys & torch.iinfo(keys.dtype).max
        kth = magnitudes.kthvalue(len(flat) - len(values) + 1).values
        if runs_in_triton(flat):
            from slimfit_ds.activations.codecs.triton_pruning import prune

            del magnitudes
            prune(flat, keys, kth, values, indices)
            return
        above, equal = magnitudes > kth, magnitudes == kth
        missing = len(values) - above.sum()
        # How many there are is known: `nonzero` would make the host wait for the device to count them.
        chosen = torch.nonzero_static(above | (equal & (equal.cumsum(0) <= missing)), size=len(values)).view(
            -1
        )
        indices.copy_(chosen)
        torch.index_select(flat, 0, chosen, out=values)

    def _decode(self, kept: tuple[Tensor, ...], out: Tensor) -> None:
        values, indices = kept
        if runs_in_triton(out):
            from slimfit_ds.activations.codecs.triton_pruning import restore

            restore(values, indices, out)
            return
        out.zero_().scatter_(0, indices.to(torch.int64), values)
