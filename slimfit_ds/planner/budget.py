"""`memory_budget` of the `"slimfit"` block: from a live model and the engine's configuration to settings that fit."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from slimfit_ds.config import SlimFitConfig
from slimfit_ds.errors import ConfigError
from slimfit_ds.planner.search import find_setting
from slimfit_ds.planner.simulate import Estimate, Simulator
from slimfit_ds.planner.strategies import Strategy
from slimfit_ds.planner.workload import TASKS, Workload
from slimfit_ds.report.units import human_bytes

__all__ = ["resolve_budget", "settings_for_budget", "workload_of"]

RESERVE = 600_000_000
"""Bytes of a GPU kept free for its context, fragmentation and kernels' workspaces when the budget is `auto`."""


def resolve_budget(
    config: Mapping[str, Any],
    model: nn.Module,
    batch: Mapping[str, Any],
    simulator: Simulator | None = None,
) -> dict[str, Any]:
    """Return the configuration with settings that keep each rank within `slimfit.memory_budget`.

    Called by every rank, after the process group is made: rank 0 asks the planner, all ranks train with its answer.
    What the block states stays; the reason for the rest is printed. Without a budget only what `frozen_weights` leaves to
    `auto` is chosen, for what every rank's device has free. A configuration with neither comes back as it is.

    Args:
        config: the DeepSpeed configuration, batch sizes resolved, the block as the user wrote it.
        model: the model that will be trained.
        batch: an example batch, for its shapes.
        simulator: as `settings_for_budget` takes it.

    Raises:
        ConfigError: on every rank: nothing fits (names the smallest feasible budget), the model cannot be simulated, or
            there is neither a budget in bytes nor a CUDA device.
    """
    block = config.get("slimfit")
    slim = SlimFitConfig.parse(block)
    budget = slim.memory_budget
    if block is None or (budget is None and not slim.frozen_weights.undecided):
        return dict(config)
    field, fixed = "memory_budget", dict(block)
    if budget is None:
        field, budget, fixed = "frozen_weights 'auto'", "auto", slim.model_dump(mode="json")
        if "resident" not in block["frozen_weights"]:
            del fixed["frozen_weights"]["resident"]
    if "frozen_weights" in fixed:
        stated = fixed["frozen_weights"].items()
        fixed["frozen_weights"] = {name: value for name, value in stated if value != "auto"}
    import torch.distributed as dist
    from deepspeed.accelerator import get_accelerator

    ranks = dist.get_world_size() if dist.is_initialized() else 1
    device = torch.device(get_accelerator().current_device_name())
    if budget == "auto":
        free: list[Any] = [_free_bytes(device, model, field)] * ranks
        if ranks > 1:
            dist.all_gather_object(free, free[0])
        budget = min(free)
    answer: list[Any] = [None]
    if ranks == 1 or dist.get_rank() == 0:
        try:
            chosen, reason = settings_for_budget(
                int(budget), model, batch, config, fixed, ranks, device, simulator
            )
            answer = [(chosen, [])]
            print(f"slimfit.{field}: {reason}", file=sys.stderr)
        except ConfigError as error:
            answer = [
                (None, [line.replace("slimfit.memory_budget", f"slimfit.{field}") for line in error.problems])
            ]
    if ranks > 1:
        dist.broadcast_object_list(answer, src=0)
    chosen, problems = answer[0]
    if problems:
        raise ConfigError(problems)
    return {**config, "slimfit": chosen}


def workload_of(
    model: nn.Module, batch: Mapping[str, Any], samples: int, dtype: str, micro_batches: int = 1
) -> Workload:
    """Return the workload of a live transformers model.

    Args:
        model: the model that will be trained.
        batch: an example batch; only the shapes of `input_ids` or `pixel_values` are read.
        samples: samples per rank and micro-batch.
        dtype: `fp32`, `bf16` or `fp16`.
        micro_batches: micro-batches per optimizer step.

    Raises:
        ConfigError: the model cannot be rebuilt from its configuration.
    """
    config = getattr(model, "config", None)
    heads = {auto.removeprefix("AutoModel"): task for task, auto in TASKS.items()}
    name = type(model).__name__
    task = next((task for head, task in heads.items() if name.endswith(head)), None)
    if name.endswith("LMHeadModel"):
        task = "causal_lm"
    if config is None or task is None or not hasattr(config, "to_dict"):
        raise ConfigError(
            [
                f"slimfit.memory_budget: {name} cannot be simulated; it works for transformers models "
                f"{', '.join(heads)}. Set freeze.rate, activations and optimizer_states yourself"
            ]
        )
    values = {key: value for key, value in config.to_dict().items() if _is_plain(value)}
    ids, pixels = batch.get("input_ids"), batch.get("pixel_values")
    mask = batch.get("attention_mask")
    return Workload(
        model={**values, "model_type": config.model_type},
        batch=samples * micro_batches,
        seq=int(ids.shape[-1]) if isinstance(ids, torch.Tensor) else 1,
        task=task,
        dtype=dtype,
        attention=getattr(config, "_attn_implementation", None) or "sdpa",
        padding=isinstance(mask, torch.Tensor) and not bool(mask.all()),
        image_size=int(pixels.shape[-1]) if isinstance(pixels, torch.Tensor) else None,
        labels=int(getattr(config, "num_labels", 2) or 2),
    )


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(inner) for inner in value.values())
    if isinstance(value, list | tuple):
        return all(_is_plain(inner) for inner in value)
    return value is None or isinstance(value, str | int | float | bool)


def settings_for_budget(
    budget: int,
    model: nn.Module,
    batch: Mapping[str, Any],
    deepspeed: Mapping[str, Any],
    fixed: Mapping[str, Any],
    world_size: int,
    device: torch.device,
    simulator: Simulator | None = None,
) -> tuple[dict[str, Any], str]:
    """Return the `"slimfit"` block that keeps a rank within its budget, and why it was chosen; for rank 0.

    The worst active set is assumed (the largest layers at once), because a run has to stay below its budget.

    Args:
        budget: bytes.
        model: the model that will be trained.
        batch: an example batch.
        deepspeed: the DeepSpeed configuration, batch sizes resolved.
        fixed: the `"slimfit"` block as the user wrote it (not completed by defaults): what stands there is kept.
        world_size: ranks.
        device: this rank's device.
        simulator: of `world_size` ranks, left open; None: one of its own.

    Raises:
        ConfigError: nothing fits (names the smallest feasible budget), or the model cannot be simulated.
    """
    dtype = next((name for name in ("bf16", "fp16") if deepspeed.get(name, {}).get("enabled")), "fp32")
    accumulation = int(deepspeed.get("gradient_accumulation_steps", 1))
    samples = int(deepspeed["train_micro_batch_size_per_gpu"])
    zero = deepspeed.get("zero_optimization", {})
    bucket = zero.get("reduce_bucket_size")
    strategy = Strategy(
        "slimfit",
        stage=int(zero.get("stage", 0)),
        bucket=bucket if isinstance(bucket, int) else None,
        accumulation=accumulation,
    )
    workload = workload_of(model, batch, samples, dtype, accumulation)
    target = "cuda" if device.type == "cuda" else "cpu"
    with nullcontext(simulator) if simulator is not None else Simulator(world_size, deep=True) as simulator:
        try:
            facts = simulator.inspect(workload)
        except ValueError as error:
            raise ConfigError([f"slimfit.memory_budget: {error}"]) from None

        def run(work: Workload, how: Strategy) -> Estimate:
            return simulator.run(work, how, "worst", target)

        embeddings, language_model = tuple(facts["embeddings"]), facts["loss_in_chunks"]
        choice = find_setting(budget, workload, run, fixed, embeddings, strategy, language_model)
    if choice.setting is None:
        least, peak = choice.smallest.label, choice.smallest.estimate.peak
        raise ConfigError(
            [
                f"slimfit.memory_budget: {human_bytes(budget)} is too small; the smallest feasible budget within what "
                f"is fixed is {peak} bytes ({human_bytes(peak)}), with {least}"
            ]
        )
    return choice.setting.block, choice.reason(budget)


def _free_bytes(device: torch.device, model: nn.Module, field: str) -> int:
    """Bytes of this rank's device that a step may take, the model's own weights included if they are there already."""
    if device.type != "cuda":
        raise ConfigError(
            [
                f"slimfit.{field}: auto needs a CUDA device; give a memory_budget such as 8GB, or leave auto out"
            ]
        )
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + cached + sum(p.nbytes for p in model.parameters() if p.device == device) - RESERVE
