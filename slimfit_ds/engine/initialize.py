"""`slimfit_ds.initialize`: a drop-in for `deepspeed.initialize`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from slimfit_ds.activations.apply import activation_problems
from slimfit_ds.config import SlimFitConfig
from slimfit_ds.engine.compatibility import config_problems
from slimfit_ds.engine.processes import end_after_gloo
from slimfit_ds.errors import ConfigError
from slimfit_ds.schedule.prepare import freeze_problems, prepare_layers
from slimfit_ds.trainable.columns import adopt_columns

__all__ = ["initialize", "load_config", "setting_problems"]


def load_config(config: Any, args: Any = None) -> dict[str, Any]:
    """A DeepSpeed configuration as a dict, from a dict, a path, or `args.deepspeed_config`.

    Raises:
        ConfigError: no configuration, no such file, or no JSON object in it.
    """
    if config is None:
        config = getattr(args, "deepspeed_config", None)
    if config is None:
        raise ConfigError(["config: pass a DeepSpeed configuration (a path or a dict)"])
    if isinstance(config, Mapping):
        return dict(config)
    path = Path(config)
    if not path.is_file():
        raise ConfigError([f"config: no such file: {path}"])
    try:
        loaded = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ConfigError([f"config: {path} is not JSON: {error}"]) from None
    if not isinstance(loaded, dict):
        raise ConfigError([f"config: {path} must hold a JSON object, got {type(loaded).__name__}"])
    return loaded


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
    import deepspeed

    end_after_gloo()
    loaded = load_config(config if config is not None else config_params, args)
    arguments: dict[str, Any] = {
        "model": model,
        "optimizer": optimizer,
        "model_parameters": model_parameters,
        "training_data": training_data,
        "lr_scheduler": lr_scheduler,
        "distributed_port": distributed_port,
        "mpu": mpu,
        "dist_init_required": dist_init_required,
        "collate_fn": collate_fn,
        "mesh_param": mesh_param,
    }
    if "slimfit" not in loaded:
        return deepspeed.initialize(args=_without_config(args), config=loaded, **arguments)
    if model is None:
        raise ConfigError(["model: slimfit_ds.initialize needs a model, got None"])
    if problems := setting_problems(loaded, model):
        raise ConfigError(problems)
    slim = SlimFitConfig.parse(loaded["slimfit"])
    if slim.memory_budget is not None:
        slim = _within_budget(loaded, model, training_data, collate_fn, distributed_port, dist_init_required)
    # DeepSpeed prints its configuration as JSON.
    loaded["slimfit"] = slim.model_dump(mode="json")
    from slimfit_ds.engine.engine import SlimFitEngine
    from slimfit_ds.engine.weights import whole

    prepare_layers(model, slim.freeze, whole)
    arguments["model_parameters"] = _with_columns(model, model_parameters)
    adopt_columns(model, getattr(optimizer, "param_groups", ()))
    # DeepSpeed has no hook for the class of its engine; it looks the name up when it is called.
    stock = deepspeed.DeepSpeedEngine
    deepspeed.DeepSpeedEngine = SlimFitEngine
    try:
        return deepspeed.initialize(args=_without_config(args), config=loaded, **arguments)
    finally:
        deepspeed.DeepSpeedEngine = stock


def setting_problems(config: Mapping[str, Any], model: nn.Module) -> list[str]:
    """What is wrong with a DeepSpeed configuration that has a `"slimfit"` block, for this model; a line each."""
    try:
        slim = SlimFitConfig.parse(config["slimfit"])
    except ConfigError as error:
        return error.problems
    problems = config_problems(config, slim, model)
    problems += [f"slimfit.{line}" for line in activation_problems(model, slim.activations)]
    return problems + freeze_problems(model, slim.freeze)


def _with_columns(model: nn.Module, parameters: Any) -> Any:
    """Parameters or groups of them that were made before layers were split, with what trains of those now."""
    if parameters is None:
        return None
    given = list(parameters)
    groups = given if given and isinstance(given[0], dict) else [{"params": given}]
    groups = [{**group, "params": list(group["params"])} for group in groups]
    adopt_columns(model, groups)
    return groups if given and isinstance(given[0], dict) else groups[0]["params"]


def _within_budget(
    config: dict[str, Any],
    model: nn.Module,
    training_data: Any,
    collate_fn: Any,
    port: int,
    init: bool | None,
) -> SlimFitConfig:
    """The block that keeps `memory_budget`; the shape of a batch is read from the training data."""
    import deepspeed
    from torch.utils.data import default_collate

    from slimfit_ds.engine.budget import resolve_budget

    problems = []
    if training_data is None:
        problems.append(
            "slimfit.memory_budget needs training_data, to see the shape of a batch; pass it, or take the "
            "settings that `slimfit-ds plan` writes"
        )
    size = config.get("train_micro_batch_size_per_gpu")
    if not isinstance(size, int):
        problems.append(
            f"slimfit.memory_budget needs train_micro_batch_size_per_gpu as a number, got {size!r}"
        )
    if problems or not isinstance(size, int):
        raise ConfigError(problems)
    deepspeed.init_distributed(distributed_port=port, dist_init_required=init)
    batch = (collate_fn or default_collate)([training_data[index] for index in range(size)])
    return SlimFitConfig.parse(resolve_budget(config, model, batch)["slimfit"])


def _without_config(args: Any) -> Any:
    """DeepSpeed refuses a config that is given twice."""
    if getattr(args, "deepspeed_config", None) is None:
        return args
    import copy

    plain = copy.copy(args)
    plain.deepspeed_config = None
    return plain
