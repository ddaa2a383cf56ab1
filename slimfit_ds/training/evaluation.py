"""Metrics over a whole split, each example counted once whatever the number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slimfit_ds.training.batches import evaluation_loader, evaluation_positions
from slimfit_ds.training.distributed import Ranks, gather_rows, share
from slimfit_ds.training.tasks.base import Rows, Task

__all__ = ["evaluate", "in_order"]


def evaluate(
    engine: Any,
    task: Task[Any],
    prepared: Any,
    original: Any,
    *,
    ranks: Ranks,
    batch: int,
    workers: int,
    to_device: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
) -> dict[str, float]:
    """The task's metrics, the same on every rank.

    Args:
        engine: called with a batch, as in training.
        task: predicts and scores.
        prepared, original: the evaluation split as the task prepared it, and before.
        ranks: this process among all.
        batch: examples of a forward pass on one rank.
        workers: processes that prepare batches.
        to_device: moves a batch.
    """
    positions = evaluation_positions(len(prepared), batch, ranks.rank, ranks.world_size)
    collected: dict[str, list[np.ndarray]] = {}
    engine.eval()
    with torch.no_grad():
        for examples in evaluation_loader(prepared, task, positions, workers=workers):
            moved = to_device(examples)
            for name, values in task.predict(engine(**moved), moved).items():
                collected.setdefault(name, []).append(values.cpu().numpy())
    engine.train()
    rows = {name: np.concatenate(values) for name, values in collected.items()}
    parts = gather_rows({**rows, "position": np.concatenate(positions)})
    metrics = None
    if parts is not None:
        metrics = task.score(in_order(parts, len(prepared)), prepared, original)
    return share(metrics)


def in_order(parts: list[Rows], examples: int) -> Rows:
    """The predictions of all ranks in the order of the data set, without padding.

    Args:
        parts: what each rank predicted, with the example of each row under `position`.
        examples: number of examples.
    """
    position = np.concatenate([part["position"] for part in parts])
    real = np.flatnonzero(position < examples)
    order = real[np.argsort(position[real], kind="stable")]
    return {
        name: np.concatenate([part[name] for part in parts])[order] for name in parts[0] if name != "position"
    }
