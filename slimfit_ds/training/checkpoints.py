"""Checkpoints to go on with, and models for transformers."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from slimfit_ds.engine.checkpoint_files import CheckpointError, damage, latest_tag
from slimfit_ds.training.distributed import Ranks, share
from slimfit_ds.training.endings import SaveError
from slimfit_ds.training.tasks.base import Task
from slimfit_ds.training.whole_files import is_leftover, replaced_folder

__all__ = [
    "damaged_checkpoints",
    "last_checkpoint",
    "load_checkpoint",
    "remove_old",
    "save_checkpoint",
    "save_model",
]


def save_checkpoint(engine: Any, folder: Path, step: int, state: Mapping[str, Any]) -> None:
    """Write `checkpoints/step_N`; called by every rank.

    Args:
        engine: saves weights, optimizer and schedule.
        folder: the run's output folder.
        step: optimizer steps done.
        state: of the loop, small, of JSON types.

    Raises:
        SaveError: a rank could not write; the checkpoints before are untouched.
    """
    place, tag = folder / "checkpoints", f"step_{step}"
    client_state = {**state, "step": step}
    try:
        if _is_slimfit(engine):
            engine.save_checkpoint(str(place), tag=tag, client_state=client_state)
        else:
            from slimfit_ds.engine.stock_checkpoint import save_stock

            save_stock(engine, place, tag, client_state)
    except CheckpointError as error:
        last = last_checkpoint(folder)
        kept = f"{last} is whole, and the run can go on from it" if last else "there was none before"
        raise SaveError(f"{error}; {kept}") from None


def remove_old(folder: Path, step: int, keep: int, best_step: int | None) -> None:
    """Remove all but the last checkpoints; called by rank 0 once a new one is whole.

    Args:
        folder: the run's output folder.
        step: of the checkpoint that was just written.
        keep: checkpoints that stay.
        best_step: the checkpoint of this step stays as well.
    """
    place = folder / "checkpoints"
    # A run that went further, and was resumed from an earlier point, left checkpoints of steps still to come.
    ahead = [path for path in _written(place) if _step_of(path) > step]
    behind = [path for path in _written(place) if _step_of(path) <= step]
    leftovers = [path for path in place.iterdir() if is_leftover(path)]
    for path in [*ahead, *behind[:-keep], *leftovers]:
        if path in leftovers or _step_of(path) not in (step, best_step):
            shutil.rmtree(path, ignore_errors=True)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of an output folder: the one that `latest` names, or else one before it."""
    place = folder / "checkpoints"
    try:
        named = latest_tag(place)
        written = _written(place)
    except (OSError, ValueError):
        return None
    candidates = ([place / named] if named else []) + written[::-1]
    return next((path for path in candidates if path.is_dir() and _damage(path) is None), None)


def damaged_checkpoints(folder: Path) -> str | None:
    """What is wrong with the checkpoints of a folder that has some, and none that is whole; else None."""
    place = folder / "checkpoints"
    try:
        written = _written(place)
        named = latest_tag(place)
    except (OSError, ValueError) as error:
        return f"{place} cannot be read ({error})"
    if named and place / named not in written:
        written.append(place / named)
    if not written or last_checkpoint(folder) is not None:
        return None
    return f"no checkpoint in {place} is whole (the newest, {written[-1].name}: {_damage(written[-1])})"


def load_checkpoint(engine: Any, folder: Path, ranks: Ranks) -> dict[str, Any]:
    """Load the newest whole checkpoint of an output folder into the engine; the state of the loop.

    Raises:
        RuntimeError: the checkpoint cannot be read.
    """
    place = folder / "checkpoints"
    found = share(last_checkpoint(folder))
    if found is None:
        raise RuntimeError(f"no checkpoint of this program could be loaded from {place}")
    if ranks.is_main and found.name != (named := latest_tag(place)):
        why = (_damage(place / named) or "not there") if named else "there is no such file"
        print(f"{place / 'latest'} names {named}: {why}; goes on from {found.name}", file=sys.stderr)
    if _is_slimfit(engine):
        path, state = engine.load_checkpoint(str(place), tag=found.name)
    else:
        from slimfit_ds.engine.stock_checkpoint import load_stock

        path, state = load_stock(engine, place, found.name)
    if path is None or "step" not in state:
        raise RuntimeError(f"{found} is no checkpoint of this program")
    return state


def save_model(engine: Any, task: Task[Any], folder: Path, ranks: Ranks) -> None:
    """Write the weights, the configuration and the preprocessing as transformers reads them."""
    with replaced_folder(folder, acts=ranks.is_main) as part:
        if hasattr(engine, "save_pretrained"):
            engine.save_pretrained(str(part))
        else:
            # Stock DeepSpeed: at stage 3 the weights are scattered, and gathering them takes all ranks.
            state = (
                engine._zero3_consolidated_16bit_state_dict()
                if engine.zero_optimization_stage() == 3
                else None
            )
            if ranks.is_main:
                engine.module.save_pretrained(str(part), state_dict=state)
        if ranks.is_main:
            task.save_preprocessing(part)
    torch.distributed.barrier()


def _is_slimfit(engine: Any) -> bool:
    return hasattr(engine, "schedule")


def _written(place: Path) -> list[Path]:
    """The checkpoints of a folder, in the order of steps."""
    return sorted((path for path in place.glob("step_*") if path.name[5:].isdigit()), key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.name[5:])


def _damage(path: Path) -> str | None:
    # Stock DeepSpeed's files have no header to compare with; they were whole when they got their name.
    return None if any(path.glob("*_model_states.pt")) else damage(path)
