"""Which layers are split into narrow units, how narrow, and what trains whole: worked out before a model is changed."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from slimfit_ds.errors import ConfigError
from slimfit_ds.trainable.units import (
    COLUMNS,
    ParameterRoles,
    SplitRecord,
    Unit,
    discover,
    find_blocks,
    match_always_and_never,
)

__all__ = ["Plan", "SplitLayer", "plan_units"]

# What transformers, timm and torch call layers of one module that read the same tensor.
_READ_TOGETHER = (
    ("query", "key", "value"),
    ("q_proj", "k_proj", "v_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("to_q", "to_k", "to_v"),
    ("q", "k", "v"),
    ("gate_proj", "up_proj"),
    ("wi_0", "wi_1"),
    ("w1", "w3"),
)
# There queries read another tensor than keys and values.
_CROSS_ATTENTION = re.compile("cross|enc.*att", re.IGNORECASE)
# Matrix products of 16-bit numbers want sizes that are multiples of it.
_ALIGNMENT = 8


@dataclass(frozen=True)
class SplitLayer:
    """A layer of which some input columns train."""

    layer: Unit
    """The whole layer."""
    columns: int
    """How many columns its weight has."""
    count: int
    """How many of them train."""
    source: str
    """What it reads; layers of the same source train the same columns, and share the copy that is kept of them."""
    rows: int | None = None
    """Of the word embedding: how many words from the front of the vocabulary train; None: all."""

    @property
    def unit(self) -> Unit:
        """What trains of it, as `discover` finds it after the split."""
        layer = self.layer
        return Unit(
            layer.name.removesuffix("weight") + COLUMNS,
            layer.kind,
            (self.rows or layer.numel // self.columns) * self.count,
            self.count if layer.inputs else 0,
            self.count / self.columns,
            (layer.name, *layer.aliases),
        )


@dataclass(frozen=True)
class Plan:
    """The units of a model to come; layers that are in neither of the first fields are frozen."""

    split: tuple[SplitLayer, ...]
    whole: frozenset[str]
    """Names of the layers that train whole."""
    roles: ParameterRoles
    """Of the parameters after the split."""


def plan_units(
    model: nn.Module,
    *,
    rate: float | None = None,
    width: float | None = None,
    always: Sequence[str] = (),
    never: Sequence[str] = (),
    like: Plan | None = None,
) -> Plan:
    """Work out which layers to split, and how narrow; the model is not changed.

    Of every linear layer of the blocks and of the word embedding, if no output layer shares its weight, some columns
    train. Norms, parameters that are merely added, the linear layers behind the blocks (pooler and head of a task, no
    output embedding) and `always` layers train whole; other embeddings, convolutions and `never` layers do not train.

    Args:
        model: whole layers.
        rate: share of the weights, and of the inputs kept for them, that stays frozen; how narrow the units are follows.
        width: share of each layer's columns that trains; instead of `rate`.
        always: globs of layers that train whole.
        never: globs of layers that do not train.
        like: plan of the same model with more blocks, whose layers of the same names are split as there, whatever the
            rate.

    Raises:
        ConfigError: globs without a match or that contradict each other, or no number of columns that keeps to the rate.
    """
    roles = discover(model)
    layers = roles.units
    problems: list[str] = []
    matched, excluded = match_always_and_never(always, never, roles, problems)
    if problems:
        raise ConfigError(problems)
    parts = find_blocks(roles.names)
    largest = max((layers[i].numel for block in parts.blocks for i in block), default=0)
    small = {i for i, layer in enumerate(layers) if layer.numel <= largest}
    head = {i for i in parts.after if layers[i].kind == "linear" and i in small}
    added = {i for i, layer in enumerate(layers) if layer.kind in ("norm", "parameter") and not layer.inputs}
    whole = (matched | added | head) - excluded
    modules = {i: model.get_submodule(_module(layer)) for i, layer in enumerate(layers)}
    holders = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    # Of a weight that two modules hold the other one would not see the columns.
    alone = {i for i, module in modules.items() if all(holders[id(p)] == 1 for p in _weight(module))}
    alone -= whole | excluded
    split = {i: _source(layers[i]) for i in sorted(alone & small) if _splittable(modules[i])}
    words = _words(model, {modules[i]: i for i in sorted(alone)})
    rows: dict[int, int] = {}
    if like is not None:
        there = {each.layer.name: each for each in like.split}
        known = {i: there[layers[i].name] for i in sorted(split | words) if layers[i].name in there}
        counts = {i: each.count for i, each in known.items()}
        rows = {i: each.rows for i, each in known.items() if each.rows is not None}
        wish = "a plan"
    elif width is not None:
        inputs = {i: layers[i].inputs for i in split} | words
        counts = {i: max(_aligned(round(width * n)), 1) for i, n in inputs.items() if n > 1}
        wish = f"width {width}"
    else:
        assert rate is not None
        counts, rows = _counts(layers, whole, split, words, rate)
        wish = f"rate {rate}"
    if not any(counts.get(i) for i in split):
        if packed := [(n, p.dtype) for n, p in model.named_parameters() if not p.is_floating_point()]:
            raise ConfigError(
                [
                    f"slimfit.freeze: {len(packed)} weights hold packed integers ({packed[0][0]} of {packed[0][1]}, a quantised "
                    f"base), of which no columns can train: load the base in bf16, with frozen_weights.live host where it is too "
                    f"large for the device, or train an adapter on it"
                ]
            )
        raise ConfigError(
            [
                f"slimfit.freeze: no part of the linear layers can train within {wish}; lower the rate, or let whole "
                f"layers train in turn (policy: ils)"
            ]
        )
    made = {
        i: SplitLayer(
            layers[i], words.get(i, layers[i].inputs), count, split.get(i, _module(layers[i])), rows.get(i)
        )
        for i, count in sorted(counts.items())
        if count
    }
    return Plan(tuple(made.values()), frozenset(layers[i].name for i in whole), _after(roles, made, whole))


def _after(roles: ParameterRoles, split: Mapping[int, SplitLayer], whole: Iterable[int]) -> ParameterRoles:
    """The roles of the parameters of a model whose layers have been split."""
    units = {i: each.unit for i, each in split.items()} | {i: roles.units[i] for i in whole}
    asleep = [layer for i, layer in enumerate(roles.units) if i not in whole]
    after = {roles.units[i].name: unit.name for i, unit in units.items()} | {n: n for n in roles.small}
    return ParameterRoles(
        tuple(unit for _, unit in sorted(units.items())),
        roles.small,
        (*roles.frozen, *(name for layer in asleep for name in (layer.name, *layer.aliases))),
        SplitRecord(tuple(layer.name for layer in asleep), roles.layers, roles.numel),
        tuple(after[name] for name in roles.order if name in after),
    )


def _aligned(number: int) -> int:
    """A number of columns as matrix products of 16-bit numbers want it, if it is not small."""
    return number - number % _ALIGNMENT if number >= 8 * _ALIGNMENT else number


def _module(layer: Unit) -> str:
    return layer.name.rpartition(".")[0]


def _splittable(module: nn.Module) -> bool:
    """Whether the layer computes by its own forward: `MultiheadAttention` reads the weight of its projection."""
    return type(module) is nn.Linear or type(module).__name__ == "Conv1D"


def _source(layer: Unit) -> str:
    """A name for the tensor that a linear layer reads, as far as names of modules tell."""
    owner, _, name = _module(layer).rpartition(".")
    for together in _READ_TOGETHER:
        if name in together and not _CROSS_ATTENTION.search(owner.rpartition(".")[2]):
            return f"{owner}.{together[0]}"
    return _module(layer)


def _weight(module: nn.Module) -> list[nn.Parameter]:
    weight = getattr(module, "weight", None)
    return [weight] if isinstance(weight, nn.Parameter) else []


def _words(model: nn.Module, positions: Mapping[nn.Module, int]) -> dict[int, int]:
    """The word embedding, if it is among these modules and computes as usual: position -> places of a vector.

    Without transformers' `get_input_embeddings` it is the largest.
    """
    try:
        module = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        embeddings = [each for each in model.modules() if isinstance(each, nn.Embedding)]
        module = max(embeddings, key=lambda each: each.weight.numel(), default=None)
    if type(module) is not nn.Embedding or module not in positions:
        return {}
    if module.max_norm is not None or module.scale_grad_by_freq or module.sparse or module.embedding_dim < 2:
        return {}
    return {positions[module]: module.embedding_dim}


def _counts(
    layers: Sequence[Unit],
    whole: Iterable[int],
    split: Mapping[int, str],
    words: Mapping[int, int],
    rate: float,
) -> tuple[dict[int, int], dict[int, int]]:
    """How many columns of each layer train: of every tensor that is read the same number, the largest that the rate allows.

    The rate holds for the weights and for the inputs that are kept. With so many columns of a narrow input as of a wide one
    the bytes go to the layers that have many outputs for a column. Inputs of layers that train whole do not count: norms
    and added parameters need none, the head reads one vector of an example; who asks for more by `always_active` knows.
    The word embedding gets what is left of the weights: as many columns as a layer, of as many words from the front of the
    vocabulary as that is enough for, at least an eighth of them. Vocabularies have frequent words first.

    Args:
        layers: of the model.
        whole: positions of those that train whole.
        split: position -> source of the linear layers.
        words: position -> width of the word embedding, if it can be split.
        rate: what is frozen.

    Returns:
        position -> columns, 0 of every layer where no number keeps to the rate; position of the word embedding -> words,
        if not all.
    """
    room = (1 - rate) * sum(layer.numel for layer in layers) - sum(layers[i].numel for i in whole)
    read = {split.get(i, layer.name): layer.inputs for i, layer in enumerate(layers)}
    inputs = (1 - rate) * sum(read.values())

    def at(number: int) -> tuple[dict[int, int], dict[int, int]] | None:
        aligned = _aligned(number)
        # At most every other column: the rest is frozen.
        counts = {i: min(aligned, layers[i].inputs // 2) for i in split}
        left = room + 1e-6 - sum(layers[i].numel // layers[i].inputs * count for i, count in counts.items())
        kept = sum({split[i]: count for i, count in counts.items()}.values())
        counts |= {i: min(aligned, width // 2) for i, width in words.items()}
        vocabulary = {i: layers[i].numel // width for i, width in words.items()}
        rows = {i: int(left // counts[i]) for i in words}
        if left >= 0 and kept <= inputs + 1e-6 and all(8 * rows[i] >= vocabulary[i] for i in words):
            return counts, {i: n for i, n in rows.items() if n < vocabulary[i]}
        return None

    # What trains and what is kept grow with the number.
    numbers = range(1, max((layers[i].inputs for i in split), default=0) // 2 + 1)
    fitting = bisect_left(numbers, True, key=lambda number: at(number) is None)
    if fitting:
        return at(numbers[fitting - 1]) or ({}, {})
    return dict.fromkeys(split, 0), {}
