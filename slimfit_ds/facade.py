"""`slimfit_ds.initialize`: a drop-in for `deepspeed.initialize`; the planner resolves `memory_budget`, then the engine is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from slimfit_ds.engine import initialize as engine
from slimfit_ds.errors import ConfigError
from slimfit_ds.planner.budget import resolve_budget

__all__ = ["initialize"]


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: Any = None,
    model_parameters: Any = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int = 29500,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Any = None,
    config: Any = None,
    mesh_param: Any = None,
    config_params: Any = None,
) -> tuple[Any, Any, Any, Any]:
    """Make a DeepSpeed engine that freezes layers as the `"slimfit"` block of its config says.

    Arguments and return value are those of `deepspeed.initialize`; without a `"slimfit"` block it does
    exactly what `deepspeed.initialize` does.

    Returns:
        engine, optimizer, training dataloader, learning-rate scheduler.

    Raises:
        ConfigError: all problems of the configuration at once, before any process group is made.

    Example:
        engine, _, loader, _ = slimfit_ds.initialize(
            model=model, config="ds_configs/slimfit_zero1.json", training_data=dataset
        )
    """
    config, args = engine.read_config(config if config is not None else config_params, args)
    if _asks_planner(config):
        if problems := engine.setting_problems(config, model):
            raise ConfigError(problems)
        batch = _first_batch(config, training_data, collate_fn, distributed_port, dist_init_required)
        assert model is not None
        config = resolve_budget(config, model, batch)
    return engine.initialize(
        args=args,
        model=model,
        optimizer=optimizer,
        model_parameters=model_parameters,
        training_data=training_data,
        lr_scheduler=lr_scheduler,
        distributed_port=distributed_port,
        mpu=mpu,
        dist_init_required=dist_init_required,
        collate_fn=collate_fn,
        config=config,
        mesh_param=mesh_param,
    )


def _asks_planner(config: Mapping[str, Any]) -> bool:
    block = config.get("slimfit")
    if not isinstance(block, Mapping):
        return False
    weights = block.get("frozen_weights")
    undecided = isinstance(weights, Mapping) and "auto" in weights.values()
    return undecided or block.get("memory_budget") is not None


def _first_batch(
    config: Mapping[str, Any], data: Any, collate: Callable[..., Any] | None, port: int, init: bool | None
) -> Mapping[str, Any]:
    """Return the first samples of the training data, for their shapes; starts the process group."""
    import deepspeed
    from torch.utils.data import default_collate

    problems = []
    if data is None:
        problems.append(
            "slimfit.memory_budget and frozen_weights 'auto' need training_data, to see the shape of a batch; pass it, or take "
            "the settings that `slimfit-ds plan` writes"
        )
    size = config.get("train_micro_batch_size_per_gpu")
    if not isinstance(size, int):
        problems.append(
            f"slimfit.memory_budget needs train_micro_batch_size_per_gpu as a number, got {size!r}"
        )
    if problems or not isinstance(size, int):
        raise ConfigError(problems)
    deepspeed.init_distributed(distributed_port=port, dist_init_required=init)
    return (collate or default_collate)([data[index] for index in range(size)])
