"""From a recipe to the inputs of a Trainer: everything that can be wrong is found before anything is built."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimfit_ds.config import SlimFitConfig
from slimfit_ds.errors import ConfigError
from slimfit_ds.tasks.base import Splits, Task
from slimfit_ds.tasks.data import open_splits
from slimfit_ds.tasks.models import fit_config, read_model_config, resolve_source
from slimfit_ds.tasks.recipe import Recipe

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, TrainingArguments

__all__ = ["Inputs", "inspect", "make_arguments", "weight_dtype"]


@dataclass
class Inputs:
    """What a sound recipe stands for.

    Args:
        splits: the data, with columns as the task needs them.
        source: folder, hub id or GGUF file of the model; None: it is initialised.
        config: of the model, fitted to the data.
        deepspeed: the DeepSpeed configuration with its `"slimfit"` block; None: the Trainer's own loop.
        slimfit: the block; None: plain full fine-tuning.
    """

    splits: Splits = field(init=False)
    source: str | None = field(init=False)
    config: PretrainedConfig = field(init=False)
    deepspeed: dict[str, Any] | None = field(init=False)
    slimfit: dict[str, Any] | None = field(init=False)


def inspect(recipe: Recipe, task: Task[Any], known: Sequence[str] = ()) -> Inputs:
    """Look at data, model, DeepSpeed and SlimFit settings.

    Args:
        recipe: from `read_recipe`.
        task: of the recipe; afterwards it knows its columns and its tokenizer.
        known: problems found before, to be told with the others.

    Raises:
        ConfigError: all problems at once.
    """
    inputs, problems = Inputs(), _Problems()
    task.take_arguments(recipe.arguments)
    with problems.collect():
        inputs.splits = task.study(open_splits(recipe))
    data_are_sound = not problems.lines
    with problems.collect():
        inputs.source, inputs.config = read_model_config(recipe)
        if data_are_sound:
            fit_config(inputs.config, recipe, task)
            tokenizer = recipe.tokenizer
            task.load_preprocessing(
                resolve_source(tokenizer, "tokenizer") if tokenizer else inputs.source, inputs.config
            )
    with problems.collect():
        inputs.deepspeed = deepspeed_config(recipe)
        inputs.slimfit = recipe.slimfit if inputs.deepspeed is None else inputs.deepspeed.get("slimfit")
        _check_slimfit(recipe, inputs)
    problems.lines += _argument_problems(recipe.arguments, task)
    if known or problems.lines:
        raise ConfigError([*known, *problems.lines])
    return inputs


class _Problems:
    """Collects the problems of several `ConfigError`s."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    @contextmanager
    def collect(self) -> Iterator[None]:
        try:
            yield
        except ConfigError as error:
            self.lines += error.problems


def _check_slimfit(recipe: Recipe, inputs: Inputs) -> None:
    """Settings of the block that cannot work whatever the model is."""
    if inputs.slimfit is None:
        if recipe.on_nonfinite == "skip" and inputs.deepspeed is not None:
            raise ConfigError(
                [
                    "on_nonfinite 'skip' needs a slimfit block: plain DeepSpeed has moved the weights before a loss can "
                    "be looked at; use stop, or slimfit={freeze: {policy: none}} for full fine-tuning"
                ]
            )
        return
    block = SlimFitConfig.parse(inputs.slimfit)
    problems = []
    if inputs.deepspeed is not None:
        from slimfit_ds.engine.compatibility import config_problems

        problems = [
            line if line.startswith("slimfit.") else f"deepspeed.{line}"
            for line in config_problems(inputs.deepspeed, block, None)
        ]
    checkpointing = ("gradient_checkpointing", "activation_checkpointing")
    if any(map(recipe.arguments.get, checkpointing)) and block.activations != SlimFitConfig().activations:
        problems.append(
            "gradient_checkpointing and slimfit.activations both decide what is kept for the backward pass; "
            "set gradient_checkpointing=false, or slimfit.activations=exact"
        )
    if recipe.lora is not None:
        problems.append("lora: adapters and per-step freezing are rivals; set lora=null or slimfit=null")
    if problems:
        raise ConfigError(problems)


def _argument_problems(values: Mapping[str, Any], task: Task[Any]) -> list[str]:
    """What transformers would ignore in silence, or find out after the first evaluation."""
    problems = [
        f"{what}_steps has no effect with {what}_strategy {given!r}; set {what}_strategy=steps"
        for what, default in (("eval", "no"), ("save", "steps"))
        if f"{what}_steps" in values and (given := values.get(f"{what}_strategy", default)) != "steps"
    ]
    metric = str(values.get("metric_for_best_model") or "loss").removeprefix("eval_")
    if metric not in task.metrics:
        problems.append(
            f"metric_for_best_model {metric!r} is not a metric of this task; choose one of {', '.join(task.metrics)}"
        )
    return problems


def deepspeed_config(recipe: Recipe) -> dict[str, Any] | None:
    """The recipe's DeepSpeed JSON with the recipe's `slimfit` laid over its own; None if the recipe names none.

    The JSON decides ZeRO, offloading and communication. Batch sizes, clipping, precision and the optimizer's values are
    the recipe's: they become "auto", which transformers fills from the arguments.

    Raises:
        ConfigError: no such file, no JSON object in it, or blocks that only the recipe can decide.
    """
    if recipe.deepspeed is None:
        return None
    config = (
        copy.deepcopy(recipe.deepspeed) if isinstance(recipe.deepspeed, dict) else _load(recipe.deepspeed)
    )
    if "scheduler" in config:
        raise ConfigError(["deepspeed.scheduler: lr_scheduler_type of the recipe decides; remove the block"])
    for key in (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
    ):
        config[key] = "auto"
    for key in ("bf16", "fp16"):
        config[key] = {**config.get(key, {}), "enabled": "auto"}
    config.setdefault("steps_per_print", 2**31)
    optimizer = config.get("optimizer", {"type": "AdamW", "params": {}})
    zero = config.setdefault("zero_optimization", {"stage": 0})
    if str(optimizer.get("type")).lower() in ("adam", "adamw") and not zero.get("offload_optimizer"):
        # The Trainer's own: no weight decay on biases and norms, and `optim` has its say.
        config.pop("optimizer", None)
    else:
        names = ("lr", "betas", "eps", "weight_decay")
        config["optimizer"] = {
            **optimizer,
            "params": {**optimizer.get("params", {}), **dict.fromkeys(names, "auto")},
        }
    if zero.get("stage") == 3:
        config["zero_optimization"] = {"stage3_gather_16bit_weights_on_model_save": True, **zero}
    if "slimfit" in recipe.model_fields_set:
        own = config.pop("slimfit", None)
        if recipe.slimfit is not None:
            config["slimfit"] = _merge(own or {}, recipe.slimfit)
    return config


def _load(name: str) -> dict[str, Any]:
    try:
        content = json.loads(Path(name).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            [f"deepspeed: cannot read {name!r} as JSON ({reason}); name a file such as ds_configs/zero1.json"]
        ) from None
    if not isinstance(content, dict):
        raise ConfigError([f"deepspeed: {name!r} must hold a JSON object, got {type(content).__name__}"])
    return content


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid over `base`, mapping by mapping; anything else of `over` replaces."""
    merged = dict(base)
    for key, value in over.items():
        inner = merged.get(key)
        both = isinstance(inner, Mapping) and isinstance(value, Mapping)
        merged[key] = _merge(inner, value) if both else value  # type: ignore[arg-type]
    return merged


def make_arguments(recipe: Recipe, task: Task[Any], inputs: Inputs) -> TrainingArguments:
    """The Trainer's arguments; making them starts the process group.

    Raises:
        ConfigError: values that do not go together.
    """
    import torch

    values = {
        "logging_steps": 10,
        # A loss that is not finite is shown as such, unless its step is left out: it would stay in the mean for good.
        "logging_nan_inf_filter": recipe.on_nonfinite == "skip",
        "average_tokens_across_devices": task.loss_counts_tokens,
        # Without a GPU transformers wants to be asked for the CPU, or it refuses bf16.
        "use_cpu": not torch.cuda.is_available(),
        # Batches are page-locked, so that their copies need not be waited for.
        "accelerator_config": {"non_blocking": True},
        **task.default_arguments(),
        **recipe.arguments,
    }
    values.pop("resume_from_checkpoint", None)
    if (
        inputs.slimfit is not None
        and SlimFitConfig.parse(inputs.slimfit).activations != SlimFitConfig().activations
    ):
        # TRL's default: two ways of keeping less for the backward pass are one too many.
        values.setdefault("gradient_checkpointing", False)
    metric = str(values.get("metric_for_best_model") or "loss").removeprefix("eval_")
    values.setdefault("greater_is_better", metric not in task.lower_is_better)
    if inputs.deepspeed is not None:
        values["deepspeed"] = inputs.deepspeed
    try:
        return task.arguments_class()(**values)
    except (ValueError, ImportError) as error:
        raise ConfigError([" ".join(str(error).split())]) from None


def weight_dtype(args: TrainingArguments) -> torch.dtype:
    """The type that weights are loaded in.

    Under DeepSpeed that of the run: its optimizer holds the float32 masters. Without it bf16 and fp16 mean autocast, and
    the weights are their own masters.
    """
    import torch

    if args.deepspeed is None:
        return torch.float32
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
