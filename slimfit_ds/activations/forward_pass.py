"""The forward pass of a checkpointed function: exact values, nothing kept, and what the backward pass must know."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from slimfit_ds.activations import graph, rng
from slimfit_ds.activations.autocast import AutocastState
from slimfit_ds.activations.batching import Chunks, Merged
from slimfit_ds.activations.scope import recomputed_part

__all__ = ["Call", "Outcome", "as_leaves", "run_forward"]

# Functions and modules that drew random numbers when they last ran: they start out in chunks the next time.
_DRAWING: weakref.WeakSet = weakref.WeakSet()
# Those with a result that belongs to no sample: it must be that of the whole batch.
_JOINT: weakref.WeakSet = weakref.WeakSet()


class Call:
    """A function with its arguments taken apart into tensors and the rest."""

    def __init__(self, function: Callable, args: tuple, kwargs: dict[str, Any], recompute: Callable | None):
        leaves, self._structure = pytree.tree_flatten((args, kwargs), is_leaf=_is_opaque)
        self._function, self._again = function, recompute or function
        holders = (getattr(function, "__self__", None), *leaves)
        self.owner = next((x for x in holders if isinstance(x, nn.Module)), function)
        self._positions = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self.tensors: list[Tensor] = [leaves[i] for i in self._positions]
        self._leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def run(self, tensors: Sequence[Tensor]) -> Any:
        """The function's results for these tensors."""
        return self._call(self._function, tensors)

    def run_again(self, tensors: Sequence[Tensor]) -> Any:
        """The same in the backward pass."""
        return self._call(self._again, tensors)

    def _call(self, function: Callable, tensors: Sequence[Tensor]) -> Any:
        leaves = list(self._leaves)
        for position, tensor in zip(self._positions, tensors, strict=True):
            leaves[position] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self._structure)
        with recomputed_part():
            return function(*args, **kwargs)


def _is_opaque(value: Any) -> bool:
    """Caches and other objects are passed on as they are, even if they are registered as trees."""
    return not isinstance(value, (tuple, list, dict))


class Outcome:
    """What a forward pass gave.

    Attributes:
        values: the tensors among the results, detached.
        differentiable: which of them carry gradients.
        parameters: the leaves that were used and are no arguments.
        states: for each chunk that was run, the random state before it, or `None` where nothing was drawn.
    """

    def __init__(
        self,
        merged: list[Any],
        differentiable: list[bool],
        structure: Any,
        parameters: list[Tensor],
        states: list,
    ):
        self._positions = [i for i, value in enumerate(merged) if isinstance(value, Tensor)]
        self.differentiable = [differentiable[i] for i in self._positions]
        self.values: Sequence[Tensor] = [merged[i].detach() for i in self._positions]
        self.parameters, self.states = parameters, states
        self._rest = [None if isinstance(value, Tensor) else value for value in merged]
        self._structure = structure

    def take(self) -> Any:
        """The results as the function would return them."""
        leaves = list(self._rest)
        for position, value in zip(self._positions, self.values, strict=True):
            leaves[position] = value
        self.values, self.parameters = [], []
        return pytree.tree_unflatten(leaves, self._structure)


def run_forward(call: Call, plan: Chunks, chunk_forward: bool, preserve_rng_state: bool) -> Outcome:
    """Run the function on exact values, keeping nothing for backward.

    In chunks where it must be, and where it may be and every result has a row for each sample: any other may depend
    on all of them (the load balance of a mixture of experts).
    """
    draws = preserve_rng_state and call.owner in _DRAWING
    before = rng.capture(call.tensors) if preserve_rng_state else None
    outcome = None
    if chunk_forward and not draws and call.owner not in _JOINT:
        try:
            outcome = _run(call, plan, preserve_rng_state, by_row=True)
        except _Joint:
            _JOINT.add(call.owner)
            rng.restore(before)
    if outcome is None:
        outcome = _run(call, plan if draws else plan.undivided(), preserve_rng_state)
    if any(state is not None for state in outcome.states):
        _DRAWING.add(call.owner)
    else:
        _DRAWING.discard(call.owner)
    if len(outcome.states) < len(plan) and outcome.states[0] is not None:
        # A chunk cannot repeat its part of a dropout mask drawn for the whole batch.
        rng.restore(before)
        outcome = _run(call, plan, preserve_rng_state)
    return outcome


class _Joint(Exception):
    """A chunk gave a result without a row for each sample."""


def _run(call: Call, plan: Chunks, preserve_rng_state: bool, by_row: bool = False) -> Outcome:
    merged, states = Merged(plan), []
    differentiable: list[bool] = []
    parameters: dict[int, Tensor] = {}
    autocast = AutocastState.capture(call.tensors)
    for index in range(len(plan)):
        inputs = as_leaves(plan.slice(call.tensors, index), [t.requires_grad for t in call.tensors])
        before = rng.capture(inputs) if preserve_rng_state else None
        start = graph.position()
        with autocast.entered(), graph.nothing_saved():
            leaves, structure = pytree.tree_flatten(call.run(inputs))
        states.append(before if rng.consumed_since(before, inputs) else None)
        for leaf in graph.leaves_used([v for v in leaves if isinstance(v, Tensor)], start):
            if not any(leaf is tensor for tensor in inputs):
                parameters.setdefault(id(leaf), leaf)
        carry = [isinstance(v, Tensor) and v.requires_grad for v in leaves]
        differentiable = [a or b for a, b in zip(differentiable or carry, carry, strict=True)]
        with torch.no_grad():
            merged.add(index, [v.detach() if isinstance(v, Tensor) else v for v in leaves])
        if by_row and not merged.by_row:
            raise _Joint
        del leaves
    return Outcome(merged.values, differentiable, structure, list(parameters.values()), states)


def as_leaves(tensors: Sequence[Tensor], needs_gradient: Sequence[bool]) -> list[Tensor]:
    return [t.detach().requires_grad_(needs) for t, needs in zip(tensors, needs_gradient, strict=True)]
