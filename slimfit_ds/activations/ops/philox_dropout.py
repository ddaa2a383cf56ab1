"""Dropout with masks of its own that nothing has to be kept for: seed and position give them again.

Forward and backward are one kernel each, in Triton on a GPU and in C on a CPU, without the mask of bytes that PyTorch's
writes on a GPU and ten times as fast as it draws one on a CPU. The masks are not those that PyTorch draws from the same
seed, and differ between the two kernels. Where neither runs, dropout is PyTorch's, replayed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slimfit_ds.activations import rng
from slimfit_ds.activations.codecs.base import is_fake, stands_for_device
from slimfit_ds.activations.codecs.triton_support import runs_in_triton
from slimfit_ds.activations.ops.cpu_dropout import CpuMask, runs_in_c
from slimfit_ds.activations.ops.dropout import replayed_dropout
from slimfit_ds.activations.storing import RECIPE, SHARED, Payload

__all__ = ["philox_dropout"]


def philox_dropout(forward: Callable[[Tensor], Tensor], x: Tensor, p: float) -> Tensor:
    """Dropout that makes its mask again in the backward pass.

    Args:
        forward: the dropout layer in training mode, for tensors that the kernel does not take.
        x: any shape.
        p: the probability of a zero.
    """
    mask = _draw(x, p) if x.is_contiguous() and x.numel() and 0 < p < 1 else None
    if mask is None:
        return replayed_dropout(forward, x, p)
    source = SHARED.find(x.detach(), RECIPE)
    y = _Philox.apply(x, mask)
    if source is not None:
        SHARED.remember(y.detach(), RECIPE, _DROPPED, _Dropped(source.encoded.tensors, source, mask))
    return y


def _draw(x: Tensor, p: float) -> _TritonMask | CpuMask | None:
    """A new mask for `x`, or `None` where no kernel takes it. Fake tensors stand for a device with the kernel."""
    if stands_for_device(x) and x.dtype != torch.float64:
        return _TritonMask(p, 0, 0)
    if runs_in_triton(x):
        from slimfit_ds.activations.ops.triton_dropout import counters_for

        return _TritonMask(p, *rng.take_counters(x.device, counters_for(x.numel())))
    if runs_in_c(x) and CpuMask.takes(p):
        return CpuMask.draw(p)
    return None


@dataclass(frozen=True)
class _TritonMask:
    """A mask as the numbers it is made from."""

    p: float
    seed: int
    first: int

    def apply(self, values: Tensor) -> Tensor:
        """The values that stay, scaled; zero elsewhere."""
        values = values.contiguous()
        out = torch.empty_like(values)
        if not is_fake(values):
            from slimfit_ds.activations.ops.triton_dropout import drop

            drop(values.view(-1), out.view(-1), self.p, self.seed, self.first)
        return out


class _Philox(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, mask: _TritonMask | CpuMask):
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
    mask: _TritonMask | CpuMask


class _DropAgain:
    """Decodes a `_Dropped` to the output of the dropout."""

    @staticmethod
    def decode(recipe: _Dropped) -> Tensor:
        encoded = dataclasses.replace(recipe.source.encoded, tensors=recipe.tensors)
        return recipe.mask.apply(dataclasses.replace(recipe.source, encoded=encoded).decode())


_DROPPED = _DropAgain()
