"""What a module computes and which modules are a transformer's blocks, without a table of classes.

transformers has dozens of RMSNorm and activation classes. A candidate is run on random numbers with random
parameters (not its own, which may be partitioned, on `meta`, or all ones) and compared with a reference.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.dropout import _DropoutNd

from slimfit_ds.activations import replay
from slimfit_ds.activations.codecs.backend import real_tensors
from slimfit_ds.activations.ops.norm import NormKind

__all__ = [
    "activation_name",
    "find_blocks",
    "find_consumers",
    "has_checkpoint_hook",
    "inside",
    "is_attention",
    "is_dropout",
    "norm_kind",
    "norm_width",
    "weighted_input_width",
]

# The base class of transformers' encoder and decoder layers; by name, so that this room does not import them.
_CHECKPOINTED_CLASS = "GradientCheckpointingLayer"

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
    """Return which normalisation over the last dimension a module computes; `None`: none that is known."""
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
    with real_tensors(), torch.no_grad():
        random = torch.Generator().manual_seed(0)
        drawn = {name: torch.randn(width, generator=random) for name in parameters}
        # [batch, tokens, width]: a norm over channels (GroupNorm) sees others here than in rows.
        samples = [torch.randn(2, 3, width, generator=random) * size + 0.3 * size for size in (1.0, 1e-2)]
        for kind in (NormKind(True, eps), NormKind(False, eps), NormKind(False, eps, offset=1.0)):
            if all(_agrees(module, drawn, x, _normalise(kind, drawn, x)) for x in samples):
                return kind
    return None


def norm_width(module: nn.Module) -> int | None:
    """Return the length of the normalised dimension, also where the parameters are empty (partitioned)."""
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
    """Return which activation function of `codecs.step_derivative` a module computes; `None`: none that is known."""
    if (
        isinstance(module, _DropoutNd)
        or getattr(module, "inplace", False)
        or any(True for _ in module.children())
        or any(True for _ in module.parameters())
    ):
        return None
    with real_tensors(), torch.no_grad():
        x = torch.linspace(-6, 6, 97)
        for name, reference in _ACTIVATIONS.items():
            if _agrees(module, {}, x, reference(x)):
                return name
    return None


def is_dropout(module: nn.Module) -> bool:
    """Return whether a module is elementwise dropout."""
    return type(module) is nn.Dropout and not module.inplace


def weighted_input_width(module: nn.Module) -> tuple[int, int] | None:
    """Return input and output width of a linear layer or convolution; `None`: another module."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return module.in_channels, module.out_channels
    # transformers' Conv1D (GPT-2): a linear layer with a transposed weight.
    nx, nf = getattr(module, "nx", None), getattr(module, "nf", None)
    return (nx, nf) if isinstance(nx, int) and isinstance(nf, int) else None


def is_attention(module: nn.Module) -> bool:
    """Return whether a module is an attention, by its class's name."""
    return "attention" in type(module).__name__.lower()


def _agrees(module: nn.Module, parameters: dict[str, Tensor], x: Tensor, expected: Tensor) -> bool:
    """Return whether the module with these parameters maps `x` to `expected`; a module that refuses does not."""
    # Running statistics are the model's: it is tried on copies.
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    with replay.replayed(replay.capture([x])):
        try:
            found = functional_call(module, {**parameters, **buffers}, (x,))
        except Exception:
            return False
    return (
        isinstance(found, Tensor)
        and found.shape == expected.shape
        and torch.allclose(found.float(), expected, rtol=1e-4, atol=1e-5)
    )


def has_checkpoint_hook(module: nn.Module) -> bool:
    """Return whether a module calls `_gradient_checkpointing_func` when its `gradient_checkpointing` flag is set."""
    return any(base.__name__ == _CHECKPOINTED_CLASS for base in type(module).__mro__)


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return the outermost repeated blocks, by name, in model order.

    A block is a layer with transformers' checkpoint hook, or, in a model without any, a member of an
    `nn.ModuleList` whose members are of one class and hold at least two weight matrices each.
    """
    modules = dict(model.named_modules())
    blocks = {name: module for name, module in modules.items() if has_checkpoint_hook(module)}
    if not blocks:
        for name, module in modules.items():
            if isinstance(module, nn.ModuleList) and len({type(child) for child in module}) == 1:
                blocks |= {
                    f"{name}.{i}".lstrip("."): child
                    for i, child in enumerate(module)
                    if _is_deep(child) and not isinstance(child, nn.ModuleList)
                }
    return {name: module for name, module in blocks.items() if not inside(name, blocks)}


def find_consumers(block: nn.Module, norm_widths: dict[nn.Module, int]) -> dict[str, nn.Module]:
    """Return the largest parts of a block that hold weights but none of its norms, by name within the block.

    Such a part (self-attention, the first half of a feed-forward layer) is fed by a norm or by a part. Norms over
    fewer elements than the widest (of single heads) do not count.

    Args:
        block: a transformer block.
        norm_widths: normalised width of each norm in the model.
    """
    widths = [norm_widths[m] for m in block.modules() if m in norm_widths]
    found: dict[str, nn.Module] = {}
    for name, module in block.named_modules():
        if not name or inside(name, found) or not any(True for _ in module.children()):
            continue
        holds_norm = any(norm_widths.get(m) == max(widths, default=0) for m in module.modules())
        if (
            not holds_norm
            and not isinstance(module, nn.ModuleList)
            and any(p.dim() > 1 for p in module.parameters())
        ):
            found[name] = module
    return found


def inside(name: str, others: dict[str, nn.Module]) -> bool:
    """Return whether the module of that name lies within one of the others."""
    return any(name.startswith(f"{other}.") for other in others)


def _is_deep(module: nn.Module) -> bool:
    return sum(parameter.dim() >= 2 for parameter in module.parameters()) >= 2
