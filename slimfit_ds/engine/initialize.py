"""Make the engine: read and check the configuration, split layers, hand the rest to `deepspeed.initialize`."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from slimfit_ds import private_names
from slimfit_ds.activations.apply import activation_problems
from slimfit_ds.config import SlimFitConfig
from slimfit_ds.deltas.base import base_problems
from slimfit_ds.deltas.reference import reference_problems
from slimfit_ds.engine.compatibility import config_problems
from slimfit_ds.engine.processes import end_after_gloo
from slimfit_ds.errors import ConfigError
from slimfit_ds.schedule.schedule import freeze_problems, prepare_units
from slimfit_ds.streaming.find import streaming_problems
from slimfit_ds.streaming.streaming import stream
from slimfit_ds.trainable.split import adopt_columns

__all__ = ["initialize", "read_config", "setting_problems"]


def read_config(config: Any, args: Any = None) -> tuple[dict[str, Any], Any]:
    """Read a DeepSpeed configuration in all the forms that DeepSpeed takes, by DeepSpeed's own reader.

    Args:
        config: a dict, a path of a JSON or hjson file, or base64 of either; None: it stands in `args`.
        args: may hold the configuration as `deepspeed_config` or `deepscale_config`.

    Returns:
        The configuration as a dict of its own, and `args` without it: DeepSpeed refuses one that is given twice.

    Raises:
        ConfigError: no configuration, two of them, no such file, or no JSON object in it.
    """
    from deepspeed.runtime.tensor_parallel.init_utils import load_ds_config

    given = {"config": config}
    given |= {name: getattr(args, name, None) for name in ("deepspeed_config", "deepscale_config")}
    given = {name: value for name, value in given.items() if value is not None}
    if not given:
        raise ConfigError(["config: pass a DeepSpeed configuration (a path or a dict)"])
    if len(given) > 1:
        raise ConfigError([f"config: given more than once, as {' and '.join(given)}; keep one of them"])
    (value,) = given.values()
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str) and value.endswith(".json") and not Path(value).is_file():
        raise ConfigError([f"config: no such file: {value}"])
    try:
        loaded = dict(value) if isinstance(value, Mapping) else load_ds_config(value)
    except (ValueError, OSError) as error:
        raise ConfigError([f"config: {value!r} is not a configuration: {error}"]) from None
    if not isinstance(loaded, dict):
        raise ConfigError([f"config: {value} must hold a JSON object, got {type(loaded).__name__}"])
    if args is not None and "config" not in given:
        args = copy.copy(args)
        for name in given:
            setattr(args, name, None)
    return dict(loaded), args


def initialize(
    model: nn.Module | None = None,
    config: Any = None,
    config_params: Any = None,
    args: Any = None,
    **arguments: Any,
) -> tuple[Any, Any, Any, Any]:
    """Make a DeepSpeed engine that freezes layers as the `"slimfit"` block of its config says.

    `slimfit_ds.initialize` is this, with a `memory_budget` resolved before.

    Args:
        arguments: others of `deepspeed.initialize`.

    Returns:
        engine, optimizer, training dataloader, learning-rate scheduler.

    Raises:
        ConfigError: all problems of the configuration at once, before any process group is made.
    """
    import deepspeed

    end_after_gloo()
    loaded, args = read_config(config if config is not None else config_params, args)
    if "slimfit" not in loaded:
        return deepspeed.initialize(args=args, model=model, config=loaded, **arguments)
    if problems := setting_problems(loaded, model):
        raise ConfigError(problems)
    assert model is not None
    slim = SlimFitConfig.parse(loaded["slimfit"])
    if slim.memory_budget is not None:
        raise ConfigError(
            [
                "slimfit.memory_budget: only slimfit_ds.initialize with training_data resolves it; take the settings "
                "that `slimfit-ds plan` writes for it, and leave memory_budget out"
            ]
        )
    if slim.frozen_weights.undecided:
        raise ConfigError(slim.frozen_weights.undecided)
    # DeepSpeed prints its configuration as JSON.
    loaded["slimfit"] = slim.model_dump(mode="json")
    # DeepSpeed's timer would wait for the device at the start and the end of every step.
    timers = loaded.get("timers", {})
    loaded["timers"] = {**timers, "throughput": {"synchronized": False, **timers.get("throughput", {})}}
    from slimfit_ds.engine.engine import SlimFitEngine
    from slimfit_ds.engine.weights import whole

    private_names.check()
    prepare_units(model, slim.freeze, whole)
    stream(model, slim.frozen_weights)
    arguments["model_parameters"] = _with_columns(model, arguments.get("model_parameters"))
    adopt_columns(model, getattr(arguments.get("optimizer"), "param_groups", ()))
    # DeepSpeed has no hook for the class of its engine; it looks the name up when it is called.
    stock = deepspeed.DeepSpeedEngine
    deepspeed.DeepSpeedEngine = SlimFitEngine
    try:
        return deepspeed.initialize(args=args, model=model, config=loaded, **arguments)
    finally:
        deepspeed.DeepSpeedEngine = stock


def setting_problems(
    config: Mapping[str, Any], model: nn.Module | None, output: str | None = None
) -> list[str]:
    """Return what is wrong with a DeepSpeed configuration that has a `"slimfit"` block, for this model; a line each.

    Args:
        output: the folder that a Trainer writes to.
    """
    if model is None:
        return ["model: slimfit_ds.initialize needs a model, got None"]
    try:
        slim = SlimFitConfig.parse(config["slimfit"])
    except ConfigError as error:
        return error.problems + config_problems(config, SlimFitConfig(), model)
    problems = config_problems(config, slim, model)
    problems += [f"slimfit.{line}" for line in activation_problems(model, slim.activations)]
    problems += freeze_problems(model, slim.freeze)
    problems += reference_problems(model, int(config.get("zero_optimization", {}).get("stage", 0)))
    if slim.checkpoints == "delta":
        problems += base_problems(model, output)
    states = 0.0
    if slim.optimizer_states.active == "host":
        # Float32 master and moments of the share that trains, before they are cut over ranks.
        states = 12 * (1 - slim.freeze.rate) * sum(p.numel() for p in model.parameters())
    if slim.frozen_weights.columns == "host":
        # Columns and gradients.
        states += 2 * (1 - slim.freeze.rate) * sum(p.nbytes for p in model.parameters())
    return problems + streaming_problems(
        model, slim.frozen_weights, slim.freeze.splits, slim.activations.compile, states, shares=True
    )


def _with_columns(model: nn.Module, parameters: Any) -> Any:
    """Return parameters or groups of them that were made before layers were split, with what trains of those now."""
    if parameters is None:
        return None
    given = list(parameters)
    groups = given if given and isinstance(given[0], dict) else [{"params": given}]
    groups = [{**group, "params": list(group["params"])} for group in groups]
    adopt_columns(model, groups)
    return groups if given and isinstance(given[0], dict) else groups[0]["params"]
