"""Which layers a policy of columns splits, how finely, and what trains whole: worked out before a model is changed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from slimfit_ds.config import ConfigError, FreezeConfig
from slimfit_ds.freezing.blocks import find_blocks
from slimfit_ds.freezing.layers import Layer, discover, match_globs

__all__ = ["ColumnPlan", "plan_columns"]


@dataclass(frozen=True)
class ColumnPlan:
    """What a policy of columns makes of a model."""

    split: tuple[Layer, ...]
    """Layers of which every `stride`-th input column trains."""
    stride: int
    whole: frozenset[str]
    """Names of the layers that train whole."""


def plan_columns(model: nn.Module, config: FreezeConfig) -> ColumnPlan:
    """Which layers `split_columns` would split, and how finely; the model is not changed.

    Raises:
        ConfigError: a rate schedule, globs without a match, or no stride that keeps to the rate.
    """
    layers = discover(model).layers
    names = [layer.name for layer in layers]
    problems: list[str] = []
    always = match_globs(config.always_active, names, "slimfit.freeze.always_active", problems)
    never = match_globs(config.never_active, names, "slimfit.freeze.never_active", problems)
    if len(config.rates) > 1:
        problems.append(
            "slimfit.freeze.rate: policy columns trains the same columns for the whole run, so it needs one number, "
            f"got a schedule from {config.rates[0]} to {config.rates[-1]}"
        )
    if problems:
        raise ConfigError(problems)
    parts = find_blocks(names)
    largest = max((layers[i].numel for block in parts.blocks for i in block), default=0)
    small = {i for i, layer in enumerate(layers) if layer.numel <= largest}
    head = {i for i in parts.after if layers[i].kind == "linear" and i in small}
    added = {i for i, layer in enumerate(layers) if layer.kind in ("norm", "parameter") and not layer.inputs}
    whole = (always | added | head) - never
    split = [
        i
        for i, layer in enumerate(layers)
        if i in small - whole - never and _splittable(model.get_submodule(layer.name.rpartition(".")[0]))
    ]
    stride = _stride(layers, whole, split, config.rates[0])
    if stride is None:
        raise ConfigError(
            [
                f"slimfit.freeze: policy columns finds no part of the linear layers that trains within rate "
                f"{config.rates[0]}; lower the rate, or choose another policy"
            ]
        )
    return ColumnPlan(
        tuple(layers[i] for i in split if layers[i].inputs >= stride),
        stride,
        frozenset(names[i] for i in whole),
    )


def _splittable(module: nn.Module) -> bool:
    """Whether the layer computes by its own forward: `MultiheadAttention` reads the weight of its projection."""
    return type(module) is nn.Linear or type(module).__name__ == "Conv1D"


def _stride(layers: Sequence[Layer], whole: Iterable[int], split: Sequence[int], rate: float) -> int | None:
    """The smallest stride whose columns, with the layers that train whole, keep to the rate.

    Inputs of layers that train whole do not count: norms and added parameters need none, the head reads one vector of
    an example; who asks for more by `always_active` knows.
    """
    room = (1 - rate) * sum(layer.numel for layer in layers) - sum(layers[i].numel for i in whole)
    inputs = (1 - rate) * sum(layer.inputs for layer in layers)
    least = max(1, math.ceil(1 / (1 - rate) - 1e-9))
    for stride in range(least, max((layers[i].inputs for i in split), default=0) + 1):
        counts = {i: layers[i].inputs // stride for i in split}
        weights = sum(layers[i].numel // layers[i].inputs * count for i, count in counts.items())
        if weights <= room + 1e-6 and sum(counts.values()) <= inputs + 1e-6:
            return stride
    return None
