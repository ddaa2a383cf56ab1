"""Reduce gradients to shards and gather weights from shards, for the active units only.

A unit of `numel` elements is cut into `rows` equal chunks (the last may be short): `rows` is the number
of data-parallel ranks, or 1 where every rank keeps the whole (stage 0, or a single rank). Units travel
in buckets whose layout is `[rows, row]`, a row being the chunks of one rank one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from deepspeed import comm as dist
from torch import Tensor

from slimfit_ds.engine.units import Piece, Unit, pieces

__all__ = ["Sharding", "squared_norm"]


class Sharding:
    """The cut of all units over the data-parallel ranks.

    Args:
        group: the data-parallel process group.
        sharded: optimizer work is split over the ranks (stages 1, 2) or repeated on each (stage 0).
        reduce_bucket: elements of one reduction over all ranks.
        gather_bucket: elements of one gather over all ranks.
        average: divide summed gradients by the number of ranks.
    """

    def __init__(self, group, sharded: bool, reduce_bucket: int, gather_bucket: int, average: bool):
        self.group = group
        self.world = dist.get_world_size(group=group)
        self.rank = dist.get_rank(group=group)
        self.rows = self.world if sharded else 1
        self.row = self.rank if sharded else 0
        self._average = average
        self._reduce_limit = max(reduce_bucket // self.rows, 1)
        self._gather_limit = max(gather_bucket // self.rows, 1)

    def chunk(self, unit: Unit) -> int:
        """Elements of a chunk of this unit."""
        return -(-unit.numel // self.rows)

    def own(self, unit: Unit) -> tuple[int, int]:
        """First and last (exclusive) element of this rank's shard in the flat unit."""
        start = min(self.row * self.chunk(unit), unit.numel)
        return start, min(start + self.chunk(unit), unit.numel)

    def own_weights(self, unit: Unit) -> Tensor:
        """This rank's shard of the weights, a view."""
        start, stop = self.own(unit)
        return unit.flat[start:stop]

    def reduce(
        self, units: Sequence[Unit], gradients: dict[int, Tensor], send: torch.dtype, keep: torch.dtype | None
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
            return shards, squared_norm(list(shards.values()))
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
        device = gradients[bucket[0].unit.index].device
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
            start, stop = self.own(piece.unit)
            # The last rank's chunk may be shorter than the piece says: the rest is padding.
            length = max(min(piece.stop, stop - start) - piece.start, 0)
            if length:
                part = result[offset : offset + length]
                parts[piece.unit.index].append(part.to(keep or piece.unit.dtype))
            offset += piece.length
        # Padding is zero, so the whole message counts.
        return squared_norm([result])

    def gather(self, units: Sequence[Unit], sidecar: Tensor) -> Tensor:
        """Give every rank the whole weights of these units, from each rank's own shard.

        Args:
            sidecar: a few float32 values `[n]` of this rank that travel with the first bucket.

        Returns:
            The sidecars of all ranks `[rows, n]`, in rank order: the same on every rank.
        """
        if self.rows == 1:
            return sidecar[None]
        sidecars = sidecar[None]
        extra: Tensor | None = sidecar.contiguous().view(torch.uint8)
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
        device = bucket[0].unit.device
        row = torch.zeros(head + sum(sizes), dtype=torch.uint8, device=device)
        if extra is not None:
            row[:head] = extra
        offset = head
        for piece, size in zip(bucket, sizes, strict=True):
            part = self.own_weights(piece.unit)[piece.start : piece.stop]
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


def squared_norm(tensors: list[Tensor]) -> Tensor:
    """Sum of squares of all elements, in float32, without float32 copies."""
    return torch.stack(torch._foreach_norm(tensors, 2.0, torch.float32)).square().sum()
