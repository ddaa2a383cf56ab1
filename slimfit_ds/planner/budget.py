"""`memory_budget` of the `"slimfit"` block: from a live model and the engine's configuration to settings that fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from slimfit_ds.errors import ConfigError
from slimfit_ds.planner.estimator import Simulator
from slimfit_ds.planner.planner import choose_settings
from slimfit_ds.planner.strategy import Strategy
from slimfit_ds.planner.workload import TASKS, Workload

__all__ = ["settings_for_budget", "workload_of"]

RESERVE = 600_000_000
"""Bytes of a GPU kept free for its context, fragmentation and kernels' workspaces when the budget is `auto`."""


def workload_of(
    model: nn.Module, batch: Mapping[str, Any], samples: int, dtype: str, micro_batches: int = 1
) -> Workload:
    """The workload of a live transformers model.

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
                f"{', '.join('For' + head[3:] if head.startswith('For') else head for head in heads)}. "
                "Set freeze.rate, activations and optimizer_states yourself"
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
    budget: int | str,
    model: nn.Module,
    batch: Mapping[str, Any],
    deepspeed: Mapping[str, Any],
    fixed: Mapping[str, Any],
    world_size: int,
    device: torch.device,
    simulator: Simulator | None = None,
) -> tuple[dict[str, Any], str]:
    """The `"slimfit"` block that keeps a rank within its budget; only rank 0 needs to ask.

    Args:
        budget: bytes, or `auto`: what the device has free, less a reserve.
        model: the model that will be trained.
        batch: an example batch.
        deepspeed: the DeepSpeed configuration, batch sizes resolved.
        fixed: the `"slimfit"` block as the user wrote it (not completed by defaults): what stands there is kept.
        world_size: ranks.
        device: this rank's device.
        simulator: of `world_size` ranks, left open; None: one of its own.

    Returns:
        The block, and why it was chosen, for the log.

    Raises:
        ConfigError: nothing fits (names the smallest feasible budget), the model cannot be simulated, or `auto`
            without a CUDA device.
    """
    limit = _free_bytes(device) if budget == "auto" else int(budget)
    dtype = next((name for name in ("bf16", "fp16") if deepspeed.get(name, {}).get("enabled")), "fp32")
    accumulation = int(deepspeed.get("gradient_accumulation_steps", 1))
    samples = int(deepspeed["train_micro_batch_size_per_gpu"])
    zero = deepspeed.get("zero_optimization", {})
    workload = workload_of(model, batch, samples, dtype, accumulation)
    stage, bucket = int(zero.get("stage", 0)), zero.get("reduce_bucket_size")
    return choose_settings(
        limit,
        workload,
        fixed,
        world_size,
        stage,
        strategy=Strategy(
            "slimfit",
            stage=stage,
            bucket=bucket if isinstance(bucket, int) else None,
            accumulation=accumulation,
        ),
        target="cuda" if device.type == "cuda" else "cpu",
        simulator=simulator,
    )


def _free_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        raise ConfigError(["slimfit.memory_budget: auto needs a CUDA device; give a size such as 8GB"])
    free, _ = torch.cuda.mem_get_info(device)
    return free - RESERVE
