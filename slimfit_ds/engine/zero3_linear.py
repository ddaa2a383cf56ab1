"""A linear function for weights that ZeRO 3 cuts, which keeps no input where the weight is frozen.

torch's own `linear` saves a transposed view of the weight, which keeps the gathered weight alive until
backward. DeepSpeed replaces it, for every model of the process and for ever, by one that saves the
parameter instead, but the input as well whether the weight trains or not: freezing then saves no
activation memory. This one saves what the backward pass will use, and is in force only while its engine runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from torch import Tensor
from torch.nn import functional

__all__ = ["ScopedLinear", "linear"]

_plain_linear = torch._C._nn.linear


class _Linear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _plain_linear(input, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        input, weight, _ = inputs
        wants_input, wants_weight, _ = ctx.needs_input_grad
        # The parameter itself, never a view of it: its data may come and go until backward.
        ctx.save_for_backward(input if wants_weight else None, weight if wants_input else None)
        device = input.device.type
        ctx.autocast = {
            "device_type": device,
            "enabled": torch.is_autocast_enabled(device),
            "dtype": torch.get_autocast_dtype(device),
        }

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (grad_output,) = gradients
        input, weight = ctx.saved_tensors
        grad_input = grad_weight = grad_bias = None
        with torch.autocast(**ctx.autocast):
            if weight is not None:
                grad_input = _times_weight(grad_output, weight)
            rows = grad_output.reshape(-1, grad_output.shape[-1])
            if input is not None:
                grad_weight = rows.t().matmul(input.reshape(-1, input.shape[-1]))
            if ctx.needs_input_grad[2]:
                grad_bias = rows.sum(0)
        return grad_input, grad_weight, grad_bias


def _times_weight(gradient: Tensor, weight: Any) -> Tensor:
    # DeepSpeed's hooks have gathered the weight, unless its module's hooks did not fire.
    missing = getattr(getattr(weight, "ds_status", None), "name", None) == "NOT_AVAILABLE"
    if missing:
        weight.all_gather()
    try:
        return gradient.matmul(weight)
    finally:
        if missing:
            weight.partition()


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, through our function where ZeRO 3 has cut the weight.

    Args:
        input: `[..., in]`.
        weight: `[out, in]`; a vector, or a weight that is not cut, goes to torch's function.
        bias: `[out]`.

    Returns:
        `[..., out]`, the same bits as torch's function.
    """
    if hasattr(weight, "ds_id") and weight.dim() == 2:
        return _Linear.apply(input, weight, bias)
    return _plain_linear(input, weight, bias)


class ScopedLinear:
    """Puts `linear` into the place of torch's function for the forward and backward passes of one engine.

    Outside of them `torch.nn.functional.linear` is what it was before the engine was made. Engines may be nested.
    """

    def __init__(self) -> None:
        self._wanted = True
        self._before: Any = None

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Undo DeepSpeed's own replacement, which it makes while the engine is built and never undoes itself.

        Where it makes none (`memory_efficient_linear: false`), nothing will be replaced later either.
        """
        before = functional.linear
        try:
            yield
        finally:
            self._wanted = functional.linear is zero3_linear_wrap
            functional.linear = before

    def enter(self) -> None:
        if self._wanted and functional.linear is not linear:
            self._before, functional.linear = functional.linear, linear

    def leave(self) -> None:
        if self._before is not None:
            functional.linear, self._before = self._before, None

    def __enter__(self) -> None:
        self.enter()

    def __exit__(self, *_: object) -> None:
        self.leave()
