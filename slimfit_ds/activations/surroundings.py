"""What runs around and inside of our blocks without being ours: torch's checkpointing, and outputs that transformers takes
out of a block while it runs.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Iterator

import torch
from torch import nn

__all__ = ["inside_torch_checkpoint", "recorded_inside", "warn_of_recorded"]


def inside_torch_checkpoint() -> bool:
    """Return whether torch's own checkpointing runs this code: what is saved here is dropped, or used at once."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is not None and getattr(hooks[0], "__module__", None) == "torch.utils.checkpoint"


def recorded_inside(module: nn.Module) -> list[str]:
    """Return what transformers records inside of a module in this forward pass (`router_logits`, `attentions`).

    Its hooks stay for ever once they were needed; they take something while their model's `output_...` asks for it.
    """
    capturing = sys.modules.get("transformers.utils.output_capturing")
    wanted = None if capturing is None else capturing._active_collector.get()
    if not wanted:
        return []
    inner = (child for child in module.modules() if child is not module)
    return sorted({key for child in inner for key in _keys(child) if key in wanted})


def _keys(module: nn.Module) -> Iterator[str]:
    for hook in module._forward_hooks.values():
        if getattr(hook, "__name__", None) == "output_capturing_hook":
            yield inspect.getclosurevars(hook).nonlocals["key"]


def warn_of_recorded(module: nn.Module, keys: list[str]) -> None:
    """Say once for each kind of block what its recorded outputs cost."""
    warnings.warn(
        f"{type(module).__name__}: {', '.join(keys)} leave it while it runs (output_{keys[0]}), so torch's checkpointing "
        f"recomputes it: its input is kept as it is, and it runs on the whole batch",
        stacklevel=2,
    )
