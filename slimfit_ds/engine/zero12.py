"""The freeze-aware ZeRO optimizer of stages 0, 1 and 2."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from torch import Tensor

from slimfit_ds.config import SlimFitConfig
from slimfit_ds.engine.checkpoint_files import Shard
from slimfit_ds.engine.optimizer import FreezeOptimizer
from slimfit_ds.engine.sharding import Sharding, squared_norm

__all__ = ["FreezeZeroOptimizer"]


class FreezeZeroOptimizer(FreezeOptimizer, ZeROOptimizer):
    """Steps the active units, each of them its own shard unit.

    Args:
        optimizer: the torch optimizer whose parameter groups hold the hyperparameters.
        sharding: the units that may train and how they are cut over the ranks.
        stage: ZeRO stage 0, 1 or 2; 2 reduces gradients after each micro-batch and keeps shards.
        config: the `slimfit` block.
        measures: the schedule asks for statistics.
        loss_scaler: DeepSpeed's loss scaler (static 1 unless fp16).
        clip: largest global norm of the gradients; 0: no clipping.
        communication_dtype: what gradients are sent in; float32 sums make the norm the same on any number of ranks.
            Between reduction and update they are kept in the dtype of the weights.
        must_use_all: a step in which a parameter that trains has no gradient is an error.
        arrive: waits for gradients on their way to the host.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        sharding: Sharding,
        stage: int,
        config: SlimFitConfig,
        measures: bool,
        loss_scaler: Any,
        clip: float = 0.0,
        communication_dtype: torch.dtype = torch.float32,
        must_use_all: bool = False,
        arrive: Callable[[], None] = lambda: None,
    ):
        super().__init__()
        self.optimizer = optimizer
        self.sharding = sharding
        self.stage = stage
        self.loss_scaler = loss_scaler
        self.dynamic_loss_scale = loss_scaler.dynamic
        self.clip_grad = clip
        self.communication_dtype = communication_dtype
        self._must_use_all, self._arrive = must_use_all, arrive
        self._used: set[str] = set()
        self.custom_loss_scaler = False
        self.external_loss_scale = None
        self.torch_autocast_gradscaler = None
        self.dp_process_group = sharding.group
        self.overflow = False
        self._global_grad_norm = 0.0
        self._accumulated: dict[int, Tensor] = {}
        self._present: set[int] = set()
        self._squared: Tensor | None = torch.zeros((), device=sharding.device)
        """Of the own shards of all reduced gradients; None: not worked out yet."""
        self._set_up(
            sharding.units, config, measures, sharding.group, sharding.device, sharding.row, sharding.rows
        )

    # What DeepSpeed's engine and schedulers ask of an optimizer.

    @property
    def param_groups(self) -> list[dict]:
        return self.optimizer.param_groups

    @property
    def state(self) -> Mapping[torch.nn.Parameter, dict[str, Tensor]]:
        return self.optimizer.state  # type: ignore[return-value]

    @property
    def loss_scale(self) -> float:
        return self.loss_scaler.cur_scale

    @property
    def bit16_groups(self) -> list[list[torch.nn.Parameter]]:
        return [group["params"] for group in self.param_groups]

    def overlapping_partition_gradients_reduce_epilogue(self) -> None:
        """Gradients are reduced by `collect_gradients`; DeepSpeed's engine may still call this."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of the active units; frozen ones have none."""
        for unit in self._active:
            unit.drop_gradient()
        self._reduced.clear()
        self._accumulated.clear()
        self._present.clear()

    def collect_gradients(self, boundary: bool) -> None:
        """Take in the gradients of one backward pass.

        Gradients of several micro-batches are summed in float32 (in bf16 the norm is off by 2.6e-3
        already at two).

        Args:
            boundary: this was the last micro-batch before a step.
        """
        self._arrive()
        if self._must_use_all:
            self._check_used(boundary)
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
                self._reduced, self._squared = sums, self._squared_norm(sums)
            else:
                self._reduced, self._squared = self._reduce(sums, keep=torch.float32)

    def _squared_norm(self, gradients: Mapping[int, Tensor]) -> Tensor:
        return squared_norm(list(gradients.values()), self.sharding.device)

    def _check_used(self, boundary: bool) -> None:
        named = [pair for unit in self._active for pair in zip(unit.names, unit.parameters, strict=True)]
        self._used.update(name for name, parameter in named if parameter.grad is not None)
        if not boundary:
            return
        unused = [name for name, _ in named if name not in self._used]
        self._used.clear()
        if unused:
            # DeepSpeed's error is one of assert.
            raise AssertionError(
                f"the module has parameters that were not used in producing loss: {', '.join(unused)}; set "
                "zero_optimization.ignore_unused_parameters to true, or let all of them take part in the loss"
            )

    def _accumulate(self, gradients: Mapping[int, Tensor]) -> None:
        known = [index for index in gradients if index in self._accumulated]
        if known:
            sums = [self._accumulated[index] for index in known]
            torch._foreach_add_(sums, [gradients[index] for index in known])
        new = {i: torch.empty_like(g, dtype=torch.float32) for i, g in gradients.items() if i not in known}
        if new:
            torch._foreach_copy_(list(new.values()), [gradients[index] for index in new])
        self._accumulated |= new

    def _reduce(
        self, gradients: dict[int, Tensor], keep: torch.dtype | None
    ) -> tuple[dict[int, Tensor], Tensor]:
        """Reduce all active units, in order: a rank without a gradient sends zeros."""
        for unit in self._active:
            if unit.index not in gradients:
                gradients[unit.index] = torch.zeros(unit.numel, dtype=unit.dtype, device=unit.device)
        return self.sharding.reduce(self._active, gradients, self.communication_dtype, keep)

    def _gradient_was_set(self, unit: Any) -> None:
        self._present.add(unit.index)
        self._squared = None

    def _own_norm(self) -> tuple[Tensor, set[int]]:
        if self._squared is None:
            self._squared = self._squared_norm(self._reduced)
        # At stage 0 every rank has the whole.
        share = self.sharding.world if self.sharding.rows == 1 else 1
        return self._squared / share if share > 1 else self._squared, self._present

    def _publish(self, units: Sequence[Any], sums: Tensor) -> Tensor:
        """Gather the new weights; the sums travel with them."""
        return self.sharding.gather(units, sums)

    def held_gradients(self) -> list[Tensor]:
        return [*self._reduced.values(), *self._accumulated.values()]

    def shards(self) -> Iterator[Shard]:
        if self.sharding.rows > 1 or self.sharding.rank == 0:
            yield from self.updater.shards()
