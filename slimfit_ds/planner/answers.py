"""What simulations have answered before, in the user's cache folder: the same question costs nothing again."""

from __future__ import annotations

import hashlib
import json
import os
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from slimfit_ds.files import write_atomically
from slimfit_ds.planner.workload import Workload

__all__ = ["place", "read", "write"]

_LIBRARIES = ("torch", "transformers", "deepspeed", "peft", "accelerate")


def place(job: dict[str, Any], workload: Workload, world_size: int) -> Path:
    """Return the file of a job's answer: its name depends on the job, the model's configuration and all code.

    Args:
        job: what the child is asked.
        workload: of the job; its model by value, not by name, because a folder's content may change.
        world_size: pretended ranks.
    """
    model = workload.config().to_json_string(use_diff=True)
    question = json.dumps([job, model, world_size, _code()], sort_keys=True)
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root, "slimfit_ds", "plans", f"{hashlib.sha256(question.encode()).hexdigest()[:32]}.json")


def read(file: Path) -> dict[str, Any] | None:
    """Return an answer, if it is there and whole."""
    try:
        answer = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return answer if isinstance(answer, dict) else None


def write(file: Path, answer: dict[str, Any]) -> None:
    """Keep an answer; where nothing can be written it is asked for again next time."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(answer))
    except OSError:
        return


@cache
def _code() -> str:
    """Return a fingerprint of this package's source and of the versions of the libraries that a step runs through."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(file.read_bytes())
    for library in _LIBRARIES:
        try:
            digest.update(f"{library}{version(library)}".encode())
        except PackageNotFoundError:
            continue
    return digest.hexdigest()
