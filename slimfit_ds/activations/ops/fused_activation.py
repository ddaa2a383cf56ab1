"""Which kernels compute an activation function together with its codec, and when they may.

The values of the forward pass have to be the module's own. A kernel takes its place only after it has given exactly
these for all 65,536 numbers of the dtype, on this device; for fp32 the module runs as it is and its input is packed apart.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from slimfit_ds.activations.codecs import Codec, Encoded, StepDerivative
from slimfit_ds.activations.codecs.absmax import AbsmaxCodec
from slimfit_ds.activations.codecs.base import is_fake, stands_for_device
from slimfit_ds.activations.codecs.triton_support import runs_in_triton

__all__ = ["ActivationKernels", "find_kernels"]

# The names in `triton_elementwise`, which needs Triton.
KNOWN = frozenset({"gelu", "gelu_tanh", "silu", "quick_gelu", "relu"})

# By module: which form of its function gives its values.
_FOUND: WeakKeyDictionary[Any, dict[Hashable, Any]] = WeakKeyDictionary()


class _Packing(Protocol):
    """Kernels of one kind of codec, on flat tensors."""

    def forward(self, x: Tensor, y: Tensor, kept: tuple[Tensor, ...], form: Any) -> None: ...

    def gradient(self, dy: Tensor, kept: tuple[Tensor, ...], dx: Tensor, function: str) -> None: ...


class _Cells:
    """The cell of the derivative."""

    def __init__(self, codec: StepDerivative):
        self._codec = codec

    def forward(self, x: Tensor, y: Tensor, kept: tuple[Tensor, ...], form: Any) -> None:
        from slimfit_ds.activations.ops.triton_activation import table_forward

        table_forward(x, y, kept, self._codec, form)

    def gradient(self, dy: Tensor, kept: tuple[Tensor, ...], dx: Tensor, function: str) -> None:
        from slimfit_ds.activations.ops.triton_activation import table_gradient

        table_gradient(dy, kept, dx, self._codec)


class _Integers:
    """The input in groups of integers."""

    def __init__(self, codec: AbsmaxCodec):
        self._codec = codec

    def forward(self, x: Tensor, y: Tensor, kept: tuple[Tensor, ...], form: Any) -> None:
        from slimfit_ds.activations.ops.triton_activation import integer_forward

        integer_forward(x, y, kept, self._codec, form)

    def gradient(self, dy: Tensor, kept: tuple[Tensor, ...], dx: Tensor, function: str) -> None:
        from slimfit_ds.activations.ops.triton_activation import integer_gradient
        from slimfit_ds.activations.ops.triton_elementwise import SLOPES

        integer_gradient(dy, kept, dx, self._codec, SLOPES[function])


PACKINGS: dict[type, Callable[[Any], _Packing]] = {StepDerivative: _Cells, AbsmaxCodec: _Integers}
"""Kind of codec -> its kernels."""


class ActivationKernels:
    """The kernels of one function and codec."""

    def __init__(self, packing: _Packing, codec: Codec, function: str):
        self._packing, self._codec, self._function = packing, codec, function

    def forward(self, forward: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Encoded] | None:
        """The function's values and the payload of `x`, or `None` where no kernel gives these values exactly."""
        form = None if is_fake(x) else _form_of(forward, self._function, x)
        if form is None:
            return None
        y = torch.empty_like(x)
        kept = tuple(x.new_empty(n, dtype=dtype) for dtype, n in self._codec.storage(x.numel(), x.dtype))
        self._packing.forward(x.view(-1), y.view(-1), kept, form)
        return y, Encoded(kept, x.shape, x.dtype)

    def gradient(self, dy: Tensor, kept: tuple[Tensor, ...]) -> Tensor:
        """The gradient of the input, from that of the output and what was stored."""
        dy = dy.contiguous()
        dx = torch.empty_like(dy)
        if not is_fake(dy):
            self._packing.gradient(dy.view(-1), kept, dx.view(-1), self._function)
        return dx


def find_kernels(codec: Codec, function: str | None, x: Tensor) -> ActivationKernels | None:
    """The kernels for this function of this tensor, or `None`: PyTorch does it.

    Fake tensors stand for a device with the kernels.

    Args:
        codec: a `StepDerivative`, or what stores the input.
        function: a name of `codecs.step_derivative`; `None`: not known.
        x: any shape.
    """
    if not x.is_contiguous() or not x.numel() or function not in KNOWN:
        return None
    if not (runs_in_triton(x) or (stands_for_device(x) and x.dtype != torch.float64)):
        return None
    packing = PACKINGS.get(type(codec))
    if packing is None or not codec.fits_kernels:  # type: ignore[attr-defined]
        return None
    return ActivationKernels(packing(codec), codec, function)


def _form_of(forward: Callable[[Tensor], Tensor], function: str, x: Tensor) -> Any:
    """The form of the function that gives the values of `forward` for every number of the dtype of `x`."""
    if x.dtype.itemsize != 2:
        return None
    bound = getattr(forward, "__self__", None)
    owner = bound if isinstance(bound, nn.Module) else forward
    kind = x.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    key = function, x.device, x.dtype, autocast
    found = _FOUND.setdefault(owner, {})
    if key not in found:
        found[key] = _try_forms(forward, function, x)
    return found[key]


def _try_forms(forward: Callable[[Tensor], Tensor], function: str, x: Tensor) -> Any:
    from slimfit_ds.activations.ops.triton_activation import apply
    from slimfit_ds.activations.ops.triton_elementwise import FORMS

    patterns = torch.arange(-(1 << 15), 1 << 15, device=x.device).to(torch.int16)
    numbers = patterns.view(x.dtype).view(256, 256)
    expected = forward(numbers)
    if expected.dtype != x.dtype:
        return None
    values = torch.empty_like(numbers)
    for form in FORMS[function]:
        apply(numbers.view(-1), values.view(-1), form)
        if _equal(values, expected):
            return form
    return None


def _equal(a: Tensor, b: Tensor) -> bool:
    """Equal but for the sign of zeros and the payload of NaN."""
    return bool(((a == b) | (a.isnan() & b.isnan())).all())
