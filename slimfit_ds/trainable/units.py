"""The units of any `nn.Module`: the parts of its layers that train and freeze as one, found without a class map.

A unit is the trainable part of a layer: the whole weight, or the share of its input columns (`width`) that `trainable.split`
has made a parameter of its own.
"""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

__all__ = [
    "COLUMNS",
    "Blocks",
    "ParameterRoles",
    "SplitRecord",
    "Unit",
    "discover",
    "find_blocks",
    "full_shape",
    "is_part",
    "match_always_and_never",
    "match_globs",
    "named_tensors",
    "split_record",
]

COLUMNS = "weight_columns"
"""Name of the parameter that holds the trained columns of a split layer, beside its frozen `weight`."""

Kind = Literal["linear", "convolution", "embedding", "norm", "parameter"]


@dataclass(frozen=True)
class Unit:
    """One weight, or the trained columns of one: what the schedule freezes and the engine shards."""

    name: str
    """Name of the parameter as in `model.named_parameters()`."""
    kind: Kind
    numel: int
    inputs: int = 0
    """Elements per position (token, patch) of the input that only this unit's gradient needs: what it adds to the
    activations kept while it is active. 0 for norms (their input is kept in any case), embeddings (ids) and parameters
    that are merely added."""
    width: float = 1.0
    """Share of the layer's input columns, or of an embedding's vectors, that trains; 1: the whole layer."""
    aliases: tuple[str, ...] = ()
    """Other names of the parameter: of a tied weight, and of the weight that the columns belong to."""


@dataclass(frozen=True)
class SplitRecord:
    """What splitting did to a model; stands on the model as `slimfit_split`."""

    frozen: tuple[str, ...]
    """Names of the weights that it froze, in part or whole."""
    layers: int
    """Trainable layers before the split."""
    numel: int
    """Elements of these layers."""


def split_record(model: nn.Module) -> SplitRecord | None:
    """What splitting did to this model; None: it is not split."""
    return getattr(model, "slimfit_split", None)


@dataclass(frozen=True)
class ParameterRoles:
    """Every parameter of a model, in model order, by its role under freezing."""

    units: tuple[Unit, ...]
    """What the schedule freezes and unfreezes."""
    small: tuple[str, ...] = ()
    """Biases, norm biases and other vectors: their gradient needs no stored input."""
    frozen: tuple[str, ...] = ()
    """Parameters with `requires_grad=False` when they were found, under all of their names: never touched."""
    split: SplitRecord | None = field(default=None, compare=False)
    order: tuple[str, ...] = field(default=(), compare=False)
    """Names of units and small parameters as they stand in the model."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the units."""
        return tuple(unit.name for unit in self.units)

    @property
    def layers(self) -> int:
        """How many layers the model had to train before any was split."""
        return len(self.units) if self.split is None else self.split.layers

    @property
    def numel(self) -> int:
        """Elements of these layers."""
        return sum(unit.numel for unit in self.units) if self.split is None else self.split.numel


def discover(model: nn.Module) -> ParameterRoles:
    """Find the units of a model (paper, section 3: a weight of more than one dimension, or a norm weight).

    A parameter with two or more dimensions is a unit, whatever holds it (linear, convolution,
    embedding, or a bare parameter such as a bank of experts). A vector is a unit when it is the
    weight of a normalisation module. Every other vector (bias, norm bias, layer scale) is small.
    Tied weights appear once, under their first name. Under ZeRO 3 the full shape is read from
    DeepSpeed's `ds_shape`.

    Returns:
        The roles of all parameters, in model order.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    units: list[Unit] = []
    small: list[str] = []
    frozen: list[str] = []
    order: list[str] = []
    for name, parameter, owner, local_name in _owned_parameters(model):
        shape = full_shape(parameter)
        aliases = tuple(names[id(parameter)][1:])
        if not parameter.requires_grad:
            frozen += [name, *aliases]
            continue
        order.append(name)
        if len(shape) >= 2:
            kind, width = _kind(owner), 1.0
            if local_name == COLUMNS:
                width = _width(kind, shape, full_shape(owner.weight))
                aliases = (f"{name.removesuffix(COLUMNS)}weight", *aliases)
            units.append(Unit(name, kind, shape.numel(), _inputs(kind, owner, tuple(shape)), width, aliases))
        elif _is_norm(owner) and local_name in {"weight", "gamma", "scale"}:
            units.append(Unit(name, "norm", shape.numel(), aliases=aliases))
        else:
            small.append(name)
    return ParameterRoles(tuple(units), tuple(small), tuple(frozen), split_record(model), tuple(order))


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters (tied ones once, columns apart from their weight) and persistent buffers, by name."""
    yield from model.named_parameters()
    persistent = model.state_dict(keep_vars=True)
    for name, buffer in model.named_buffers():
        if name in persistent:
            yield name, buffer


def full_shape(parameter: Any) -> torch.Size:
    """The shape of a parameter, also of one that ZeRO 3 has cut."""
    return getattr(parameter, "ds_shape", parameter.shape)


def _owned_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Module, str]]:
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        owner_name, _, local_name = name.rpartition(".")
        yield name, parameter, modules[owner_name], local_name


def _kind(owner: nn.Module) -> Kind:
    if isinstance(owner, nn.modules.conv._ConvNd):
        return "convolution"
    if isinstance(owner, nn.Embedding | nn.EmbeddingBag):
        return "embedding"
    # transformers' Conv1D (GPT-2) is a linear layer with a transposed weight.
    if isinstance(owner, nn.Linear | nn.Bilinear) or type(owner).__name__ == "Conv1D":
        return "linear"
    return "parameter"


def _width(kind: Kind, part: torch.Size, whole: torch.Size) -> float:
    return part[1] / whole[1] if kind == "embedding" else part.numel() / whole.numel()


def _inputs(kind: Kind, owner: nn.Module, shape: tuple[int, ...]) -> int:
    if kind == "embedding" or (kind == "parameter" and (len(shape) == 2 or shape[0] == 1)):
        return 0
    if kind == "linear":
        # Of a split layer the same dimension counts the columns that train.
        return shape[0] if type(owner).__name__ == "Conv1D" else math.prod(shape[1:])
    # A convolution reads its receptive field; a bank of experts [experts, in, out] reads `in` or `out`.
    return math.prod(shape[1:]) if kind == "convolution" else min(shape[1:])


def _is_norm(owner: nn.Module) -> bool:
    """Every norm of torch and transformers has "norm" in its class name and vectors only."""
    vectors_only = all(len(full_shape(p)) <= 1 for p in owner.parameters(recurse=False))
    return vectors_only and "norm" in type(owner).__name__.lower()


def is_part(name: str) -> bool:
    """Whether a parameter is the trained part of a split layer, by its name."""
    return name.rpartition(".")[2] == COLUMNS


def match_globs(
    patterns: Iterable[str], roles: ParameterRoles, key: str, problems: list[str]
) -> frozenset[int]:
    """Positions of the units that any of the globs matches.

    A glob is matched against all names of a parameter (`encoder.layer.0.output.dense.weight`, the other name of a tied
    weight) and of its module (`encoder.layer.0.output.dense`). One that matches a frozen parameter only has found what it
    asks for: that is no error.

    Args:
        patterns: shell-style globs.
        roles: of the model.
        key: where the patterns stand, for the message.
        problems: a line is appended for each pattern that matches nothing, with near names.
    """
    found: set[int] = set()
    for pattern in patterns:
        hits = {
            index
            for index, unit in enumerate(roles.units)
            if any(_matches(pattern, name) for name in (unit.name, *unit.aliases))
        }
        if not hits and not any(_matches(pattern, name) for name in roles.frozen):
            near = _near_names(pattern, roles.names)
            problems.append(f"{key}: {pattern!r} matches no layer; near names: {', '.join(near)}")
        found |= hits
    return frozenset(found)


def match_always_and_never(
    always: Iterable[str], never: Iterable[str], roles: ParameterRoles, problems: list[str]
) -> tuple[frozenset[int], frozenset[int]]:
    """Positions of the units that the globs of `always_active` and of `never_active` match.

    Args:
        always: globs of the first.
        never: globs of the second.
        roles: of the model.
        problems: a line is appended for each glob without a match and for each unit that both match.
    """
    first = match_globs(always, roles, "slimfit.freeze.always_active", problems)
    second = match_globs(never, roles, "slimfit.freeze.never_active", problems)
    problems += [
        f"slimfit.freeze: {roles.names[unit]!r} is matched by always_active and by never_active"
        for unit in sorted(first & second)
    ]
    return first, second


def _matches(pattern: str, name: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name.rpartition(".")[0], pattern)


def _near_names(pattern: str, names: Sequence[str], count: int = 3) -> list[str]:
    plain = pattern.replace("*", "").replace("?", "")

    def distance(name: str) -> float:
        # A short pattern is compared with the parts of a name, a dotted one with the whole.
        parts = [name, *name.split(".")]
        return -max(difflib.SequenceMatcher(None, plain, part).ratio() for part in parts)

    return sorted(names, key=distance)[:count]


@dataclass(frozen=True)
class Blocks:
    """Positions of units by where they stand in the model."""

    before: tuple[int, ...]
    """Embeddings: all units in front of the first block."""
    blocks: tuple[tuple[int, ...], ...]
    """The units of each block, in model order."""
    after: tuple[int, ...]
    """Final norm, pooler and head: all units behind the last block, and those between blocks."""


def find_blocks(names: Sequence[str]) -> Blocks:
    """Group units by the numbered list that most of them stand in (`encoder.layer.3.`, `model.layers.3.`).

    A model without such a list is one block for each unit.

    Args:
        names: of the units, in model order.
    """
    prefixes = [_numbered_prefix(name) for name in names]
    lists = Counter(prefix[0] for prefix in prefixes if prefix is not None)
    if not lists:
        return Blocks((), tuple((unit,) for unit in range(len(names))), ())
    (stem, _), *_ = lists.most_common(1)
    members: dict[str, list[int]] = {}
    before: list[int] = []
    after: list[int] = []
    for unit, prefix in enumerate(prefixes):
        if prefix is not None and prefix[0] == stem:
            members.setdefault(prefix[1], []).append(unit)
        else:
            (after if members else before).append(unit)
    return Blocks(tuple(before), tuple(tuple(block) for block in members.values()), tuple(after))


def _numbered_prefix(name: str) -> tuple[str, str] | None:
    """The list that a name stands in and its number there: the outermost numbered part."""
    parts = name.split(".")
    for position, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[:position]), part
    return None
