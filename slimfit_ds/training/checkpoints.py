"""Checkpoints to go on with, and models for transformers."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from slimfit_ds.training.distributed import Ranks
from slimfit_ds.training.tasks.base import Task

__all__ = ["load_checkpoint", "save_checkpoint", "save_model"]


def save_checkpoint(
    engine: Any, folder: Path, step: int, state: Mapping[str, Any], keep: int, ranks: Ranks
) -> None:
    """Write `checkpoints/step_N`, then remove all but the last `keep`.

    Args:
        engine: saves weights, optimizer and schedule.
        folder: the run's output folder.
        step: optimizer steps done.
        state: of the loop, small and picklable.
        keep: checkpoints that stay.
        ranks: rank 0 removes.
    """
    place = folder / "checkpoints"
    engine.save_checkpoint(str(place), tag=f"step_{step}", client_state={**state, "step": step})
    torch.distributed.barrier()
    if ranks.is_main:
        written = sorted(place.glob("step_*"), key=lambda path: int(path.name.removeprefix("step_")))
        for old in written[:-keep]:
            shutil.rmtree(old)


def load_checkpoint(engine: Any, folder: Path) -> dict[str, Any]:
    """Load the latest checkpoint of an output folder into the engine; the state of the loop.

    Raises:
        RuntimeError: the checkpoint cannot be read.
    """
    path, state = engine.load_checkpoint(str(folder / "checkpoints"))
    if path is None or "step" not in state:
        raise RuntimeError(f"no checkpoint of this program could be loaded from {folder / 'checkpoints'}")
    return state


def save_model(engine: Any, task: Task[Any], folder: Path, ranks: Ranks) -> None:
    """Write the weights, the configuration and the preprocessing as transformers reads them."""
    if ranks.is_main:
        folder.mkdir(parents=True, exist_ok=True)
    if hasattr(engine, "save_pretrained"):
        engine.save_pretrained(str(folder))
    else:
        # Stock DeepSpeed: at stage 3 the weights are scattered, and gathering them takes all ranks.
        state = (
            engine._zero3_consolidated_16bit_state_dict() if engine.zero_optimization_stage() == 3 else None
        )
        if ranks.is_main:
            engine.module.save_pretrained(str(folder), state_dict=state)
    if ranks.is_main:
        task.save_preprocessing(folder)
    torch.distributed.barrier()
