"""Training some input columns of every linear layer: the rest of each weight is frozen for the whole run.

The weight gradient of a linear layer is `dy^T x`; its columns `c` are `dy^T x[:, c]`. So a layer of which one input column
in ten trains keeps a tenth of its input, makes a tenth of its gradient and has a tenth of the optimizer states, as if one
layer in ten trained; but every layer learns at every step. Layers that read the same tensor (queries, keys and values)
train the same columns of it and share one copy.

The trained columns are a parameter of their own, `weight_columns`, and a copy of them stands in the layer's frozen
`weight`, which is what the layer computes with. In `state_dict()` there is only `weight`, up to date, and
`load_state_dict()` fills both.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slimfit_ds.config import FreezeConfig
from slimfit_ds.freezing.column_plan import plan_columns
from slimfit_ds.freezing.layers import COLUMNS, discover

_COPIES = "_slimfit_columns"

__all__ = [
    "adopt_columns",
    "column_places",
    "fill_columns",
    "split_columns",
    "unsplit_columns",
]


@dataclass(frozen=True)
class _Split:
    """Which input columns of a layer train: every `stride`-th from `start` on, `count` of them."""

    start: int
    stride: int
    count: int
    transposed: bool
    """Whether the weight is `[in, out]` (transformers' Conv1D) instead of `[out, in]`."""

    @property
    def _range(self) -> slice:
        return slice(self.start, self.start + self.count * self.stride, self.stride)

    def of_input(self, x: Tensor) -> Tensor:
        """The columns of `[..., in]`, a view `[..., count]`."""
        return x[..., self._range]

    def of_weight(self, weight: Tensor) -> Tensor:
        """The trained part of a whole weight, a view: `[out, count]`, or `[count, out]` where transposed."""
        return weight[self._range] if self.transposed else weight[:, self._range]

    def fill(self, weight: Tensor, columns: Tensor) -> Tensor:
        """Write the trained columns into a whole weight, and return it as `[out, in]`."""
        weight = weight.detach()
        self.of_weight(weight).copy_(columns.detach())
        return weight.mT if self.transposed else weight


class _SplitLinear(torch.autograd.Function):
    """`x W^T + b`, of whose weight gradient only some columns are made.

    The columns are written into the weight at each use: under ZeRO 3 it has just been gathered from shards that do not
    know them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        kept: Tensor | None,
        columns: Tensor,
        bias: Tensor | None,
        layer: _SplitForward,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.layer, ctx.x_dtype = layer, x.dtype
        ctx.save_for_backward(kept, columns)
        weight = layer.split.fill(layer.weight, columns).to(dtype)
        return F.linear(x.to(dtype), weight, None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = gradients
        kept, columns = ctx.saved_tensors
        split = ctx.layer.split
        dx = d_columns = d_bias = None
        if ctx.needs_input_grad[0]:
            dx = (dy @ split.fill(ctx.layer.weight, columns).to(dy.dtype)).to(ctx.x_dtype)
        rows = dy.reshape(-1, dy.shape[-1])
        if ctx.needs_input_grad[2]:
            kept = kept.reshape(-1, split.count)
            d_columns = (kept.mT @ rows if split.transposed else rows.mT @ kept).to(columns.dtype)
        if ctx.needs_input_grad[3]:
            d_bias = rows.sum(0).to(columns.dtype)
        return dx, None, d_columns, d_bias, None, None


class _SplitForward(nn.Module):
    """In front of the class of a split layer."""

    split: _Split
    weight: nn.Parameter
    weight_columns: nn.Parameter
    bias: nn.Parameter | None
    split_hooks: tuple[Any, ...]

    def forward(self, x: Tensor) -> Tensor:
        kind, dtype = x.device.type, x.dtype
        if kind != "meta" and torch.is_autocast_enabled(kind) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(kind)
        kept = None
        if self.weight_columns.requires_grad and torch.is_grad_enabled():
            kept = _kept_columns(x, self.split, dtype)
        return _SplitLinear.apply(x, kept, self.weight_columns, self.bias, self, dtype)


def _kept_columns(x: Tensor, split: _Split, dtype: torch.dtype) -> Tensor:
    """A copy of the columns of `[..., in]`: the same one for each layer that reads this tensor and trains these columns."""
    key = (split.start, split.stride, split.count, dtype, x._version)
    known = getattr(x, _COPIES, None)
    if known is not None and key in known:
        return known[key]
    # A view would keep all of x alive.
    kept = split.of_input(x.detach()).to(dtype, copy=True, memory_format=torch.contiguous_format)
    # It lives with x: who reads x next finds it.
    setattr(x, _COPIES, {key: kept})
    return kept


def _merge_into_state(module: _SplitForward, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """A state dict has whole weights only."""
    columns = state.pop(f"{prefix}{COLUMNS}", None)
    weight = state.get(f"{prefix}weight")
    # Under ZeRO 3 there is nothing here of a weight that is not gathered.
    if columns is not None and weight is not None and weight.numel() and columns.numel():
        module.split.fill(weight, columns)


def _take_from_state(module: _SplitForward, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """The columns of a state dict of whole weights."""
    weight = state.get(f"{prefix}weight")
    if weight is not None and f"{prefix}{COLUMNS}" not in state:
        state[f"{prefix}{COLUMNS}"] = module.split.of_weight(weight).clone()


def split_columns(
    model: nn.Module,
    config: FreezeConfig,
    whole: Callable[[Tensor], AbstractContextManager[Any]] = lambda weight: nullcontext(),
) -> tuple[str, ...]:
    """Make some input columns of every linear layer trainable, and the rest of them frozen.

    Of each tensor that linear layers read the same number of columns trains, a share `1 - rate` on the whole. Norms, biases,
    parameters that are merely added, the linear layers behind the blocks (pooler and head of a task, no output embedding)
    and `always_active` layers train whole; embeddings, convolutions and `never_active` layers do not train. The columns of
    a layer are evenly spaced, from a start that is drawn by `seed`. All that trains, biases aside, takes at most `1 - rate`
    of the weights and of the inputs. A model that is split already stays as it is.

    Args:
        model: is changed in place.
        config: `rate`, `seed`, `always_active` and `never_active` of it.
        whole: a context in which a weight that ZeRO 3 has cut is whole.

    Returns:
        Names of the weights that it has frozen, in part or whole.

    Raises:
        ConfigError: what `plan_columns` finds.
    """
    if any(isinstance(module, _SplitForward) for module in model.modules()):
        return ()
    plan = plan_columns(model, config)
    split = {each.layer.name: each for each in plan.split}
    frozen = []
    for layer in discover(model).layers:
        if layer.name in plan.whole:
            continue
        frozen.append(layer.name)
        if layer.name in split:
            owner: Any = model.get_submodule(layer.name.rpartition(".")[0])
            with whole(owner.weight):
                chance = random.Random(f"{config.seed}:{split[layer.name].source}")
                _split(owner, layer.inputs, split[layer.name].count, chance)
        else:
            model.get_parameter(layer.name).requires_grad_(False)
    return tuple(frozen)


def _split(module: Any, width: int, count: int, chance: random.Random) -> None:
    base = type(module)
    stride = width // count
    start = chance.randrange(width - (count - 1) * stride)
    split = _Split(start, stride, count, transposed=base.__name__ == "Conv1D")
    trained = split.of_weight(module.weight.detach()).clone(memory_format=torch.contiguous_format)
    module.weight.requires_grad_(False)
    module.register_parameter(COLUMNS, nn.Parameter(trained))
    # The same name: what is told by the name of a class stays true.
    module.__class__ = type(base.__name__, (_SplitForward, base), {"split": split})
    module.split_hooks = (
        module._register_state_dict_hook(_merge_into_state),
        module.register_load_state_dict_pre_hook(_take_from_state),
    )


def adopt_columns(model: nn.Module, groups: Iterable[dict[str, Any]], states: Any = None) -> None:
    """Let an optimizer's parameter groups that were made before the split hold the columns instead of the weights.

    Args:
        model: the split model; one that is not split changes nothing.
        groups: as torch's optimizers have them; changed in place.
        states: of the optimizer, by parameter: what it loaded for columns under the name of their weight is theirs.
    """
    instead = {m.weight: m.weight_columns for m in model.modules() if isinstance(m, _SplitForward)}
    if not instead:
        return
    groups = list(groups)
    held = {id(p) for group in groups for p in group["params"]}
    for group in groups:
        group["params"] = [
            instead[p] if p in instead and id(instead[p]) not in held else p for p in group["params"]
        ]
    for weight, columns in instead.items():
        if states and weight in states:
            state = states.pop(weight)
            # Moments of a whole weight that has trained before are of no use to its columns.
            if all(t.dim() == 0 or t.shape == columns.shape for t in state.values() if isinstance(t, Tensor)):
                states[columns] = state


def column_places(model: nn.Module) -> dict[str, tuple[int, int, int, bool]]:
    """Where the columns of each split weight stand in it, by the weight's name: what `fill_columns` needs."""
    return {
        f"{name}.weight" if name else "weight": dataclasses.astuple(module.split)
        for name, module in model.named_modules()
        if isinstance(module, _SplitForward)
    }


def fill_columns(state: Mapping[str, Tensor], places: Mapping[str, Sequence[Any]]) -> dict[str, Tensor]:
    """A dict of all parameters by name, as a model that was never split has them.

    Args:
        state: whole tensors by name, columns among them; is not changed.
        places: from `column_places`.
    """
    merged = dict(state)
    for name, place in places.items():
        part = f"{name.removesuffix('weight')}{COLUMNS}"
        # Without its weight a part is left as it is: somebody wants what trained alone.
        if part in merged and name in merged:
            merged[name] = merged[name].clone()
            _Split(*place).fill(merged[name], merged.pop(part))
    return merged


def unsplit_columns(model: nn.Module, frozen: Iterable[str]) -> None:
    """Undo `split_columns`: whole weights with what was learned, and what it froze trains again.

    Args:
        model: the split model.
        frozen: what `split_columns` returned.
    """
    for module in list(model.modules()):
        if isinstance(module, _SplitForward):
            module.split.fill(module.weight, module.weight_columns)
            for hook in module.split_hooks:
                hook.remove()
            del module.weight_columns, module.split_hooks
            module.__class__ = type(module).__mro__[2]
    for name in frozen:
        model.get_parameter(name).requires_grad_(True)
