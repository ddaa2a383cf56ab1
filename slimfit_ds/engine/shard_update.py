"""The update of a rank's own shards: states, rule and statistic, whatever brings gradients and takes weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from slimfit_ds.activations.codecs.triton_support import runs_in_triton
from slimfit_ds.engine.checkpoint_files import Shard, ShardReader
from slimfit_ds.engine.sharding import Piece, Unit, pieces
from slimfit_ds.optim.config import OptimizerStatesConfig
from slimfit_ds.optim.low_bit import stochastic_round_bf16
from slimfit_ds.optim.rules import UpdateRule
from slimfit_ds.optim.states import LayerState, StateStore, UnitStates
from slimfit_ds.schedule.statistics import Statistic, of_layers

__all__ = ["ShardUpdater"]

# Elements that are updated together: bounds the float32 temporaries of a step, and keeps them in a CPU's cache.
_UPDATE_ELEMENTS = 1 << 21


class ShardUpdater:
    """Steps own shards and keeps their states.

    Args:
        units: every unit that may train; `units[i].index == i`.
        optimizer: its parameter groups hold the hyperparameters; its own step is never called.
        rule: the update rule that does what this optimizer would do.
        statistic: the measure of an update; None: nothing is measured.
        config: residency, precision and staleness of the states.
        device: where updates are worked out and active states live.
        seed: seed of stochastic rounding.
        rank: position of this rank among the shards.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        optimizer: torch.optim.Optimizer,
        rule: UpdateRule,
        statistic: Statistic | None,
        config: OptimizerStatesConfig,
        device: torch.device,
        seed: int = 0,
        rank: int = 0,
    ):
        self.units = list(units)
        self.step_count = 0
        self._optimizer = optimizer
        self._rule = rule
        self._statistic = statistic
        self._config = config
        self.device = device
        self._seed = seed
        self._rank = rank
        self._layout = UnitStates(rule, config)
        self.states = StateStore(device, config.inactive, self._create)
        self._rounding = torch.Generator(device)
        self.lr_factors: Mapping[int | None, float] = {}
        """Layer, or None for small parameters -> what its learning rate is multiplied by; 1 where it is not named."""

    def _options(self, unit: Unit) -> dict[str, Any]:
        return self._optimizer.param_groups[unit.group]

    def _create(self, index: int) -> dict[str, Tensor]:
        unit = self.units[index]
        return self._layout.create(unit.own_weights.to(self.device), self._options(unit))

    def move_states(self, asleep: Iterable[int], awake: Iterable[int]) -> None:
        """Write back the states of units that go to sleep, start to fetch those that wake up."""
        self.states.write_back(asleep)
        self.states.prefetch(awake)

    def update(self, units: Sequence[Unit], gradients: dict[int, Tensor], factor: float) -> dict[int, Tensor]:
        """Step the own shards of these units once.

        Args:
            gradients: unit index -> own stretch of the gradient, any float dtype; taken out one by one.
            factor: what gradients are multiplied by first (loss scale, clipping).

        Returns:
            Unit index -> partial sums of the statistic `[columns]`, of layers with a stretch here.
        """
        self._rounding.manual_seed((self._seed << 20) + self.step_count * 4096 + self._rank)
        sums: dict[int, Tensor] = {}
        for group, options in enumerate(self._optimizer.param_groups):
            mine = [unit for unit in units if unit.group == group]
            for unit in mine:
                self._layout.refresh(self.states.get(unit.index), self.step_count, options)
            for bucket in self._buckets(mine):
                self._update_bucket(bucket, gradients, factor, options, sums)
        for unit in units:
            gradients.pop(unit.index)
        self.step_count += 1
        return sums

    def _buckets(self, units: Sequence[Unit]) -> Iterable[list[Piece]]:
        lengths = [(unit, unit.length) for unit in units]
        if self._config.precision == "fp32":
            return pieces(lengths, _UPDATE_ELEMENTS)
        # Blocks of low-bit states must not be rounded twice in a step: a shard at a time.
        return [[Piece(unit, 0, length)] for unit, length in lengths if length]

    def _update_bucket(
        self,
        bucket: Sequence[Piece],
        gradients: Mapping[int, Tensor],
        factor: float,
        options: Mapping[str, Any],
        sums: dict[int, Tensor],
    ) -> None:
        states = [self.states.get(piece.unit.index) for piece in bucket]
        updates = [
            gradients[piece.unit.index][piece.start : piece.stop].to(self.device, torch.float32)
            for piece in bucket
        ]
        shards = [piece.unit.own_weights[piece.start : piece.stop] for piece in bucket]
        weights = [
            self._layout.weight(state, piece, shard).to(self.device)
            for state, piece, shard in zip(states, bucket, shards, strict=True)
        ]
        moments = self._layout.load(states, bucket, options)
        steps = [state.step for state in states]
        # Every rule's update is proportional to the learning rate.
        scales = [self.lr_factors.get(piece.unit.layer, 1.0) for piece in bucket]
        measured = self._statistic
        if (
            self._rule.fused is not None
            and (measured is None or measured.sums)
            and runs_in_triton(updates[0])
        ):
            found = self._rule.fused(updates, weights, moments, steps, options, factor=factor, scales=scales)
            if measured is not None:
                self._add(bucket, found[:, list(measured.sums)], sums)
        else:
            self._step_in_torch(bucket, updates, weights, moments, steps, options, factor, scales, sums)
        self._layout.store(states, moments)
        for shard, weight in zip(shards, weights, strict=True):
            if shard.data_ptr() == weight.data_ptr():
                continue
            if shard.dtype is torch.bfloat16 and self._config.bf16_weights == "stochastic_rounding":
                weight = stochastic_round_bf16(weight, self._rounding)
            shard.copy_(weight)

    def _step_in_torch(
        self,
        bucket: Sequence[Piece],
        updates: list[Tensor],
        weights: list[Tensor],
        moments: Mapping[str, Sequence[Tensor]],
        steps: Sequence[int],
        options: Mapping[str, Any],
        factor: float,
        scales: Sequence[float],
        sums: dict[int, Tensor],
    ) -> None:
        """Turn gradients into updates in place, measure them, and add them to the weights."""
        if factor != 1.0:
            torch._foreach_mul_(updates, factor)
        statistic = self._statistic
        if statistic is not None and statistic.of_gradient:
            self._measure(statistic, bucket, updates, weights, sums)
        self._rule.update(updates, weights, moments, steps, options)
        for update, scale in zip(updates, scales, strict=True):
            if scale != 1.0:
                update.mul_(scale)
        if statistic is not None and not statistic.of_gradient:
            self._measure(statistic, bucket, updates, weights, sums)
        torch._foreach_add_(weights, updates)

    def _measure(
        self,
        statistic: Statistic,
        bucket: Sequence[Piece],
        changes: Sequence[Tensor],
        weights: Sequence[Tensor],
        sums: dict[int, Tensor],
    ) -> None:
        """Add up the statistic of updates or gradients, before the weights change."""
        layers = [i for i, piece in enumerate(bucket) if piece.unit.layer is not None]
        parts = [statistic.of_update(changes[i], weights[i]) for i in layers]
        self._add([bucket[i] for i in layers], parts, sums)

    @staticmethod
    def _add(bucket: Sequence[Piece], parts: Iterable[Tensor], sums: dict[int, Tensor]) -> None:
        """Add partial sums of the statistic of each piece to those of its unit, if that is a layer."""
        for piece, part in zip(bucket, parts, strict=True):
            if piece.unit.layer is not None:
                known = sums.get(piece.unit.index)
                sums[piece.unit.index] = part if known is None else known + part

    def statistic_sums(self, units: Sequence[Unit], sums: Mapping[int, Tensor]) -> Tensor:
        """Return the partial sums of all layers among these units, in order, as one message `[layers * columns]`."""
        empty = torch.zeros(0 if self._statistic is None else self._statistic.columns, device=self.device)
        parts = [sums.get(unit.index, empty) for unit in units if unit.layer is not None]
        return torch.cat(parts) if parts else empty[:0]

    def statistics(
        self, stepped: Sequence[Unit], active: Sequence[Unit], everyone: Tensor
    ) -> dict[int, float]:
        """Return the statistic of each active layer whose learning rate is not 0; empty if nothing is measured.

        Args:
            stepped: the units that were updated.
            active: all units that could have been.
            everyone: the messages of all ranks in rank order `[ranks, layers * columns]`.
        """
        if self._statistic is None:
            return {}
        layers = [unit.layer for unit in stepped if unit.layer is not None]
        # Added in rank order and in float64: the same bits on every rank.
        totals = everyone.double().sum(0).view(-1, self._statistic.columns).tolist()
        sizes = {
            unit.layer: unit.numel
            for unit in active
            if unit.layer is not None and float(self._options(unit)["lr"]) != 0.0
        }
        return of_layers(self._statistic, dict(zip(layers, totals, strict=True)), sizes)

    def shards(self) -> Iterator[Shard]:
        """This rank's stretch of every parameter's states, in float32, for a checkpoint."""
        for index in self.states.units:
            unit = self.units[index]
            first = unit.start
            state = self._layout.plain(self.states.peek(index), unit.length)
            for name, low, high, start in self._own_spans(unit):
                cut = slice(low - first, high - first)
                yield Shard(name, low - start, {key: t[cut] for key, t in state.tensors.items()})

    def _own_spans(self, unit: Unit) -> Iterator[tuple[str, int, int, int]]:
        """Each parameter with elements here: name, own first and last element, its first element."""
        first, last = unit.start, unit.stop
        for name, (_, start, stop) in zip(unit.names, unit.spans(), strict=True):
            low, high = max(start, first), min(stop, last)
            if low < high:
                yield name, low, high, start

    def shard_steps(self) -> dict[str, list[int]]:
        """Parameter -> its own step count and the global step of its last update."""
        return {
            name: [self.states.peek(index).step, self.states.peek(index).last_step]
            for index in self.states.units
            for name in self.units[index].names
        }

    def load_shards(self, reader: ShardReader, steps: Mapping[str, Sequence[int]], active: set[int]) -> None:
        """Replace all states by saved ones, whatever cut they were saved in.

        Args:
            active: units that train now; the states of the others go where inactive ones belong.
        """
        self.states.clear()
        for unit in self.units:
            if unit.names[0] not in steps:
                continue
            first = unit.start
            tensors = self._layout.plain_zeros(unit.own_weights.to(self.device), self._options(unit))
            for name, low, high, start in self._own_spans(unit):
                for key, target in tensors.items():
                    reader.read_into(target[low - first : high - first], name, key, low - start)
            step, last_step = steps[unit.names[0]]
            self.states.put(unit.index, self._layout.packed(LayerState(tensors, step, last_step)))
            if unit.index not in active:
                self.states.write_back([unit.index])
