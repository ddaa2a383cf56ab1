"""Activation functions that keep a coarse derivative, or their input in a codec.

On a GPU one kernel computes the function and packs what is kept, and one reads it packed backward. The values of the
forward pass have to be the module's own: a kernel takes the module's place only after it has given exactly these for all
65,536 numbers of the dtype, on this device; for fp32 the module runs as it is and its input is packed apart.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from slimfit_ds.activations.codecs import Codec, Encoded, StepDerivative
from slimfit_ds.activations.codecs.absmax import AbsmaxCodec
from slimfit_ds.activations.codecs.backend import backend_of, has_fused_kernels
from slimfit_ds.activations.saved_tensors import SHARED, Payload, Rebuilt, SavedTensors

__all__ = ["compressed_activation"]

# The functions of `triton_activation`, which needs Triton.
_IN_KERNELS = frozenset({"gelu", "gelu_tanh", "silu", "quick_gelu", "relu"})

# By module: which form of its function gives its values.
_FORMS: WeakKeyDictionary[Any, dict[Hashable, Any]] = WeakKeyDictionary()


def compressed_activation(
    forward: Callable[[Tensor], Tensor],
    x: Tensor,
    codec: Codec,
    function: str | None = None,
    share: bool = False,
) -> Tensor:
    """Apply an elementwise function whose backward pass sees its input through a codec.

    Args:
        forward: the function; its values are returned as they are.
        x: any shape.
        codec: a `StepDerivative` stores f'(x) itself; any other codec stores x.
        function: its name in `codecs.step_derivative`, by which kernels are found; a `StepDerivative` knows it.
        share: let operations that keep the result (the product with `up`) compute it from the stored x.
    """
    if isinstance(codec, StepDerivative):
        function = codec.activation
    kept: list[Encoded] = []
    y = _Activation.apply(x, forward, codec, function, kept)
    if share and y.requires_grad:
        stored = Payload(codec, kept[0], x.shape)
        build = functools.partial(_output, stored.with_tensors(()), forward)
        SHARED.remember_rebuilt(y, Rebuilt(stored.tensors, build))
    return y


@torch.no_grad()
def _output(stored: Payload, forward: Callable[[Tensor], Tensor], *tensors: Tensor) -> Tensor:
    return forward(stored.with_tensors(tensors).decode())


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, forward, codec: Codec, function: str | None, kept: list[Encoded]):
        ctx.function = function if _packs_in_kernel(x, codec, function) else None
        together = None if ctx.function is None else _forward_in_kernel(x, forward, codec, ctx.function)
        y, encoded = together if together is not None else (None, codec.encode(x))
        kept.append(encoded)
        saved = SavedTensors()
        saved.add_payload(Payload(codec, encoded, x.shape))
        ctx.records, ctx.forward, ctx.dtype = saved.records, forward, x.dtype
        ctx.save_for_backward(*saved.tensors)
        return forward(x) if y is None else y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        stored = ctx.records[0].payload_of(ctx.saved_tensors)
        if ctx.function is not None and dy.dtype == ctx.dtype:
            dx = _gradient_in_kernel(dy, stored, ctx.function)
        elif isinstance(stored.codec, StepDerivative):
            dx = dy * stored.decode()
        else:
            with torch.enable_grad():
                x = stored.decode().requires_grad_()
                (dx,) = torch.autograd.grad(ctx.forward(x), x, dy)
        return dx, None, None, None, None


def _packs_in_kernel(x: Tensor, codec: Codec, function: str | None) -> bool:
    """Return whether kernels pack by this codec and know the function's derivative."""
    packs = isinstance(codec, (StepDerivative, AbsmaxCodec)) and codec.fits_kernels
    return packs and function in _IN_KERNELS and x.is_contiguous() and has_fused_kernels(x)


def _forward_in_kernel(
    x: Tensor, forward: Callable[[Tensor], Tensor], codec: Any, function: str
) -> tuple[Tensor, Encoded] | None:
    """Return the function's values and what is kept of `x`, or `None` where no kernel gives these values exactly."""
    form = None if backend_of(x) == "none" else _form_of(forward, function, x)
    if form is None:
        return None
    from slimfit_ds.activations.ops.triton_activation import forward_and_pack

    y = torch.empty_like(x)
    kept = tuple(x.new_empty(n, dtype=dtype) for dtype, n in codec.storage(x.numel(), x.dtype))
    forward_and_pack(x.view(-1), y.view(-1), kept, codec, form)
    return y, Encoded(kept, x.shape, x.dtype)


def _gradient_in_kernel(dy: Tensor, stored: Payload, function: str) -> Tensor:
    dy = dy.contiguous()
    dx = torch.empty_like(dy)
    if backend_of(dy) != "none":
        from slimfit_ds.activations.ops.triton_activation import gradient

        gradient(dy.view(-1), stored.tensors, dx.view(-1), stored.codec, function)
    return dx


def _form_of(forward: Callable[[Tensor], Tensor], function: str, x: Tensor) -> Any:
    """Return the form of the function that gives the values of `forward` for every number of the dtype of `x`."""
    if x.dtype.itemsize != 2:
        return None
    bound = getattr(forward, "__self__", None)
    owner = bound if isinstance(bound, nn.Module) else forward
    kind = x.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    key = function, x.device, x.dtype, autocast
    found = _FORMS.setdefault(owner, {})
    if key not in found:
        found[key] = _try_forms(forward, function, x)
    return found[key]


def _try_forms(forward: Callable[[Tensor], Tensor], function: str, x: Tensor) -> Any:
    from slimfit_ds.activations.ops.triton_activation import FORMS, apply

    patterns = torch.arange(-(1 << 15), 1 << 15, device=x.device).to(torch.int16)
    numbers = patterns.view(x.dtype).view(256, 256)
    expected = forward(numbers)
    if expected.dtype != x.dtype:
        return None
    values = torch.empty_like(numbers)
    for form in FORMS[function]:
        apply(numbers.view(-1), values.view(-1), form)
        # Equal but for the sign of zeros and the payload of NaN.
        if bool(((values == expected) | (values.isnan() & expected.isnan())).all()):
            return form
    return None
