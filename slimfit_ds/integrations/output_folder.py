"""The output folder of a run: start in it, go on in it, or leave it alone; nobody's results are overwritten.

recipe.yaml       the recipe of the run       checkpoint-N/   to go on from
history.jsonl     a line for each step        model/          for transformers
metrics.json      written last: the run is finished
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from slimfit_ds.errors import ConfigError
from slimfit_ds.integrations.survival import last_checkpoint

__all__ = ["claim_output", "is_finished", "write_recipe"]

MAY_DIFFER = frozenset(
    {
        *(
            "output_dir",
            "resume_from_checkpoint",
            "on_nonfinite",
            "max_nonfinite",
            "export",
            "report_to",
            "ddp_timeout",
            "measure",
        ),
        *(
            "save_strategy",
            "save_steps",
            "save_total_limit",
            "logging_strategy",
            "logging_steps",
            "disable_tqdm",
        ),
        *("dataloader_num_workers", "per_device_eval_batch_size", "deepspeed", "use_cpu"),
        # Another number of ranks; what counts is `examples_per_step`.
        *("per_device_train_batch_size", "gradient_accumulation_steps"),
    }
)
"""Keys that may change when a run goes on: they do not touch what is learned."""


def claim_output(values: Mapping[str, Any], world_size: int) -> str | None:
    """Decide before anything is written what the output folder is to this run.

    Args:
        values: the recipe.
        world_size: ranks of this run.

    Returns:
        the checkpoint to go on from, or None to start.

    Raises:
        ConfigError: the folder holds something else, or there is nothing to go on from.
    """
    folder, wanted = Path(values["output_dir"]).expanduser(), values.get("resume_from_checkpoint")
    _check_writable(folder)
    if isinstance(wanted, str):
        if not Path(wanted, "trainer_state.json").is_file():
            raise ConfigError([f"resume_from_checkpoint: {wanted!r} is no checkpoint of a Trainer"])
        if Path(wanted).resolve().parent == folder.resolve():
            return wanted
    occupied = folder.is_dir() and any(folder.iterdir())
    if not occupied:
        if wanted is True:
            raise ConfigError([f"resume_from_checkpoint: {str(folder)!r} holds no checkpoint"])
        return wanted or None
    differing = _differing(folder, _comparable(values, world_size))
    if differing is None:
        reason = "is not empty and holds no run of this program"
    elif differing:
        reason = f"holds a run with other values of {', '.join(sorted(differing))}"
    elif wanted is False or isinstance(wanted, str):
        reason = f"holds a run of this recipe, and resume_from_checkpoint is {wanted!r}"
    else:
        found = last_checkpoint(folder)
        return None if found is None else str(found)
    raise ConfigError([f"output_dir: {str(folder)!r} {reason}; choose another folder, or remove it yourself"])


def is_finished(folder: str | os.PathLike) -> bool:
    """Return whether the run in this folder has written its last file."""
    return Path(folder, "metrics.json").is_file()


def write_recipe(values: Mapping[str, Any], world_size: int) -> None:
    """Write the recipe to the output folder, for `claim_output` of a later run."""
    from slimfit_ds.files import write_atomically

    folder = Path(values["output_dir"]).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(_comparable(values, world_size), sort_keys=False, allow_unicode=True)
    write_atomically(folder / "recipe.yaml", text)


def _comparable(values: Mapping[str, Any], world_size: int) -> dict[str, Any]:
    micro, accumulation = (
        values.get("per_device_train_batch_size", 8),
        values.get("gradient_accumulation_steps", 1),
    )
    return {**values, "examples_per_step": micro * accumulation * world_size}


def _differing(folder: Path, asked: Mapping[str, Any]) -> set[str] | None:
    """Return the keys in which the folder's run differs; None if it holds no run."""
    try:
        written = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
        asked = yaml.safe_load(yaml.safe_dump(dict(asked)))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    if not isinstance(written, dict):
        return None
    absent = object()
    return {
        key for key in {**asked, **written} if asked.get(key, absent) != written.get(key, absent)
    } - MAY_DIFFER


def _check_writable(folder: Path) -> None:
    existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    try:
        # By doing it: to root `os.access` allows also what the file system does not.
        with TemporaryDirectory(dir=existing, prefix=".writable"):
            pass
    except OSError as error:
        raise ConfigError(
            [
                f"output_dir: cannot write to {str(folder)!r} ({existing} is no writable folder: {error.strerror}); "
                "choose another place"
            ]
        ) from None
