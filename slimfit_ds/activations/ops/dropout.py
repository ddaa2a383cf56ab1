"""Dropout that keeps no mask: the mask is made again in the backward pass.

`replayed_dropout` draws PyTorch's own mask again from the random state it was drawn from. `philox_dropout` computes the
mask from a seed and the position of the element, in one Triton kernel forward and the same one backward; PyTorch's writes
a mask of bytes on a GPU. Where that kernel does not run (on a CPU), it is `replayed_dropout`.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from slimfit_ds.activations import replay
from slimfit_ds.activations.codecs.backend import backend_of, has_fused_kernels
from slimfit_ds.activations.saved_tensors import SHARED, Payload, Rebuilt

__all__ = ["masks_of_torch", "philox_dropout", "replayed_dropout"]


class _Masks(threading.local):
    of_torch = False


_masks = _Masks()


@contextlib.contextmanager
def masks_of_torch() -> Iterator[None]:
    """Let `philox_dropout` draw the masks that PyTorch draws, so that results can be compared with PyTorch's."""
    before, _masks.of_torch = _masks.of_torch, True
    try:
        yield
    finally:
        _masks.of_torch = before


def replayed_dropout(forward: Callable[[Tensor], Tensor], x: Tensor, p: float) -> Tensor:
    """Apply dropout and draw the same mask again in the backward pass.

    Args:
        forward: the dropout layer in training mode, with probability `p`.
        x: any shape.
        p: the probability of a zero.
    """
    source = SHARED.find_rebuilt(x)
    state = replay.capture([x])
    y = _Replayed.apply(x, forward, p, state)
    if source is not None:
        # The output of dropout follows from that of a norm, which is kept anyway, and the random state.
        draw = functools.partial(_draw_again, source.with_tensors(()), _devices(state), _dense_stride(x), p)
        SHARED.remember_rebuilt(y, Rebuilt((*_state_tensors(state), *source.tensors), draw))
    return y


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, forward, p, state: replay.RngState | None):
        ctx.stride, ctx.p, ctx.devices = _dense_stride(x), p, _devices(state)
        ctx.save_for_backward(*_state_tensors(state))
        return forward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return _dropped(_state_of(ctx.devices, ctx.saved_tensors), dy, ctx.stride, ctx.p), None, None, None


def _dropped(state: replay.RngState | None, values: Tensor, stride: tuple[int, ...], p: float) -> Tensor:
    """Apply dropout to `values` with the mask that followed `state` for a tensor of these strides."""
    laid_out = values
    if values.stride() != stride:
        laid_out = torch.empty_strided(values.shape, stride, dtype=values.dtype, device=values.device)
        laid_out.copy_(values)
    with replay.replayed(state):
        return F.dropout(laid_out, p, training=True)


def _draw_again(
    source: Payload, devices: tuple[torch.device, ...] | None, stride: tuple[int, ...], p: float, *tensors
) -> Tensor:
    count = 0 if devices is None else 1 + len(devices)
    values = source.with_tensors(tensors[count:]).decode()
    return _dropped(_state_of(devices, tensors[:count]), values, stride, p)


def _devices(state: replay.RngState | None) -> tuple[torch.device, ...] | None:
    return None if state is None else tuple(device for device, _ in state.devices)


def _state_tensors(state: replay.RngState | None) -> tuple[Tensor, ...]:
    return () if state is None else (state.cpu, *(value for _, value in state.devices))


def _state_of(
    devices: tuple[torch.device, ...] | None, tensors: tuple[Tensor, ...]
) -> replay.RngState | None:
    return (
        None
        if devices is None
        else replay.RngState(tensors[0], tuple(zip(devices, tensors[1:], strict=True)))
    )


def _dense_stride(x: Tensor) -> tuple[int, ...]:
    """Return the strides of what dropout allocates for `x`: its own where it is dense, else contiguous ones."""
    return torch.empty_like(x, device="meta").stride()


def philox_dropout(forward: Callable[[Tensor], Tensor], x: Tensor, p: float) -> Tensor:
    """Apply dropout by a mask that follows from a seed and the position of each element.

    Args:
        forward: the dropout layer in training mode, for tensors that the kernel does not take.
        x: any shape.
        p: the probability of a zero.
    """
    if _masks.of_torch or not (x.is_contiguous() and 0 < p < 1 and has_fused_kernels(x)):
        return replayed_dropout(forward, x, p)
    if backend_of(x) == "none":
        return _Philox.apply(x, p, 0, 0)
    from slimfit_ds.activations.ops.triton_dropout import counters_for

    return _Philox.apply(x, p, *replay.take_counters(x.device, counters_for(x.numel())))


class _Philox(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p, seed, first):
        ctx.mask = p, seed, first
        return _masked(x, *ctx.mask)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return _masked(dy, *ctx.mask), None, None, None


def _masked(values: Tensor, p: float, seed: int, first: int) -> Tensor:
    values = values.contiguous()
    out = torch.empty_like(values)
    if backend_of(values) != "none":
        from slimfit_ds.activations.ops.triton_dropout import drop

        drop(values.view(-1), out.view(-1), p, seed, first)
    return out
