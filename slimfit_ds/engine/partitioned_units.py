"""The units of ZeRO 3: every parameter by itself, cut over the ranks by DeepSpeed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from deepspeed import comm as dist
from torch import Tensor, nn

from slimfit_ds.trainable.layers import ParameterRoles

__all__ = ["PartitionedCut", "PartitionedUnit", "build_units"]


class PartitionedUnit:
    """A parameter that ZeRO 3 has cut over the ranks.

    Args:
        index: position among the units.
        name: name of the parameter.
        parameter: it; `ds_tensor` is this rank's stretch, padded at the end.
        group: index of the optimizer's parameter group.
        layer: position in the schedule; `None`: trains at every step.
    """

    def __init__(self, index: int, name: str, parameter: Any, group: int, layer: int | None):
        self.index = index
        self.names = (name,)
        self.parameter = parameter
        self.group = group
        self.layer = layer
        self.numel: int = parameter.ds_numel
        rank, chunk = dist.get_rank(group=parameter.ds_process_group), parameter.partition_numel()
        self.start = min(rank * chunk, self.numel)
        self.length = min(chunk, self.numel - self.start)

    def spans(self) -> Iterator[tuple[nn.Parameter, int, int]]:
        """The parameter with its first and last (exclusive) position in the unit."""
        yield self.parameter, 0, self.numel


class PartitionedCut:
    """Which stretch of each unit is this rank's."""

    def own(self, unit: PartitionedUnit) -> tuple[int, int]:
        """First and last (exclusive) element of the stretch."""
        return unit.start, unit.start + unit.length

    def own_weights(self, unit: PartitionedUnit) -> Tensor:
        """The stretch without its padding, a view; on the host with `offload_param`."""
        return unit.parameter.ds_tensor.data[: unit.length]


def build_units(model: nn.Module, roles: ParameterRoles, groups: Sequence[dict]) -> list[PartitionedUnit]:
    """A unit for each parameter that requires a gradient now and stands in one of the groups.

    Args:
        groups: the parameter groups of the optimizer.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    layers = {layer.name: position for position, layer in enumerate(roles.layers)}
    units: list[PartitionedUnit] = []
    for group, options in enumerate(groups):
        for parameter in options["params"]:
            if parameter.requires_grad and parameter.ds_numel:
                name = names[id(parameter)]
                units.append(PartitionedUnit(len(units), name, parameter, group, layers.get(name)))
    return units
