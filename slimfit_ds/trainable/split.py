"""Layers of which some input columns train: how they are split, what they compute, and how they become whole again.

The weight gradient of a linear layer is `dy^T x`; its columns `c` are `dy^T x[:, c]`. So a layer of which one input column
in ten trains keeps a tenth of its input, makes a tenth of its gradient and has a tenth of the optimizer states. Layers that
read the same tensor (queries, keys and values) train the same columns of it and share one copy. Of the vectors of the word
embedding some places train, which keeps nothing but the ids.

The trained columns are a parameter of their own, `weight_columns`, beside the layer's frozen `weight`. In `state_dict()`
there is only `weight`, up to date, and `load_state_dict()` fills both. A model that reads `layer.weight` itself, without
calling the layer, finds it up to date too, and what it makes of it gives the columns their gradient.
"""

from __future__ import annotations

import dataclasses
import random
import sys
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from slimfit_ds.errors import ConfigError
from slimfit_ds.trainable.graph_product import graph_product, in_filled_graph
from slimfit_ds.trainable.plan import Plan
from slimfit_ds.trainable.units import COLUMNS, SplitRecord, discover, full_shape, split_record

__all__ = [
    "Split",
    "SplitModule",
    "adopt_columns",
    "check_columns",
    "column_places",
    "fill_columns",
    "split_columns",
    "unsplit_columns",
    "whole_weight",
]


@dataclasses.dataclass(frozen=True)
class Split:
    """Which columns of a weight train: every `stride`-th from `start` on, `count` of them, in the first `rows` rows."""

    start: int
    stride: int
    count: int
    transposed: bool
    """Whether the weight is `[in, out]` (transformers' Conv1D) instead of `[out, in]`."""
    rows: int | None = None
    """Of an embedding: how many words from the front of the vocabulary; None: all rows."""

    @property
    def _range(self) -> slice:
        return slice(self.start, self.start + self.count * self.stride, self.stride)

    def of_rows(self, x: Tensor) -> Tensor:
        """The columns of `[..., width]`, a view `[..., count]`."""
        return x[..., self._range]

    def of_weight(self, weight: Tensor) -> Tensor:
        """The trained part of a whole weight, a view: `[rows, count]`, or `[count, out]` where transposed."""
        return weight[self._range] if self.transposed else weight[: self.rows, self._range]

    def fill(self, weight: Tensor, columns: Tensor) -> Tensor:
        """Write the trained columns into a whole weight, and return it as `[out, in]`."""
        # Past autograd's count of changes: a graph that keeps the weight finds in it what it has kept.
        weight = weight.data
        self.of_weight(weight).copy_(columns.detach())
        return weight.mT if self.transposed else weight


class SplitModule(nn.Module):
    """A layer that trains some columns of its weight; put in front of the layer's class by `_split_class`."""

    split: Split
    whole_class: type[nn.Module]
    """What the layer was, and becomes again."""
    weight_columns: nn.Parameter
    home: Any = None
    """None: the columns are where the layer computes. Otherwise they live on the host, and this is what brings them
    (`streaming.blocks.Block`)."""

    @property
    def columns(self) -> Tensor:
        """The trained columns where the layer computes."""
        return self.weight_columns if self.home is None else self.home.columns_of(self)

    @property
    def leaf(self) -> Tensor:
        """What the graph knows the trained columns as, whose gradient becomes theirs."""
        return self.weight_columns if self.home is None else self.home.leaf_of(self)

    @property
    def frozen_weight(self) -> nn.Parameter:
        """The parameter `weight` itself; its trained columns may be old."""
        # Streamed under ZeRO 3 it is a buffer, so that it is not cut.
        weight: Any = self._parameters.get("weight", self._buffers.get("weight"))
        return weight

    @property
    def weight(self) -> Tensor:
        """The whole weight, up to date; while a forward pass runs, its gradient reaches the columns that train.

        WavLM, DeBERTa, Mamba and others read the weight of a layer that they never call.
        """
        weight, columns = self.frozen_weight, self.weight_columns
        if weight.shape != full_shape(weight) or columns.shape != full_shape(columns):
            # Cut by ZeRO 3, and not gathered.
            return weight
        if columns.requires_grad and torch.is_grad_enabled() and _inside_forward():
            return whole_weight(self)
        self.split.fill(weight, columns)
        return weight

    def __repr__(self) -> str:
        total = full_shape(self.frozen_weight)[0 if self.split.transposed else 1]
        words = f" of {self.split.rows} words" if self.split.rows is not None else ""
        return f"{super().__repr__()[:-1]}, trains {self.split.count} of {total} columns{words})"

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # Made at run time, the class has no name by which pickle would find it.
        return _empty_split, (self.whole_class,), self.__dict__

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """A state dict has whole weights only."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        columns, weight = destination.pop(f"{prefix}{COLUMNS}", None), destination.get(f"{prefix}weight")
        # Under ZeRO 3 there is nothing here of a weight that is not gathered.
        if columns is not None and weight is not None and weight.numel() and columns.numel():
            self.split.fill(weight, columns)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take the columns from a state dict of whole weights."""
        weight = state.get(f"{prefix}weight")
        if weight is not None and f"{prefix}{COLUMNS}" not in state:
            state[f"{prefix}{COLUMNS}"] = self.split.of_weight(weight).clone()
        super()._load_from_state_dict(state, prefix, *args)


class _SplitLinear(SplitModule):
    """A linear layer, or a Conv1D of transformers, that trains some of its input columns."""

    bias: nn.Parameter | None

    def forward(self, x: Tensor) -> Tensor:
        kind, dtype = x.device.type, x.dtype
        if kind != "meta" and torch.is_autocast_enabled(kind) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(kind)
        if in_filled_graph():
            return graph_product(self, x, dtype)
        kept = None
        if self.weight_columns.requires_grad and torch.is_grad_enabled():
            kept = _kept_columns(x, self.split, dtype)
        return _Product.apply(x, kept, self.leaf, self.bias, self, dtype)


class _SplitEmbedding(SplitModule):
    """An embedding of whose vectors some places train, for the words at the front of the vocabulary."""

    padding_idx: int | None

    def forward(self, ids: Tensor) -> Tensor:
        return _Lookup.apply(ids, self.weight_columns, self)


@cache
def _split_class(whole: type[nn.Module]) -> type[SplitModule]:
    """The class of split layers that were of class `whole`; of the same name, which tells what a layer is."""
    kind = _SplitEmbedding if issubclass(whole, nn.Embedding) else _SplitLinear
    return type(whole.__name__, (kind, whole), {"whole_class": whole, "__doc__": kind.__doc__})


def _empty_split(whole: type[nn.Module]) -> SplitModule:
    """For pickle and `copy.deepcopy`: an instance whose attributes follow."""
    made = _split_class(whole)  # type: ignore[arg-type]
    return made.__new__(made)


def _inside_forward() -> bool:
    """Whether a module's forward pass is running: who else reads a weight (an optimizer, a user) wants the parameter."""
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_name == "forward":
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def whole_weight(layer: SplitModule) -> Tensor:
    """The weight of a split layer, up to date, as a tensor of the graph, whose gradient reaches the columns that train."""
    layer.split.fill(layer.frozen_weight, layer.columns)
    return _Whole.apply(layer.leaf, layer)


class _Whole(torch.autograd.Function):
    """The weight of a split layer as a tensor of the graph, whose gradient is cut to the columns."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, layer: SplitModule) -> Tensor:
        ctx.split, ctx.dtype = layer.split, leaf.dtype
        # For autograd's check that nobody changed them in between.
        ctx.save_for_backward(layer.weight_columns)
        return _no_view(layer.frozen_weight.data)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors
        columns = ctx.split.of_weight(gradients[0])
        return columns.to(ctx.dtype, copy=True, memory_format=torch.contiguous_format), None


def _no_view(tensor: Tensor) -> Tensor:
    """The same tensor, for autograd no view: a result of ours that is one could not be changed in place."""
    return torch.ops.aten._unsafe_view(tensor, tensor.shape)


class _Product(torch.autograd.Function):
    """`x W^T + b`, of whose weight gradient only some columns are made.

    The columns are written into the weight at each use: under ZeRO 3 it has just been gathered from shards that do not
    know them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        kept: Tensor | None,
        leaf: Tensor,
        bias: Tensor | None,
        layer: _SplitLinear,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.layer, ctx.x_dtype = layer, x.dtype
        # The parameter itself, never what it holds now: its data may come and go until backward.
        ctx.save_for_backward(kept, layer.weight_columns, layer.frozen_weight)
        weight = layer.split.fill(layer.frozen_weight, layer.columns).to(dtype)
        return _no_view(F.linear(x.to(dtype), weight, None if bias is None else bias.to(dtype)))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = gradients
        kept, columns, weight = ctx.saved_tensors
        split = ctx.layer.split
        if ctx.layer.home is not None:
            columns = ctx.layer.columns
        dx = d_columns = d_bias = None
        if ctx.needs_input_grad[0]:
            dx = (dy @ split.fill(weight, columns).to(dy.dtype)).to(ctx.x_dtype)
        rows = dy.reshape(-1, dy.shape[-1])
        if ctx.needs_input_grad[2]:
            kept = kept.reshape(-1, split.count)
            d_columns = (kept.mT @ rows if split.transposed else rows.mT @ kept).to(columns.dtype)
        if ctx.needs_input_grad[3]:
            d_bias = rows.sum(0).to(columns.dtype)
        return dx, None, d_columns, d_bias, None, None


class _Lookup(torch.autograd.Function):
    """Rows of an embedding `[vocabulary, width]`, of whose gradient only some columns are made.

    Not the whole weight is brought up to date, as it is large, only the rows that are looked up.
    """

    @staticmethod
    def forward(ctx: Any, ids: Tensor, columns: Tensor, layer: _SplitEmbedding) -> Tensor:
        ctx.split, ctx.padding = layer.split, layer.padding_idx
        ctx.rows, ctx.dtype = columns.shape[0], columns.dtype
        ctx.save_for_backward(ids)
        weight = layer.frozen_weight.data
        # It may live on the host.
        found = F.embedding(ids.to(weight.device), weight).to(ids.device)
        places = ctx.split.of_rows(found)
        # An id behind the trained rows reads any of them and keeps what it has.
        trained = F.embedding(ids.clamp(max=ctx.rows - 1), columns)
        places.copy_(torch.where((ids < ctx.rows).unsqueeze(-1), trained, places))
        return _no_view(found)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            return None, None, None
        (dy,) = gradients
        # A frequent token is a long sum.
        exact = torch.promote_types(dy.dtype, torch.float32)
        parts = ctx.split.of_rows(dy).to(exact, memory_format=torch.contiguous_format)
        known = ids < ctx.rows
        if ctx.padding is not None:
            known &= ids != ctx.padding
        parts = parts * known.unsqueeze(-1)
        ids = ids.clamp(max=ctx.rows - 1)
        gradient = torch.ops.aten.embedding_dense_backward(parts, ids, ctx.rows, -1, False)
        return None, gradient.to(ctx.dtype), None


_KEPT: MutableMapping[Tensor, tuple[Any, Tensor]] = WeakTensorKeyDictionary()
"""An input that is still alive -> what was kept of it last, so that the next layer that reads it need keep nothing."""


def _kept_columns(x: Tensor, split: Split, dtype: torch.dtype) -> Tensor:
    """A copy of the columns of `[..., in]`: the same one for each layer that reads this tensor and trains these columns."""
    key = (split.start, split.stride, split.count, dtype, x._version)
    known = _KEPT.get(x)
    if known is not None and known[0] == key:
        return known[1]
    # A view would keep all of x alive.
    kept = split.of_rows(x.detach()).to(dtype, copy=True, memory_format=torch.contiguous_format)
    _KEPT[x] = (key, kept)
    return kept


def split_columns(
    model: nn.Module,
    plan: Plan,
    seed: int = 0,
    whole: Callable[[Tensor], AbstractContextManager[Any]] = lambda weight: nullcontext(),
) -> None:
    """Make the units of a plan the ones that train, and freeze the rest of the model's layers.

    The columns of a layer are evenly spaced, from a start that is drawn by `seed` and what the layer reads. Biases and what
    was frozen before are left alone.

    Args:
        model: is changed in place; `slimfit_split` on it says how.
        plan: from `plan_units` for this model.
        seed: of the columns.
        whole: a context in which a weight that ZeRO 3 has cut is whole.
    """
    split = {each.layer.name: each for each in plan.split}
    roles = discover(model)
    frozen = [name for name in roles.names if name not in plan.whole]
    for name in frozen:
        if name in split:
            owner: Any = model.get_submodule(name.rpartition(".")[0])
            with whole(owner.weight):
                each = split[name]
                _split(owner, each.count, each.rows, random.Random(f"{seed}:{each.source}"))
        else:
            model.get_parameter(name).requires_grad_(False)
    record = SplitRecord(tuple(frozen), roles.layers, roles.numel)
    model.slimfit_split = record  # type: ignore[assignment]


def _split(module: Any, count: int, rows: int | None, chance: random.Random) -> None:
    transposed = type(module).__name__ == "Conv1D"
    width = module.weight.shape[0 if transposed else 1]
    stride = width // count
    split = Split(chance.randrange(width - (count - 1) * stride), stride, count, transposed, rows)
    trained = split.of_weight(module.weight.detach()).clone(memory_format=torch.contiguous_format)
    module.weight.requires_grad_(False)
    module.register_parameter(COLUMNS, nn.Parameter(trained))
    module.split = split
    module.__class__ = _split_class(type(module))  # type: ignore[arg-type]


def unsplit_columns(model: nn.Module, optimizers: Iterable[torch.optim.Optimizer] = ()) -> None:
    """Undo `split_columns`: whole weights with what was learned, in these optimizers too (without moments), and what it froze trains again."""
    record = split_record(model)
    if record is None:
        return
    instead: dict[Tensor, Tensor] = {}
    for module in list(model.modules()):
        if isinstance(module, SplitModule):
            instead[module.weight_columns] = module.frozen_weight
            module.split.fill(module.frozen_weight, module.weight_columns)
            del module.weight_columns, module.split
            module.__class__ = module.whole_class  # type: ignore[assignment]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"] = [instead.get(p, p) for p in group["params"]]
        for columns in instead:
            optimizer.state.pop(columns, None)
    for name in record.frozen:
        model.get_parameter(name).requires_grad_(True)
    del model.slimfit_split


def adopt_columns(model: nn.Module, groups: Iterable[dict[str, Any]], states: Any = None) -> None:
    """Let an optimizer's parameter groups that were made before the split hold the columns instead of the weights.

    Args:
        model: the split model; one that is not split changes nothing.
        groups: as torch's optimizers have them; changed in place.
        states: of the optimizer, by parameter: what it loaded for columns under the name of their weight is theirs.
    """
    instead = {m.frozen_weight: m.weight_columns for m in model.modules() if isinstance(m, SplitModule)}
    groups = list(groups)
    held = {id(p) for group in groups for p in group["params"]}
    for group in groups:
        group["params"] = [
            instead[p] if p in instead and id(instead[p]) not in held else p for p in group["params"]
        ]
    for weight, columns in instead.items():
        state = states.pop(weight, {}) if states else {}
        # Moments of a whole weight that has trained before are of no use to its columns.
        if state and all(
            t.dim() == 0 or t.shape == columns.shape for t in state.values() if isinstance(t, Tensor)
        ):
            states[columns] = state


def column_places(model: nn.Module) -> dict[str, tuple[int, int, int, bool, int | None]]:
    """Where the columns of each split weight stand in it, by the weight's name: what `fill_columns` needs."""
    return {
        f"{name}.weight" if name else "weight": dataclasses.astuple(module.split)
        for name, module in model.named_modules()
        if isinstance(module, SplitModule)
    }


def check_columns(saved: Mapping[str, Sequence[Any]], own: Mapping[str, Sequence[Any]]) -> None:
    """Raise unless the trained columns of a checkpoint stand where the model's own do (`column_places`): its moments are of those.

    Raises:
        ConfigError: names a layer and both places.
    """
    differing = [name for name in own if name not in saved or Split(*saved[name]) != Split(*own[name])]
    if differing:
        name = differing[0]
        raise ConfigError(
            [
                f"slimfit.freeze: the checkpoint trains other columns of {len(differing)} layers than this run would "
                f"({name}: start, stride, count, transposed, rows {list(saved.get(name, ()))}, now {list(own[name])}); resume with "
                f"the rate, the width and the seed of that run, or export the checkpoint and start from its whole weights"
            ]
        )


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
            Split(*place).fill(merged[name], merged.pop(part))
    return merged
