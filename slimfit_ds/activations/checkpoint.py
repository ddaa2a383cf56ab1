"""Checkpointing that keeps a function's inputs compressed and recomputes the rest during the backward pass.

Used in place of `torch.utils.checkpoint.checkpoint`. The forward pass runs the function as it is, on exact values,
and throws away what autograd saved; the backward pass decodes the inputs, runs the function again (in chunks of the
batch, if asked) and differentiates that. Seen from outside it is non-reentrant: every parameter used is an input of
one autograd node, so gradients reach each parameter once per backward pass, whatever the number of chunks, also when
no input requires grad (frozen embeddings).
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils import _pytree as pytree

from slimfit_ds.activations import autograd_graph as graph
from slimfit_ds.activations import replay
from slimfit_ds.activations.codecs import Codec, resolve_codec
from slimfit_ds.activations.offload import HostInputs
from slimfit_ds.activations.replay import (
    AutocastState,
    Call,
    Chunks,
    Merged,
    NotTokenwise,
    Piece,
    States,
    plan_chunks,
)
from slimfit_ds.activations.saved_tensors import SHARED, Rebuilt, SavedTensors, Stored

__all__ = [
    "CHANGED",
    "ROWS",
    "SEAM",
    "Replayer",
    "checkpoint",
    "compresses",
    "left_exact",
    "make_checkpoint",
]

CHANGED = "_slimfit_changed"
"""Attribute of a module that the proof found wanting: options of `checkpoint` that stand in for its own, or `None`: left exact."""
SEAM = "_slimfit_seam"
"""Attribute of a module that may run in tiles of the sequence: its `tiles.Seam`."""
ROWS = "_slimfit_rows"
"""Attribute of a module: whether the rows of its batch are independent, or what finds out, called with `Call` and `Chunks`."""


def left_exact(module: nn.Module) -> bool:
    """Return whether the proof on the first batch has left a patched module as it is."""
    return module.__dict__.get(CHANGED, {}) is None


def compresses(module: nn.Module) -> bool:
    """Return whether a patched module compresses what it keeps: training, with gradients, not inside a recomputed part."""
    if not module.training or not torch.is_grad_enabled() or graph.inside_recomputed_part():
        return False
    return not left_exact(module) and not graph.inside_torch_checkpoint()


def make_checkpoint(
    codec: Any = "int8",
    chunk_tokens: int | None = None,
    chunk_forward: bool = False,
    remember_output: bool = False,
    host: HostInputs | None = None,
) -> Callable:
    """Return a checkpoint function with its options bound, for frameworks that call `fn(function, *args)`."""
    return functools.partial(
        checkpoint,
        codec=resolve_codec(codec),
        chunk_tokens=chunk_tokens,
        chunk_forward=chunk_forward,
        remember_output=remember_output,
        host=host,
    )


def checkpoint(
    function: Callable,
    *args: Any,
    codec: Any = "int8",
    chunk_tokens: int | None = None,
    chunk_forward: bool = False,
    select: Callable[[Sequence[Tensor]], Sequence[bool | Codec]] | None = None,
    recompute: Callable | None = None,
    remember_output: bool = False,
    host: HostInputs | None = None,
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
        remember_output: let functions that store the first result (an active layer, the next block) recompute it too.
        host: where the hidden states are kept until the backward pass; `None`: where they are.
        preserve_rng_state: replay random numbers (dropout) in the recomputation.
        use_reentrant: accepted for compatibility, without effect: the semantics are always non-reentrant.
        kwargs: keyword arguments of `function`.

    Returns:
        What `function` returns, bit for bit; its tensors carry gradients where the function's would.

    Raises:
        ValueError: the function uses a tensor that requires grad and is neither a parameter nor an argument.
    """
    if not torch.is_grad_enabled() or graph.inside_torch_checkpoint():
        return function(*args, **kwargs)
    while isinstance(function, functools.partial):
        args, kwargs = (*function.args, *args), {**function.keywords, **kwargs}
        function = function.func
    call = Call(function, args, kwargs, recompute)
    if isinstance(call.owner, nn.Module) and (keys := graph.recorded_inside(call.owner)):
        # What leaves the block on the way needs a graph that can be differentiated.
        graph.warn_of_recorded(call.owner, keys)
        return torch.utils.checkpoint.checkpoint(
            function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state, **kwargs
        )
    plan = plan_chunks(call.tensors, chunk_tokens, tiled=_seam_of(call) is not None)
    ran = _run_unchanged(call, plan, chunk_forward, preserve_rng_state)
    if ran is None:
        return function(*args, **kwargs)
    plan, outcome = ran
    if any(outcome.differentiable):
        mask = (select or _hidden_states)(call.tensors)
        chosen = resolve_codec(codec) if isinstance(codec, str | Mapping) else codec
        codecs = [chosen if which is True else which or None for which in mask]
        # Parameters that DeepSpeed has partitioned are whole only while their module runs: their gradients are
        # accumulated inside the recomputation, and a dummy input makes autograd visit this node.
        inside = any(hasattr(p, "ds_id") for p in outcome.parameters)
        parameters = [torch.empty(0, requires_grad=True)] if inside else outcome.parameters
        record = _Record(call, plan, outcome, outcome.parameters if inside else None)
        hosts = [host if which else None for which in mask]
        outcome.values = _CheckpointFunction.apply(record, codecs, hosts, *call.tensors, *parameters)
        call.tensors = []
        if remember_output:
            again = functools.partial(_repeat, weakref.ref(record))
            SHARED.remember_rebuilt(outcome.values[0], Rebuilt(tuple(record.kept), again))
        record.kept = []
    return outcome.take()


def _rows_are_independent(call: Call, plan: Chunks) -> bool:
    """Return whether the batch may be cut: what the proof found out, or finds out now; true where nothing is to be proven."""
    verdict = call.owner.__dict__.get(ROWS, True) if isinstance(call.owner, nn.Module) else True
    return verdict if isinstance(verdict, bool) else verdict(call, plan)


def _seam_of(call: Call) -> Any:
    """Return where the tokens of a module meet, if it may run in tiles. Whole weights of ZeRO 3 are gathered once for each pass
    through a module, in an order that all ranks share; they would differ by the length of their sequences."""
    owner = call.owner
    seam = owner.__dict__.get(SEAM) if isinstance(owner, nn.Module) else None
    if seam is None or seam.verdict is False or any(hasattr(p, "ds_id") for p in owner.parameters()):  # type: ignore[attr-defined]
        return None
    return seam


# Functions and modules that drew random numbers when they last ran: they start out in chunks the next time.
_DRAWING: weakref.WeakSet = weakref.WeakSet()
# Those with a result that belongs to no sample: it must be that of the whole batch.
_JOINT: weakref.WeakSet = weakref.WeakSet()


# Modules that leave their inputs as they are, and those that change them in place: these cannot be repeated.
_LEAVING: weakref.WeakSet = weakref.WeakSet()
_CHANGING: weakref.WeakSet = weakref.WeakSet()


def _run_unchanged(
    call: Call, plan: Chunks, chunk_forward: bool, preserve_rng_state: bool
) -> tuple[Chunks, _Outcome] | None:
    """Return the chunks and the forward pass, run in them where rows are independent; `None` for a module that changes
    its hidden states in place, which are then as before.

    A module is found out when it runs for the first time, on a copy of its hidden states.
    """
    owner, inputs = call.owner, call.tensors
    if owner in _CHANGING:
        return None
    before = replay.capture(inputs) if preserve_rng_state else None
    if isinstance(owner, nn.Module) and owner not in _LEAVING:
        copied = zip(inputs, _hidden_states(inputs), strict=True)
        call.tensors = [
            t.detach().clone().requires_grad_(t.requires_grad) if hidden else t for t, hidden in copied
        ]
    versions = [t._version for t in call.tensors]
    buffers = replay.buffers_of(owner) if isinstance(owner, nn.Module) else {}
    try:
        if len(plan) > 1 and not _rows_are_independent(call, plan):
            plan = plan.undivided()
        if plan.tiles is not None and not call.owner.__dict__[SEAM].may_be_cut(call, plan):
            plan = plan.untiled()
        try:
            outcome = _run_forward(call, plan, chunk_forward, preserve_rng_state)
        except NotTokenwise as against:
            # This batch is not like the one that the block was proven on.
            owner.__dict__[SEAM].refuse(owner, against)
            replay.restore(before)
            plan = plan.untiled()
            outcome = _run_forward(call, plan, chunk_forward, preserve_rng_state)
        changes = versions != [t._version for t in call.tensors]
    except RuntimeError as error:
        if "leaf Variable that requires grad is being used in an in-place" not in str(error):
            raise
        outcome, changes = None, True
    tried, call.tensors = call.tensors is not inputs, inputs
    if outcome is not None and not changes:
        if tried:
            _LEAVING.add(owner)
        if isinstance(owner, nn.Module):
            call.changing = replay.changing(buffers, owner)
        return plan, outcome
    if not tried:
        raise RuntimeError(f"{type(owner).__name__} {_CHANGES}: leave it exact, by activations.layers")
    warnings.warn(f"{type(owner).__name__} {_CHANGES}: it is left exact", stacklevel=3)
    _CHANGING.add(owner)
    replay.restore(before)
    return None


_CHANGES = "changes its input in place, so it cannot be computed again"


class _Outcome:
    """What a forward pass gave.

    Attributes:
        values: the tensors among the results, detached.
        differentiable: which of them carry gradients.
        parameters: the leaves that were used and are no arguments.
        plan: the chunks that were run.
        states: for each of them the random states before its pieces, or `None` where nothing was drawn.
    """

    def __init__(
        self,
        merged: list[Any],
        differentiable: list[bool],
        structure: Any,
        parameters: list[Tensor],
        plan: Chunks,
        states: list[States],
    ):
        self._positions = [i for i, value in enumerate(merged) if isinstance(value, Tensor)]
        self.differentiable = [differentiable[i] for i in self._positions]
        self.values: Sequence[Tensor] = [merged[i].detach() for i in self._positions]
        self.parameters, self.plan, self.states = parameters, plan, states
        self._rest = [None if isinstance(value, Tensor) else value for value in merged]
        self._structure = structure

    @property
    def drew(self) -> bool:
        """Whether random numbers were drawn."""
        return any(state is not None for states in self.states for state in states)

    def take(self) -> Any:
        """Return the results as the function would return them."""
        leaves = list(self._rest)
        for position, value in zip(self._positions, self.values, strict=True):
            leaves[position] = value
        self.values, self.parameters = [], []
        return pytree.tree_unflatten(leaves, self._structure)


def _run_forward(call: Call, plan: Chunks, chunk_forward: bool, preserve_rng_state: bool) -> _Outcome:
    """Run the function on exact values, keeping nothing for backward.

    In chunks where it must be, and where it may be and every result has a row for each sample: any other may depend
    on all of them (the load balance of a mixture of experts).
    """
    draws = preserve_rng_state and call.owner in _DRAWING
    before = replay.capture(call.tensors) if preserve_rng_state else None
    outcome = None
    if chunk_forward and not draws and call.owner not in _JOINT:
        try:
            outcome = _run(call, plan, preserve_rng_state, by_row=True)
        except _Joint:
            _JOINT.add(call.owner)
            replay.restore(before)
    if outcome is None:
        outcome = _run(call, plan if draws else plan.undivided(), preserve_rng_state)
    if outcome.drew:
        _DRAWING.add(call.owner)
    else:
        _DRAWING.discard(call.owner)
    if outcome.plan != plan and outcome.drew:
        # A chunk cannot repeat its part of a dropout mask drawn for the whole batch.
        replay.restore(before)
        outcome = _run(call, plan, preserve_rng_state)
    return outcome


class _Joint(Exception):
    """A chunk gave a result without a row for each sample."""


class _Recorder:
    """A `Piece` of a forward pass: keeps nothing for backward, and notes parameters and random states."""

    def __init__(self, call: Call, preserve_rng_state: bool):
        self._autocast, self._preserve = AutocastState.capture(call.tensors), preserve_rng_state
        self.parameters: dict[int, Tensor] = {}
        self.states: States = []

    def __call__(self, run: Callable[[], Any], inputs: Sequence[Tensor]) -> Any:
        before = replay.capture(inputs) if self._preserve else None
        start = graph.position()
        with self._autocast.entered(), graph.nothing_saved(), graph.recomputed_part():
            results = run()
        self.states.append(before if replay.consumed_since(before, inputs) else None)
        found = [v for v in pytree.tree_leaves(results) if isinstance(v, Tensor)]
        for leaf in graph.leaves_used(found, start):
            if not any(leaf is tensor for tensor in inputs):
                self.parameters.setdefault(id(leaf), leaf)
        return results


class Replayer:
    """A `Piece` that draws the random numbers of the forward pass again.

    Args:
        autocast: of the forward pass.
        states: of its pieces; empty: nothing was drawn.
    """

    def __init__(self, autocast: AutocastState, states: States):
        self._autocast, self._states = autocast, states
        self.rewind()

    def rewind(self) -> None:
        """Go on with the first piece."""
        self._left = iter(self._states)

    def __call__(self, run: Callable[[], Any], inputs: Sequence[Tensor]) -> Any:
        with self._autocast.entered(), replay.replayed(next(self._left, None)), graph.recomputed_part():
            return run()


def _run_chunk(
    call: Call, run: Callable, plan: Chunks, inputs: list[Tensor], piece: Piece
) -> tuple[list, Any]:
    """Return the leaves of the results of one chunk, and their structure."""
    if plan.tiles is None:
        return pytree.tree_flatten(piece(lambda: run(inputs), inputs))
    return call.owner.__dict__[SEAM].over(plan.tiles, run, inputs).forward(piece)


def _run(call: Call, plan: Chunks, preserve_rng_state: bool, by_row: bool = False) -> _Outcome:
    merged, states, piece = Merged(plan), [], _Recorder(call, preserve_rng_state)
    differentiable: list[bool] = []
    for index in range(len(plan)):
        inputs = _as_leaves(plan.slice(call.tensors, index), [t.requires_grad for t in call.tensors])
        leaves, structure = _run_chunk(call, call.run, plan, inputs, piece)
        states.append(piece.states)
        piece.states = []
        carry = [isinstance(v, Tensor) and v.requires_grad for v in leaves]
        differentiable = [a or b for a, b in zip(differentiable or carry, carry, strict=True)]
        with torch.no_grad():
            merged.add(index, [v.detach() if isinstance(v, Tensor) else v for v in leaves])
        if by_row and not merged.by_row:
            raise _Joint
        del leaves
    return _Outcome(merged.values, differentiable, structure, [*piece.parameters.values()], plan, states)


def _as_leaves(tensors: Sequence[Any], needs_gradient: Sequence[bool], tiled: bool = False) -> list[Any]:
    """Return leaves of the graph to come. What is on the host comes to the device, but in tiles only with these."""
    leaves = []
    for tensor, needs in zip(tensors, needs_gradient, strict=True):
        whole = tensor if tiled or isinstance(tensor, Tensor) else tensor.whole()
        leaves.append(whole.detach().requires_grad_(needs))
    return leaves


def _hidden_states(tensors: Sequence[Tensor]) -> list[bool]:
    """Select the first floating-point tensor of rank two or more, and those of its rank, batch and width."""
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

    def __init__(self, call: Call, plan: Chunks, outcome: _Outcome, partitioned: list[Tensor] | None):
        self.call, self.partitioned = call, partitioned
        self.outcome: _Outcome | None = outcome
        self.plan, self.ran, self.states = plan, outcome.plan, outcome.states
        self.autocast = AutocastState.capture(call.tensors)
        self.needs_gradient = [t.requires_grad for t in call.tensors]
        self.parameters = partitioned if partitioned is not None else list(outcome.parameters)
        self.stored: list[Stored] = []
        self.kept: list[Tensor] = []

    def repeat(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the first result of the function again, from what was saved."""
        inputs = SavedTensors.restore(self.stored, tensors)
        plan = self.ran
        merged = Merged(plan)
        for index, states in enumerate(self.states):
            piece = Replayer(self.autocast, states)
            chunk = _as_leaves(plan.slice(inputs, index), [False] * len(inputs), plan.tiles is not None)
            with torch.no_grad():
                leaves, _ = _run_chunk(self.call, self.call.run_again, plan, chunk, piece)
            merged.add(index, [next(leaf for leaf in leaves if isinstance(leaf, Tensor))])
        return merged.values[0]

    def chunks_for(self, gradients: Sequence[Tensor | None]) -> tuple[Chunks, list[States]]:
        """Return the chunks to recompute, with the random states of each."""
        if self.ran == self.plan:
            return self.plan, self.states
        whole = any(g is not None and not self.plan.is_batched(g) for g in gradients)
        # A result without batch dimension may depend on all rows at once.
        plan = self.plan.undivided() if whole else self.plan
        return plan, [[] for _ in plan.bounds]


class _CheckpointFunction(torch.autograd.Function):
    """Saves the inputs of a function that has run, and repeats it for the gradients."""

    @staticmethod
    def forward(
        ctx,
        record: _Record,
        codecs: list[Codec | None],
        hosts: list[HostInputs | None],
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        saved, first = SavedTensors(), record.plan.first_rows(record.call.tensors)
        for tensor, codec, host in zip(record.call.tensors, codecs, hosts, strict=True):
            saved.add(tensor, codec, host, first)
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
        total = graph.Totals(
            inputs, record.needs_gradient, record.parameters, record.partitioned is not None, plan
        )
        for index in range(len(plan)):
            piece = Replayer(record.autocast, states[index])
            if plan.tiles is not None:
                seam = record.call.owner.__dict__[SEAM]
                chunk = _as_leaves(plan.slice(inputs, index), record.needs_gradient, tiled=True)
                try:
                    run = seam.over(plan.tiles, record.call.run_again, chunk)
                    run.backward(gradients, total, index, piece)
                    continue
                except NotTokenwise as against:
                    # Only where the forward pass ran whole: nothing has been drawn or added yet.
                    seam.refuse(record.call.owner, against)
                    plan = plan.untiled()
            chunk = _as_leaves(plan.slice(inputs, index), record.needs_gradient)
            with torch.enable_grad():
                results = piece(functools.partial(record.call.run_again, chunk), chunk)
            total.add(*graph.heads_of(results, gradients, plan, index), chunk, index)
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            for stored in record.stored:
                if stored.away is not None:
                    stored.away.release()
        return (None, None, None, *total.gradients())


def _repeat(record: weakref.ref[_Record], *tensors: Tensor) -> Tensor:
    """Return the first result of a checkpointed function again, from what its checkpoint keeps.

    The record belongs to the checkpoint's node of the graph: what is remembered of it must not keep the model alive.
    """
    found = record()
    if found is None:
        raise RuntimeError(
            "the graph of a checkpointed part was freed before the layer that reads its result"
        )
    return found.repeat(tensors)
