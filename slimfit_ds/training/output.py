"""The folder a run writes to: which one, whether it may, and what stands in it.

recipe.yaml       the resolved recipe        history.jsonl   a line for each step
metrics.json      written last               schedule.png    which layer trained when
checkpoints/      to go on with              model/, best/   for transformers
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from slimfit_ds.errors import ConfigError
from slimfit_ds.training.checkpoints import damaged_checkpoints, last_checkpoint
from slimfit_ds.training.recipe import Draft, Recipe
from slimfit_ds.training.whole_files import is_leftover

__all__ = ["OutputPlan", "plan_output", "resolved_yaml", "resume_overrides"]

MAY_DIFFER = frozenset(
    {
        "resume",
        "output_dir",
        "num_workers",
        "keep_last",
        "save_steps",
        "eval_batch_size",
        "on_nonfinite",
        "max_nonfinite",
        "rank_timeout",
        "report_to",
        "logging_steps",
        "track_memory",
    }
)
"""Keys that may change when a run goes on: they do not touch what is learned."""


@dataclass(frozen=True)
class OutputPlan:
    """Where to write and what to go on with.

    Args:
        folder: the output folder.
        action: `start` in a fresh folder, `resume` from checkpoints, or `finished`: nothing is left to do.
        resume_from: folder of the checkpoints to go on with.
    """

    folder: Path = Path("outputs/run")
    action: Literal["start", "resume", "finished"] = "start"
    resume_from: Path | None = None


def plan_output(draft: Draft) -> OutputPlan:
    """Decide before anything is written; somebody's results are never overwritten.

    Raises:
        ConfigError: the folder holds something else, or there is nothing to resume from.
    """
    recipe = draft.recipe
    source = None
    if recipe.resume not in ("auto", "none"):
        source = Path(recipe.resume).expanduser()
        if not _holds_checkpoints(source):
            raise ConfigError(
                [f"resume: {recipe.resume!r} holds no checkpoints; use auto, none or a run's output_dir"]
            )
    if recipe.output_dir is None:
        return OutputPlan(_next_free(draft.name), "resume" if source else "start", source)
    folder = Path(recipe.output_dir).expanduser()
    if not _is_occupied(folder):
        _check_writable(folder)
        return OutputPlan(folder, "resume" if source else "start", source)
    if folder.is_dir():
        _check_writable(folder)
    if source is not None and source.resolve() == folder.resolve():
        return OutputPlan(folder, "resume", source)
    differing = _differing_keys(folder, recipe)
    if recipe.resume == "auto" and differing == []:
        if (folder / "metrics.json").is_file():
            return OutputPlan(folder, "finished")
        # A run that was stopped before its first checkpoint starts again; its history is rewritten.
        return OutputPlan(folder, "resume", folder) if _holds_checkpoints(folder) else OutputPlan(folder)
    if differing is None:
        reason = "is not empty and holds no run of this program"
    elif differing:
        reason = f"holds a run with other values of {', '.join(differing)}"
    else:
        reason = "holds a run of this recipe, and resume is 'none'"
    raise ConfigError(
        [f"output_dir: {recipe.output_dir!r} {reason}; choose another folder, or remove it yourself"]
    )


def resolved_yaml(recipe: Recipe) -> str:
    """The recipe with every field, as it is written to `recipe.yaml`."""
    return yaml.safe_dump(_comparable(recipe), sort_keys=False, allow_unicode=True)


def resume_overrides(recipe: Recipe, folder: Path) -> list[str]:
    """What has to stand behind the command of a run to go on with it."""
    wanted = {"output_dir": str(folder), "resume": "auto"}
    return [f"{key}={value}" for key, value in wanted.items() if getattr(recipe, key) != value]


def _comparable(recipe: Recipe) -> dict[str, Any]:
    values = recipe.model_dump(mode="json")
    if "slimfit" not in recipe.model_fields_set:
        # An absent block leaves the JSON's own block in force, an explicit null does not.
        del values["slimfit"]
    return values


def _differing_keys(folder: Path, recipe: Recipe) -> list[str] | None:
    """Keys in which the folder's run differs; None if the folder holds no run."""
    try:
        written = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    if not isinstance(written, dict):
        return None
    asked = yaml.safe_load(resolved_yaml(recipe))
    missing = object()
    return [
        key
        for key in {**asked, **written}
        if key not in MAY_DIFFER and asked.get(key, missing) != written.get(key, missing)
    ]


def _next_free(name: str) -> Path:
    number = 1
    while _is_occupied(folder := Path("outputs") / (name if number == 1 else f"{name}-{number}")):
        number += 1
    return folder


def _is_occupied(folder: Path) -> bool:
    try:
        return folder.exists() and (
            not folder.is_dir() or not all(is_leftover(path) for path in folder.iterdir())
        )
    except (OSError, ValueError) as error:
        raise ConfigError([f"output_dir: cannot use {str(folder)!r} ({error})"]) from None


def _check_writable(folder: Path) -> None:
    """Raise ConfigError if the folder cannot be made or written to; it is not made here."""
    existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError([f"output_dir: cannot write to {str(folder)!r} ({existing} is no writable folder)"])


def _holds_checkpoints(folder: Path) -> bool:
    if last_checkpoint(folder) is not None:
        return True
    if problem := damaged_checkpoints(folder):
        raise ConfigError([f"output_dir: {problem}; restore one, or remove {str(folder)!r} yourself"])
    return False
