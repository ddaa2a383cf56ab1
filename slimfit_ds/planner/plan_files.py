"""The files of a plan, ready to run: a recipe and the DeepSpeed JSON it names."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import yaml

from slimfit_ds.errors import parse_bytes
from slimfit_ds.planner.planner import Choice
from slimfit_ds.planner.strategy import Strategy
from slimfit_ds.planner.workload import Workload, load_config

__all__ = ["write_plan"]


def write_plan(
    arguments: argparse.Namespace, workload: Workload, strategy: Strategy, choice: Choice, folder: Path
) -> list[Path]:
    """Write the recipe and the DeepSpeed JSON of the chosen setting.

    Args:
        arguments: of the command line.
        workload: model and batch of a GPU.
        strategy: stage and buckets.
        choice: with a setting that fits.
        folder: where to; made if needed.

    Returns:
        The paths written.
    """
    assert choice.setting is not None
    config = load_config(workload.model)
    task = workload.resolved_task(config)
    folder.mkdir(parents=True, exist_ok=True)
    deepspeed: dict[str, Any] = {"zero_optimization": strategy.zero_block(), "slimfit": choice.setting.block}
    values: dict[str, Any] = {
        "task": {"name": task, **({} if task == "image_classification" else {"max_length": workload.seq})},
        "model": _recipe_model(arguments.model),
        "data_dir": None,
        "max_steps": 1000,
        "train_batch_size": arguments.batch * arguments.gpus,
        "micro_batch_size": arguments.batch,
        "lr": 5e-5,
        "dtype": arguments.dtype,
        "deepspeed": "ds_config.json",
    }
    header = (
        f"# Written by slimfit-ds plan for {arguments.gpus} GPU(s) of {arguments.gpu_memory}.\n"
        f"# {choice.reason(parse_bytes(arguments.gpu_memory))}\n"
        "# Set data_dir (or data) and what else your task needs.\n"
    )
    paths = [folder / "ds_config.json", folder / "recipe.yaml"]
    paths[0].write_text(json.dumps(deepspeed, indent=2) + "\n", encoding="utf-8")
    paths[1].write_text(header + yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return paths


def _recipe_model(name: str) -> Any:
    """A hub id or folder as it is; a single file becomes a model to initialise."""
    path = Path(name).expanduser()
    return {"config": json.loads(path.read_text())} if path.is_file() else name
