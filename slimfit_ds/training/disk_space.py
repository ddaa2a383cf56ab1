"""How many bytes a run will write, against those that its disk has left."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from slimfit_ds.training.recipe import Recipe

__all__ = ["Writes", "free_bytes", "planned_writes"]

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Writes:
    """What a run has on disk at most.

    Args:
        checkpoints, checkpoint_bytes: their number, and bytes of one in which every layer has trained.
        models, model_bytes: the same of models for transformers.
    """

    checkpoints: int
    checkpoint_bytes: int
    models: int
    model_bytes: int

    @property
    def total(self) -> int:
        return self.checkpoints * self.checkpoint_bytes + self.models * self.model_bytes

    def __str__(self) -> str:
        return (
            f"{self.checkpoints} checkpoints of {self.checkpoint_bytes / 2**30:.3g} GiB, "
            f"{self.models} models of {self.model_bytes / 2**30:.3g} GiB"
        )


def planned_writes(recipe: Recipe, parameters: int) -> Writes:
    """What a recipe writes.

    Args:
        recipe: with its precision and numbers of checkpoints.
        parameters: elements of all weights.
    """
    weights = parameters * BYTES[recipe.dtype]
    # Two moments, and a master of 16-bit weights, in float32; adapters train next to nothing.
    states = 0 if recipe.lora is not None else parameters * (8 if recipe.dtype == "fp32" else 12)
    # A new one is whole before an old one goes, and the best one stays.
    checkpoints = recipe.keep_last + 1 + (recipe.eval_steps is not None)
    if recipe.save_steps is None:
        checkpoints = 1
    elif recipe.max_steps is not None:
        checkpoints = min(checkpoints, -(-recipe.max_steps // recipe.save_steps))
    models = (3 if recipe.eval_steps is not None else 1) if recipe.save_model else 0
    return Writes(checkpoints, weights + states, models, weights)


def free_bytes(folder: Path) -> int:
    """Bytes that may still be written where a folder is or will be, what its own checkpoints take included."""
    existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    own = sum(path.stat().st_size for path in (folder / "checkpoints").rglob("*") if path.is_file())
    return shutil.disk_usage(existing).free + own
