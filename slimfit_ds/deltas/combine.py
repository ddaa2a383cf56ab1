"""The weighted sum of several deltas of one base, as one delta."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from slimfit_ds.deltas.base import DeltaError, find_base, whole_name
from slimfit_ds.deltas.delta import Delta
from slimfit_ds.deltas.load import load_base
from slimfit_ds.trainable.units import is_part, named_tensors

__all__ = ["combine"]


@torch.no_grad()
def combine(base: str | Path, deltas: Sequence[Delta], weights: Sequence[float] | None = None) -> Delta:
    """Return the base plus the weighted sum of what each delta changed of it, as one delta.

    Args:
        base: folder or hub id.
        deltas: of this base, of the same class of model.
        weights: one for each delta; None: their mean.

    Returns:
        A delta in the dtype of the first. Where all deltas have the same columns of a weight, so has the sum; else it has the
        weight whole.

    Raises:
        DeltaError: another base, another class or other shapes, not as many weights as deltas, or one that is not finite.
    """
    weights = [1 / len(deltas)] * len(deltas) if weights is None else weights
    if not deltas or len(weights) != len(deltas):
        raise DeltaError(f"{len(deltas)} deltas and {len(weights)} weights: give one weight for each")
    if not all(map(math.isfinite, weights)):
        raise DeltaError(f"weights must be finite, got {', '.join(map(str, weights))}")
    folder, found = find_base(base)
    for delta in deltas:
        delta.base.require(found, "the delta")
        if delta.architecture != deltas[0].architecture:
            raise DeltaError(f"deltas of {deltas[0].architecture} and {delta.architecture} have no sum")
    first = deltas[0]
    model, made = load_base(folder, first)
    original = dict(named_tensors(model))
    names = sorted({whole_name(name) for delta in deltas for name in delta.tensors})
    for name in names:
        if name not in original:
            raise DeltaError(f"the first delta's {first.architecture} has no {name!r}")
        if name in made:
            # A head that was made anew has no base.
            original[name] = torch.zeros_like(original[name])
            if not all(name in delta.tensors for delta in deltas):
                raise DeltaError(f"not all deltas have {name!r}, which their base lacks")
    tensors: dict[str, Tensor] = {}
    places = {}
    for name in names:
        start = original[name]
        splits = [delta.places.get(name) for delta in deltas]
        whole = any(name in delta.tensors for delta in deltas)
        if splits[0] is not None and not whole and all(split == splits[0] for split in splits):
            places[name] = splits[0]
        total = start.double() if start.is_floating_point() else start
        for delta, weight in zip(deltas, weights, strict=True):
            if start.is_floating_point():
                total = total + weight * (_value(delta, name, start) - start.double())
            elif name in delta.tensors and not torch.equal(delta.tensors[name], start):
                raise DeltaError(f"{name!r} is not of floating point, so it has no weighted sum")
        result = total.to(start.dtype)
        if name in places:
            part = next(n for n in first.tensors if is_part(n) and whole_name(n) == name)
            tensors[part] = places[name].of_weight(result).contiguous()
        else:
            tensors[name] = result.contiguous()
    return dataclasses.replace(first, tensors=tensors, places=places)


def _value(delta: Delta, name: str, start: Tensor) -> Tensor:
    """A weight with a delta in it, float64."""
    value = delta.tensors.get(name, start).double()
    if name in delta.places:
        part = next(n for n in delta.tensors if is_part(n) and whole_name(n) == name)
        value = value.clone()
        delta.places[name].of_weight(value).copy_(delta.tensors[part])
    if value.shape != start.shape:
        raise DeltaError(
            f"{name!r} has shape {list(value.shape)} in one delta, and {list(start.shape)} in another"
        )
    return value
