"""Checkpointing that keeps a function's inputs compressed and recomputes the rest during the backward pass.

Used in place of `torch.utils.checkpoint.checkpoint`. The forward pass runs the function as it is, on exact values,
and throws away what autograd saved; the backward pass decodes the inputs, runs the function again (in chunks of the
batch, if asked) and differentiates that. Seen from outside it is non-reentrant: every parameter used is an input of
one autograd node, so gradients reach each parameter once per backward pass, whatever the number of chunks, also when
no input requires grad (frozen embeddings).
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.autograd.function import once_differentiable
from torch.utils import _pytree as pytree

from slimfit_ds.activations import channels as _registers_codecs  # noqa: F401
from slimfit_ds.activations import graph, rng
from slimfit_ds.activations.autocast import AutocastState
from slimfit_ds.activations.batching import Chunks, Merged, plan_chunks
from slimfit_ds.activations.codecs import Codec, get_codec
from slimfit_ds.activations.forward_pass import Call, Outcome, as_leaves, run_forward
from slimfit_ds.activations.storing import RECIPE, SHARED, SavedTensors, Stored

__all__ = ["checkpoint", "make_checkpoint", "resolve_codec"]


def resolve_codec(codec: Any) -> Codec | None:
    """The codec that a name, a mapping `{"name": ..., option: ...}` or a codec stands for; `None` for exact.

    Equal specifications give the same object, so that payloads can be shared between functions.
    """
    # Codecs fit their tables with real numbers, also while a memory estimate runs on fake tensors.
    with unset_fake_temporarily():
        if isinstance(codec, Mapping):
            codec = get_codec(codec["name"], **{key: value for key, value in codec.items() if key != "name"})
        elif isinstance(codec, str):
            codec = get_codec(codec)
    return None if codec is None or codec.name == "exact" else codec


def make_checkpoint(
    codec: Any = "int8", chunk_tokens: int | None = None, chunk_forward: bool = False
) -> Callable:
    """A checkpoint function with its options bound, for frameworks that call `fn(function, *args)`."""
    return functools.partial(checkpoint, codec=codec, chunk_tokens=chunk_tokens, chunk_forward=chunk_forward)


def checkpoint(
    function: Callable,
    *args: Any,
    codec: Any = "int8",
    chunk_tokens: int | None = None,
    chunk_forward: bool = False,
    select: Callable[[Sequence[Tensor]], Sequence[bool | Codec]] | None = None,
    recompute: Callable | None = None,
    remember_output: bool = False,
    preserve_rng_state: bool = True,
    use_reentrant: bool | None = None,
    **kwargs: Any,
) -> Any:
    """Run `function(*args, **kwargs)`, keep its inputs compressed, and recompute it in the backward pass.

    Args:
        function: any callable on tensors; `functools.partial` is looked through, so that tensors bound by it are
            inputs too. It must give the same result when called again, apart from random numbers, and, for
            `chunk_tokens`, treat the rows of a batch independently.
        args: its arguments. The first floating-point tensor, `[batch, ..., hidden]`, is the hidden state; it and
            the tensors of the same rank, batch and width (an encoder's output) are stored by `codec`. Everything
            else (masks, position embeddings) is kept as it is, by reference.
        codec: name, mapping with options, or codec object; `exact` keeps the inputs themselves.
        chunk_tokens: recompute and differentiate about this many tokens (elements of the hidden state divided by
            its width) at a time; `None`: the whole batch. Gradients are those of the unchunked pass.
        chunk_forward: run the forward pass in the same chunks. It always is when the function draws random
            numbers, since a chunk could not repeat its part of a draw for the whole batch.
        select: which of the input tensors to compress, instead of the rule above; a codec takes the place of `codec`.
        recompute: called in place of `function` in the backward pass, to run hooks that are around the forward
            call already (a module instead of its `forward`).
        remember_output: let functions that store the first result (an active layer's input) recompute it too.
        preserve_rng_state: replay random numbers (dropout) in the recomputation.
        use_reentrant: accepted for compatibility, without effect: the semantics are always non-reentrant.
        kwargs: keyword arguments of `function`.

    Returns:
        What `function` returns, bit for bit; its tensors carry gradients where the function's would.

    Raises:
        ValueError: the function uses a tensor that requires grad and is neither a parameter nor an argument.
    """
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    while isinstance(function, functools.partial):
        args, kwargs = (*function.args, *args), {**function.keywords, **kwargs}
        function = function.func
    call = Call(function, args, kwargs, recompute)
    plan = plan_chunks(call.tensors, chunk_tokens)
    outcome = run_forward(call, plan, chunk_forward, preserve_rng_state)
    if any(outcome.differentiable):
        mask = (select or _hidden_states)(call.tensors)
        chosen = resolve_codec(codec)
        codecs = [chosen if which is True else which or None for which in mask]
        # Parameters that DeepSpeed has partitioned are whole only while their module runs: their gradients are
        # accumulated inside the recomputation, and a dummy input makes autograd visit this node.
        inside = any(hasattr(p, "ds_id") for p in outcome.parameters)
        parameters = [torch.empty(0, requires_grad=True)] if inside else outcome.parameters
        record = _Record(call, plan, outcome, outcome.parameters if inside else None)
        outcome.values = _CheckpointFunction.apply(record, codecs, *call.tensors, *parameters)
        call.tensors = []
        if remember_output:
            SHARED.remember(
                outcome.values[0].detach(),
                RECIPE,
                _REPEATED,
                _Repetition(tuple(record.kept), weakref.ref(record)),
            )
        record.kept = []
    return outcome.take()


def _hidden_states(tensors: Sequence[Tensor]) -> list[bool]:
    """The first floating-point tensor of rank two or more, and those of its rank, batch and width."""
    first = next((t for t in tensors if t.is_floating_point() and t.dim() >= 2), None)
    if first is None:
        return [False] * len(tensors)
    return [
        t.is_floating_point()
        and t.dim() == first.dim()
        and t.shape[0] == first.shape[0]
        and t.shape[-1] == first.shape[-1]
        for t in tensors
    ]


class _Record:
    """What the backward pass needs besides tensors."""

    def __init__(self, call: Call, plan: Chunks, outcome: Outcome, partitioned: list[Tensor] | None):
        self.call, self.partitioned = call, partitioned
        self.outcome: Outcome | None = outcome
        self.plan = plan
        self.states = outcome.states
        self.autocast = AutocastState.capture(call.tensors)
        self.needs_gradient = [t.requires_grad for t in call.tensors]
        self.parameters = partitioned if partitioned is not None else list(outcome.parameters)
        self.stored: list[Stored] = []
        self.kept: list[Tensor] = []

    def repeat(self, tensors: Sequence[Tensor]) -> Tensor:
        """The first result of the function again, from what was saved."""
        inputs = SavedTensors.restore(self.stored, tensors)
        plan = self.plan if len(self.states) == len(self.plan) else self.plan.undivided()
        merged = Merged(plan)
        for index, state in enumerate(self.states):
            with torch.no_grad(), self.autocast.entered(), rng.replay(state):
                leaves = pytree.tree_leaves(self.call.run_again(plan.slice(inputs, index)))
            merged.add(index, [next(leaf for leaf in leaves if isinstance(leaf, Tensor))])
        return merged.values[0]

    def chunks_for(self, gradients: Sequence[Tensor | None]) -> tuple[Chunks, list[rng.RngState | None]]:
        """The chunks to recompute, with the random state of each."""
        if len(self.states) == len(self.plan):
            return self.plan, self.states
        whole = any(g is not None and not self.plan.is_batched(g) for g in gradients)
        # A result without batch dimension may depend on all rows at once.
        plan = self.plan.undivided() if whole else self.plan
        return plan, [None] * len(plan)


class _CheckpointFunction(torch.autograd.Function):
    """Saves the inputs of a function that has run, and repeats it for the gradients."""

    @staticmethod
    def forward(ctx, record: _Record, codecs: list[Codec | None], *tensors: Tensor) -> tuple[Tensor, ...]:
        saved = SavedTensors()
        saved.add_all(record.call.tensors, codecs)
        record.stored, record.kept = saved.records, saved.tensors
        ctx.record = record
        ctx.save_for_backward(*saved.tensors)
        ctx.set_materialize_grads(False)
        outcome, record.outcome = record.outcome, None
        assert outcome is not None
        fixed = [v for v, carries in zip(outcome.values, outcome.differentiable, strict=True) if not carries]
        ctx.mark_non_differentiable(*fixed)
        return tuple(outcome.values)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        record: _Record = ctx.record
        inputs = SavedTensors.restore(record.stored, ctx.saved_tensors)
        plan, states = record.chunks_for(gradients)
        total = _Totals(inputs, record, plan)
        for index in range(len(plan)):
            chunk = as_leaves(plan.slice(inputs, index), record.needs_gradient)
            with torch.enable_grad(), record.autocast.entered(), rng.replay(states[index]):
                results = pytree.tree_leaves(record.call.run_again(chunk))
            results = [value for value in results if isinstance(value, Tensor)]
            heads, weights = [], []
            for value, gradient in zip(results, gradients, strict=True):
                if gradient is None or not value.requires_grad:
                    continue
                if plan.is_batched(gradient) and value.shape != gradient.shape:
                    start, stop = plan.bounds[index]
                    gradient = gradient[start:stop]
                elif index:
                    continue
                heads.append(value)
                weights.append(gradient)
            if heads:
                total.differentiate(heads, weights, chunk, index)
        return (None, None, *total.gradients())


@dataclasses.dataclass(frozen=True)
class _Repetition:
    """How a checkpointed function's first result follows from what the checkpoint saved.

    The record belongs to the checkpoint's node of the graph; the memory of payloads must not keep the model alive.
    """

    tensors: tuple[Tensor, ...]
    record: weakref.ref[_Record]


class _Repeated:
    """Decodes a `_Repetition` to the result."""

    @staticmethod
    def decode(recipe: _Repetition) -> Tensor:
        record = recipe.record()
        if record is None:
            raise RuntimeError(
                "the graph of a checkpointed part was freed before the layer that reads its result"
            )
        return record.repeat(recipe.tensors)


_REPEATED = _Repeated()


class _Totals:
    """Gradients of inputs and parameters, summed or joined over the chunks."""

    def __init__(self, inputs: Sequence[Tensor], record: _Record, plan: Chunks):
        self._wanted = [i for i, needs in enumerate(record.needs_gradient) if needs]
        self._record, self._plan = record, plan
        self._inputs: list[Tensor | None] = [None] * len(inputs)
        self._shapes = [t.shape for t in inputs]
        self._parameters: list[Tensor | None] = [None] * len(record.parameters)

    def differentiate(
        self, heads: list[Tensor], weights: list[Tensor], chunk: list[Tensor], index: int
    ) -> None:
        parameters = self._record.parameters
        wanted = [chunk[i] for i in self._wanted]
        if self._record.partitioned is not None and index == len(self._plan) - 1:
            with graph.add_to_gradients(parameters, self._parameters):
                torch.autograd.backward(heads, weights, inputs=[*wanted, *parameters])
            found: list[Tensor | None] = [t.grad for t in wanted]
        else:
            with graph.without_tensor_hooks(parameters):
                found = list(torch.autograd.grad(heads, [*wanted, *parameters], weights, allow_unused=True))
            for i, gradient in enumerate(found[len(wanted) :]):
                self._parameters[i] = _sum(self._parameters[i], gradient)
        for i, gradient in zip(self._wanted, found, strict=False):
            self._add_input(i, gradient, index)

    def _add_input(self, i: int, gradient: Tensor | None, index: int) -> None:
        if gradient is None or not self._plan.divided[i]:
            self._inputs[i] = _sum(self._inputs[i], gradient)
            return
        start, stop = self._plan.bounds[index]
        whole = self._inputs[i]
        if whole is None:
            whole = self._inputs[i] = gradient.new_zeros(self._shapes[i])
        whole[start:stop] = gradient

    def gradients(self) -> list[Tensor | None]:
        return [*self._inputs, *([None] if self._record.partitioned is not None else self._parameters)]


def _sum(total: Tensor | None, term: Tensor | None) -> Tensor | None:
    if total is None or term is None:
        return term if total is None else total
    return total + term
