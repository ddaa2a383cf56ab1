"""Dropout with masks of its own that nothing has to be kept for: seed and position give them again.

On a GPU forward and backward are one kernel each, without the mask of bytes that PyTorch's writes. The masks are not
those that PyTorch draws from the same seed. Where the kernel does not run, dropout is PyTorch's, replayed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slimfit_ds.activations import rng
from slimfit_ds.activations.codecs.base import is_fake
from slimfit_ds.activations.codecs.triton_support import runs_in_triton
from slimfit_ds.activations.functions.dropout import replayed_dropout
from slimfit_ds.activations.storing import RECIPE, SHARED, Payload

__all__ = ["philox_dropout"]


def philox_dropout(forward: Callable[[Tensor], Tensor], x: Tensor, p: float) -> Tensor:
    """Dropout that makes its mask again in the backward pass.

    Args:
        forward: the dropout layer in training mode, for tensors that the kernel does not take.
        x: any shape.
        p: the probability of a zero.
    """
    if not _takes(x) or not 0 < p < 1:
        return replayed_dropout(forward, x, p)
    mask = _Mask.draw(x, p)
    source = SHARED.find(x.detach(), RECIPE)
    y = _Philox.apply(x, mask)
    if source is not None:
        SHARED.remember(y.detach(), RECIPE, _DROPPED, _Dropped(source.encoded.tensors, source, mask))
    return y


def _takes(x: Tensor) -> bool:
    """Fake tensors stand for a device with the kernel."""
    known = runs_in_triton(x) or (is_fake(x) and x.dtype != torch.float64)
    return known and x.is_contiguous() and x.numel() > 0


@dataclass(frozen=True)
class _Mask:
    """A mask as the numbers it is made from."""

    p: float
    seed: int
    first: int

    @classmethod
    def draw(cls, x: Tensor, p: float) -> _Mask:
        if is_fake(x):
            return cls(p, 0, 0)
        from slimfit_ds.activations.functions.triton_dropout import counters_for

        return cls(p, *rng.take_counters(x.device, counters_for(x.numel())))

    def apply(self, values: Tensor) -> Tensor:
        """The values that stay, scaled; zero elsewhere."""
        values = values.contiguous()
        out = torch.empty_like(values)
        if not is_fake(values):
            from slimfit_ds.activations.functions.triton_dropout import drop

            drop(values.view(-1), out.view(-1), self.p, self.seed, self.first)
        return out


class _Philox(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, mask: _Mask):
        ctx.mask = mask
        return mask.apply(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return ctx.mask.apply(dy), None


@dataclass(frozen=True)
class _Dropped:
    """How a dropout's output follows from a norm's; `tensors`: those of `source`."""

    tensors: tuple[Tensor, ...]
    source: Payload
    mask: _Mask


class _DropAgain:
    """Decodes a `_Dropped` to the output of the dropout."""

    @staticmethod
    def decode(recipe: _Dropped) -> Tensor:
        encoded = dataclasses.replace(recipe.source.encoded, tensors=recipe.tensors)
        return recipe.mask.apply(dataclasses.replace(recipe.source, encoded=encoded).decode())


_DROPPED = _DropAgain()
