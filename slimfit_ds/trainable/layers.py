"""The freezable layers of any `nn.Module`, found by what its parameters are, without a class map."""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

__all__ = ["COLUMNS", "Layer", "ParameterRoles", "discover", "is_part", "match_globs"]

COLUMNS = "weight_columns"
"""Name of the parameter that holds the trained columns of a split layer, beside its frozen `weight`."""

Kind = Literal["linear", "convolution", "embedding", "norm", "parameter"]


@dataclass(frozen=True)
class Layer:
    """One freezable weight: the unit that the schedule freezes and the engine shards."""

    name: str
    """Name of the weight as in `model.named_parameters()`."""
    kind: Kind
    numel: int
    inputs: int = 0
    """Elements per position (token, patch) of the input that only this weight's gradient needs: what an
    active layer adds to the activations kept. 0 for norms (their input is kept in any case), embeddings (ids)
    and parameters that are merely added."""
    share: float = 1.0
    """Of the weights it stands for, below 1 for the trained columns of a split layer; of an embedding, of a word's vector."""


@dataclass(frozen=True)
class ParameterRoles:
    """Every trainable parameter of a model, in model order, by its role under freezing."""

    layers: tuple[Layer, ...]
    """Weights that are frozen and unfrozen by the schedule."""
    small: tuple[str, ...]
    """Biases, norm biases and other vectors: their gradient needs no stored input."""
    user_frozen: tuple[str, ...]
    """Parameters with `requires_grad=False` when they were found: never touched."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(layer.name for layer in self.layers)


def discover(model: nn.Module) -> ParameterRoles:
    """The layers of a model (paper, section 3: a weight of more than one dimension, or a norm weight).

    A parameter with two or more dimensions is a layer, whatever holds it (linear, convolution,
    embedding, or a bare parameter such as a bank of experts). A vector is a layer when it is the
    weight of a normalisation module. Every other vector (bias, norm bias, layer scale) is small.
    Tied weights appear once, under their first name. Under ZeRO 3 the full shape is read from
    DeepSpeed's `ds_shape`.

    Returns:
        The roles of all parameters, in model order.
    """
    layers: list[Layer] = []
    small: list[str] = []
    user_frozen: list[str] = []
    for name, parameter, owner, local_name in _owned_parameters(model):
        shape = _shape(parameter)
        if not parameter.requires_grad:
            user_frozen.append(name)
        elif len(shape) >= 2:
            kind = _kind(owner)
            share = _share(kind, shape, _shape(owner.weight)) if local_name == COLUMNS else 1.0
            layers.append(Layer(name, kind, shape.numel(), _inputs(kind, owner, tuple(shape)), share))
        elif _is_norm(owner) and local_name in {"weight", "gamma", "scale"}:
            layers.append(Layer(name, "norm", shape.numel()))
        else:
            small.append(name)
    return ParameterRoles(tuple(layers), tuple(small), tuple(user_frozen))


def _shape(parameter: Any) -> torch.Size:
    """Also of a parameter that ZeRO 3 has cut."""
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


def _share(kind: Kind, part: torch.Size, whole: torch.Size) -> float:
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
    vectors_only = all(len(getattr(p, "ds_shape", p.shape)) <= 1 for p in owner.parameters(recurse=False))
    return vectors_only and "norm" in type(owner).__name__.lower()


def is_part(name: str) -> bool:
    """Whether a parameter is the trained part of a split layer, by its name."""
    return name.rpartition(".")[2] == COLUMNS


def match_globs(
    patterns: Iterable[str], names: Sequence[str], key: str, problems: list[str]
) -> frozenset[int]:
    """Positions of the names that any of the globs matches.

    A glob is matched against the parameter name (`encoder.layer.0.output.dense.weight`) and against
    the module name (`encoder.layer.0.output.dense`).

    Args:
        patterns: shell-style globs.
        names: layer names.
        key: where the patterns stand, for the message.
        problems: a line is appended for each pattern that matches nothing, with near names.
    """
    found: set[int] = set()
    for pattern in patterns:
        hits = {
            index
            for index, name in enumerate(names)
            if fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name.rpartition(".")[0], pattern)
        }
        if not hits:
            near = _near_names(pattern, names)
            problems.append(f"{key}: {pattern!r} matches no layer; near names: {', '.join(near)}")
        found |= hits
    return frozenset(found)


def _near_names(pattern: str, names: Sequence[str], count: int = 3) -> list[str]:
    plain = pattern.replace("*", "").replace("?", "")

    def distance(name: str) -> float:
        # A short pattern is compared with the parts of a name, a dotted one with the whole.
        parts = [name, *name.split(".")]
        return -max(difflib.SequenceMatcher(None, plain, part).ratio() for part in parts)

    return sorted(names, key=distance)[:count]
