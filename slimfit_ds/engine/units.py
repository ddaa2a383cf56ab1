"""The units that the optimizer freezes, shards and steps: one per layer, one per bundle of small parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from slimfit_ds.trainable.layers import ParameterRoles

__all__ = ["Piece", "Unit", "build_units", "pieces"]


class Unit:
    """A flat stretch of weights that is active or frozen as a whole.

    Args:
        index: position among the units.
        names: parameter names, in order.
        parameters: the parameters; several of them are moved into one flat tensor that they view.
        group: index of the optimizer's parameter group (learning rate, weight decay).
        layer: position of the layer in the schedule, or `None` for a bundle that always trains.
    """

    def __init__(
        self,
        index: int,
        names: Sequence[str],
        parameters: Sequence[nn.Parameter],
        group: int,
        layer: int | None,
    ):
        self.index = index
        self.names = tuple(names)
        self.parameters = tuple(parameters)
        self.group = group
        self.layer = layer
        self.numel = sum(p.numel() for p in parameters)
        self.dtype = parameters[0].dtype
        self.device = parameters[0].device
        if len(parameters) == 1:
            parameters[0].data = parameters[0].data.contiguous()
            self._flat: Tensor | None = None
        else:
            self._flat = torch.cat([p.data.reshape(-1) for p in parameters])
            for parameter, start, stop in self.spans():
                parameter.data = self._flat[start:stop].view(parameter.shape)

    @property
    def flat(self) -> Tensor:
        """The weights as one flat tensor `[numel]` that shares their memory."""
        return self.parameters[0].data.view(-1) if self._flat is None else self._flat

    def spans(self) -> Iterator[tuple[nn.Parameter, int, int]]:
        """Each parameter with its first and last (exclusive) position in the flat tensor."""
        start = 0
        for parameter in self.parameters:
            yield parameter, start, start + parameter.numel()
            start += parameter.numel()

    def has_gradient(self) -> bool:
        return any(p.grad is not None for p in self.parameters)

    def flat_gradient(self) -> Tensor:
        """The gradients as one flat tensor `[numel]`; of a single parameter without a copy."""
        if len(self.parameters) == 1:
            gradient = self.parameters[0].grad
            if gradient is None:
                return torch.zeros(self.numel, dtype=self.dtype, device=self.device)
            return gradient.reshape(-1)
        flat = torch.zeros(self.numel, dtype=self.dtype, device=self.device)
        for parameter, start, stop in self.spans():
            if parameter.grad is not None:
                flat[start:stop] = parameter.grad.reshape(-1)
        return flat

    def drop_gradient(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def set_trainable(self, trainable: bool) -> None:
        for parameter in self.parameters:
            parameter.requires_grad_(trainable)


def build_units(
    model: nn.Module, roles: ParameterRoles, groups: Sequence[dict], train_small: bool
) -> list[Unit]:
    """A unit for each layer, then one for the small parameters of each (group, dtype).

    Args:
        groups: the optimizer's parameter groups; a parameter in none of them is not stepped.
        train_small: small parameters train at every step; otherwise they are frozen for good.
    """
    group_of = {id(p): i for i, group in enumerate(groups) for p in group["params"]}
    parameters = dict(model.named_parameters())
    units: list[Unit] = []
    for position, layer in enumerate(roles.layers):
        parameter = parameters[layer.name]
        if id(parameter) in group_of:
            group = group_of[id(parameter)]
            units.append(Unit(len(units), [layer.name], [parameter], group, position))
    bundles: dict[tuple[int, torch.dtype], list[str]] = {}
    for name in roles.small:
        parameter = parameters[name]
        if not train_small or id(parameter) not in group_of:
            parameter.requires_grad_(False)
            continue
        bundles.setdefault((group_of[id(parameter)], parameter.dtype), []).append(name)
    for (group, _), names in bundles.items():
        units.append(Unit(len(units), names, [parameters[n] for n in names], group, None))
    return units


_AnyUnit = TypeVar("_AnyUnit")


@dataclass(frozen=True)
class Piece(Generic[_AnyUnit]):
    """Positions `start` to `stop` of a unit's shard: the granule of communication and update."""

    unit: _AnyUnit
    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start


def pieces(lengths: Sequence[tuple[_AnyUnit, int]], limit: int) -> Iterator[list[Piece[_AnyUnit]]]:
    """Cut the shards of several units into buckets of at most `limit` elements, in order.

    Args:
        lengths: each unit with the length of its shard.
        limit: elements of a bucket; a large unit is spread over several.
    """
    bucket: list[Piece[_AnyUnit]] = []
    room = limit
    for unit, length in lengths:
        start = 0
        while start < length:
            stop = min(start + room, length)
            bucket.append(Piece(unit, start, stop))
            room -= stop - start
            start = stop
            if room == 0:
                yield bucket
                bucket, room = [], limit
    if bucket:
        yield bucket
