"""The update of a rank's own shards: states, rule and statistic, whatever brings gradients and takes weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from slimfit_ds.activations.codecs.backend import runs_in_triton
from slimfit_ds.engine.checkpoint_files import Shard, ShardReader
from slimfit_ds.engine.sharding import Piece, Unit, pieces
from slimfit_ds.optim.config import OptimizerStatesConfig
from slimfit_ds.optim.low_bit import BLOCK, stochastic_round_bf16
from slimfit_ds.optim.rules import UpdateRule
from slimfit_ds.optim.states import LayerState, StateStore, UnitStates
from slimfit_ds.schedule.statistics import of_units, sums_of_updates

__all__ = ["ShardUpdater"]

# Elements that are updated together. On a CPU: what its cache holds, and on any device of states that rest on the host, which
# travel in such pieces, two at a time. On a device otherwise: a bound of the float32 temporaries of rules without a kernel.
_CPU_ELEMENTS, _DEVICE_ELEMENTS = 1 << 21, 1 << 26


class ShardUpdater:
    """Steps own shards and keeps their states.

    Args:
        units: every unit that may train; `units[i].index == i`.
        optimizer: its parameter groups hold the hyperparameters; its own step is never called.
        rule: the update rule that does what this optimizer would do.
        config: residency, precision and staleness of the states.
        device: where updates are worked out and active states live.
        seed: seed of stochastic rounding.
        rank: position of this rank among the shards.
        measures: whether the statistic of each update is worked out.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        optimizer: torch.optim.Optimizer,
        rule: UpdateRule,
        config: OptimizerStatesConfig,
        device: torch.device,
        seed: int = 0,
        rank: int = 0,
        measures: bool = True,
    ):
        self.units = list(units)
        self.step_count = 0
        self._optimizer = optimizer
        self._rule = rule
        self._measures = measures
        self._config = config
        self.device = device
        self._seed = seed
        self._rank = rank
        self._layout = UnitStates(rule, config)
        self._rests_on_host = config.active == "host"
        self.states = StateStore(device, "host" in (config.inactive, config.active), self._create)
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
        if not self._rests_on_host:
            self.states.prefetch(awake)

    def update(self, units: Sequence[Unit], gradients: dict[int, Tensor], factor: float) -> dict[int, Tensor]:
        """Step the own shards of these units once.

        Args:
            gradients: unit index -> own stretch of the gradient, any float dtype; taken out one by one.
            factor: what gradients are multiplied by first (loss scale, clipping).

        Returns:
            Unit index -> sum of the statistic `[]`, of units with a shard here.
        """
        self._rounding.manual_seed((self._seed << 20) + self.step_count * 4096 + self._rank)
        sums: dict[int, Tensor] = {}
        for options, mine in self._alike(units, gradients):
            buckets = [[Piece(unit, 0, 0)] for unit in mine if not unit.length]
            buckets += self._buckets(mine, gradients)
            for number, bucket in enumerate(buckets):
                for piece in bucket:
                    if piece.start == 0:
                        self._layout.refresh(self.states.get(piece.unit.index), self.step_count, options)
                # The next ones travel meanwhile.
                self.states.prefetch(piece.unit.index for piece in (buckets[number + 1 :] or [[]])[0])
                if bucket[0].length:
                    self._update_bucket(bucket, gradients, factor, options, sums)
                if self._rests_on_host:
                    self.states.write_back(p.unit.index for p in bucket if p.stop == p.unit.length)
        for unit in units:
            gradients.pop(unit.index)
        self.step_count += 1
        return sums

    def _alike(
        self, units: Sequence[Unit], gradients: Mapping[int, Tensor]
    ) -> Iterator[tuple[Mapping[str, Any], list[Unit]]]:
        """Yield units that one call updates, of one group, dtype and device, with the options of their group."""
        alike: dict[tuple, list[Unit]] = {}
        for unit in units:
            gradient = gradients[unit.index]
            key = unit.group, unit.dtype, unit.device, gradient.dtype, gradient.device
            alike.setdefault(key, []).append(unit)
        for key in sorted(alike, key=lambda key: key[0]):
            yield self._optimizer.param_groups[key[0]], alike[key]

    def _buckets(self, units: Sequence[Unit], gradients: Mapping[int, Tensor]) -> Iterable[list[Piece]]:
        lengths = [(unit, unit.length) for unit in units]
        if self._config.precision != "fp32":
            # Blocks of low-bit states must not be rounded twice in a step: a shard at a time.
            return [[Piece(unit, 0, length)] for unit, length in lengths if length]
        small = self.device.type == "cpu" or self._rests_on_host
        limit = _CPU_ELEMENTS if small else _DEVICE_ELEMENTS
        if units and not self._rests_on_host:
            gradient = gradients[units[0].index]
            resident = gradient.device == units[0].device == self.device
            if resident and self._rule.fused is not None and runs_in_triton(gradient):
                # The kernel needs no temporaries.
                limit = sum(length for _, length in lengths)
        return pieces(lengths, limit)

    def _update_bucket(
        self,
        bucket: Sequence[Piece],
        gradients: Mapping[int, Tensor],
        factor: float,
        options: Mapping[str, Any],
        sums: dict[int, Tensor],
    ) -> None:
        states = [self.states.get(piece.unit.index) for piece in bucket]
        given = [
            gradients[piece.unit.index][piece.start : piece.stop].to(self.device, non_blocking=True)
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
        dtype = shards[0].dtype
        own = weights[0] is shards[0]
        stochastic = dtype is torch.bfloat16 and self._config.bf16_weights == "stochastic_rounding"
        found: Iterable[Tensor]
        if self._rule.fused is not None and runs_in_triton(given[0]):
            # The kernel rounds to nearest, into weights where it can write them.
            rounds = not own and not stochastic and shards[0].device == self.device
            found = self._rule.fused(
                given, weights, moments, steps, options,
                factor=factor, scales=scales, rounded=shards if rounds else None,
            )  # fmt: skip
            own = own or rounds
        else:
            updates = given
            if given[0].dtype is not torch.float32:
                updates = [torch.empty_like(weight) for weight in weights]
                torch._foreach_copy_(updates, given)
            found = self._step_in_torch(updates, weights, moments, steps, options, factor, scales)
        if self._measures:
            for piece, part in zip(bucket, found, strict=True):
                index = piece.unit.index
                sums[index] = sums[index] + part if index in sums else part
        self._layout.store(states, moments)
        if own:
            return
        if stochastic:
            weights = [stochastic_round_bf16(weight, self._rounding) for weight in weights]
        if shards[0].device != self.device:
            # Rounded first: half of it travels.
            weights = [weight.to(dtype) for weight in weights]
        torch._foreach_copy_(shards, weights)

    def _step_in_torch(
        self,
        updates: list[Tensor],
        weights: list[Tensor],
        moments: Mapping[str, Sequence[Tensor]],
        steps: Sequence[int],
        options: Mapping[str, Any],
        factor: float,
        scales: Sequence[float],
    ) -> list[Tensor]:
        """Turn gradients into updates in place, measure them, and add them to the weights."""
        if factor != 1.0:
            torch._foreach_mul_(updates, factor)
        self._rule.update(updates, weights, moments, steps, options)
        if any(scale != 1.0 for scale in scales):
            torch._foreach_mul_(updates, list(scales))
        sums = sums_of_updates(updates, weights) if self._measures else []
        torch._foreach_add_(weights, updates)
        return sums

    def statistic_sums(self, units: Sequence[Unit], sums: Mapping[int, Tensor]) -> Tensor:
        """Return the sums of all layers among these units, in order, as one message; empty if nothing is measured."""
        zero = torch.zeros((), device=self.device)
        parts = [sums.get(unit.index, zero) for unit in units if unit.layer is not None and self._measures]
        return torch.stack(parts) if parts else zero[None][:0]

    def statistics(
        self, stepped: Sequence[Unit], active: Sequence[Unit], everyone: Tensor
    ) -> dict[int, float]:
        """Return the statistic of each active layer whose learning rate is not 0; empty if nothing is measured.

        Args:
            stepped: the units that were updated.
            active: all units that could have been.
            everyone: the messages of all ranks in rank order `[ranks, layers]`.
        """
        if not self._measures:
            return {}
        layers = [unit.layer for unit in stepped if unit.layer is not None]
        # Added in rank order and in float64: the same bits on every rank.
        totals = everyone.double().sum(0).tolist()
        sizes = {
            unit.layer: unit.numel
            for unit in active
            if unit.layer is not None and float(self._options(unit)["lr"]) != 0.0
        }
        return of_units(dict(zip(layers, totals, strict=True)), sizes)

    def read(self, unit: Unit, name: str | None) -> Tensor:
        """Return the own shard of one state in float32; without a name that of the weights, as exact as they are known.

        Makes no states: before a unit has trained its moments are zero. May be a view.
        """
        known = self.states.peek(unit.index).tensors if unit.index in self.states else {}
        if name is None:
            return known["master"] if "master" in known else unit.own_weights.to(torch.float32)
        self._check_name(unit, name)
        if not known:
            return torch.zeros(unit.length, device=self.device)
        return self._layout.plain(self.states.peek(unit.index), unit.length).tensors[name]

    def write(self, unit: Unit, name: str | None, values: Tensor, active: bool) -> None:
        """Set the own shard of one state, or without a name that of the weights and their master.

        Args:
            values: `[own length]` float32.
            active: the unit trains now; the states of the others go where inactive ones belong.
        """
        if name is None:
            unit.own_weights.copy_(values)
            if unit.index in self.states and "master" in (state := self.states.peek(unit.index)).tensors:
                state.tensors["master"].copy_(values)
            return
        self._check_name(unit, name)
        if unit.index not in self.states:
            self.states.get(unit.index)
        self._layout.set(self.states.peek(unit.index), name, values)
        if self._rests_on_host or not active:
            self.states.write_back([unit.index])

    def state_names(self, unit: Unit) -> tuple[str, ...]:
        """Return the names of a unit's moments."""
        return self._rule.states(self._options(unit))

    def _check_name(self, unit: Unit, name: str) -> None:
        names = self.state_names(unit)
        if name not in names:
            raise KeyError(f"{name!r} is no state of this optimizer, which has {', '.join(names) or 'none'}")

    def refresh_masters(self, changed_only: bool = False) -> None:
        """Take every master from the weights.

        Args:
            changed_only: leave those elements that the weights are the rounding of.
        """
        for index in self.states.units:
            if "master" in (state := self.states.peek(index)).tensors:
                master, weights = state.tensors["master"], self.units[index].own_weights
                weights = weights.to(master.device)
                if changed_only:
                    weights = torch.where(
                        master.to(weights.dtype) == weights, master, weights.to(master.dtype)
                    )
                master.copy_(weights)

    def shards(self) -> Iterator[Shard]:
        """This rank's stretch of every parameter's states, as they are kept, for a checkpoint."""
        for index in self.states.units:
            unit = self.units[index]
            first = unit.start
            state = self.states.peek(index)
            for name, low, high, start in self._own_spans(unit):
                tensors = self._layout.cut(state, low - first, high - first)
                yield Shard(name, low - start, tensors, (low - first) % BLOCK)

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
            state = self._layout.packed(LayerState(tensors, step, last_step))
            self._take_blocks(unit, state, reader)
            self.states.put(unit.index, state)
            if self._rests_on_host or unit.index not in active:
                self.states.write_back([unit.index])

    def _take_blocks(self, unit: Unit, state: LayerState, reader: ShardReader) -> None:
        """Take 8-bit moments as they were saved, where their blocks are the same here: rounded twice they would differ."""
        first = unit.start
        spans = [
            (name, low - first, high - low, low - start) for name, low, high, start in self._own_spans(unit)
        ]
        for key in [key for key in state.tensors if key.endswith(".codes")]:
            moment = key.removesuffix(".codes")
            codes, scale = state.tensors[key].clone(), state.tensors[f"{moment}.scale"].clone()
            parts = []
            for name, low, length, start in spans:
                found = reader.blocks(name, moment, start, length, low % BLOCK)
                if found is None:
                    break
                codes[low : low + length] = found[0]
                parts.append((slice(low // BLOCK, low // BLOCK + len(found[1])), found[1].to(scale.device)))
                scale[parts[-1][0]] = parts[-1][1]
            # Of a block that parameters share all must have the same scale.
            if len(parts) == len(spans) and all(torch.equal(scale[at], saved) for at, saved in parts):
                state.tensors[key], state.tensors[f"{moment}.scale"] = codes, scale
