"""The product of a split layer in a graph of `torch.compile`.

A split layer as it runs without a graph writes its trained columns into its frozen weight at each use and looks up who else
has kept its input: neither can be traced. In a graph the weights hold their columns already (`columns_filled`), and what
is kept of an input once or more often is for the compiler to see.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["columns_filled", "graph_product", "in_filled_graph"]

_PLACES, _SEEN = "_slimfit_places", "_slimfit_columns_seen"
"""Attributes of a split layer: which columns train, int64 `[count]`; split, device and version of the columns that the weight holds."""

_filled = False


@contextmanager
def columns_filled(layers: Iterable[Any]) -> Iterator[None]:
    """Write the trained columns of these split layers into their weights, which graphs that run inside read as they are."""
    global _filled
    for layer in layers:
        weight, columns, split = layer.frozen_weight, layer.weight_columns, layer.split
        split.fill(weight, columns)
        known = layer.__dict__.get(_SEEN, (None, None, None))
        if known[2] != columns._version:
            # A graph that has kept the weight with older columns must hear of it.
            torch.autograd.graph.increment_version(weight)
        if known[:2] != (split, weight.device):
            # One for each layer: graphs tell apart which layers would share them.
            places = split.start + split.stride * torch.arange(split.count, device=weight.device)
            layer.__dict__[_PLACES] = places
        layer.__dict__[_SEEN] = split, weight.device, columns._version
    before, _filled = _filled, True
    try:
        yield
    finally:
        _filled = before


def in_filled_graph() -> bool:
    """Whether a graph is being traced that `columns_filled` will run."""
    return _filled and torch.compiler.is_compiling()


def graph_product(layer: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x W^T + b` of a split layer in `dtype`, in a graph that `columns_filled` runs.

    Args:
        layer: a split linear layer or Conv1D.
        x: `[..., in]`.
        dtype: of the product.
    """
    weight, columns = layer.frozen_weight, layer.weight_columns
    if layer.split.transposed:
        weight, columns = weight.mT, columns.mT
    bias = None if layer.bias is None else layer.bias.to(dtype)
    if not columns.requires_grad:
        return F.linear(x.to(dtype), weight.to(dtype), bias)
    return _Product.apply(x.to(dtype), weight.to(dtype), bias, columns, layer.__dict__[_PLACES])


class _Product(torch.autograd.Function):
    """`x W^T + b`, of whose weight gradient the columns `[out, count]` at `places` `[count]` are made.

    The places are a tensor, no constants of the graph, so that all layers of a shape share one.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, columns: Tensor, places: Tensor
    ) -> Tensor:
        ctx.dtype = columns.dtype
        ctx.save_for_backward(x.index_select(-1, places), weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = gradients
        kept, weight = ctx.saved_tensors
        rows = dy.reshape(-1, dy.shape[-1])
        d_columns = (rows.mT @ kept.reshape(-1, kept.shape[-1])).to(ctx.dtype)
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        return dx, None, rows.sum(0) if ctx.needs_input_grad[2] else None, d_columns, None
