"""Dropout that keeps the random state it drew from, or one bit per element, instead of a mask of bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from slimfit_ds.activations import rng
from slimfit_ds.activations.codecs import Codec
from slimfit_ds.activations.storing import RECIPE, SHARED, Payload, SavedTensors

__all__ = ["packed_dropout", "replayed_dropout"]


def replayed_dropout(forward: Callable[[Tensor], Tensor], x: Tensor, p: float) -> Tensor:
    """Dropout whose backward pass draws the same mask again.

    Args:
        forward: the dropout layer in training mode, with probability `p`.
        x: any shape.
        p: the probability of a zero.
    """
    kept: list[rng.RngState | None] = []
    source = SHARED.find(x.detach(), RECIPE)
    y = _Replayed.apply(x, forward, p, kept)
    if source is not None:
        recipe = _Dropped(
            (*source.encoded.tensors, *_state_tensors(kept[0])), source, kept[0], _dense_stride(x), p
        )
        SHARED.remember(y.detach(), RECIPE, _DROPPED, recipe)
    return y


def packed_dropout(forward: Callable[[Tensor], Tensor], x: Tensor, p: float, codec: Codec) -> Tensor:
    """The same with the mask stored by `codec` (`mask`: one bit per element)."""
    return _Packed.apply(x, forward, p, codec)


def _dropout_as_drawn(
    state: rng.RngState | None, values: Tensor, stride: tuple[int, ...], p: float
) -> Tensor:
    """Dropout of `values` with the mask that followed `state` for a tensor of these strides."""
    laid_out = values
    if values.stride() != stride:
        laid_out = torch.empty_strided(values.shape, stride, dtype=values.dtype, device=values.device)
        laid_out.copy_(values)
    with rng.replay(state):
        return F.dropout(laid_out, p, training=True)


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, forward, p, kept: list[rng.RngState | None]):
        state = rng.capture([x])
        kept.append(state)
        ctx.stride, ctx.p = _dense_stride(x), p
        ctx.devices = () if state is None else tuple(device for device, _ in state.devices)
        ctx.save_for_backward(*_state_tensors(state))
        return forward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        state = None
        if ctx.saved_tensors:
            cpu, *others = ctx.saved_tensors
            state = rng.RngState(cpu, tuple(zip(ctx.devices, others, strict=True)))
        return _dropout_as_drawn(state, dy, ctx.stride, ctx.p), None, None, None


class _Packed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, forward, p, codec: Codec):
        state = rng.capture([x])
        y = forward(x)
        # The result cannot tell a dropped element from one that was zero.
        mask = _dropout_as_drawn(state, torch.ones_like(x), _dense_stride(x), p) != 0
        saved = SavedTensors()
        saved.add_payload(Payload(codec, codec.encode(mask), x.shape))
        ctx.records, ctx.p = saved.records, p
        ctx.save_for_backward(*saved.tensors)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (mask,) = SavedTensors.restore(ctx.records, ctx.saved_tensors)
        return dy * mask.to(dy.dtype) * (1 / (1 - ctx.p) if ctx.p < 1 else 0.0), None, None, None


@dataclasses.dataclass(frozen=True)
class _Dropped:
    """How a dropout's output follows from a norm's; `tensors`: those of `source`, then the random states."""

    tensors: tuple[Tensor, ...]
    source: Payload
    state: rng.RngState | None
    stride: tuple[int, ...]
    p: float


class _DropAgain:
    """Decodes a `_Dropped` to the output of the dropout."""

    @staticmethod
    def decode(recipe: _Dropped) -> Tensor:
        tensors = recipe.tensors[: len(recipe.tensors) - len(_state_tensors(recipe.state))]
        encoded = dataclasses.replace(recipe.source.encoded, tensors=tensors)
        values = dataclasses.replace(recipe.source, encoded=encoded).decode()
        return _dropout_as_drawn(recipe.state, values, recipe.stride, recipe.p)


_DROPPED = _DropAgain()


def _state_tensors(state: rng.RngState | None) -> tuple[Tensor, ...]:
    return () if state is None else (state.cpu, *(value for _, value in state.devices))


def _dense_stride(x: Tensor) -> tuple[int, ...]:
    """The strides of what dropout allocates for `x`: its own where it is dense, else contiguous ones."""
    return torch.empty_like(x, device="meta").stride()
