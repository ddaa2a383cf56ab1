"""`memory_budget`: rank 0 lets the planner choose, every rank trains with what it chose."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch import nn

from slimfit_ds.config import SlimFitConfig
from slimfit_ds.errors import ConfigError
from slimfit_ds.planner.budget import settings_for_budget

__all__ = ["resolve_budget"]


def resolve_budget(config: Mapping[str, Any], model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with settings that keep each rank within `slimfit.memory_budget`.

    Called by every rank, after the process group is made; a configuration without a budget comes back
    as it is. What the block fixes stays; freezing rate, preset, chunk size and residency are chosen
    otherwise, and the reason is printed.

    Args:
        config: the DeepSpeed configuration, batch sizes resolved, the block as the user wrote it.
        model: the model that will be trained.
        batch: an example batch, for its shapes.

    Raises:
        ConfigError: on every rank: nothing fits (names the smallest feasible budget), or the model
            cannot be simulated.
    """
    block = config["slimfit"]
    budget = SlimFitConfig.parse(block).memory_budget
    if budget is None:
        return dict(config)
    answer: list[Any] = [None]
    if dist.get_rank() == 0:
        device = torch.device(get_accelerator().current_device_name())
        try:
            chosen, reason = settings_for_budget(
                budget, model, batch, config, block, dist.get_world_size(), device
            )
            answer = [(chosen, [])]
            print(f"memory_budget of {budget} bytes: {reason}", file=sys.stderr)
        except ConfigError as error:
            answer = [(None, error.problems)]
    torch.distributed.broadcast_object_list(answer, src=0)
    chosen, problems = answer[0]
    if problems:
        raise ConfigError(problems)
    return {**config, "slimfit": chosen}
