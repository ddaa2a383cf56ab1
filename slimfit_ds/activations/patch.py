"""Reversible changes to single module instances, and the forwards that take the place of a module's own.

A patched `forward` is bound to its module, so that a copy of the model, or a pickled one, has it bound to its own. It calls the
original forward for its values, and steps aside in eval mode, under `no_grad` and inside recomputed parts. What trains
is read from `requires_grad` at every call.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from slimfit_ds.activations.autograd_graph import inside_torch_checkpoint
from slimfit_ds.activations.checkpoint import CHANGED, checkpoint, compresses
from slimfit_ds.activations.codecs import Codec
from slimfit_ds.activations.ops.activation import compressed_activation
from slimfit_ds.activations.ops.dropout import philox_dropout, replayed_dropout
from slimfit_ds.activations.ops.norm import NormKind, compressed_norm
from slimfit_ds.activations.replay import AutocastState
from slimfit_ds.activations.saved_tensors import SHARED, Payload, Rebuilt, compress_saved

__all__ = [
    "DROPOUTS",
    "ActivationSetting",
    "BlockSetting",
    "Bound",
    "ConsumerSetting",
    "DropoutSetting",
    "LinearSetting",
    "NormSetting",
    "Patches",
    "Setting",
    "install",
    "is_patched",
    "original_forward",
    "run_as_it_is",
    "run_block",
    "run_compressed",
]

_ABSENT = object()
_ORIGINAL = "_slimfit_original_forward"
_SETTING = "_slimfit_setting"

DROPOUTS = {"replay": replayed_dropout, "philox": philox_dropout}
"""Values of the operation `dropout` besides `exact`."""


class Bound:
    """A function of a module of ours bound to a model's module, as a method is.

    pickle looks a method up by name on the object that it is bound to, and there is none of ours.
    """

    __slots__ = ("__func__", "__self__")

    def __init__(self, function: Callable, module: nn.Module):
        self.__func__, self.__self__ = function, module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__func__(self.__self__, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return Bound, (self.__func__, self.__self__)


class Patches:
    """Remembers what instance attributes were, and puts them back."""

    def __init__(self) -> None:
        self._changes: list[tuple[Any, str, Any]] = []

    def set(self, target: Any, name: str, value: Any) -> None:
        """Set an instance attribute past `nn.Module.__setattr__`."""
        self._changes.append((target, name, target.__dict__.get(name, _ABSENT)))
        target.__dict__[name] = value

    def replace_forward(self, module: nn.Module, forward: Callable) -> None:
        """Make `forward(module, ...)` the forward of this instance; it may call `original_forward(module)`."""
        self.set(module, _ORIGINAL, module.__dict__.get("forward"))
        self.set(module, "forward", Bound(forward, module))

    def undo(self) -> None:
        """Restore everything, latest change first."""
        while self._changes:
            target, name, value = self._changes.pop()
            if value is _ABSENT:
                target.__dict__.pop(name, None)
            else:
                target.__dict__[name] = value


def is_patched(module: nn.Module) -> bool:
    """Whether the forward of this instance is replaced."""
    return _ORIGINAL in module.__dict__


def original_forward(module: nn.Module) -> Callable:
    """Return the forward that the patched one replaces, bound to `module`."""
    return module.__dict__[_ORIGINAL] or MethodType(type(module).forward, module)


@dataclass(frozen=True)
class NormSetting:
    """Codecs of x_hat of a norm whose weight is frozen or trains (`None`: leave it to autograd)."""

    kind: NormKind
    frozen: Codec | None
    active: Codec | None
    share: bool

    def forward(self, module: nn.Module, original: Callable, x: Tensor) -> Tensor:
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if weight is not None and x.shape[-1] != getattr(weight, "ds_shape", weight.shape)[0]:
            # Over another dimension than the last.
            return original(x)
        codec = self.active if weight is not None and weight.requires_grad else self.frozen
        needed = x.requires_grad or any(p is not None and p.requires_grad for p in (weight, bias))
        if codec is None or not needed:
            return original(x)
        return compressed_norm(original, x, weight, bias, self.kind, codec, self.share)


@dataclass(frozen=True)
class ActivationSetting:
    """Codec of an activation function's input or derivative, and the function's name."""

    codec: Codec
    function: str
    share: bool

    def forward(self, module: nn.Module, original: Callable, x: Tensor) -> Tensor:
        if not x.requires_grad:
            return original(x)
        return compressed_activation(original, x, self.codec, self.function, self.share)


@dataclass(frozen=True)
class DropoutSetting:
    """Dropout by one of `DROPOUTS`."""

    drop: Callable[[Callable, Tensor, float], Tensor]

    def forward(self, module: nn.Module, original: Callable, x: Tensor) -> Tensor:
        p: float = module.p  # type: ignore[assignment]
        return self.drop(original, x, p) if p and x.requires_grad else original(x)


@dataclass(frozen=True)
class LinearSetting:
    """Codec of the input of a linear layer or convolution that trains.

    Attributes:
        codec: `None`: left to autograd.
        again: what keeps the layer's result (the product with a gate) runs the layer again instead, where its input comes
            from what a norm keeps.
    """

    codec: Codec | None
    again: bool = False

    def forward(self, module: nn.Module, original: Callable, x: Tensor) -> Tensor:
        trains = any(p.requires_grad and p.dim() > 1 for p in module.parameters(recurse=False))
        if trains and self.codec is not None:
            with compress_saved(self.codec, x, module.parameters(recurse=False)):
                y = original(x)
        else:
            y = original(x)
        source = SHARED.find_rebuilt(x) if self.again else None
        if source is not None:
            autocast = AutocastState.capture([x])
            build = functools.partial(_run_again, weakref.ref(module), source.with_tensors(()), autocast)
            SHARED.remember_rebuilt(y, Rebuilt(source.tensors, build))
        return y


def _run_again(
    module: weakref.ref[nn.Module], source: Payload, autocast: AutocastState, *tensors: Tensor
) -> Tensor:
    """Return the result of a linear layer again, from what its input is rebuilt from."""
    layer = module()
    assert layer is not None
    with torch.no_grad(), autocast.entered():
        return layer(source.with_tensors(tensors).decode())


@dataclass(frozen=True)
class ConsumerSetting:
    """A module that is recomputed from its input: from what the norm that feeds it stores, or else by `codec`.

    Attributes:
        codec: stores an input that no norm has stored.
        width: of the block's norms; a module whose input has another width is left alone.
        chunk_tokens: as in `checkpoint`.
        chunk_forward: as in `checkpoint`.
    """

    codec: Codec | None
    width: int
    chunk_tokens: int | None
    chunk_forward: bool

    def forward(self, module: nn.Module, original: Callable, *args: Any, **kwargs: Any) -> Any:
        tensors = (a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.is_floating_point())
        first = next(tensors, None)
        if first is None or first.shape[-1] != self.width:
            return original(*args, **kwargs)
        return checkpoint(
            original,
            *args,
            codec=self.codec,
            chunk_tokens=self.chunk_tokens,
            chunk_forward=self.chunk_forward,
            select=lambda tensors: [t is first for t in tensors],
            recompute=module,
            remember_output=True,
            **kwargs,
        )


@dataclass(frozen=True)
class BlockSetting:
    """A block run through a function that takes its forward, its arguments and, as `recompute`, the block."""

    run: Callable

    def forward(self, module: nn.Module, original: Callable, *args: Any, **kwargs: Any) -> Any:
        return run_block(self.run, module, original, *args, recompute=module, **kwargs)


Setting = NormSetting | ActivationSetting | DropoutSetting | LinearSetting | ConsumerSetting | BlockSetting
_ONE_TENSOR = (NormSetting, ActivationSetting, DropoutSetting, LinearSetting)


def install(patches: Patches, module: nn.Module, setting: Setting) -> None:
    """Let the setting's forward take the place of the module's."""
    patches.set(module, _SETTING, setting)
    patches.replace_forward(module, _unary_forward if isinstance(setting, _ONE_TENSOR) else _forward)


def _unary_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    original = original_forward(self)
    if len(args) != 1 or kwargs or not isinstance(args[0], Tensor) or not compresses(self):
        return original(*args, **kwargs)
    return self.__dict__[_SETTING].forward(self, original, args[0])


def _forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    original = original_forward(self)
    if not compresses(self):
        return original(*args, **kwargs)
    return self.__dict__[_SETTING].forward(self, original, *args, **kwargs)


def run_block(run: Callable, block: nn.Module, function: Callable, *args: Any, **kwargs: Any) -> Any:
    """Run the forward of a block through `run`, unless the block compresses nothing now."""
    if not compresses(block):
        kwargs.pop("recompute", None)
        return function(*args, **kwargs)
    return run(function, *args, **kwargs, **block.__dict__.get(CHANGED, {}))


def run_as_it_is(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """Run the forward of a block as it is."""
    return function(*args, **kwargs)


def run_compressed(codec: Codec, block: nn.Module, function: Callable, *args: Any, **kwargs: Any) -> Any:
    """Run the forward of a block with a codec for the token rows that autograd saves in it."""
    kwargs.pop("recompute", None)
    hidden = next((a for a in args if isinstance(a, Tensor) and a.is_floating_point() and a.dim() > 1), None)
    if hidden is None or not torch.is_grad_enabled() or inside_torch_checkpoint():
        return function(*args, **kwargs)
    with compress_saved(codec, hidden, block.parameters()):
        return function(*args, **kwargs)
