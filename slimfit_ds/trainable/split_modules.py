"""Layers of which some columns of the weight train, and what they compute.

A linear layer makes the gradient of its trained columns from the same columns of its input, of which it keeps a copy. An
embedding keeps nothing but the ids. What trains is a parameter of its own, `weight_columns`; the frozen rest stands in
`weight`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Split", "SplitEmbedding", "SplitLinear", "SplitModule"]

_COPIES = "_slimfit_columns"


@dataclass(frozen=True)
class Split:
    """Which columns of a weight train: every `stride`-th from `start` on, `count` of them, in the first `rows` rows."""

    start: int
    stride: int
    count: int
    transposed: bool
    """Whether the weight is `[in, out]` (transformers' Conv1D) instead of `[out, in]`."""
    rows: int | None = None
    """Of an embedding: how many words from the front of the vocabulary; None: all rows."""

    @property
    def _range(self) -> slice:
        return slice(self.start, self.start + self.count * self.stride, self.stride)

    def of_rows(self, x: Tensor) -> Tensor:
        """The columns of `[..., width]`, a view `[..., count]`."""
        return x[..., self._range]

    def of_weight(self, weight: Tensor) -> Tensor:
        """The trained part of a whole weight, a view: `[rows, count]`, or `[count, out]` where transposed."""
        return weight[self._range] if self.transposed else weight[: self.rows, self._range]

    def fill(self, weight: Tensor, columns: Tensor) -> Tensor:
        """Write the trained columns into a whole weight, and return it as `[out, in]`."""
        weight = weight.detach()
        self.of_weight(weight).copy_(columns.detach())
        return weight.mT if self.transposed else weight


class SplitModule(nn.Module):
    """In front of the class of a split layer."""

    split: Split
    whole_class: type[nn.Module]
    """What the layer was, and becomes again."""
    weight: nn.Parameter
    weight_columns: nn.Parameter
    split_hooks: tuple[Any, ...]


class SplitLinear(SplitModule):
    """A linear layer, or a Conv1D of transformers, that trains some of its input columns."""

    bias: nn.Parameter | None

    def forward(self, x: Tensor) -> Tensor:
        kind, dtype = x.device.type, x.dtype
        if kind != "meta" and torch.is_autocast_enabled(kind) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(kind)
        kept = None
        if self.weight_columns.requires_grad and torch.is_grad_enabled():
            kept = _kept_columns(x, self.split, dtype)
        return _Product.apply(x, kept, self.weight_columns, self.bias, self, dtype)


class SplitEmbedding(SplitModule):
    """An embedding of whose vectors some places train, for the words at the front of the vocabulary."""

    padding_idx: int | None

    def forward(self, ids: Tensor) -> Tensor:
        return _Lookup.apply(ids, self.weight_columns, self)


class _Product(torch.autograd.Function):
    """`x W^T + b`, of whose weight gradient only some columns are made.

    The columns are written into the weight at each use: under ZeRO 3 it has just been gathered from shards that do not
    know them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        kept: Tensor | None,
        columns: Tensor,
        bias: Tensor | None,
        layer: SplitLinear,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.layer, ctx.x_dtype = layer, x.dtype
        ctx.save_for_backward(kept, columns)
        weight = layer.split.fill(layer.weight, columns).to(dtype)
        return F.linear(x.to(dtype), weight, None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = gradients
        kept, columns = ctx.saved_tensors
        split = ctx.layer.split
        dx = d_columns = d_bias = None
        if ctx.needs_input_grad[0]:
            dx = (dy @ split.fill(ctx.layer.weight, columns).to(dy.dtype)).to(ctx.x_dtype)
        rows = dy.reshape(-1, dy.shape[-1])
        if ctx.needs_input_grad[2]:
            kept = kept.reshape(-1, split.count)
            d_columns = (kept.mT @ rows if split.transposed else rows.mT @ kept).to(columns.dtype)
        if ctx.needs_input_grad[3]:
            d_bias = rows.sum(0).to(columns.dtype)
        return dx, None, d_columns, d_bias, None, None


class _Lookup(torch.autograd.Function):
    """Rows of an embedding `[vocabulary, width]`, of whose gradient only some columns are made.

    Not the whole weight is brought up to date, as it is large, only the rows that are looked up.
    """

    @staticmethod
    def forward(ctx: Any, ids: Tensor, columns: Tensor, layer: SplitEmbedding) -> Tensor:
        ctx.split, ctx.padding = layer.split, layer.padding_idx
        ctx.rows, ctx.dtype = columns.shape[0], columns.dtype
        ctx.save_for_backward(ids)
        found = F.embedding(ids, layer.weight.detach())
        places = ctx.split.of_rows(found)
        # An id behind the trained rows reads any of them and keeps what it has.
        trained = F.embedding(ids.clamp(max=ctx.rows - 1), columns)
        places.copy_(torch.where((ids < ctx.rows).unsqueeze(-1), trained, places))
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            return None, None, None
        (dy,) = gradients
        # A frequent token is a long sum.
        exact = torch.promote_types(dy.dtype, torch.float32)
        parts = ctx.split.of_rows(dy).to(exact, memory_format=torch.contiguous_format)
        known = ids < ctx.rows
        if ctx.padding is not None:
            known &= ids != ctx.padding
        parts = parts * known.unsqueeze(-1)
        ids = ids.clamp(max=ctx.rows - 1)
        gradient = torch.ops.aten.embedding_dense_backward(parts, ids, ctx.rows, -1, False)
        return None, gradient.to(ctx.dtype), None


def _kept_columns(x: Tensor, split: Split, dtype: torch.dtype) -> Tensor:
    """A copy of the columns of `[..., in]`: the same one for each layer that reads this tensor and trains these columns."""
    key = (split.start, split.stride, split.count, dtype, x._version)
    known = getattr(x, _COPIES, None)
    if known is not None and key in known:
        return known[key]
    # A view would keep all of x alive.
    kept = split.of_rows(x.detach()).to(dtype, copy=True, memory_format=torch.contiguous_format)
    # It lives with x: who reads x next finds it.
    setattr(x, _COPIES, {key: kept})
    return kept
