"""What the freeze-aware optimizers of all ZeRO stages share: the step, its norm and statistics, what a checkpoint holds.

Stock ZeRO turns the missing gradient of a frozen weight into zeros and still moves the weight by momentum and weight
decay. Here a frozen unit takes no part in anything: no gradient, no message, no state on the device (if states live on
the host), no update. How gradients arrive and how new weights reach the other ranks is left to `zero12` and `zero3`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from deepspeed import comm as dist
from torch import Tensor

from slimfit_ds.config import SlimFitConfig
from slimfit_ds.engine.checkpoint_files import Shard, ShardReader
from slimfit_ds.engine.client_states import ClientStates
from slimfit_ds.engine.full_values import FullValues
from slimfit_ds.engine.shard_update import ShardUpdater
from slimfit_ds.engine.sharding import Unit
from slimfit_ds.errors import ConfigError
from slimfit_ds.optim.config import OptimizerStatesConfig
from slimfit_ds.optim.rules import rule_of
from slimfit_ds.optim.transfer import to_device

__all__ = ["FreezeOptimizer"]

# The fields of DeepSpeed's loss scalers that outlive a restart.
_SCALER_STATE = {"cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis"}


class FreezeOptimizer(FullValues):
    """Steps the active units; stands in front of a DeepSpeed optimizer class, which brings the attributes named here."""

    optimizer: torch.optim.Optimizer
    """Its parameter groups hold the hyperparameters; its own step is never called."""
    loss_scaler: Any
    clip_grad: float
    overflow: bool
    _global_grad_norm: float

    def _set_up(
        self,
        units: Sequence[Unit],
        config: SlimFitConfig,
        measures: bool,
        group: Any,
        device: torch.device,
        rank: int,
        rows: int,
        states: OptimizerStatesConfig | None = None,
    ) -> None:
        """Make the states of these units; all of them are active at first.

        Args:
            units: every unit that may train.
            config: the `slimfit` block.
            measures: the schedule asks for statistics.
            group: the data-parallel process group.
            device: where updates are worked out.
            rank: position of this rank among the shards.
            rows: number of shards.
            states: instead of the block's `optimizer_states`.
        """
        self.units = list(units)
        self.updater = ShardUpdater(
            self.units,
            self.optimizer,
            rule_of(self.optimizer),
            states or config.optimizer_states,
            device,
            seed=config.freeze.seed,
            rank=rank,
            measures=measures,
        )
        self.layer_statistics: dict[int, float] = {}
        self._group = group
        self._world = dist.get_world_size(group=group)
        self._active: list[Any] = list(self.units)
        self._reduced: dict[int, Tensor] = {}
        """Unit -> own shard of its reduced gradient."""
        self._must_be_finite: Tensor | None = None
        self._rows = rows
        self._link(self.units)
        ClientStates(self, self.optimizer)

    # What each stage does in its own way.

    def _own_norm(self) -> tuple[Tensor, set[int]]:
        """Return this rank's share of the squared norm of all gradients, and the units with a gradient here."""
        raise NotImplementedError

    def _publish(self, units: Sequence[Any], sums: Tensor) -> Tensor:
        """Bring the new weights of these units to all ranks; return everyone's sums of statistics `[ranks, n]`."""
        raise NotImplementedError

    def held_gradients(self) -> list[Tensor]:
        """Return reduced and accumulated gradients; those of parameters are not among them."""
        return list(self._reduced.values())

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients of the coming step."""
        raise NotImplementedError

    # The step.

    def set_active(self, layers: frozenset[int], front: int = 0) -> None:
        """Make these layers, and the small parameters at or above the front, the ones that train from now on.

        Only at an accumulation boundary. States of layers that go to sleep are written back, states of layers that
        wake up start to travel to the device.
        """
        chosen = [
            unit
            for unit in self.units
            if (unit.layer in layers if unit.layer is not None else unit.depth >= front)
        ]
        before = {unit.index for unit in self._active}
        after = {unit.index for unit in chosen}
        asleep = [unit for unit in self._active if unit.index not in after]
        for unit in asleep:
            unit.set_trainable(False)
            unit.drop_gradient()
            self._reduced.pop(unit.index, None)
        for unit in chosen:
            if unit.index not in before:
                unit.set_trainable(True)
        self.updater.move_states((unit.index for unit in asleep), sorted(after))
        self._active = chosen

    def require_finite(self, value: Tensor) -> None:
        """Skip the coming step on all ranks if this scalar is not finite on one; does not wait for it."""
        nothing = 0.0 * value.detach().float()
        self._must_be_finite = nothing if self._must_be_finite is None else self._must_be_finite + nothing

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Update the active units, unless a gradient is not finite on any rank.

        Raises:
            ConfigError: somebody else has frozen or woken a layer since the engine was made.
        """
        self._refuse_changes()
        scale = float(self.loss_scale)  # type: ignore[attr-defined]
        present = self._global_norm(scale)
        self.overflow = not math.isfinite(self._global_grad_norm)
        self.loss_scaler.update_scale(self.overflow)
        self.layer_statistics = {}
        if self.overflow:
            self.zero_grad()
            return
        factor = 1.0 / scale
        if self.clip_grad and self._global_grad_norm > self.clip_grad:
            factor *= self.clip_grad / (self._global_grad_norm + 1e-6)
        stepped = [unit for unit in self._active if unit.index in present]
        sums = self.updater.statistic_sums(stepped, self.updater.update(stepped, self._reduced, factor))
        everyone = self._publish(stepped, sums) if stepped else sums[None]
        self.layer_statistics = self.updater.statistics(stepped, self._active, everyone)
        # Schedulers of torch warn when the optimizer they hold has never stepped.
        self.optimizer._opt_called = True  # type: ignore[attr-defined]

    def _refuse_changes(self) -> None:
        """The schedule sets `requires_grad`, and would undo in silence what a user sets."""
        active = {unit.index for unit in self._active}
        changed = [
            name
            for unit in self.units
            for name, p in zip(unit.names, unit.parameters, strict=True)
            if p.requires_grad != (unit.index in active)
        ]
        if changed:
            raise ConfigError(
                [
                    f"requires_grad of {len(changed)} parameters, {changed[0]} first, was changed after the engine was made, whose "
                    f"schedule sets it: freeze before slimfit_ds.initialize or by slimfit.freeze.never_active"
                ]
            )

    def _global_norm(self, scale: float) -> set[int]:
        """Send one small all-reduce: squared norm (with overflow in it) and which units have a gradient.

        Returns:
            the units that have a gradient on any rank.
        """
        squared, present = self._own_norm()
        if self._must_be_finite is not None:
            squared, self._must_be_finite = squared + self._must_be_finite.to(squared.device), None
        found = {unit.index for unit in self._active} & present
        if self._world == 1:
            total = squared.item()
        else:
            flags = torch.tensor([float(unit.index in present) for unit in self._active])
            message = torch.cat([squared.float().view(1), to_device(flags, squared.device)])
            dist.all_reduce(message, group=self._group)
            total, *counts = message.tolist()
            found = {unit.index for unit, count in zip(self._active, counts, strict=True) if count > 0}
        self._global_grad_norm = math.sqrt(total) / scale if total >= 0 else math.nan
        return found

    # What is held, and what a checkpoint holds.

    def state_bytes(self) -> dict[str, int]:
        """Return the bytes of optimizer states and gradients that this rank holds now."""
        whole = [p.grad for unit in self._active for p in unit.parameters if p.grad is not None]
        held = [*whole, *self.held_gradients()]
        return {
            "optimizer": self.updater.states.device_bytes(),
            "optimizer_host": self.updater.states.host_bytes(),
            "gradients": sum(t.numel() * t.element_size() for t in held),
        }

    def shards(self) -> Iterator[Shard]:
        """Yield this rank's shard of every parameter's states, in float32."""
        return self.updater.shards()

    def shard_steps(self) -> dict[str, list[int]]:
        """Return parameter -> its own step count and the global step of its last update."""
        return self.updater.shard_steps()

    def load_shards(self, reader: ShardReader, steps: Mapping[str, Sequence[int]]) -> None:
        """Replace all states by saved ones, whatever cut they were saved in."""
        self.updater.load_shards(reader, steps, {unit.index for unit in self._active})

    def state_dict(self) -> dict[str, Any]:
        """Return scalars only; tensors are saved through `shards`."""
        scaler = {key: value for key, value in vars(self.loss_scaler).items() if key in _SCALER_STATE}
        return {"step_count": self.updater.step_count, "loss_scaler": scaler}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`; a static loss scale stays what the configuration says."""
        self.updater.step_count = int(state["step_count"])
        if self.loss_scaler.dynamic:
            for key, value in state["loss_scaler"].items():
                setattr(self.loss_scaler, key, value)
