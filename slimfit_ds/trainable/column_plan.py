"""Which layers a policy of columns splits, how finely, and what trains whole: worked out before a model is changed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from slimfit_ds.errors import ConfigError
from slimfit_ds.schedule.config import FreezeConfig
from slimfit_ds.trainable.blocks import find_blocks
from slimfit_ds.trainable.layers import Layer, discover, match_globs

__all__ = ["ColumnPlan", "SplitLayer", "plan_columns"]

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

    layer: Layer
    count: int
    """How many columns of its weight train."""
    source: str
    """What it reads; layers of the same source train the same columns, and share the copy that is kept of them."""
    rows: int | None = None
    """Of the word embedding: how many words from the front of the vocabulary train; None: all."""


@dataclass(frozen=True)
class ColumnPlan:
    """What a policy of columns makes of a model."""

    split: tuple[SplitLayer, ...]
    whole: frozenset[str]
    """Names of the layers that train whole."""


def plan_columns(model: nn.Module, config: FreezeConfig) -> ColumnPlan:
    """Which layers `split_columns` would split, and how finely; the model is not changed.

    Raises:
        ConfigError: a rate schedule, globs without a match, or no number of columns that keeps to the rate.
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
    split = {
        i: _source(layer)
        for i, layer in enumerate(layers)
        if i in small - whole - never and _splittable(model.get_submodule(_module(layer)))
    }
    words = _words(model, layers, whole | never)
    counts, rows = _counts(layers, whole, split, words, config.rates[0])
    if not any(counts[i] for i in split):
        raise ConfigError(
            [
                f"slimfit.freeze: policy columns finds no part of the linear layers that trains within rate "
                f"{config.rates[0]}; lower the rate, or choose another policy"
            ]
        )
    return ColumnPlan(
        tuple(
            SplitLayer(layers[i], count, split.get(i, _module(layers[i])), rows.get(i))
            for i, count in sorted(counts.items())
            if count
        ),
        frozenset(names[i] for i in whole),
    )


def _module(layer: Layer) -> str:
    return layer.name.rpartition(".")[0]


def _splittable(module: nn.Module) -> bool:
    """Whether the layer computes by its own forward: `MultiheadAttention` reads the weight of its projection."""
    return type(module) is nn.Linear or type(module).__name__ == "Conv1D"


def _source(layer: Layer) -> str:
    """A name for the tensor that a linear layer reads, as far as names of modules tell."""
    owner, _, name = _module(layer).rpartition(".")
    for together in _READ_TOGETHER:
        if name in together and not _CROSS_ATTENTION.search(owner.rpartition(".")[2]):
            return f"{owner}.{together[0]}"
    return _module(layer)


def _words(model: nn.Module, layers: Sequence[Layer], taken: Iterable[int]) -> dict[int, int]:
    """The word embedding, if its columns can train alone: position -> places of a vector.

    One whose weight the output layer shares cannot, nor one that computes in a way of its own. Without transformers'
    `get_input_embeddings` it is the largest.
    """
    positions = {model.get_submodule(_module(layer)): i for i, layer in enumerate(layers)}
    try:
        module = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        embeddings = [each for each in positions if isinstance(each, nn.Embedding)]
        module = max(embeddings, key=lambda each: each.weight.numel(), default=None)
    if type(module) is not nn.Embedding or positions.get(module) in {None, *taken}:
        return {}
    if module.max_norm is not None or module.scale_grad_by_freq or module.sparse or module.embedding_dim < 2:
        return {}
    holders = sum(p is module.weight for each in model.modules() for p in each.parameters(recurse=False))
    return {positions[module]: module.embedding_dim} if holders == 1 else {}


def _counts(
    layers: Sequence[Layer],
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
    for number in range(max((layers[i].inputs for i in split), default=0) // 2, 0, -1):
        aligned = number - number % _ALIGNMENT if number >= 8 * _ALIGNMENT else number
        # At most every other column: the rest is frozen.
        counts = {i: min(aligned, layers[i].inputs // 2) for i in split}
        left = room + 1e-6 - sum(layers[i].numel // layers[i].inputs * count for i, count in counts.items())
        kept = sum({split[i]: count for i, count in counts.items()}.values())
        counts |= {i: min(aligned, width // 2) for i, width in words.items()}
        vocabulary = {i: layers[i].numel // width for i, width in words.items()}
        rows = {i: int(left // counts[i]) for i in words}
        if left >= 0 and kept <= inputs + 1e-6 and all(8 * rows[i] >= vocabulary[i] for i in words):
            return counts, {i: n for i, n in rows.items() if n < vocabulary[i]}
    return dict.fromkeys(split, 0), {}
