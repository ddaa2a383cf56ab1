"""What a freeze policy does to a model before the run, and whether the two fit together."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

from slimfit_ds.errors import ConfigError
from slimfit_ds.schedule.config import FreezeConfig
from slimfit_ds.schedule.policies import POLICIES
from slimfit_ds.schedule.schedule import FreezeSchedule
from slimfit_ds.trainable.column_plan import plan_columns
from slimfit_ds.trainable.columns import split_columns
from slimfit_ds.trainable.layers import discover, is_part

__all__ = ["freeze_problems", "prepare_layers"]


def freeze_problems(model: nn.Module, config: FreezeConfig) -> list[str]:
    """What is wrong with a `freeze` block for this model, a line each; the model is not changed."""
    policy = POLICIES.get(config.policy)
    try:
        split = any(is_part(name) for name, _ in model.named_parameters())
        if policy is not None and policy.splits_columns and not split:
            plan_columns(model, config)
        FreezeSchedule(discover(model).layers, config)
    except ConfigError as error:
        return error.problems
    return []


def prepare_layers(
    model: nn.Module,
    config: FreezeConfig,
    whole: Callable[[Tensor], AbstractContextManager[Any]] = lambda weight: nullcontext(),
) -> tuple[str, ...]:
    """Split the layers of a model if the policy asks for it.

    Args:
        model: is changed in place.
        config: of the freezing.
        whole: a context in which a weight that ZeRO 3 has cut is whole.

    Returns:
        names of the weights that this has frozen for good, in part or whole.

    Raises:
        ConfigError: what `plan_columns` finds.
    """
    policy = POLICIES.get(config.policy)
    return split_columns(model, config, whole) if policy is not None and policy.splits_columns else ()
