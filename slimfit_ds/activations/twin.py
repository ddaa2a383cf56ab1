"""A part of a model run as it is and as it was changed, on copies of its arguments, and what differs between the two.

Nothing of a run stays in the model: random states, buffers, flags and gradients are put back, and hooks behind a module (which
recorders of hidden states and router logits are) do not see it.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from slimfit_ds.activations import autograd_graph as graph
from slimfit_ds.activations import replay
from slimfit_ds.activations.ops.dropout import masks_of_torch
from slimfit_ds.activations.replay import AutocastState, first_tokens, is_opaque, plan_chunks
from slimfit_ds.memory.saved import SavedActivations
from slimfit_ds.trainable.split import SplitModule, whole_weight

__all__ = [
    "Arguments",
    "NothingRandom",
    "Outcome",
    "difference",
    "direction",
    "relative_error",
    "rounding",
    "run",
    "undisturbed",
]


_FEW = 256
"""Tokens of which fewer say little: a rounded ReLU input near zero weighs much among few."""


@dataclass(frozen=True)
class Outcome:
    """What a part gave.

    Attributes:
        results: tensors among the results.
        inputs: gradients of the arguments that want one.
        parameters: gradients by name; `None`: not used.
        buffers: by name, after forward and backward pass.
        caches: tensors in other arguments (key-value caches), after forward and backward pass.
        bytes: kept from forward to backward pass.
    """

    results: list[Tensor]
    inputs: list[Tensor | None]
    parameters: dict[str, Tensor | None]
    buffers: dict[str, Tensor]
    caches: list[Tensor]
    bytes: int


class Arguments:
    """Arguments of a module's forward, of which copies are made: of some rows of the batch, spread over it.

    An eighth of the rows, but two and about 256 tokens at least, and about `tokens` tokens at most, the first ones of a longer sequence: what is kept of a block
    uncompressed must be little beside what the run keeps of all blocks.

    Attributes:
        tensors: of the whole batch.
    """

    def __init__(self, args: tuple, kwargs: dict[str, Any], tokens: int):
        self._leaves, self._structure = pytree.tree_flatten((args, kwargs), is_leaf=is_opaque)
        self.tensors: list[Tensor] = [leaf for leaf in self._leaves if isinstance(leaf, Tensor)]
        hidden = next((t for t in self.tensors if t.is_floating_point() and t.dim() > 2 and t.numel()), None)
        most = tokens
        if hidden is not None:
            whole = hidden.numel() // hidden.shape[-1]
            tokens = min(tokens, max(2 * whole // hidden.shape[0], whole // 8, _FEW))
        self._plan = plan_chunks(self.tensors, tokens)
        # Of a long sequence the first tokens, of which a block is as large as the tiles in which it runs.
        length = hidden.shape[1] if hidden is not None and hidden.dim() == 3 else 0
        self._cut = (length, max(most // 2, 1)) if length > most else None

    @property
    def share(self) -> float:
        """Of the rows that are in the copies."""
        start, stop = self._plan.bounds[0]
        length, few = self._cut or (1, 1)
        return (stop - start) / self._plan.batch * few / length

    @property
    def is_part(self) -> bool:
        return len(self._plan) > 1 or self._cut is not None

    def take_whole(self) -> None:
        """Copy the whole batch from now on."""
        self._plan, self._cut = self._plan.undivided(), None

    def _part(self, tensor: Tensor, divided: bool) -> Tensor:
        part = tensor.detach() if self._cut is None else first_tokens(tensor, *self._cut)
        if not divided:
            return part.clone()
        rows = torch.linspace(0, self._plan.batch - 1, self._plan.bounds[0][1]).long()
        return part[rows.to(tensor.device)]

    def copies(self) -> tuple[tuple, dict[str, Any], list[Tensor], list[Any]]:
        """Return arguments and keyword arguments, the leaves among them that want a gradient, and copies of caches."""
        fresh: dict[int, Tensor] = {}
        wanting: list[Tensor] = []
        for whole, divided in zip(self.tensors, self._plan.divided, strict=True):
            if id(whole) not in fresh:
                leaf = self._part(whole, divided)
                if whole.requires_grad:
                    wanting.append(leaf.requires_grad_())
                # No leaf: the part may write into it.
                fresh[id(whole)] = leaf.view_as(leaf) if whole.requires_grad else leaf
        caches = [_copy(leaf) for leaf in self._leaves if not isinstance(leaf, Tensor)]
        others = iter(caches)
        leaves = [fresh[id(leaf)] if isinstance(leaf, Tensor) else next(others) for leaf in self._leaves]
        return *pytree.tree_unflatten(leaves, self._structure), wanting, caches


def _copy(value: Any) -> Any:
    """Return a copy of an object that a module may write into; what cannot be copied is itself."""
    if value is None or isinstance(value, (nn.Module, str, int, float)) or callable(value):
        return value
    try:
        return copy.deepcopy(value, {id(t): t.detach().clone() for t in _tensors_in(value, set())})
    except Exception:
        return value


def _tensors_in(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """The tensors that an object holds, in a fixed order."""
    if id(value) in seen or isinstance(value, (nn.Module, type)):
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
        return
    if isinstance(value, dict):
        members: Any = value.values()
    elif isinstance(value, (list, tuple)):
        members = value
    else:
        members = getattr(value, "__dict__", {}).values()
    for member in members:
        yield from _tensors_in(member, seen)


def run(
    module: nn.Module,
    arguments: Arguments,
    trains: set[nn.Parameter],
    plain: bool,
    state: replay.RngState | None,
) -> Outcome:
    """Run a module forward and backward on copies of its arguments.

    Args:
        module: a part of a model.
        arguments: of its forward.
        trains: parameters of which a gradient is wanted, if they are the module's.
        plain: run it as it was before it was changed.
        state: random numbers to draw.
    """
    args, kwargs, wanting, caches = arguments.copies()
    parameters = {name: p for name, p in module.named_parameters() if p in trains}
    with contextlib.ExitStack() as stack:
        stack.enter_context(replay.replayed(state))
        stack.enter_context(AutocastState.capture(arguments.tensors).entered())
        stack.enter_context(undisturbed(module))
        stack.enter_context(graph.without_tensor_hooks([*parameters.values()]))
        stack.enter_context(_requiring_grad(parameters.values()))
        leaves = {m.weight_columns: m.leaf for m in module.modules() if isinstance(m, SplitModule)}
        stack.enter_context(masks_of_torch())
        if plain:
            stack.enter_context(graph.recomputed_part())
            stack.enter_context(_whole_layers(module))
        with SavedActivations(module) as saved:
            results = module.forward(*args, **kwargs)
        tensors = [leaf for leaf in pytree.tree_leaves(results) if isinstance(leaf, Tensor)]
        heads = [t for t in tensors if t.requires_grad]
        found: Sequence[Tensor | None] = [None] * (len(wanting) + len(parameters))
        if heads and found:
            weights = [direction(t, i) for i, t in enumerate(heads)]
            ends = [leaves.get(p, p) for p in parameters.values()]
            found = torch.autograd.grad(heads, [*wanting, *ends], weights, allow_unused=True)
        buffers = {name: b.detach().clone() for name, b in module.named_buffers()}
    return Outcome(
        [t.detach() for t in tensors],
        list(found[: len(wanting)]),
        dict(zip(parameters, found[len(wanting) :], strict=True)),
        buffers,
        [t.detach() for cache in caches for t in _tensors_in(cache, set())],
        saved.total,
    )


def direction(tensor: Tensor, seed: int) -> Tensor:
    """Return a gradient of a result: random, the same at every call."""
    random = torch.Generator(tensor.device).manual_seed(seed)
    return torch.randn(tensor.shape, generator=random, device=tensor.device, dtype=torch.float32).to(
        tensor.dtype
    )


@contextlib.contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Put buffers back, and let no hook behind a module or its gradients see what runs."""
    silenced = [
        (part, name, part.__dict__[name])
        for part in module.modules()
        for name in ("_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
        if part.__dict__.get(name)
    ]
    for part, name, hooks in silenced:
        # Hooks that are called whatever happens are no recorders: they end what a hook in front of the module has begun.
        ending = part._forward_hooks_always_called if name == "_forward_hooks" else ()
        part.__dict__[name] = type(hooks)((key, hook) for key, hook in hooks.items() if key in ending)
    try:
        with replay.put_back(replay.buffers_of(module)):
            yield
    finally:
        for part, name, hooks in silenced:
            part.__dict__[name] = hooks


@contextlib.contextmanager
def _requiring_grad(parameters: Any) -> Iterator[None]:
    resting = [p for p in parameters if not p.requires_grad]
    for parameter in resting:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in resting:
            parameter.requires_grad_(False)


@contextlib.contextmanager
def _whole_layers(module: nn.Module) -> Iterator[None]:
    """Make split layers what they were before the split, also for who reads their weight without calling them."""
    changed = []
    for layer in module.modules():
        if isinstance(layer, SplitModule):
            weight = whole_weight(layer)
            changed.append((layer, layer.__class__, layer.__dict__.pop("forward", None)))
            layer.__class__ = layer.whole_class  # type: ignore[assignment]
            layer.__dict__["weight"] = weight
    try:
        yield
    finally:
        for layer, split_class, forward in changed:
            layer.__class__ = split_class
            del layer.__dict__["weight"]
            if forward is not None:
                layer.__dict__["forward"] = forward


_DROPOUTS = frozenset(
    [getattr(F, name) for name in ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout")]
    + [torch.dropout, torch.alpha_dropout, torch.feature_dropout, F.feature_alpha_dropout]
)
_DRAWS = {
    torch.rand: 0.5,
    torch.rand_like: 0.5,
    Tensor.uniform_: 0.5,
    torch.bernoulli: 1,
    Tensor.bernoulli_: 1,
}
_DRAWS |= dict.fromkeys((torch.randn, torch.randn_like, Tensor.normal_), 0)


class NothingRandom(TorchFunctionMode):
    """Let dropout pass everything and random numbers be constant, so that rows are alike whatever runs beside them."""

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if func is F.scaled_dot_product_attention:
            # query, key, value, attn_mask, dropout_p
            if len(args) > 4:
                args = (*args[:4], 0.0, *args[5:])
            else:
                kwargs["dropout_p"] = 0.0
        result = func(*args, **kwargs)
        return result.fill_(_DRAWS[func]) if func in _DRAWS else result


def rounding(tensors: Sequence[Tensor]) -> float:
    """Return the relative error that another order of the same operations may have: in TF32 (CUDA), 16 bits, or fp32."""
    low = any(t.is_floating_point() and t.element_size() < 4 for t in tensors)
    if low or any(enabled for _, enabled, _ in AutocastState.capture(tensors).settings):
        return 2e-2
    return 2e-3 if any(t.is_cuda for t in tensors) else 2e-5


def relative_error(found: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> float:
    """Return the norm of the difference over the norm of what is expected, where that is finite; infinite if shapes differ."""
    wrong = right = 0.0
    for f, e in zip(found, expected, strict=True):
        if e is None or not e.is_floating_point():
            if e is not None and f is not None and not (f.shape == e.shape and torch.equal(f, e)):
                return math.inf
            continue
        e = e.double()
        f = torch.zeros_like(e) if f is None else f.double()
        if f.shape != e.shape:
            return math.inf
        finite = e.isfinite()
        wrong += float(torch.where(finite, f - e, 0).square().sum())
        right += float(torch.where(finite, e, 0).square().sum())
    if math.isnan(wrong):
        return math.inf
    return math.sqrt(wrong / right) if right else (0.0 if wrong == 0 else math.inf)


def difference(
    plain: Outcome, ours: Outcome, exact: float, limit: float, rows: bool = False
) -> tuple[str, str] | None:
    """Return which check the changed part fails, and what was measured; `None`: none.

    Args:
        plain: of the part as it is.
        ours: of the part as it was changed.
        exact: relative error of what should be equal.
        limit: largest relative error of gradients.
        rows: no row of the input's gradient may be off by twice as much: all of the loss may depend on it.
    """
    if len(plain.results) != len(ours.results):
        return "forward", f"{len(ours.results)} results, {len(plain.results)} expected"
    if (error := relative_error(ours.results, plain.results)) > exact:
        return "forward", f"differs by {error:.2g}, at most {exact:.0e}"
    names = plain.buffers.keys() | ours.buffers.keys()
    for name in sorted(names):
        pair = [of.buffers.get(name) for of in (ours, plain)]
        if any(b is None for b in pair) or relative_error(pair[:1], pair[1:]) > exact:
            return "buffers", f"{name} after the recomputation is not what one forward pass leaves"
    if len(plain.caches) != len(ours.caches) or relative_error(ours.caches, plain.caches) > exact:
        return "caches", "an argument after the recomputation is not what one forward pass leaves"
    if (error := relative_error(ours.inputs, plain.inputs)) > limit:
        return "gradient", f"of its input differs by {error:.2g}, at most {limit:.2g}"
    if rows and (error := max(map(_worst_row, ours.inputs, plain.inputs), default=0.0)) > 2 * limit:
        return "gradient", f"of one row of its input differs by {error:.2g}, at most {2 * limit:.2g}"
    used = {n: g for n, g in plain.parameters.items() if g is not None and ours.parameters[n] is not None}
    if (error := relative_error([ours.parameters[n] for n in used], [*used.values()])) > limit:
        return "gradient", f"of its weights differs by {error:.2g}, at most {limit:.2g}"
    return None


def _worst_row(found: Tensor | None, expected: Tensor | None) -> float:
    """Return the largest relative error of a row of a gradient `[batch, ..., hidden]`: a model may read a single one.

    Of rows with next to no gradient the error is relative to a tenth of the mean row.
    """
    if found is None or expected is None or expected.dim() < 3:
        return 0.0
    norms = expected.double().norm(dim=-1)
    apart = (found.double() - expected.double()).norm(dim=-1)
    least = 0.1 * float(norms.square().mean().sqrt())
    return float((apart / norms.clamp_min(least)).max()) if least else 0.0
