"""Checks whether what the run will write fits on the disk."""

from __future__ import annotations

from slimfit_ds.errors import ConfigError
from slimfit_ds.training.checks.registry import Inspection, needs
from slimfit_ds.training.disk_space import free_bytes, planned_writes


@needs(
    "output_dir", "resume", "keep_last", "save_steps", "eval_steps", "max_steps", "save_model", "dtype", "lora",
    after=("output", "model"),
)  # fmt: skip
def disk_space(found: Inspection) -> None:
    parameters = _count_parameters(found)
    if parameters is None or found.output.action == "finished":
        return
    writes = planned_writes(found.recipe, parameters)
    free = free_bytes(found.output.folder)
    if writes.total > free:
        raise ConfigError(
            [
                f"output_dir: {str(found.output.folder)!r} is on a disk with {free / 2**30:.3g} GiB free, and this run "
                f"writes up to {writes.total / 2**30:.3g} GiB ({writes}); choose another folder, make room, or lower "
                "keep_last"
            ]
        )


def _count_parameters(found: Inspection) -> int | None:
    """Weights of the model, counted without making them; None where an architecture cannot be built that way."""
    import torch
    import transformers

    try:
        with torch.device("meta"):
            model = getattr(transformers, found.task.model_class).from_config(found.model_config)
    except Exception:  # whatever a model's own constructor raises; building it for real will tell
        return None
    return sum(parameter.numel() for parameter in model.parameters())
