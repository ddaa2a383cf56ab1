"""What a module computes, found out by trying it rather than by its class.

transformers has dozens of RMSNorm and activation classes. A candidate is run on random numbers with random
parameters (not its own, which may be partitioned, on `meta`, or all ones) and compared with a reference.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.func import functional_call
from torch.nn.modules.dropout import _DropoutNd

from slimfit_ds.activations import rng
from slimfit_ds.activations.ops.norm import NormKind

__all__ = ["activation_name", "is_dropout", "norm_kind", "norm_width", "weighted_input_width"]

_EPS_NAMES = ("eps", "variance_epsilon", "epsilon", "norm_eps")

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


def norm_kind(module: nn.Module) -> NormKind | None:
    """Which normalisation over the last dimension a module computes; `None`: none that is known."""
    parameters = dict(module.named_parameters(recurse=False))
    eps = next(
        (e for e in (getattr(module, name, None) for name in _EPS_NAMES) if isinstance(e, float)), None
    )
    if isinstance(module, nn.RMSNorm) and module.eps is None:
        eps = torch.finfo(torch.float32).eps
    if eps is None or any(True for _ in module.children()) or not set(parameters) <= {"weight", "bias"}:
        return None
    width = norm_width(module)
    if width is None:
        return None
    with unset_fake_temporarily(), torch.no_grad():
        random = torch.Generator().manual_seed(0)
        drawn = {name: torch.randn(width, generator=random) for name in parameters}
        samples = [torch.randn(3, width, generator=random) * size + 0.3 * size for size in (1.0, 1e-2)]
        for kind in (NormKind(True, eps), NormKind(False, eps), NormKind(False, eps, offset=1.0)):
            if all(_agrees(module, drawn, x, _normalise(kind, drawn, x)) for x in samples):
                return kind
    return None


def norm_width(module: nn.Module) -> int | None:
    """Length of the normalised dimension, also where the parameters are empty (partitioned)."""
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return module.normalized_shape[0] if len(module.normalized_shape) == 1 else None
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return None
    shape = getattr(weight, "ds_shape", weight.shape)
    return shape[0] if len(shape) == 1 else None


def _normalise(kind: NormKind, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    y = kind.statistics(x)[0]
    if "weight" in parameters:
        y = y * (parameters["weight"] + kind.offset)
    return y + parameters["bias"] if "bias" in parameters else y


def activation_name(module: nn.Module) -> str | None:
    """Which activation function of `codecs.step_derivative` a module computes; `None`: none that is known."""
    if (
        isinstance(module, _DropoutNd)
        or any(True for _ in module.children())
        or any(True for _ in module.parameters())
    ):
        return None
    with unset_fake_temporarily(), torch.no_grad():
        x = torch.linspace(-6, 6, 97)
        for name, reference in _ACTIVATIONS.items():
            if _agrees(module, {}, x, reference(x)):
                return name
    return None


def is_dropout(module: nn.Module) -> bool:
    """Whether a module is elementwise dropout."""
    return type(module) is nn.Dropout and not module.inplace


def weighted_input_width(module: nn.Module) -> tuple[int, int] | None:
    """Input and output width of a linear layer or convolution; `None`: another module."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return module.in_channels, module.out_channels
    # transformers' Conv1D (GPT-2): a linear layer with a transposed weight.
    nx, nf = getattr(module, "nx", None), getattr(module, "nf", None)
    return (nx, nf) if isinstance(nx, int) and isinstance(nf, int) else None


def _agrees(module: nn.Module, parameters: dict[str, Tensor], x: Tensor, expected: Tensor) -> bool:
    """Whether the module with these parameters maps `x` to `expected`; a module that refuses does not."""
    with rng.replay(rng.capture([x])):
        try:
            found = functional_call(module, parameters, (x,)) if parameters else module(x)
        except Exception:
            return False
    return (
        isinstance(found, Tensor)
        and found.shape == expected.shape
        and torch.allclose(found.float(), expected, rtol=1e-4, atol=1e-5)
    )
