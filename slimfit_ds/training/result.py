"""What a finished run leaves: the model, `metrics.json` and the picture of its schedule."""

from __future__ import annotations

import json
from collections.abc import Mapping
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from slimfit_ds.training.checkpoints import save_model
from slimfit_ds.training.distributed import share
from slimfit_ds.training.history import finite, read_history
from slimfit_ds.training.surroundings import hardware, peak_memory, versions
from slimfit_ds.training.whole_files import write_whole

if TYPE_CHECKING:
    from slimfit_ds.training.run import Run

__all__ = ["write_result"]


def write_result(run: Run, metrics: Mapping[str, float]) -> dict[str, Any]:
    """Write the results of a run that has done all its steps; called by every rank.

    Args:
        run: the run.
        metrics: of the final evaluation.

    Returns:
        the content of `metrics.json`, the same on every rank.
    """
    if run.recipe.save_model:
        save_model(run.engine, run.task, run.folder / "model", run.ranks)
    report = finite(_numbers(run, metrics))
    if run.ranks.is_main:
        _draw_schedule(run)
        write_whole(run.folder / "metrics.json", json.dumps(report, indent=2) + "\n")
    torch.distributed.barrier()
    return share(report)


def _numbers(run: Run, metrics: Mapping[str, float]) -> dict[str, Any]:
    peak = torch.tensor(float(peak_memory(run.device)), dtype=torch.float64, device=run.device)
    torch.distributed.all_reduce(peak, torch.distributed.ReduceOp.MAX)
    # The first steps pay for allocation and caches.
    typical = median(run.seconds[min(2, len(run.seconds) - 1) :]) if run.seconds else None
    return {
        "metrics": dict(metrics),
        "best": {"metric": run.best.metric, "value": run.best.value, "step": run.best.step},
        "steps": run.steps,
        "epochs": run.steps / run.batches.steps_per_epoch,
        "layers": len(getattr(run.engine, "layer_names", ())) or None,
        "seconds_per_step": typical,
        "samples_per_second": run.recipe.train_batch_size / typical if typical else None,
        "tokens_per_second": median(run.tokens_per_second or [0.0]) or None,
        "peak_bytes": int(peak.item()),
        "peak_bytes_are": "allocated on the GPU"
        if run.device.type == "cuda"
        else "resident set of a process",
        "memory": run.engine.memory_report() if hasattr(run.engine, "memory_report") else None,
        "world_size": run.ranks.world_size,
        "launcher": run.ranks.launcher,
        "seed": run.recipe.seed,
        "dtype": run.recipe.dtype,
        "versions": versions(),
        "hardware": hardware(run.device),
        "output_dir": str(run.folder),
    }


def _draw_schedule(run: Run) -> None:
    names = getattr(run.engine, "layer_names", None)
    if names:
        from slimfit_ds.report.schedule_plot import plot_schedule

        plot_schedule(read_history(run.folder / "history.jsonl"), names, run.folder / "schedule.png")
