"""The freeze-aware ZeRO 3 optimizer: DeepSpeed's parameter partitioning, our gradients, states and update.

Stock ZeRO 3 keeps float32 weights, gradient partitions and Adam states of every layer, and moves frozen
layers by momentum and weight decay. Here only DeepSpeed's cutting, gathering and reducing are kept. A
parameter is a unit: a frozen one has no gradient partition, no state until it first trains, no update.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from slimfit_ds.engine import zero3_linear
from slimfit_ds.engine.loss_scale import restore_scaler, scaler_state
from slimfit_ds.engine.partitioned_units import PartitionedCut, build_units
from slimfit_ds.engine.shard_files import Shard, ShardReader
from slimfit_ds.engine.shard_update import ShardUpdater
from slimfit_ds.freezing.layers import ParameterRoles
from slimfit_ds.freezing.statistics import STATISTICS
from slimfit_ds.optim.rules import rule_of

__all__ = ["FreezeZero3Optimizer", "configure_zero3"]

_REDUCE_BUCKET = "_DeepSpeedZeroOptimizer_Stage3__reduce_and_partition_ipg_grads"

# Methods of DeepSpeed's class that are overridden or called here: if one of them is gone, frozen layers
# would silently move.
_NEEDED = (
    _REDUCE_BUCKET,
    "_partition_all_parameters",
    "_post_step",
    "_pre_step",
    "_setup_for_real_optimizer",
    "get_param_comm_dtype",
    "independent_gradient_partition_epilogue",
    "partition_grads",
    "reduce_ready_partitions_and_remove_grads",
    "zero_grad",
)


@dataclass(frozen=True)
class _Setting:
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
        setting: _Setting,
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
        self._updater = ShardUpdater(
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
        self._gradients: dict[int, Tensor] = {}

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
                self._gradients.pop(unit.index, None)
        for unit in chosen:
            if unit.index not in before:
                unit.parameter.requires_grad_(True)
        self._updater.move_states(before - after, sorted(after))
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
        """Add this rank's stretches of reduced gradients, in float32, to those of earlier micro-batches.

        Args:
            params_to_release: parameters of one bucket; their full gradients are dropped.
            grad_partitions: own stretch of each, a view into the bucket.
        """
        for parameter, partition in zip(params_to_release, grad_partitions, strict=True):
            unit = self._unit_of[id(parameter)]
            own = partition[: unit.length]
            if unit.index in self._gradients:
                self._gradients[unit.index].add_(own)
            else:
                # A copy: the view would keep the whole bucket alive.
                self._gradients[unit.index] = own.to(self._updater.device, torch.float32, copy=True)
            if parameter.grad is not None and not get_accelerator().is_synchronized_device():
                parameter.grad.record_stream(get_accelerator().current_stream())
            parameter.grad = None

    def independent_gradient_partition_epilogue(self) -> None:
        """Reduce what is left in the buckets after a backward pass."""
        for dtype in sort_dtypes(self.ipg_buckets.keys()):
            getattr(self, _REDUCE_BUCKET)(dtype)
        if not get_accelerator().resolves_data_dependency():
            self.reduce_and_partition_stream.synchronize()
        self._epilogue_ran_this_backward = True

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, and with them those of earlier micro-batches."""
        super().zero_grad(set_to_none)
        self._gradients.clear()

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
        if self._gradients:
            norms = torch._foreach_norm(list(self._gradients.values()), 2.0, torch.float32)
            message[0] = torch.stack(norms).square().sum()
        message[1:] = torch.tensor([float(unit.index in self._gradients) for unit in self._active])
        if self.partition_count > 1:
            dist.all_reduce(message, group=self.dp_process_group)
        squared, *flags = message.tolist()
        self._global_grad_norm = math.sqrt(squared) / scale if squared >= 0 else math.nan
        return {unit.index for unit, flag in zip(self._active, flags, strict=True) if flag > 0}

    def _update(self, present: set[int], factor: float) -> None:
        stepped = [unit for unit in self._active if unit.index in present]
        sums = self._updater.update(stepped, self._gradients, factor)
        mine = self._updater.statistic_sums(stepped, sums).to(get_accelerator().current_device_name())
        everyone = mine[None]
        if self.partition_count > 1 and mine.numel():
            everyone = mine.new_empty(self.partition_count, mine.numel())
            dist.allgather_fn(everyone.view(-1), mine, group=self.dp_process_group)
        self.layer_statistics = self._updater.statistics(stepped, everyone)
        for unit in self._active:
            # A layer that took no part in the forward pass of any rank did not move.
            if unit.layer is not None and unit.index not in present:
                self.layer_statistics[unit.layer] = 0.0

    def state_bytes(self) -> dict[str, int]:
        """Bytes of optimizer states and gradients that this rank holds now."""
        whole = [p.grad for group in self.fp16_groups for p in group if p.grad is not None]
        held = [*whole, *self._gradients.values()]
        device, host = self._updater.states.device_bytes(), self._updater.states.host_bytes()
        if self._states_offloaded:
            device, host = 0, device + host
        return {
            "optimizer": device,
            "optimizer_host": host,
            "gradients": sum(t.numel() * t.element_size() for t in held),
        }

    def shards(self) -> Iterator[Shard]:
        """This rank's stretch of every parameter's states, in float32, for a checkpoint."""
        return self._updater.shards()

    def shard_steps(self) -> dict[str, list[int]]:
        """Parameter -> its own step count and the global step of its last update."""
        return self._updater.shard_steps()

    def load_shards(self, reader: ShardReader, steps: Mapping[str, Sequence[int]]) -> None:
        """Replace all states by saved ones, whatever cut they were saved in."""
        self._updater.load_shards(reader, steps, {unit.index for unit in self._active})

    def state_dict(self) -> dict[str, Any]:
        """Scalars only; tensors are saved through `shards`."""
        return {"step_count": self._updater.step_count, "loss_scaler": scaler_state(self.loss_scaler)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The counterpart of `state_dict`."""
        self._updater.step_count = int(state["step_count"])
        restore_scaler(self.loss_scaler, state["loss_scaler"])


def configure_zero3(
    engine: Any, stock_configure: Callable[[torch.optim.Optimizer], Any], optimizer: torch.optim.Optimizer
) -> FreezeZero3Optimizer:
    """Let DeepSpeed build its ZeRO 3 optimizer, of our class.

    Args:
        engine: the engine under construction; read: `slimfit_config`, `roles`, its DeepSpeed config.
        stock_configure: DeepSpeed's `_configure_zero_optimizer`.
        optimizer: the torch optimizer that carries the hyperparameters.

    Raises:
        RuntimeError: this DeepSpeed lacks a method that is overridden here.
    """
    missing = [name for name in _NEEDED if not hasattr(DeepSpeedZeroOptimizer_Stage3, name)]
    if missing:
        raise RuntimeError(
            f"DeepSpeedZeroOptimizer_Stage3 of this DeepSpeed lacks {missing}; install deepspeed==0.19.*"
        )
    setting = _Setting(
        engine.slimfit_config,
        engine.roles,
        # Few gradients travel, and summed in bf16 the norm is off by 2e-3 on two ranks.
        engine._config.communication_data_type or torch.float32,
    )
    # Derives from the class when it is first imported, which must not be while ours stands in for it.
    importlib.import_module("deepspeed.runtime.superoffload.superoffload_stage3")
    # DeepSpeed has no hook for the class; it looks the name up when it is called.
    stock = stage3.DeepSpeedZeroOptimizer_Stage3
    stage3.DeepSpeedZeroOptimizer_Stage3 = functools.partial(FreezeZero3Optimizer, setting=setting)
    try:
        built = stock_configure(optimizer)
    finally:
        stage3.DeepSpeedZeroOptimizer_Stage3 = stock
    zero3_linear.install()
    return built
