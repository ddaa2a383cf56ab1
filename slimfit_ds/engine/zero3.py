"""The freeze-aware ZeRO 3 optimizer: DeepSpeed's parameter partitioning, our gradients, states and update.

Stock ZeRO 3 keeps float32 weights, gradient partitions and Adam states of every layer, and moves frozen
layers by momentum and weight decay. Here only DeepSpeed's cutting, gathering and reducing are kept. A
parameter is a unit: a frozen one has no gradient partition, no state until it first trains, no update.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
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
from slimfit_ds.engine.optimizer import FreezeOptimizer
from slimfit_ds.engine.sharding import PartitionedUnit, build_units, squared_norm
from slimfit_ds.trainable.units import ParameterRoles

__all__ = ["FreezeZero3Optimizer", "Setting", "configure_zero3"]

_REDUCE_BUCKET = "_DeepSpeedZeroOptimizer_Stage3__reduce_and_partition_ipg_grads"


@dataclass(frozen=True)
class Setting:
    """What the engine knows and DeepSpeed's constructor does not pass on."""

    config: SlimFitConfig
    roles: ParameterRoles
    measures: bool
    depths: Mapping[str, int]
    communication_dtype: torch.dtype


class FreezeZero3Optimizer(FreezeOptimizer, DeepSpeedZeroOptimizer_Stage3):
    """Steps the active parameters of a model that ZeRO 3 has cut.

    Args:
        module: the model.
        init_optimizer: the torch optimizer whose parameter groups hold the hyperparameters.
        setting: what DeepSpeed does not pass on.
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
            states = states.model_copy(update={"inactive": "device", "active": "device"})
        device = torch.device("cpu" if self._states_offloaded else get_accelerator().current_device_name())
        units = build_units(
            self.module,
            self._setting.roles,
            self.optimizer.param_groups,
            config.freeze.train_biases,
            self._setting.depths,
            partitioned=True,
        )
        self._unit_of = {id(unit.parameter): unit for unit in units}
        self._squares: dict[int, Tensor] = {}
        """Unit -> squared norm of its own shard, taken before that was rounded to the dtype of the weights."""
        group = self.dp_process_group
        rank, world = dist.get_rank(group=group), dist.get_world_size(group=group)
        self._set_up(units, config, self._setting.measures, group, device, rank, world, states)

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
            getattr(self, _REDUCE_BUCKET)(dtype)
        if not get_accelerator().resolves_data_dependency():
            self.reduce_and_partition_stream.synchronize()
        self._epilogue_ran_this_backward = True

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, and with them those of earlier micro-batches."""
        DeepSpeedZeroOptimizer_Stage3.zero_grad(self, set_to_none)
        self._reduced.clear()
        self._squares.clear()

    def step(self, closure: Any = None) -> None:
        """Update the active parameters, unless a gradient is not finite on any rank."""
        self._pre_step()
        self._partition_all_parameters()
        super().step(closure)
        self._squares.clear()
        self._post_step(set())

    def _gradient_was_set(self, unit: Any) -> None:
        self._squares.pop(unit.index, None)

    def _own_norm(self) -> tuple[Tensor, set[int]]:
        device = torch.device(get_accelerator().current_device_name())
        known = [self._squares[index] for index in self._reduced if index in self._squares]
        sums = [gradient for index, gradient in self._reduced.items() if index not in self._squares]
        squares = [*known, *([squared_norm(sums)] if sums else [])]
        total = (
            torch.stack([square.to(device) for square in squares])
            if squares
            else torch.zeros(1, device=device)
        )
        return total.sum(), set(self._reduced)

    def _publish(self, units: Sequence[Any], sums: Tensor) -> Tensor:
        """Gather the sums; DeepSpeed gathers weights when they are used."""
        mine = sums.to(get_accelerator().current_device_name())
        if self._world == 1 or not mine.numel():
            return mine[None]
        everyone = mine.new_empty(self._world, mine.numel())
        dist.allgather_fn(everyone.view(-1), mine, group=self._group)
        return everyone

    def get_fp32_grad_partitions(self) -> dict[int, dict[int, Tensor]]:
        """Return this rank's stretches of the reduced gradients: group -> position in it -> `[stretch]`, float32, padded."""
        return {
            number: {
                place: self._padded(parameter, own)
                for place, parameter in enumerate(group["params"])
                if id(parameter) in self._places
                and self._own(parameter)[0].index in self._reduced
                and (own := self._gradient(parameter)) is not None
            }
            for number, group in enumerate(self.param_groups)
        }

    def state_bytes(self) -> dict[str, int]:
        found = super().state_bytes()
        if self.offload_optimizer:
            return {**found, "optimizer": 0, "optimizer_host": found["optimizer"] + found["optimizer_host"]}
        return found


def configure_zero3(
    engine: Any, stock_configure: Callable[[torch.optim.Optimizer], Any], optimizer: torch.optim.Optimizer
) -> FreezeZero3Optimizer:
    """Let DeepSpeed build its ZeRO 3 optimizer, of our class.

    Args:
        engine: the engine under construction; read: `slimfit_config`, `roles`, `schedule`, its DeepSpeed config.
        stock_configure: DeepSpeed's `_configure_zero_optimizer`.
        optimizer: the torch optimizer that carries the hyperparameters.
    """
    setting = Setting(
        engine.slimfit_config,
        engine.roles,
        engine.schedule.measures,
        engine.schedule.depths,
        # Few gradients travel, and summed in bf16 the norm is off by 2e-3 on two ranks.
        engine._config.communication_data_type or torch.float32,
    )
    # Derives from the class when it is first imported, which must not be while ours stands in for it.
    importlib.import_module("deepspeed.runtime.superoffload.superoffload_stage3")
    # DeepSpeed has no hook for the class; it looks the name up when it is called.
    stock = stage3.DeepSpeedZeroOptimizer_Stage3
    stage3.DeepSpeedZeroOptimizer_Stage3 = functools.partial(FreezeZero3Optimizer, setting=setting)
    try:
        return stock_configure(optimizer)
    finally:
        stage3.DeepSpeedZeroOptimizer_Stage3 = stock
