"""Activation functions that keep a coarse derivative, or their input in a codec."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slimfit_ds.activations.codecs import Codec, StepDerivative
from slimfit_ds.activations.ops.fused_activation import find_kernels
from slimfit_ds.activations.storing import RECIPE, SHARED, Payload, SavedTensors

__all__ = ["compressed_activation"]


def compressed_activation(
    forward: Callable[[Tensor], Tensor],
    x: Tensor,
    codec: Codec,
    recipe: bool = False,
    function: str | None = None,
) -> Tensor:
    """An elementwise function whose backward pass sees its input through a codec.

    Args:
        forward: the function; its result is returned as it is.
        x: any shape.
        codec: a `StepDerivative` stores f'(x) itself; any other codec stores x.
        recipe: let functions that store the result (the product with `up`) share the stored x.
        function: its name in `codecs.step_derivative`, by which kernels are found; a `StepDerivative` knows it.
    """
    kept: list[Any] = []
    if isinstance(codec, StepDerivative):
        function = codec.activation
    y = _Activation.apply(x, forward, codec, function, kept)
    if recipe and kept and y.requires_grad:
        inner = dataclasses.replace(kept[0], tensors=())
        SHARED.remember(
            y.detach(), RECIPE, _FROM_INPUT, _ActivationOutput(kept[0].tensors, inner, codec, forward)
        )
    return y


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, forward, codec: Codec, function: str | None, kept: list[Any]):
        ctx.kernels = find_kernels(codec, function, x)
        together = ctx.kernels.forward(forward, x) if ctx.kernels is not None else None
        y, encoded = together if together is not None else (None, codec.encode(x))
        kept.append(encoded)
        saved = SavedTensors()
        saved.add_payload(Payload(codec, encoded, x.shape))
        ctx.records, ctx.forward, ctx.dtype = saved.records, forward, x.dtype
        ctx.stores_derivative = isinstance(codec, StepDerivative)
        ctx.save_for_backward(*saved.tensors)
        return forward(x) if y is None else y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        if ctx.kernels is not None and dy.dtype == ctx.dtype:
            return ctx.kernels.gradient(dy, ctx.saved_tensors), None, None, None, None
        (stored,) = SavedTensors.restore(ctx.records, ctx.saved_tensors)
        if ctx.stores_derivative:
            return dy * stored, None, None, None, None
        with torch.enable_grad():
            x = stored.requires_grad_()
            (dx,) = torch.autograd.grad(ctx.forward(x), x, dy)
        return dx, None, None, None, None


@dataclasses.dataclass(frozen=True)
class _ActivationOutput:
    """How an activation's output follows from its stored input."""

    tensors: tuple[Tensor, ...]
    x: Any
    codec: Codec
    forward: Callable[[Tensor], Tensor]


class _FromInput:
    """Decodes an `_ActivationOutput` to the activation's output."""

    @staticmethod
    def decode(recipe: _ActivationOutput) -> Tensor:
        with torch.no_grad():
            return recipe.forward(recipe.codec.decode(dataclasses.replace(recipe.x, tensors=recipe.tensors)))


_FROM_INPUT = _FromInput()
