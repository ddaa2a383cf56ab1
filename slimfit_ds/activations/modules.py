"""The forwards that take the place of a module's own; their settings lie in the module's `__dict__`.

Each calls the original forward for its values, and steps aside in eval mode, under `no_grad` and inside recomputed
parts. What trains is read from `requires_grad` at every call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from slimfit_ds.activations.checkpoint import checkpoint, resolve_codec
from slimfit_ds.activations.codecs import Codec
from slimfit_ds.activations.ops.activation import compressed_activation
from slimfit_ds.activations.ops.dropout import packed_dropout, replayed_dropout
from slimfit_ds.activations.ops.norm import NormKind, compressed_norm
from slimfit_ds.activations.ops.philox_dropout import philox_dropout
from slimfit_ds.activations.patching import Patches, original_forward
from slimfit_ds.activations.saved_hooks import call_compressed
from slimfit_ds.activations.scope import compresses

__all__ = [
    "MASKS_MADE_AGAIN",
    "ActivationSetting",
    "BlockSetting",
    "ConsumerSetting",
    "DropoutSetting",
    "LinearSetting",
    "NormSetting",
    "install",
]

_SETTING = "_slimfit_setting"

MASKS_MADE_AGAIN = MappingProxyType({"replay": replayed_dropout, "philox": philox_dropout})
"""Values of the operation `dropout` that keep no mask."""


@dataclass(frozen=True)
class NormSetting:
    """x_hat codecs of a norm whose weight is frozen or trains (`None`: leave it to autograd)."""

    kind: NormKind
    frozen: Codec | None
    active: Codec | None
    recipe: bool

    def forward(self, module: nn.Module, original: Callable, x: Tensor) -> Tensor:
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        codec = self.active if weight is not None and weight.requires_grad else self.frozen
        needed = x.requires_grad or any(p is not None and p.requires_grad for p in (weight, bias))
        if codec is None or not needed:
            return original(x)
        return compressed_norm(original, x, weight, bias, self.kind, codec, self.recipe)


@dataclass(frozen=True)
class ActivationSetting:
    """Codec of an activation function's input or derivative, and the function's name."""

    codec: Codec
    recipe: bool
    function: str

    def forward(self, module: nn.Module, original: Callable, x: Tensor) -> Tensor:
        if not x.requires_grad:
            return original(x)
        return compressed_activation(original, x, self.codec, self.recipe, self.function)


@dataclass(frozen=True)
class DropoutSetting:
    """Dropout by a function of the original forward, x and p: of a mask that is made again, or stored."""

    drop: Callable[[Callable, Tensor, float], Tensor]

    @classmethod
    def of(cls, way: Any) -> DropoutSetting:
        """The setting that `dropout` in a table of operations stands for: a way of making masks again, or a codec."""
        if isinstance(way, str) and way in MASKS_MADE_AGAIN:
            return cls(MASKS_MADE_AGAIN[way])
        codec = resolve_codec(way)
        assert codec is not None
        return cls(functools.partial(packed_dropout, codec=codec))

    def forward(self, module: nn.Module, original: Callable, x: Tensor) -> Tensor:
        p: float = module.p  # type: ignore[assignment]
        return self.drop(original, x, p) if p and x.requires_grad else original(x)


@dataclass(frozen=True)
class LinearSetting:
    """Codec of the input of a linear layer or convolution that trains."""

    codec: Codec

    def forward(self, module: nn.Module, original: Callable, x: Tensor) -> Tensor:
        if not any(p.requires_grad and p.dim() > 1 for p in module.parameters(recurse=False)):
            return original(x)
        return call_compressed(original, self.codec, x, module.parameters(recurse=False), x)


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
        first = next(
            (a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.is_floating_point()), None
        )
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
    """A block run through a function that takes it and its arguments."""

    run: Callable

    def forward(self, module: nn.Module, original: Callable, *args: Any, **kwargs: Any) -> Any:
        return self.run(original, *args, recompute=module, **kwargs)


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
