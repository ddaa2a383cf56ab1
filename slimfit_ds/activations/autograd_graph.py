"""The autograd graph of a forward pass: built without saving anything, searched for the parameters it used, and what of others
is in force in it: torch's own checkpointing, and outputs that transformers takes out of a block while it runs.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

__all__ = [
    "add_to_gradients",
    "inside_torch_checkpoint",
    "leaves_used",
    "nothing_saved",
    "position",
    "recorded_inside",
    "warn_of_recorded",
    "without_tensor_hooks",
]


def nothing_saved() -> torch.autograd.graph.saved_tensors_hooks:
    """Build the graph but drop every tensor that it would keep for backward."""
    return torch.autograd.graph.saved_tensors_hooks(_drop, _no_backward)


def _drop(tensor: Tensor) -> None:
    return None


def _no_backward(nothing: None) -> Tensor:
    raise RuntimeError(
        "a tensor left a recomputed part of the model other than by its result (a forward hook, an attribute), and a loss was "
        "made of it, which cannot be differentiated: let the block return it, or choose the preset balanced, which "
        "recomputes no whole blocks"
    )


def position() -> int:
    """Return a number that nodes created from now on (by this thread) reach or exceed."""
    return torch._C._autograd._get_sequence_nr()


def leaves_used(outputs: Iterable[Tensor], start: int) -> list[Tensor]:
    """Return the leaf tensors that `outputs` were computed from, in a graph created since `start`.

    Args:
        outputs: results of the computation.
        start: `position()` before the computation.

    Raises:
        ValueError: the computation used a tensor with an older graph, which is no leaf.
    """
    leaves: list[Tensor] = []
    pending: list[Any] = [t.grad_fn if t.grad_fn is not None else t for t in outputs if t.requires_grad]
    seen = set()
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if isinstance(node, Tensor):
            leaves.append(node)
        elif hasattr(node, "variable"):
            leaves.append(node.variable)
        elif node._sequence_nr() < start:
            raise ValueError(
                "the checkpointed function uses a tensor that requires grad and that it was not given as an "
                f"argument (made by {node.name()}); pass it as an argument so that its gradient is not lost"
            )
        else:
            pending.extend(following for following, _ in node.next_functions if following is not None)
    return leaves


@contextlib.contextmanager
def without_tensor_hooks(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Silence hooks that users registered on these leaves: they see the whole gradient later, once."""
    hooked = [(t, t._backward_hooks) for t in tensors if t._backward_hooks]
    for tensor, _ in hooked:
        tensor._backward_hooks = None
    try:
        yield
    finally:
        for tensor, hooks in hooked:
            tensor._backward_hooks = hooks


@contextlib.contextmanager
def add_to_gradients(tensors: Sequence[Tensor], extra: Sequence[Tensor | None]) -> Iterator[None]:
    """Add `extra` to the gradients that reach these leaves within the context."""
    handles: list[RemovableHandle] = [
        tensor.register_hook(lambda gradient, term=term: gradient + term)
        for tensor, term in zip(tensors, extra, strict=True)
        if term is not None
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
