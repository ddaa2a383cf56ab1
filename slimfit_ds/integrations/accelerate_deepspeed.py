"""The SlimFit engine behind `TrainingArguments(deepspeed=...)` and `accelerate.Accelerator`, by one call.

accelerate makes its engine by `deepspeed.initialize`, looked up when it is called; `slimfit_ds.initialize` takes the
same arguments and returns the same things, so it stands in under that name. "auto" values of the JSON are filled from
the arguments as ever (those of the `"slimfit"` block are ours and stay), and a JSON without that block gives stock
DeepSpeed.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from typing import Any

import torch

from slimfit_ds.deltas.reference import ReferenceModel
from slimfit_ds.errors import ConfigError
from slimfit_ds.integrations.delta_checkpoints import write_deltas

__all__ = ["disable_deepspeed", "enable_deepspeed"]

_restore: list[Callable[[], None]] = []
"""What undoes the replacements; empty: nothing is replaced."""


def enable_deepspeed() -> None:
    """Make Trainer and accelerate use the SlimFit engine for a DeepSpeed JSON with a `"slimfit"` block.

    Call it once, before the Trainer (or `Accelerator.prepare`); again is harmless. `disable_deepspeed` undoes it.

    Raises (later, when training starts):
        ConfigError: every value of the JSON that differs from the arguments, and everything that freezing
            cannot be combined with, in one list.

    Example:
        slimfit_ds.integrations.enable_deepspeed()
        args = TrainingArguments("out", deepspeed="ds_configs/slimfit_zero2.json")
    """
    if _restore:
        return
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from slimfit_ds.engine.processes import skip_shm_build

    # accelerate or transformers start the process group, later.
    _restore.append(skip_shm_build())
    _restore.append(_replace_initialize())
    _restore.append(_replace_finalize())
    _restore.append(_replace_process())
    _restore.append(_watch_accelerator())


def disable_deepspeed() -> None:
    """Undo `enable_deepspeed`; engines that were made keep working."""
    while _restore:
        _restore.pop()()


def _replace_initialize() -> Callable[[], None]:
    """Put the engine's `initialize` into the place of `deepspeed.initialize`; without a block it calls the stock one.

    Returns:
        what puts the stock function back.
    """
    import deepspeed

    from slimfit_ds.engine.initialize import initialize

    stock = deepspeed.initialize

    @functools.wraps(stock)
    def with_slimfit(*args: Any, **kwargs: Any) -> Any:
        from slimfit_ds.engine.engine import SlimFitEngine

        if deepspeed.DeepSpeedEngine is SlimFitEngine:  # a script has called slimfit_ds.initialize itself
            return stock(*args, **kwargs)
        # Ours ends in a call of the stock one, under the same name.
        before = deepspeed.initialize
        deepspeed.initialize = stock
        try:
            arguments = inspect.signature(stock).bind(*args, **kwargs).arguments
            if isinstance(arguments.get("model"), ReferenceModel):
                # TRL wants an engine around it; the policy's own has all of it.
                return arguments["model"], None, None, None
            made = initialize(**(_without_block(arguments) if _nothing_trains(arguments) else arguments))
            if isinstance(made[0], SlimFitEngine) and made[0].slimfit_config.checkpoints == "delta":
                # The engine's own part of a Trainer's checkpoint has what trained.
                engine = made[0]
                write_deltas(
                    engine.module,
                    lambda: None,
                    lambda trainer: getattr(trainer, "model_wrapped", None) is engine,
                )
            return made
        finally:
            deepspeed.initialize = before

    deepspeed.initialize = with_slimfit
    return lambda: setattr(deepspeed, "initialize", stock)


def _config_of(arguments: dict[str, Any]) -> Any:
    config = arguments.get("config")
    return arguments.get("config_params") if config is None else config


def _nothing_trains(arguments: dict[str, Any]) -> bool:
    """Whether the engine is for evaluation, such as that of TRL's reference model: there is nothing to freeze."""
    config = _config_of(arguments)
    return (
        isinstance(config, dict)
        and "optimizer" not in config
        and all(arguments.get(name) is None for name in ("optimizer", "model_parameters"))
    )


def _without_block(arguments: dict[str, Any]) -> dict[str, Any]:
    config = {key: value for key, value in _config_of(arguments).items() if key != "slimfit"}
    return {**arguments, "config": config, "config_params": None}


def _replace_finalize() -> Callable[[], None]:
    """transformers compares JSON and arguments at this point; our own findings belong into the same list.

    Returns:
        what puts the stock method back.
    """
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig as TrainerConfig

    from slimfit_ds.engine.initialize import setting_problems

    stock = TrainerConfig.trainer_config_finalize

    @functools.wraps(stock)
    def with_slimfit(self: Any, args: Any, model: Any, num_training_steps: int) -> None:
        if "slimfit" not in self.config:
            return stock(self, args, model, num_training_steps)
        problems: list[str] = []
        try:
            stock(self, args, model, num_training_steps)
        except ValueError:
            if not self.mismatches:
                raise
            problems = [
                f"{line.removeprefix('- ds ').replace(' vs hf ', ' in the DeepSpeed JSON, but ')} in the "
                'TrainingArguments: make them equal, or write "auto" into the JSON'
                for line in self.mismatches
            ]
        problems += setting_problems(self.config, model, args.output_dir or "trainer_output")
        if problems:
            raise ConfigError(problems)
        return None

    setattr(TrainerConfig, stock.__name__, with_slimfit)
    return lambda: setattr(TrainerConfig, stock.__name__, stock)


def _replace_process() -> Callable[[], None]:
    """accelerate fills every "auto" of the JSON from the arguments; those of our block are not for it.

    Returns:
        what puts the stock method back.
    """
    from accelerate.utils import DeepSpeedPlugin

    stock = DeepSpeedPlugin.deepspeed_config_process

    @functools.wraps(stock)
    def without_block(self: Any, prefix: str = "", *args: Any, **kwargs: Any) -> None:
        # It calls itself for each block of the JSON.
        if not prefix.startswith("slimfit."):
            stock(self, prefix, *args, **kwargs)

    setattr(DeepSpeedPlugin, stock.__name__, without_block)
    return lambda: setattr(DeepSpeedPlugin, stock.__name__, stock)


def _watch_accelerator() -> Callable[[], None]:
    """accelerate leaves DeepSpeed out without a word where it was told to use the CPU (`accelerate launch --cpu`).

    Returns:
        what puts the stock method back.
    """
    from accelerate import Accelerator

    stock = Accelerator.__init__

    @functools.wraps(stock)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)
        plugin = inspect.signature(stock).bind(self, *args, **kwargs).arguments.get("deepspeed_plugin")
        if plugin is not None and self.distributed_type.name != "DEEPSPEED":
            raise ConfigError(
                [
                    f"deepspeed: accelerate has chosen {self.distributed_type.name} and would train without DeepSpeed and "
                    "without the slimfit block: unset ACCELERATE_USE_CPU (accelerate launch without --cpu), "
                    "and set DS_ACCELERATOR=cpu instead to train on a CPU"
                ]
            )

    setattr(Accelerator, "__init__", checked)  # noqa: B010 - mypy knows no assignment to a method
    return lambda: setattr(Accelerator, "__init__", stock)
