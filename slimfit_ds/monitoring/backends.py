"""Where numbers can be logged to, as blocks of a DeepSpeed configuration."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from slimfit_ds.errors import ConfigError

__all__ = ["BACKENDS", "Backend", "monitor_blocks", "settle_wandb"]

WANDB_SERVER = "https://api.wandb.ai"


@dataclass(frozen=True)
class Backend:
    """One place to log to.

    Args:
        block: its key in a DeepSpeed configuration.
        package: the module that it needs; None: none.
        install: what installs that.
        writes_files: whether the block has `output_path` and `job_name`.
    """

    block: str
    package: str | None = None
    install: str = ""
    writes_files: bool = False


BACKENDS = {
    "tensorboard": Backend("tensorboard", "tensorboard", "pip install tensorboard", writes_files=True),
    "wandb": Backend("wandb", "wandb", "pip install wandb"),
    "csv": Backend("csv_monitor", writes_files=True),
    "comet": Backend("comet", "comet_ml", "pip install comet_ml"),
}


def monitor_blocks(
    report_to: Sequence[str] | None, base: Mapping[str, Any], folder: Path
) -> dict[str, dict[str, Any]]:
    """The monitor blocks of a run that are switched on.

    Args:
        report_to: backends that the recipe names, laid over the JSON's blocks; empty: none at all, whatever the JSON
            says; None: the recipe does not speak of it, the JSON decides.
        base: the DeepSpeed JSON.
        folder: where files go unless a block says otherwise.

    Returns:
        block name -> its content with `enabled` true.

    Raises:
        ConfigError: a block is no mapping, or a package is missing; says what installs it.
    """
    problems, blocks = [], {}
    for name, backend in BACKENDS.items():
        stated = base.get(backend.block, {})
        if not isinstance(stated, Mapping) or not isinstance(stated.get("enabled", False), bool):
            problems.append(
                f"deepspeed.{backend.block} must be a mapping with enabled: true or false, got {stated!r}"
            )
            continue
        named = name in (report_to or ())
        of_json = stated.get("enabled", False) and report_to != []
        if not named and not of_json:
            continue
        if backend.package is not None and find_spec(backend.package) is None:
            where = f"report_to {name!r}" if named else f"deepspeed.{backend.block}"
            problems.append(
                f"{where} needs the package {backend.package}, which is not installed: {backend.install}"
            )
            continue
        block = {**stated, "enabled": True}
        if backend.writes_files and not block.get("output_path"):
            block |= {"output_path": str(folder), "job_name": name}
        blocks[backend.block] = block
    if problems:
        raise ConfigError(problems)
    if "wandb" in blocks:
        blocks["wandb"].setdefault("project", "slimfit_ds")
    return blocks


def settle_wandb(folder: Path, timeout: float = 3.0) -> None:
    """Let W&B write into the run's folder, and offline where its server cannot be reached.

    What the environment says already (`WANDB_MODE`, `WANDB_DIR`, `WANDB_NAME`) is left alone.

    Args:
        folder: of the run.
        timeout: seconds to wait for the server.
    """
    os.environ.setdefault("WANDB_DIR", str(folder))
    os.environ.setdefault("WANDB_NAME", folder.resolve().name)
    if "WANDB_MODE" in os.environ:
        return
    address = urlsplit(os.environ.get("WANDB_BASE_URL", WANDB_SERVER))
    place = (address.hostname or "", address.port or (80 if address.scheme == "http" else 443))
    try:
        socket.create_connection(place, timeout).close()
    except OSError as error:
        os.environ["WANDB_MODE"] = "offline"
        print(
            f"W&B: {place[0]} cannot be reached ({error}); logging offline into {folder / 'wandb'}; "
            f"`wandb sync` sends it later",
            file=sys.stderr,
        )
