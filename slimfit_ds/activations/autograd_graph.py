"""The autograd graph of a forward pass: built without saving anything, searched for the parameters it used, differentiated part by
part, and what of others is in force in it: torch's own checkpointing, and outputs that transformers takes out of a block.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from slimfit_ds.activations.replay import Chunks

__all__ = [
    "Totals",
    "add_to_gradients",
    "heads_of",
    "inside_recomputed_part",
    "inside_torch_checkpoint",
    "leaves_used",
    "nodes_behind",
    "nothing_saved",
    "position",
    "recomputed_part",
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


def nodes_behind(outputs: Iterable[Tensor]) -> set[Any]:
    """Return all nodes of the graph that `outputs` were computed by."""
    pending: list[Any] = [t.grad_fn for t in outputs if t.grad_fn is not None]
    seen = set()
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            pending.extend(following for following, _ in node.next_functions if following is not None)
    return seen


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


class _Depth(threading.local):
    value = 0


_depth = _Depth()


@contextlib.contextmanager
def recomputed_part() -> Iterator[None]:
    """Mark code whose saved tensors are dropped at once (forward) or used at once (recomputation)."""
    _depth.value += 1
    try:
        yield
    finally:
        _depth.value -= 1


def inside_recomputed_part() -> bool:
    """Return whether such code runs."""
    return bool(_depth.value)


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


class Totals:
    """Gradients of inputs and parameters, summed or joined over chunks and tiles.

    Args:
        inputs: of the function, whole.
        wanted: which of them need a gradient.
        parameters: that the function uses.
        partitioned: they are DeepSpeed's, whole only while they are used: their gradients are accumulated in the last chunk.
        plan: the chunks.
    """

    def __init__(
        self,
        inputs: Sequence[Tensor],
        wanted: Sequence[bool],
        parameters: list[Tensor],
        partitioned: bool,
        plan: Chunks,
    ):
        self.plan = plan
        self._wanted = [i for i, needs in enumerate(wanted) if needs]
        self._partitioned, self._used = partitioned, parameters
        self._inputs: list[Tensor | None] = [None] * len(inputs)
        self._shapes = [t.shape for t in inputs]
        self._parameters: list[Tensor | None] = [None] * len(parameters)

    def add(
        self,
        heads: list[Tensor],
        weights: list[Tensor],
        leaves: Sequence[Tensor],
        index: int,
        tile: int | None = None,
        others: Sequence[Tensor] = (),
    ) -> list[Tensor | None]:
        """Differentiate a part of the function.

        Args:
            heads: its results.
            weights: their gradients.
            leaves: its inputs, of one chunk or tile.
            index: of the chunk.
            tile: of the tile; `None`: `leaves` are those of the whole chunk.
            others: further leaves.

        Returns:
            The gradients of `others`.
        """
        # A hidden state on the host is read in tiles only.
        which = [i for i in self._wanted if isinstance(leaves[i], Tensor)]
        wanted = [leaves[i] for i in which]
        if not heads:
            return [None] * len(others)
        if self._partitioned and index == len(self.plan) - 1:
            with add_to_gradients(self._used, self._parameters):
                torch.autograd.backward(heads, weights, inputs=[*wanted, *self._used])
            found: list[Tensor | None] = [t.grad for t in wanted]
        else:
            # Only leaves that need one.
            sought = [*wanted, *others, *self._used]
            with without_tensor_hooks(self._used):
                found = list(torch.autograd.grad(heads, sought, weights, allow_unused=True))
            for i, gradient in enumerate(found[len(wanted) + len(others) :]):
                self._parameters[i] = _sum(self._parameters[i], gradient)
        for i, gradient in zip(which, found, strict=False):
            self._add_input(i, gradient, index, tile)
        return found[len(wanted) : len(wanted) + len(others)]

    def _add_input(self, i: int, gradient: Tensor | None, index: int, tile: int | None) -> None:
        tiles = self.plan.tiles
        if gradient is None or not (
            self.plan.divided[i] or (tiles is not None and tiles.dims[i] is not None)
        ):
            self._inputs[i] = _sum(self._inputs[i], gradient)
            return
        whole = self._inputs[i]
        if whole is None:
            whole = self._inputs[i] = gradient.new_zeros(self._shapes[i])
        self.plan.region(i, whole, index, tile).add_(gradient)

    def gradients(self) -> list[Tensor | None]:
        """Return those of the inputs, and of the parameters unless these are partitioned."""
        return [*self._inputs, *([None] if self._partitioned else self._parameters)]


def _sum(total: Tensor | None, term: Tensor | None) -> Tensor | None:
    if total is None or term is None:
        return term if total is None else total
    return total + term


def heads_of(
    results: Any, gradients: Sequence[Tensor | None], plan: Chunks, index: int, tile: int | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the results of a chunk or tile that have a gradient, and their parts of it."""
    heads, weights = [], []
    values = [value for value in pytree.tree_leaves(results) if isinstance(value, Tensor)]
    for value, gradient in zip(values, gradients, strict=True):
        if gradient is None or not value.requires_grad:
            continue
        if plan.is_batched(gradient) and value.shape != gradient.shape:
            start, stop = plan.bounds[index]
            gradient = gradient[start:stop]
        elif index and tile is None:
            continue
        if tile is not None:
            start, stop = plan.tiles.bounds[tile]  # type: ignore[union-attr]
            gradient = gradient[:, start:stop]
        heads.append(value)
        weights.append(gradient)
    return heads, weights
