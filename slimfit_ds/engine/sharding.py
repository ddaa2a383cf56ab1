"""Units, the weights that train or are frozen as a whole, and how they are cut over the data-parallel ranks.

Stages 0 to 2: a unit of `numel` elements is cut into `rows` equal chunks (the last may be short): `rows` is the number
of ranks, or 1 where every rank keeps the whole (stage 0, or a single rank). `Sharding` reduces gradients to shards and
gathers weights from shards, in buckets whose layout is `[rows, row]`, a row being the chunks of one rank one after the
other. Stage 3: DeepSpeed has cut each parameter, and reduces and gathers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed import comm as dist
from torch import Tensor, nn

from slimfit_ds.trainable.units import ParameterRoles

__all__ = [
    "FlatUnit",
    "PartitionedUnit",
    "Piece",
    "Sharding",
    "Unit",
    "build_units",
    "pieces",
    "squared_norm",
]


class Unit:
    """Weights that train or are frozen as a whole, and this rank's shard of them.

    Args:
        index: position among the units.
        names: parameter names, in order.
        parameters: the parameters, one after the other in the flat unit.
        group: index of the optimizer's parameter group (learning rate, weight decay).
        layer: position of the layer in the schedule; None: small parameters.
        depth: of small parameters; they train where the front is not above it.

    Attributes:
        start, stop: first and last (exclusive) element of this rank's shard in the flat unit.
    """

    def __init__(
        self,
        index: int,
        names: Sequence[str],
        parameters: Sequence[nn.Parameter],
        group: int,
        layer: int | None,
        depth: int = 0,
    ):
        self.index = index
        self.names = tuple(names)
        self.parameters = tuple(parameters)
        self.group = group
        self.layer = layer
        self.depth = depth
        self.dtype = parameters[0].dtype
        self.device = parameters[0].device
        self.numel: int = sum(getattr(p, "ds_numel", p.numel()) for p in parameters)
        self.start, self.stop = 0, self.numel

    @property
    def length(self) -> int:
        """Elements of this rank's shard."""
        return self.stop - self.start

    @property
    def own_weights(self) -> Tensor:
        """This rank's shard of the weights, a view; it may stand on another device than its states."""
        raise NotImplementedError

    def spans(self) -> Iterator[tuple[nn.Parameter, int, int]]:
        """Yield each parameter with its first and last (exclusive) position in the flat unit."""
        start = 0
        for parameter in self.parameters:
            stop = start + getattr(parameter, "ds_numel", parameter.numel())
            yield parameter, start, stop
            start = stop

    def drop_gradient(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def set_trainable(self, trainable: bool) -> None:
        for parameter in self.parameters:
            parameter.requires_grad_(trainable)


class FlatUnit(Unit):
    """A unit of stages 0 to 2; several parameters are moved into one flat tensor that they view."""

    def __init__(
        self,
        index: int,
        names: Sequence[str],
        parameters: Sequence[nn.Parameter],
        group: int,
        layer: int | None,
        depth: int = 0,
    ):
        super().__init__(index, names, parameters, group, layer, depth)
        self._flat: Tensor | None = None
        if len(parameters) == 1:
            parameters[0].data = parameters[0].data.contiguous()
        else:
            self._flat = torch.cat([p.data.reshape(-1) for p in parameters])
            for parameter, start, stop in self.spans():
                parameter.data = self._flat[start:stop].view(parameter.shape)

    @property
    def flat(self) -> Tensor:
        """The weights as one flat tensor `[numel]` that shares their memory."""
        # Not `.data`: who keeps a copy of a parameter on another device sees by its version that it was written to.
        return self.parameters[0].detach().view(-1) if self._flat is None else self._flat

    @property
    def own_weights(self) -> Tensor:
        return self.flat[self.start : self.stop]

    def has_gradient(self) -> bool:
        return any(p.grad is not None for p in self.parameters)

    def flat_gradient(self) -> Tensor:
        """The gradients as one flat tensor `[numel]`; of a single parameter without a copy."""
        if len(self.parameters) == 1 and (gradient := self.parameters[0].grad) is not None:
            return gradient.reshape(-1)
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters]
        return torch.cat([gradient.reshape(-1) for gradient in gradients])


class PartitionedUnit(Unit):
    """A unit of stage 3: one parameter, of which `ds_tensor` is this rank's shard, padded at the end."""

    def __init__(
        self,
        index: int,
        names: Sequence[str],
        parameters: Sequence[Any],
        group: int,
        layer: int | None,
        depth: int = 0,
    ):
        super().__init__(index, names, parameters, group, layer, depth)
        (self.parameter,) = parameters
        chunk = self.parameter.partition_numel()
        self.start = min(dist.get_rank(group=self.parameter.ds_process_group) * chunk, self.numel)
        self.stop = min(self.start + chunk, self.numel)

    @property
    def own_weights(self) -> Tensor:
        """The shard without its padding; on the host with `offload_param`."""
        return self.parameter.ds_tensor.data[: self.length]


def build_units(
    model: nn.Module,
    roles: ParameterRoles,
    groups: Sequence[dict],
    train_small: bool,
    depths: Mapping[str, int],
    partitioned: bool = False,
) -> list[Any]:
    """Make a unit of each layer, then of the small parameters: one for each (group, dtype, depth), or each by itself.

    Args:
        groups: the optimizer's parameter groups; a parameter in none of them is not stepped.
        train_small: small parameters train at every step; otherwise they are frozen for good.
        depths: of parameters by name, where a front moves over them.
        partitioned: ZeRO 3 has cut the parameters.
    """
    kind = PartitionedUnit if partitioned else FlatUnit
    group_of = {id(p): i for i, group in enumerate(groups) for p in group["params"]}
    parameters = dict(model.named_parameters())
    members: list[tuple[list[str], int, int | None, int]] = []
    for position, layer in enumerate(roles.units):
        group = group_of.get(id(parameters[layer.name]))
        if group is not None:
            members.append(([layer.name], group, position, 0))
    bundles: dict[tuple, list[str]] = {}
    for name in roles.small:
        parameter = parameters[name]
        group = group_of.get(id(parameter))
        if not train_small or group is None:
            parameter.requires_grad_(False)
            continue
        key = (group, depths.get(name, 0), parameter.dtype, name if partitioned else "")
        bundles.setdefault(key, []).append(name)
    members += [(names, group, None, depth) for (group, depth, *_), names in bundles.items()]
    return [
        kind(index, names, [parameters[name] for name in names], group, layer, depth)
        for index, (names, group, layer, depth) in enumerate(members)
    ]


@dataclass(frozen=True)
class Piece:
    """Positions `start` to `stop` of a unit's shard: the granule of communication and update."""

    unit: Any
    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start


def pieces(lengths: Sequence[tuple[Unit, int]], limit: int) -> Iterator[list[Piece]]:
    """Cut the shards of several units into buckets of at most `limit` elements, in order.

    Args:
        lengths: each unit with the length of its shard.
        limit: elements of a bucket; a large unit is spread over several.
    """
    bucket: list[Piece] = []
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


class Sharding:
    """The cut of all units of stages 0 to 2 over the data-parallel ranks.

    Args:
        units: get their `start` and `stop`.
        group: the data-parallel process group.
        sharded: optimizer work is split over the ranks (stages 1, 2) or repeated on each (stage 0).
        reduce_bucket: elements of one reduction over all ranks.
        gather_bucket: elements of one gather over all ranks.
        average: divide summed gradients by the number of ranks.
        device: of the messages; weights and gradients of a unit may be on the host.
    """

    def __init__(
        self,
        units: Sequence[FlatUnit],
        group: Any,
        sharded: bool,
        reduce_bucket: int,
        gather_bucket: int,
        average: bool,
        device: torch.device,
    ):
        self.device = device
        self.units = list(units)
        self.group = group
        self.world = dist.get_world_size(group=group)
        self.rank = dist.get_rank(group=group)
        self.rows = self.world if sharded else 1
        self.row = self.rank if sharded else 0
        self._average = average
        self._reduce_limit = max(reduce_bucket // self.rows, 1)
        self._gather_limit = max(gather_bucket // self.rows, 1)
        for unit in self.units:
            unit.start = min(self.row * self.chunk(unit), unit.numel)
            unit.stop = min(unit.start + self.chunk(unit), unit.numel)

    def chunk(self, unit: Unit) -> int:
        """Elements of a chunk of this unit."""
        return -(-unit.numel // self.rows)

    def reduce(
        self,
        units: Sequence[FlatUnit],
        gradients: dict[int, Tensor],
        send: torch.dtype,
        keep: torch.dtype | None,
    ) -> tuple[dict[int, Tensor], Tensor]:
        """Average gradients over the ranks; each rank gets its own shards.

        Args:
            gradients: unit index -> flat local gradient `[numel]`; taken out as they are sent.
            send: dtype of the messages.
            keep: dtype of the shards; `None`: that of each unit's weights.

        Returns:
            unit index -> shard `[own length]`, and the sum of squares of all own shards before they were
            rounded to `keep`.
        """
        if self.world == 1:
            shards = {unit.index: gradients.pop(unit.index) for unit in units}
            return shards, squared_norm(list(shards.values()), self.device)
        parts: dict[int, list[Tensor]] = {unit.index: [] for unit in units}
        squares: list[Tensor] = []
        in_flight: list[tuple[list[Piece], Tensor, object]] = []
        for bucket in pieces([(unit, self.chunk(unit)) for unit in units], self._reduce_limit):
            # One bucket travels while the next is packed.
            in_flight.append(self._start_reduce(bucket, gradients, send))
            for piece in bucket:
                if piece.stop == self.chunk(piece.unit):
                    del gradients[piece.unit.index]
            if len(in_flight) > 1:
                squares.append(self._finish_reduce(*in_flight.pop(0), keep, parts))
        squares += [self._finish_reduce(*entry, keep, parts) for entry in in_flight]
        shards = {}
        for unit in units:
            found = parts[unit.index] or [torch.empty(0, dtype=keep or unit.dtype, device=unit.device)]
            shards[unit.index] = found[0] if len(found) == 1 else torch.cat(found)
        return shards, torch.stack(squares).sum()

    def _start_reduce(self, bucket: list[Piece], gradients: Mapping[int, Tensor], dtype: torch.dtype):
        device = self.device
        row = sum(piece.length for piece in bucket)
        buffer = torch.zeros(self.rows * row, dtype=dtype, device=device)
        self._copy_in(bucket, buffer.view(self.rows, row), gradients)
        if self._average:
            # Before the sum, so that 16-bit sums over many ranks do not overflow.
            buffer.div_(self.world)
        if self.rows == 1:
            return bucket, buffer, dist.all_reduce(buffer, group=self.group, async_op=True)
        result = torch.empty(row, dtype=dtype, device=device)
        work = dist.reduce_scatter_fn(result, buffer, group=self.group, async_op=True)
        return bucket, result, work

    def _copy_in(self, bucket: list[Piece], rows: Tensor, flats: Mapping[int, Tensor]) -> None:
        offset = 0
        for piece in bucket:
            unit, length = piece.unit, piece.length
            flat, chunk = flats[unit.index], self.chunk(unit)
            if unit.numel == self.rows * chunk:
                rows[:, offset : offset + length] = flat.view(self.rows, chunk)[:, piece.start : piece.stop]
            else:
                for row in range(self.rows):
                    part = flat[row * chunk + piece.start : min(row * chunk + piece.stop, unit.numel)]
                    rows[row, offset : offset + part.numel()] = part
            offset += length

    def _finish_reduce(
        self,
        bucket: list[Piece],
        result: Tensor,
        work,
        keep: torch.dtype | None,
        parts: dict[int, list[Tensor]],
    ) -> Tensor:
        if work is not None:
            work.wait()
        offset = 0
        for piece in bucket:
            # The last rank's chunk may be shorter than the piece says: the rest is padding.
            length = max(min(piece.stop, piece.unit.length) - piece.start, 0)
            if length:
                part = result[offset : offset + length]
                parts[piece.unit.index].append(part.to(piece.unit.device, keep or piece.unit.dtype))
            offset += piece.length
        # Padding is zero, so the whole message counts.
        return squared_norm([result])

    def gather(self, units: Sequence[FlatUnit], sidecar: Tensor) -> Tensor:
        """Give every rank the whole weights of these units, from each rank's own shard.

        Args:
            sidecar: a few float32 values `[n]` of this rank that travel with the first bucket.

        Returns:
            The sidecars of all ranks `[rows, n]`, in rank order: the same on every rank.
        """
        if self.rows == 1:
            return sidecar[None]
        sidecars = sidecar[None]
        extra = sidecar.contiguous().view(torch.uint8) if sidecar.numel() else None
        for bucket in pieces([(unit, self.chunk(unit)) for unit in units], self._gather_limit):
            received = self._gather_bucket(bucket, extra)
            if extra is not None:
                head = received[:, : extra.numel()].contiguous()
                sidecars = head.view(-1).view(torch.float32).view(self.rows, -1)
                extra = None
        return sidecars

    def _gather_bucket(self, bucket: list[Piece], extra: Tensor | None) -> Tensor:
        """Bytes are sent, so that units of several dtypes and the sidecar share a message."""
        head = 0 if extra is None else extra.numel()
        sizes = [piece.length * piece.unit.dtype.itemsize for piece in bucket]
        device = self.device
        row = torch.zeros(head + sum(sizes), dtype=torch.uint8, device=device)
        if extra is not None:
            row[:head] = extra
        offset = head
        for piece, size in zip(bucket, sizes, strict=True):
            part = piece.unit.own_weights[piece.start : piece.stop]
            packed = part.view(torch.uint8)
            row[offset : offset + packed.numel()] = packed
            offset += size
        received = torch.empty(self.rows * row.numel(), dtype=torch.uint8, device=device)
        dist.allgather_fn(received, row, group=self.group)
        table = received.view(self.rows, -1)
        offset = head
        for piece, size in zip(bucket, sizes, strict=True):
            self._copy_out(piece, table[:, offset : offset + size])
            offset += size
        return table

    def _copy_out(self, piece: Piece, table: Tensor) -> None:
        unit, chunk = piece.unit, self.chunk(piece.unit)
        width = unit.dtype.itemsize
        flat = unit.flat.view(torch.uint8)
        if unit.numel == self.rows * chunk:
            flat.view(self.rows, chunk * width)[:, piece.start * width : piece.stop * width] = table
            return
        for row in range(self.rows):
            start = row * chunk + piece.start
            length = max(min(row * chunk + piece.stop, unit.numel) - start, 0) * width
            if length:
                flat[start * width : start * width + length] = table[row, :length]


def squared_norm(tensors: list[Tensor], device: torch.device | None = None) -> Tensor:
    """Sum of squares of all elements, in float32, without float32 copies.

    Args:
        tensors: on one device; some may be on the host.
        device: that device; default: that of the first.
    """
    device = device or tensors[0].device
    if all(tensor.device.type == device.type for tensor in tensors):
        norms = list(torch._foreach_norm(tensors, 2.0, torch.float32))
    else:
        # Those on the host one after the other: there is no room for all of them.
        norms = [
            torch._foreach_norm([t.to(device, non_blocking=True)], 2.0, torch.float32)[0] for t in tensors
        ]
    return torch.stack(norms).square().sum()
