"""The freeze-aware ZeRO 3 optimizer: DeepSpeed's parameter partitioning, our gradients, states and update.

Stock ZeRO 3 keeps float32 weights, gradient partitions and Adam states of every layer, and moves frozen
layers by momentum and weight decay. Here only DeepSpeed's cutting, gathering and reducing are kept. A
parameter is a unit: a frozen one has no gradient partition, no state until it first trains, no update.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.torch_autocast import sort_dtypes
from deepspeed.runtime.zero import stage3
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import Tensor, nn

from slimfit_ds.config import SlimFitConfig
from slimfit_ds.engine.loss_scale import restore_scaler, scaler_state
from slimfit_ds.engine.partitioned_units import PartitionedCut, PartitionedUnit, build_units
from slimfit_ds.engine.shard_files import Shard, ShardReader
from slimfit_ds.engine.shard_update import ShardUpdater
from slimfit_ds.engine.sharding import squared_norm
from slimfit_ds.optim.rules import rule_of
from slimfit_ds.schedule.statistics import STATISTICS
from slimfit_ds.trainable.layers import ParameterRoles

__all__ = ["REDUCE_BUCKET", "FreezeZero3Optimizer", "Setting"]

REDUCE_BUCKET = "_DeepSpeedZeroOptimizer_Stage3__reduce_and_partition_ipg_grads"


@dataclass(frozen=True)
class Setting:
    """What the engine knows and DeepSpeed's constructor does not pass on."""

    config: SlimFitConfig
    roles: ParameterRoles
    communication_dtype: torch.dtype


class FreezeZero3Optimizer(DeepSpeedZeroOptimizer_Stage3):
    """Steps the active parameters of a model that ZeRO 3 has cut.

    Args:
        module: the model.
        init_optimizer: the torch optimizer whose parameter groups hold the hyperparameters.
        setting: the `slimfit` block, the roles of the parameters, the dtype gradients are sent in.
        arguments: as DeepSpeed's engine passes them.
    """

    def __init__(
        self,
        module: nn.Module,
        init_optimizer: torch.optim.Optimizer,
        *arguments: Any,
        setting: Setting,
        offload_optimizer_config: Any = None,
        **options: Any,
    ):
        self._setting = setting
        offload = getattr(offload_optimizer_config, "device", None)
        self._states_offloaded = offload not in (None, "none")
        self._rule = rule_of(init_optimizer)
        if not setting.config.freeze.train_biases:
            small = set(setting.roles.small)
            for name, parameter in module.named_parameters():
                if name in small:
                    parameter.requires_grad_(False)
        # Without contiguous_gradients no bucket of `reduce_bucket_size` elements is kept for ever.
        super().__init__(
            module,
            init_optimizer,
            *arguments,
            **{
                **options,
                "contiguous_gradients": False,
                "communication_data_type": setting.communication_dtype,
                "gradient_accumulation_dtype": torch.float32,
            },
        )
        # Not told to DeepSpeed before: it would build buffers for a step that is not its own.
        self.offload_optimizer = self._states_offloaded
        self.layer_statistics: dict[int, float] = {}
        self.ipg_buckets.setdefault(setting.communication_dtype, stage3.IPGBucketZ3())

    def get_param_comm_dtype(self, param: nn.Parameter) -> torch.dtype:
        """One dtype for all gradients, under `torch_autocast` too."""
        return self._setting.communication_dtype

    def _setup_for_real_optimizer(self) -> None:
        """Instead of float32 weights, gradient partitions and states of everything: none of them yet."""
        config = self._setting.config
        states = config.optimizer_states
        if self._states_offloaded:
            # They are on the host already: a second copy would go nowhere.
            states = states.model_copy(update={"inactive": "device"})
        device = torch.device("cpu" if self._states_offloaded else get_accelerator().current_device_name())
        self._units = build_units(self.module, self._setting.roles, self.optimizer.param_groups)
        self._unit_of = {id(unit.parameter): unit for unit in self._units}
        self.updater = ShardUpdater(
            self._units,
            PartitionedCut(),
            self.optimizer,
            self._rule,
            STATISTICS[config.freeze.statistic],
            states,
            device,
            seed=config.freeze.seed,
            rank=dist.get_rank(group=self.dp_process_group),
        )
        self._active = list(self._units)
        self._reduced: dict[int, Tensor] = {}
        self._squares: dict[int, Tensor] = {}
        self._must_be_finite = torch.zeros(())

    def set_active(self, layers: frozenset[int]) -> None:
        """Make these layers, and the small parameters, the ones that train from now on.

        Only at an accumulation boundary.
        """
        chosen = [unit for unit in self._units if unit.layer is None or unit.layer in layers]
        before = {unit.index for unit in self._active}
        after = {unit.index for unit in chosen}
        for unit in self._active:
            if unit.index not in after:
                unit.parameter.requires_grad_(False)
                unit.parameter.grad = None
                self._reduced.pop(unit.index, None)
                self._squares.pop(unit.index, None)
        for unit in chosen:
            if unit.index not in before:
                unit.parameter.requires_grad_(True)
        self.updater.move_states(before - after, sorted(after))
        self._active = chosen

    def reduce_ready_partitions_and_remove_grads(self, param: nn.Parameter) -> None:
        """Take a gradient that backward has just finished into the bucket that is reduced next."""
        if not param.requires_grad:
            # DeepSpeed's leaf modules make zeros for every parameter without a gradient.
            param.grad = None
            return
        if param.grad is not None and not param.grad.is_contiguous():
            param.grad.data = param.grad.contiguous()
        super().reduce_ready_partitions_and_remove_grads(param)

    def partition_grads(self, params_to_release: list[nn.Parameter], grad_partitions: list[Tensor]) -> None:
        """Take in this rank's stretches of reduced gradients.

        Args:
            params_to_release: parameters of one bucket; their full gradients are dropped.
            grad_partitions: own stretch of each, a view into the bucket.
        """
        for parameter, partition in zip(params_to_release, grad_partitions, strict=True):
            unit = self._unit_of[id(parameter)]
            self._take(unit, partition[: unit.length])
            if parameter.grad is not None and not get_accelerator().is_synchronized_device():
                parameter.grad.record_stream(get_accelerator().current_stream())
            parameter.grad = None

    def _take(self, unit: PartitionedUnit, stretch: Tensor) -> None:
        """Add a stretch to those of earlier micro-batches, in float32.

        Where it is the only one it is kept in the dtype of the weights; its norm is taken before.
        """
        known = self._reduced.get(unit.index)
        if known is not None:
            self._reduced[unit.index] = known.to(torch.float32).add_(stretch.to(known.device))
            self._squares.pop(unit.index, None)
            return
        dtype = torch.float32
        if self.is_gradient_accumulation_boundary():
            dtype = unit.parameter.dtype
            self._squares[unit.index] = squared_norm([stretch])
        # A copy: the view would keep the whole bucket alive.
        self._reduced[unit.index] = stretch.to(self.updater.device, dtype, copy=True)

    def independent_gradient_partition_epilogue(self) -> None:
        """Reduce what is left in the buckets after a backward pass."""
        for dtype in sort_dtypes(self.ipg_buckets.keys()):
            getattr(self, REDUCE_BUCKET)(dtype)
        if not get_accelerator().resolves_data_dependency():
            self.reduce_and_partition_stream.synchronize()
        self._epilogue_ran_this_backward = True

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, and with them those of earlier micro-batches."""
        super().zero_grad(set_to_none)
        self._reduced.clear()
        self._squares.clear()

    def require_finite(self, value: Tensor) -> None:
        """Skip the coming step on all ranks if this scalar is not finite on one; does not wait for it."""
        self._must_be_finite = self._must_be_finite.to(value.device) + 0.0 * value.detach().float()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Update the active parameters, unless a gradient is not finite on any rank."""
        self._pre_step()
        self._partition_all_parameters()
        scale = self.loss_scale
        present = self._global_norm(scale)
        self.overflow = not math.isfinite(self._global_grad_norm)
        self.loss_scaler.update_scale(self.overflow)
        self.layer_statistics = {}
        if self.overflow:
            self.zero_grad()
        else:
            factor = 1.0 / scale
            if self.clip_grad and self._global_grad_norm > self.clip_grad:
                factor *= self.clip_grad / (self._global_grad_norm + 1e-6)
            self._update(present, factor)
            # Schedulers of torch warn when the optimizer they hold has never stepped.
            self.optimizer._opt_called = True
        self._post_step(set())

    def _global_norm(self, scale: float) -> set[int]:
        """One small all-reduce: squared norm (with overflow in it) and which units have a gradient."""
        message = torch.zeros(1 + len(self._active), device=get_accelerator().current_device_name())
        sums = [gradient for index, gradient in self._reduced.items() if index not in self._squares]
        squares = list(self._squares.values()) + ([squared_norm(sums)] if sums else [])
        message[0] = sum(square.to(message.device) for square in squares) + self._must_be_finite
        self._must_be_finite = torch.zeros(())
        message[1:] = torch.tensor([float(unit.index in self._reduced) for unit in self._active])
        if self.partition_count > 1:
            dist.all_reduce(message, group=self.dp_process_group)
        squared, *flags = message.tolist()
        self._global_grad_norm = math.sqrt(squared) / scale if squared >= 0 else math.nan
        return {unit.index for unit, flag in zip(self._active, flags, strict=True) if flag > 0}

    def _update(self, present: set[int], factor: float) -> None:
        stepped = [unit for unit in self._active if unit.index in present]
        sums = self.updater.update(stepped, self._reduced, factor)
        self._squares.clear()
        mine = self.updater.statistic_sums(stepped, sums).to(get_accelerator().current_device_name())
        everyone = mine[None]
        if self.partition_count > 1 and mine.numel():
            everyone = mine.new_empty(self.partition_count, mine.numel())
            dist.allgather_fn(everyone.view(-1), mine, group=self.dp_process_group)
        self.layer_statistics = self.updater.statistics(stepped, everyone)
        for unit in self._active:
            # A layer that took no part in the forward pass of any rank did not move.
            if unit.layer is not None and unit.index not in present:
                self.layer_statistics[unit.layer] = 0.0

    def state_bytes(self) -> dict[str, int]:
        """Bytes of optimizer states and gradients that this rank holds now."""
        whole = [p.grad for group in self.fp16_groups for p in group if p.grad is not None]
        held = [*whole, *self._reduced.values()]
        device, host = self.updater.states.device_bytes(), self.updater.states.host_bytes()
        if self.offload_optimizer:
            device, host = 0, device + host
        return {
            "optimizer": device,
            "optimizer_host": host,
            "gradients": sum(t.numel() * t.element_size() for t in held),
        }

    def held_gradients(self) -> list[Tensor]:
        """Own stretches of reduced gradients; those of parameters not among them."""
        return list(self._reduced.values())

    def shards(self) -> Iterator[Shard]:
        """This rank's stretch of every parameter's states, in float32, for a checkpoint."""
        return self.updater.shards()

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
