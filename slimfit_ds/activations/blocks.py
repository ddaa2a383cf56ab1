"""The repeated blocks of a transformer, found without a table of classes."""

from __future__ import annotations

from torch import nn

__all__ = ["find_blocks", "has_checkpoint_seam"]

# The base class of transformers' encoder and decoder layers; by name, so that this room does not import them.
_SEAM_CLASS = "GradientCheckpointingLayer"


def has_checkpoint_seam(module: nn.Module) -> bool:
    """Whether a module calls `_gradient_checkpointing_func` when its `gradient_checkpointing` flag is set."""
    return any(base.__name__ == _SEAM_CLASS for base in type(module).__mro__)


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The outermost repeated blocks, by name, in model order.

    A block is a layer with transformers' checkpoint seam, or, in a model without any, a member of an
    `nn.ModuleList` whose members are of one class and hold at least two weight matrices each.
    """
    modules = dict(model.named_modules())
    blocks = {name: module for name, module in modules.items() if has_checkpoint_seam(module)}
    if not blocks:
        for name, module in modules.items():
            if isinstance(module, nn.ModuleList) and len({type(child) for child in module}) == 1:
                blocks |= {
                    f"{name}.{i}".lstrip("."): child for i, child in enumerate(module) if _is_deep(child)
                }
    return {
        name: module
        for name, module in blocks.items()
        if not any(name.startswith(f"{other}.") for other in blocks if other != name)
    }


def _is_deep(module: nn.Module) -> bool:
    return sum(parameter.dim() >= 2 for parameter in module.parameters()) >= 2
