"""Checks of values: lengths, batch sizes, precision, the DeepSpeed and slimfit blocks."""

from __future__ import annotations

from slimfit_ds.activations.config import ActivationsConfig
from slimfit_ds.config import SlimFitConfig
from slimfit_ds.errors import ConfigError
from slimfit_ds.training.checks.registry import Inspection, needs
from slimfit_ds.training.deepspeed_config import deepspeed_config, load_base


@needs("max_steps", "epochs")
def length(found: Inspection) -> None:
    if found.recipe.max_steps is None and found.recipe.epochs is None:
        raise ConfigError(["max_steps: say how long to train, by max_steps or by epochs"])


@needs("warmup_steps", "max_steps")
def warm_up(found: Inspection) -> None:
    recipe = found.recipe
    if (
        recipe.warmup_steps is not None
        and recipe.max_steps is not None
        and recipe.warmup_steps >= recipe.max_steps
    ):
        raise ConfigError(
            [f"warmup_steps must be below max_steps ({recipe.max_steps}), got {recipe.warmup_steps}"]
        )


@needs("train_batch_size", "micro_batch_size")
def batch_sizes(found: Inspection) -> None:
    recipe, world = found.recipe, found.ranks.world_size
    each = world * (recipe.micro_batch_size or 1)
    if recipe.train_batch_size % each == 0:
        return
    divisor = (
        f"{world} ranks"
        if recipe.micro_batch_size is None
        else f"{world} ranks x micro_batch_size {recipe.micro_batch_size}"
    )
    below = recipe.train_batch_size // each * each
    choices = f"{below} or {below + each}" if below else f"{each}"
    raise ConfigError(
        [f"train_batch_size must divide by {divisor}, got {recipe.train_batch_size}; {choices} would do"]
    )


@needs("deepspeed")
def deepspeed_file(found: Inspection) -> None:
    found.base = load_base(found.recipe, found.draft.folder)


@needs(
    "deepspeed", "train_batch_size", "micro_batch_size", "gradient_clipping", "dtype", "lr", "betas", "eps",
    "weight_decay", after=("deepspeed_file", "batch_sizes"),
)  # fmt: skip
def deepspeed_values(found: Inspection) -> None:
    found.deepspeed = deepspeed_config(found.recipe, found.base, found.ranks.world_size)


@needs("slimfit", "deepspeed", "gradient_checkpointing", "lora", after=("deepspeed_file",))
def slimfit_values(found: Inspection) -> None:
    from slimfit_ds.engine.compatibility import config_problems
    from slimfit_ds.training.deepspeed_config import slimfit_block

    block = slimfit_block(found.recipe, found.base)
    if block is None:
        return
    if not isinstance(block, dict):
        raise ConfigError([f"deepspeed.slimfit must be a mapping, got {block!r}"])
    slimfit = SlimFitConfig.parse(block)
    problems = []
    if found.deepspeed:
        problems += [
            problem if problem.startswith("slimfit.") else f"deepspeed.{problem}"
            for problem in config_problems(found.deepspeed, slimfit, None)
        ]
    if found.recipe.gradient_checkpointing and slimfit.activations != ActivationsConfig():
        problems.append(
            "gradient_checkpointing and slimfit.activations both decide what is kept for the backward pass; "
            "set gradient_checkpointing=false, or slimfit.activations=exact"
        )
    if found.recipe.lora is not None:
        problems.append("lora: adapters and per-step freezing are rivals; set lora=null or slimfit=null")
    if problems:
        raise ConfigError(problems)


@needs("on_nonfinite", "slimfit", after=("deepspeed_file",))
def steps_left_out(found: Inspection) -> None:
    from slimfit_ds.training.deepspeed_config import slimfit_block

    if found.recipe.on_nonfinite == "skip" and slimfit_block(found.recipe, found.base) is None:
        raise ConfigError(
            [
                "on_nonfinite 'skip' needs a slimfit block: plain DeepSpeed has moved the weights before a loss can be "
                "looked at; use stop, or slimfit={freeze: {policy: none}} for full fine-tuning"
            ]
        )


@needs("dtype", "deepspeed", "slimfit", after=("deepspeed_file",))
def precision_and_stage(found: Inspection) -> None:
    from slimfit_ds.training.deepspeed_config import slimfit_block

    recipe = found.recipe
    zero = found.base.get("zero_optimization", {})
    stage = zero.get("stage", 0) if isinstance(zero, dict) else zero
    if not isinstance(zero, dict) or stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        raise ConfigError([f"deepspeed.zero_optimization.stage must be 0, 1, 2 or 3, got {stage!r}"])
    problems = []
    if recipe.dtype == "fp16" and not _has_fp16():
        problems.append("dtype 'fp16' needs a GPU, and none is in use here; use bf16 or fp32")
    if recipe.dtype == "fp16" and stage == 0 and slimfit_block(recipe, found.base) is None:
        problems.append(
            "dtype 'fp16' with deepspeed.zero_optimization.stage 0 trains with unscaled gradients in plain DeepSpeed "
            "(DeepSpeed#8393); use stage 1, or bf16"
        )
    for what, least in (("offload_optimizer", 1), ("offload_param", 3)):
        block = zero.get(what)
        device = block.get("device", "none") if isinstance(block, dict) else block
        if device not in (None, "none") and stage < least:
            problems.append(
                f"deepspeed.zero_optimization.{what} needs stage {least} or higher, got stage {stage}"
            )
    if problems:
        raise ConfigError(problems)


def _has_fp16() -> bool:
    import os

    import torch

    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"
