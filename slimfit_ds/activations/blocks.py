"""The repeated blocks of a transformer and the parts of a block that a norm feeds, without a table of classes."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from slimfit_ds.activations.patching import Patches

__all__ = ["find_blocks", "find_consumers", "has_checkpoint_seam", "inside", "install_seam"]

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
    return {name: module for name, module in blocks.items() if not inside(name, blocks)}


def find_consumers(block: nn.Module, norm_widths: dict[nn.Module, int]) -> dict[str, nn.Module]:
    """The largest parts of a block that hold weights but none of its norms, by name within the block.

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
    """Whether the module of that name lies within one of the others."""
    return any(name.startswith(f"{other}.") for other in others)


def install_seam(patches: Patches, model: nn.Module, block: nn.Module, function: Callable) -> None:
    """Let a block with the checkpoint seam run through `function(forward, *args)` while it trains."""
    patches.set(block, "gradient_checkpointing", True)
    patches.set(block, "_gradient_checkpointing_func", function)
    # Some models look at their own flag before they hand a cache to a block.
    for module in model.modules():
        if "gradient_checkpointing" in module.__dict__ and any(child is block for child in module.modules()):
            patches.set(module, "gradient_checkpointing", True)


def _is_deep(module: nn.Module) -> bool:
    return sum(parameter.dim() >= 2 for parameter in module.parameters()) >= 2
