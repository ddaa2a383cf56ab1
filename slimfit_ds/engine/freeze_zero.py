"""The freeze-aware ZeRO optimizer of stages 0, 1 and 2.

Stock ZeRO turns the missing gradient of a frozen weight into zeros and still moves the weight by
momentum and weight decay. Here a frozen unit takes no part in anything: no gradient, no message, no
state on the device (if states live on the host), no update.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from torch import Tensor

from slimfit_ds.engine.loss_scale import restore_scaler, scaler_state
from slimfit_ds.engine.shard_files import Shard, ShardReader
from slimfit_ds.engine.shard_update import ShardUpdater
from slimfit_ds.engine.sharding import Sharding, squared_norm
from slimfit_ds.engine.units import Unit
from slimfit_ds.optim.config import OptimizerStatesConfig
from slimfit_ds.optim.rules import UpdateRule
from slimfit_ds.schedule.statistics import Statistic

__all__ = ["FreezeZeroOptimizer"]


class FreezeZeroOptimizer(ZeROOptimizer):
    """Steps the active units, each of them its own shard unit.

    Args:
        optimizer: the torch optimizer whose parameter groups hold the hyperparameters; its own step
            is never called.
        rule: the update rule that does what this optimizer would do.
        units: every unit that may train.
        sharding: how units are cut over the ranks.
        stage: ZeRO stage 0, 1 or 2; 2 reduces gradients after each micro-batch and keeps shards.
        config: residency, precision and staleness of the states.
        statistic: the measure of an update.
        loss_scaler: DeepSpeed's loss scaler (static 1 unless fp16).
        clip: largest global norm of the gradients; 0: no clipping.
        communication_dtype: what gradients are sent in; float32 sums make the norm the same on any
            number of ranks. Between reduction and update they are kept in the dtype of the weights.
        seed: seed of stochastic rounding.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        rule: UpdateRule,
        units: Sequence[Unit],
        sharding: Sharding,
        stage: int,
        config: OptimizerStatesConfig,
        statistic: Statistic,
        loss_scaler: Any,
        clip: float = 0.0,
        communication_dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ):
        super().__init__()
        self.optimizer = optimizer
        self.units = list(units)
        self.sharding = sharding
        self.stage = stage
        self.loss_scaler = loss_scaler
        self.dynamic_loss_scale = loss_scaler.dynamic
        self.clip_grad = clip
        self.communication_dtype = communication_dtype
        self.custom_loss_scaler = False
        self.external_loss_scale = None
        self.torch_autocast_gradscaler = None
        self.dp_process_group = sharding.group
        self.overflow = False
        self._global_grad_norm = 0.0
        self.layer_statistics: dict[int, float] = {}
        self.updater = ShardUpdater(
            self.units,
            sharding,
            optimizer,
            rule,
            statistic,
            config,
            self.units[0].device,
            seed=seed,
            rank=sharding.row,
        )
        self._active = list(units)
        self._reduced: dict[int, Tensor] = {}
        self._accumulated: dict[int, Tensor] = {}
        self._present: set[int] = set()
        self._squared = torch.zeros(())
        self._must_be_finite = torch.zeros(())
        self._step_scale = 1.0

    # What DeepSpeed's engine and schedulers ask of an optimizer.

    @property
    def param_groups(self) -> list[dict]:
        return self.optimizer.param_groups

    @property
    def state(self) -> dict:
        return {}

    @property
    def loss_scale(self) -> float:
        return self.loss_scaler.cur_scale

    @property
    def bit16_groups(self) -> list[list[torch.nn.Parameter]]:
        return [group["params"] for group in self.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of the active units; frozen ones have none."""
        for unit in self._active:
            unit.drop_gradient()
        self._reduced.clear()
        self._accumulated.clear()
        self._present.clear()

    def set_active(self, layers: frozenset[int]) -> None:
        """Make these layers, and the bundles of small parameters, the ones that train from now on.

        Only at an accumulation boundary. States of layers that go to sleep are written back, states
        of layers that wake up start to travel to the device.
        """
        chosen = [unit for unit in self.units if unit.layer is None or unit.layer in layers]
        before = {unit.index for unit in self._active}
        after = {unit.index for unit in chosen}
        asleep = [unit for unit in self._active if unit.index not in after]
        for unit in asleep:
            unit.set_trainable(False)
            unit.drop_gradient()
        for unit in chosen:
            if unit.index not in before:
                unit.set_trainable(True)
        self.updater.move_states((unit.index for unit in asleep), after)
        self._active = chosen

    def collect_gradients(self, boundary: bool) -> None:
        """Take in the gradients of one backward pass.

        Gradients of several micro-batches are summed in float32 (in bf16 the norm is off by 2.6e-3
        already at two).

        Args:
            boundary: this was the last micro-batch before a step.
        """
        live = [unit for unit in self._active if unit.has_gradient()]
        self._present.update(unit.index for unit in live)
        gradients = {unit.index: unit.flat_gradient() for unit in live}
        for unit in live:
            unit.drop_gradient()
        if boundary and not self._accumulated:
            self._reduced, self._squared = self._reduce(gradients, keep=None)
            return
        if self.stage == 2:
            gradients, _ = self._reduce(gradients, keep=torch.float32)
        self._accumulate(gradients)
        if boundary:
            sums, self._accumulated = self._accumulated, {}
            if self.stage == 2:
                self._reduced, self._squared = sums, squared_norm(list(sums.values()))
            else:
                self._reduced, self._squared = self._reduce(sums, keep=torch.float32)

    def _accumulate(self, gradients: Mapping[int, Tensor]) -> None:
        for index, gradient in gradients.items():
            if index in self._accumulated:
                self._accumulated[index].add_(gradient)
            else:
                self._accumulated[index] = gradient.to(torch.float32, copy=True)

    def _reduce(
        self, gradients: dict[int, Tensor], keep: torch.dtype | None
    ) -> tuple[dict[int, Tensor], Tensor]:
        """All active units are reduced, in order: a rank without a gradient sends zeros."""
        for unit in self._active:
            if unit.index not in gradients:
                gradients[unit.index] = torch.zeros(unit.numel, dtype=unit.dtype, device=unit.device)
        return self.sharding.reduce(self._active, gradients, self.communication_dtype, keep)

    def overlapping_partition_gradients_reduce_epilogue(self) -> None:
        """Gradients are reduced by `collect_gradients`; DeepSpeed's engine may still call this."""

    def require_finite(self, value: Tensor) -> None:
        """Skip the coming step on all ranks if this scalar is not finite on one; does not wait for it."""
        self._must_be_finite = self._must_be_finite.to(value.device) + 0.0 * value.detach().float()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Update the active units, unless a gradient is not finite on any rank."""
        present = self._global_norm()
        self.overflow = not math.isfinite(self._global_grad_norm)
        self.loss_scaler.update_scale(self.overflow)
        self.layer_statistics = {}
        if self.overflow:
            return
        factor = 1.0 / self._step_scale
        if self.clip_grad and self._global_grad_norm > self.clip_grad:
            factor *= self.clip_grad / (self._global_grad_norm + 1e-6)
        stepped = [unit for unit in self._active if unit.index in present]
        self._publish(stepped, self.updater.update(stepped, self._reduced, factor))
        # Schedulers of torch warn when the optimizer they hold has never stepped.
        self.optimizer._opt_called = True  # type: ignore[attr-defined]
        for unit in self._active:
            # A layer that took no part in the forward pass of any rank did not move.
            if unit.layer is not None and unit.index not in present:
                self.layer_statistics[unit.layer] = 0.0

    def _global_norm(self) -> set[int]:
        """One small all-reduce: squared norm (with overflow in it) and which units have a gradient."""
        self._step_scale = self.loss_scale
        message = torch.zeros(1 + len(self._active), dtype=torch.float32, device=self.units[0].device)
        message[0] = self._squared
        if self.sharding.rows == 1:
            message[0] /= self.sharding.world
        message[0] += self._must_be_finite
        self._must_be_finite = torch.zeros(())
        message[1:] = torch.tensor([float(unit.index in self._present) for unit in self._active])
        if self.sharding.world > 1:
            dist.all_reduce(message, group=self.sharding.group)
        squared, *flags = message.tolist()
        self._global_grad_norm = math.sqrt(squared) / self._step_scale if squared >= 0 else math.nan
        return {unit.index for unit, flag in zip(self._active, flags, strict=True) if flag > 0}

    def _publish(self, units: Sequence[Unit], partial: Mapping[int, Tensor]) -> None:
        """Gather the new weights, and with them each rank's sums of the statistics."""
        if units:
            sidecars = self.sharding.gather(units, self.updater.statistic_sums(units, partial))
            self.layer_statistics = self.updater.statistics(units, sidecars)

    def state_bytes(self) -> dict[str, int]:
        """Bytes of optimizer states and gradients that this rank holds now."""
        gradients = [p.grad for unit in self._active for p in unit.parameters if p.grad is not None]
        held = [*gradients, *self.held_gradients()]
        return {
            "optimizer": self.updater.states.device_bytes(),
            "optimizer_host": self.updater.states.host_bytes(),
            "gradients": sum(t.numel() * t.element_size() for t in held),
        }

    def held_gradients(self) -> list[Tensor]:
        """Reduced and accumulated gradients; those of parameters not among them."""
        return [*self._reduced.values(), *self._accumulated.values()]

    def shards(self) -> Iterator[Shard]:
        """This rank's stretch of every parameter's states, in float32, for a checkpoint."""
        if self.sharding.rows > 1 or self.sharding.rank == 0:
            yield from self.updater.shards()

    def shard_steps(self) -> dict[str, list[int]]:
        """Parameter -> its own step count and the global step of its last update."""
        return self.updater.shard_steps()

    def load_shards(self, reader: ShardReader, steps: Mapping[str, Sequence[int]]) -> None:
        """Replace all states by saved ones, whatever cut they were saved in."""
        self.updater.load_shards(reader, steps, {unit.index for unit in self._active})

    def state_dict(self) -> dict[str, Any]:
        """Scalars only; tensors are saved through `shards`."""
        return {"step_count": self.updater.step_count, "loss_scaler": scaler_state(self.loss_scaler)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The counterpart of `state_dict`."""
        self.updater.step_count = int(state["step_count"])
        restore_scaler(self.loss_scaler, state["loss_scaler"])
