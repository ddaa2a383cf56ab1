"""The model and the engine that a recipe asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from slimfit_ds.training.checks import Inspection
from slimfit_ds.training.learning_rate import rate_factor
from slimfit_ds.training.models import build_model, parameter_groups

__all__ = ["make_engine"]


def make_engine(found: Inspection, steps: int, example: Callable[[], Mapping[str, Tensor]]) -> Any:
    """Build the model from the recipe's seed and wrap it; in training mode.

    Args:
        found: the sound recipe with its configurations.
        steps: optimizer steps of the whole run, for the learning rate.
        example: makes a batch of the largest shape that training will see, for a memory budget.
    """
    from slimfit_ds.engine.initialize import initialize
    from slimfit_ds.planner.budget import resolve_budget

    recipe = found.recipe
    torch.manual_seed(recipe.seed)
    model = build_model(recipe, found.source, found.model_config, found.task)
    warmup = recipe.warmup_steps if recipe.warmup_steps is not None else round(recipe.warmup_ratio * steps)
    config = found.deepspeed
    if "slimfit" in config:
        config = resolve_budget(config, model, example())
    engine, *_ = initialize(
        model=model,
        model_parameters=parameter_groups(model, recipe.weight_decay),
        lr_scheduler=partial(LambdaLR, lr_lambda=rate_factor(recipe.scheduler, steps, warmup)),
        config=config,
    )
    engine.train()
    return engine
