"""The files of a checkpoint folder: which of its checkpoints are whole, and which is the newest. Runs no code of them.

DIR/latest                                  the tag of the newest whole checkpoint
DIR/TAG/slimfit.json                        counters, schedule, scheduler, hyperparameters, client state
DIR/TAG/model.safetensors                   whole weights and buffers, by their names
DIR/TAG/optimizer-00000-of-00002.safetensors  a rank's shards of the states: `<parameter>::<state>`
DIR/TAG/random-00000-of-00002.safetensors   a rank's random states
DIR/.TAG.part, DIR/.TAG.old                 being written, being replaced
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

__all__ = [
    "FORMAT",
    "METADATA",
    "MODEL",
    "CheckpointError",
    "damage",
    "flush",
    "latest_tag",
    "part_of",
    "publish",
    "read_metadata",
    "recover",
]

FORMAT = 1
METADATA = "slimfit.json"
MODEL = "model.safetensors"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; what was there before is untouched."""


def latest_tag(directory: str | os.PathLike) -> str | None:
    """The tag of the newest whole checkpoint of a folder, or `None`."""
    path = Path(directory) / "latest"
    return path.read_text().strip() or None if path.is_file() else None


def read_metadata(path: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint.

    Raises:
        CheckpointError: there is none, it cannot be read, or it is of another format.
    """
    file = path / METADATA
    if not file.is_file():
        raise CheckpointError(f"{path} is no SlimFit checkpoint: it has no {METADATA}")
    try:
        metadata = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        found = metadata.get("format") if isinstance(metadata, dict) else metadata
        raise CheckpointError(f"{path} has checkpoint format {found!r}; this version reads {FORMAT}")
    return metadata


def damage(path: Path) -> str | None:
    """What keeps a checkpoint from being whole, or None; reads headers and sizes, not the tensors."""
    try:
        world = read_metadata(path)["world_size"]
        kinds = ("optimizer", "random")
        names = [
            MODEL,
            *(f"{kind}-{rank:05d}-of-{world:05d}.safetensors" for kind in kinds for rank in range(world)),
        ]
        for name in names:
            # Opening compares the size that the header asks for with the size of the file.
            with safe_open(path / name, framework="pt"):
                pass
    except (CheckpointError, OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def part_of(directory: str | os.PathLike, tag: str) -> Path:
    """Where a checkpoint stands while it is written."""
    return Path(directory) / f".{tag}.part"


def _old_of(directory: str | os.PathLike, tag: str) -> Path:
    return Path(directory) / f".{tag}.old"


def publish(directory: str | os.PathLike, tag: str, save_latest: bool = True) -> None:
    """Give a checkpoint that is whole on disk its name, then name it in `latest`.

    Whatever happens in between, `latest` names a whole checkpoint, at most after `recover`.
    """
    final, part, old = Path(directory) / tag, part_of(directory, tag), _old_of(directory, tag)
    flush(part)
    if final.exists():
        # An older checkpoint of the same tag: out of the way first, gone after.
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    part.rename(final)
    flush(final.parent)
    shutil.rmtree(old, ignore_errors=True)
    if save_latest:
        mark = Path(directory) / ".latest.part"
        mark.write_text(tag)
        flush(mark)
        mark.replace(Path(directory) / "latest")
        flush(final.parent)


def recover(directory: str | os.PathLike, tag: str) -> None:
    """Undo a replacement of a checkpoint that was cut off halfway."""
    final, old = Path(directory) / tag, _old_of(directory, tag)
    if old.is_dir() and not final.exists():
        old.rename(final)


def flush(path: Path) -> None:
    """Have a file or the entries of a folder on disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
