"""Column-row sampling: an active linear layer keeps a few of its input's rows, and its gradient stays unbiased.

The weight gradient of a linear layer is a sum over tokens, `sum_i g_i x_i^T`. Winner-take-all column-row
sampling keeps the rows of largest probability for certain and samples the rest.

Source: Liu et al., "Winner-Take-All Column Row Sampling for Memory Efficient Adaptation of Language Models",
NeurIPS 2023.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from slimfit_ds.activations.codecs.backend import backend_of
from slimfit_ds.activations.codecs.base import Codec, Encoded, StorageLayout

__all__ = ["ColumnRowSampling", "sample_rows"]


class ColumnRowSampling(Codec):
    """Keep some rows (tokens) of a linear layer's input; the others decode to zeros.

    What it decodes has the input as its mean, so every gradient that is linear in the input, as that of a
    weight is, stays unbiased. A single row is far off: nothing but weight gradients may be computed from it.

    Args:
        inner: stores the rows that are kept.
        keep: their share, in (0, 1]; at least one row is kept.
        seed: of the draws.
    """

    name = "crs"
    linear_only = True

    def __init__(self, inner: Codec, keep: float = 0.3, seed: int = 0):
        if not 0 < keep <= 1:
            raise ValueError(f"crs: keep must be in (0, 1], got {keep}")
        self.inner = inner
        self.unbiased = inner.unbiased
        self.keep = keep
        self.seed = seed
        # Of its own, so that the model's random numbers are left alone.
        self._generators: dict[torch.device, torch.Generator] = {}

    @torch.no_grad()
    def encode(self, x: Tensor) -> Encoded:
        if not x.is_floating_point():
            raise TypeError(f"codec {self.name!r} takes floating-point tensors, got {x.dtype}")
        tokens, kept, width = self._rows(x.shape)
        if backend_of(x) == "none":
            index = x.new_empty(kept, dtype=torch.int32)
            weight = x.new_empty(kept, dtype=torch.float32)
            rows = x.new_empty(kept, width)
        else:
            flat = x.detach().reshape(tokens, width)
            index, weight = sample_rows(flat, kept, self._generator(x.device))
            rows = flat.index_select(0, index)
        return Encoded((*self.inner.encode(rows).tensors, index, weight), x.shape, x.dtype)

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self.seed)
        return self._generators[device]

    @torch.no_grad()
    def decode(self, e: Encoded) -> Tensor:
        *stored, index, weight = e.tensors
        tokens, kept, width = self._rows(e.shape)
        rows = self.inner.decode(Encoded(tuple(stored), torch.Size([kept, width]), e.dtype))
        out = rows.new_zeros(tokens, width)
        if backend_of(out) != "none":
            # A row that was drawn twice stands twice among the rows.
            out.index_add_(0, index, (rows * weight[:, None]).to(e.dtype))
        return out.view(e.shape)

    def storage(self, numel: int, dtype: torch.dtype) -> StorageLayout:
        """Return those of one row; `nbytes` knows the shape."""
        return *self.inner.storage(numel, dtype), (torch.int32, 1), (torch.float32, 1)

    def nbytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        _, kept, width = self._rows(shape)
        return self.inner.nbytes((kept, width), dtype) + 8 * kept

    def bits_per_element(self, dtype: torch.dtype = torch.bfloat16) -> float:
        """Count wide rows: their index and weight, 64 bits a row kept, are left out."""
        return self.keep * self.inner.bits_per_element(dtype)

    def _rows(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """Return rows, rows kept and width of a tensor."""
        width = shape[-1] if len(shape) else 1
        tokens = math.prod(shape[:-1])
        return tokens, min(tokens, max(round(self.keep * tokens), 1)), width


@torch.no_grad()
def sample_rows(x: Tensor, keep: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Choose `keep` of the rows of `x` [tokens, features]; all of them when there are no more.

    With probabilities p proportional to the norms of the rows, in descending order, the first c rows are kept for
    certain; c minimises (1 - p_1 - ... - p_c) / (keep - c), which bounds the variance of the sampled rest.
    The rest is drawn in strata, one row from each, which keeps sums over rows unbiased and lowers the variance
    further. A row whose norm is not finite in fp32 makes the weights, and so the gradient, NaN.

    Returns:
        Which rows, int32 [keep] (one that was drawn twice stands there twice), and their weights in a sum over all
        rows, fp32 [keep].
    """
    tokens = len(x)
    if keep >= tokens:
        return torch.arange(tokens, dtype=torch.int32, device=x.device), torch.ones(tokens, device=x.device)
    norms = torch.linalg.vector_norm(x, dim=1, dtype=torch.promote_types(x.dtype, torch.float32))
    norms = norms.to(torch.float64).masked_fill(~norms.isfinite(), torch.nan)
    index, weight = _winners_and_samples(norms, keep, generator)
    return index.to(torch.int32), weight.to(torch.float32)


def _winners_and_samples(importance: Tensor, keep: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return index int64 [keep] and weight float64 [keep]; no value leaves the device."""
    # Rows of no importance at all share equally.
    total = importance.sum()
    importance = torch.where(total > 0, importance, torch.where(total == 0, 1.0, importance))
    ordered, order = importance.sort(descending=True, stable=True)
    mass = ordered / ordered.sum()
    reached = torch.cat([mass.new_zeros(1), mass.cumsum(0)])
    position = torch.arange(keep, device=mass.device)
    left = (1 - reached[:keep]).clamp_min(0)
    winners = torch.argmin(left / (keep - position))
    rest = left[winners]
    drawn = keep - winners
    uniform = torch.rand(keep, dtype=mass.dtype, device=mass.device, generator=generator)
    target = reached[winners] + (position - winners + uniform) / drawn * rest
    sampled = (torch.searchsorted(reached, target, right=True) - 1).clamp_(max=len(mass) - 1)
    is_winner = position < winners
    place = torch.where(is_winner, position, torch.maximum(sampled, winners))
    # A stratum of no mass may land on a row of no mass; it must not add an infinite weight.
    share = mass[place] * drawn
    weight = torch.where(is_winner, 1.0, torch.where(share == 0, 0.0, rest / share))
    return order[place], weight
