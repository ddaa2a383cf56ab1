"""Whether a block may run in tiles of its sequence: tried on some tokens of the user's own batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from slimfit_ds.activations import autograd_graph as graph
from slimfit_ds.activations import replay
from slimfit_ds.activations.checkpoint import checkpoint
from slimfit_ds.activations.replay import AutocastState, Call, Chunks, NotTokenwise, first_tokens, plan_chunks
from slimfit_ds.activations.tiles import HEAD_TOKENS, Seam, TilePass
from slimfit_ds.activations.twin import NothingRandom, direction, relative_error, rounding, undisturbed
from slimfit_ds.trainable.split import SplitModule

__all__ = ["prove_tiles"]

_FEW = 128
"""Tokens that are tried."""


def prove_tiles(seam: Seam, call: Call, plan: Chunks) -> str | None:
    """Compare a block in two tiles with itself whole: results, and gradients of inputs and of weights that train; by single heads, or
    else with all heads at once.

    Args:
        seam: of the block; learns which of its modules lead to its attention alone.
        call: of the block.
        plan: with tiles.

    Returns:
        What speaks against it, to follow "tokens"; `None`: nothing. Fake tensors have no values to compare.
    """
    assert plan.tiles is not None
    assert isinstance(call.owner, nn.Module)
    tokens = plan.tiles.tokens
    few = min(tokens, _FEW)
    short = [first_tokens(t, tokens, few) for t in plan.slice(call.tensors, 0)]
    # A block that has nothing to differentiate in this step may have it in another.
    next(t for t in short if t.is_floating_point() and t.dim() >= 3).requires_grad_()
    tiled = plan_chunks(short, few - few // 3, tiled=True)
    if tiled.tiles is None:
        return "are too few to be tried"
    against = None
    for each_head, otherwise in ((1, HEAD_TOKENS), (None, None)):
        seam.head_tokens = each_head
        against = _try(seam, call, call.owner, tiled, short)
        if against is None:
            seam.head_tokens = otherwise
            break
    return against


def _try(seam: Seam, call: Call, owner: nn.Module, tiled: Chunks, short: list[Tensor]) -> str | None:
    try:
        with replay.replayed(replay.capture(short)), undisturbed(owner):
            _find_skipped(seam, call, owner, tiled, short)
            if any(isinstance(t, FakeTensor) for t in short):
                return None
            return _difference(seam, call, owner, tiled, short)
    except Exception as error:  # Whatever a model raises at part of its tokens: it runs whole.
        return (
            str(error) if isinstance(error, NotTokenwise) else f"alone raise {type(error).__name__}: {error}"
        )


def _find_skipped(seam: Seam, call: Call, owner: nn.Module, plan: Chunks, tensors: list[Tensor]) -> None:
    """Find the modules behind whose results nothing follows once the attention's result is there."""
    autocast = AutocastState.capture(tensors)

    def piece(run: Any, inputs: Sequence[Tensor]) -> Any:
        before = replay.capture(inputs)
        with autocast.entered(), graph.nothing_saved(), graph.recomputed_part():
            results = run()
        drew.append(replay.consumed_since(before, inputs))
        return results

    drew: list[bool] = []
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in tensors]
    tiles = TilePass(seam, plan.tiles, call.run, leaves)  # type: ignore[arg-type]
    tiles.gather(piece)
    if any(drew):
        raise NotTokenwise("have random numbers drawn in front of their attention")
    outputs = [output.detach().requires_grad_() for output in tiles.attend(piece)]
    made: dict[nn.Module, list[Tensor]] = {}

    def note(module: nn.Module, args: tuple, result: Any) -> None:
        if isinstance(result, Tensor) and len(args) == 1 and result.shape[:-1] == args[0].shape[:-1]:
            made.setdefault(module, []).append(result)

    candidates = [m for m in owner.modules() if not any(True for _ in m.children())]
    handles = [m.register_forward_hook(note) for m in candidates]
    try:
        results = tiles.behind(piece, tiles.part(0), tiles.output_of(outputs, 0))
    finally:
        for handle in handles:
            handle.remove()
    reached = graph.nodes_behind([t for t in pytree.tree_leaves(results) if isinstance(t, Tensor)])
    seam.skipped = {
        module: (of[0].shape[-1], of[0].dtype)
        for module, of in made.items()
        if len(of) == 1 and of[0].grad_fn is not None and of[0].grad_fn not in reached
    }


def _difference(seam: Seam, call: Call, owner: nn.Module, plan: Chunks, tensors: list[Tensor]) -> str | None:
    assert plan.tiles is not None
    limit = rounding([*tensors, *owner.parameters()])
    wanting = [t for t in tensors if t.requires_grad]
    # Of a split layer the columns may be elsewhere than their parameter.
    leaves = {m.weight_columns: m.leaf for m in owner.modules() if isinstance(m, SplitModule)}
    parameters = [leaves.get(p, p) for p in owner.parameters() if p.requires_grad]
    found = []
    for chunk in (None, plan.tiles.bounds[0][1]):
        seam.verdict = chunk is not None
        function, args, kwargs = call.with_tensors(tensors)
        with torch.enable_grad(), NothingRandom():
            results = checkpoint(
                function, *args, codec=None, chunk_tokens=chunk, chunk_forward=True, **kwargs
            )
            heads = [t for t in pytree.tree_leaves(results) if isinstance(t, Tensor)]
            sources = [t for t in heads if t.requires_grad]
            weights = [direction(t, i) for i, t in enumerate(sources)]
            with graph.without_tensor_hooks(parameters):
                gradients = torch.autograd.grad(sources, [*wanting, *parameters], weights, allow_unused=True)
        found.append(([t.detach() for t in heads], gradients))
    (whole, expected), (cut, gradients) = found
    if len(whole) != len(cut):
        return "depend on each other: other results come of them if they are cut"
    if (error := relative_error(cut, whole)) > limit:
        return f"depend on each other: they differ by {error:.2g} if they are cut"
    if (error := relative_error(gradients, expected)) > limit:
        return f"depend on each other: gradients differ by {error:.2g} if they are cut"
    return None
