"""Files and folders that are there whole or not at all, whenever the process is killed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["is_leftover", "replaced_folder", "write_whole"]


def write_whole(path: Path, text: str) -> None:
    """Write a text file in one go; an old one is replaced."""
    part = path.with_name(f".{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


@contextmanager
def replaced_folder(folder: Path, *, acts: bool) -> Iterator[Path]:
    """A new folder to fill, which takes the place of the old one when the body is done.

    Args:
        folder: the place.
        acts: whether this rank makes and renames; the others only learn the temporary name.
    """
    part, old = (folder.with_name(f".{folder.name}.{end}") for end in ("part", "old"))
    if acts:
        for leftover in (part, old):
            shutil.rmtree(leftover, ignore_errors=True)
        part.mkdir(parents=True)
    yield part
    if acts:
        if folder.exists():
            folder.rename(old)
        part.rename(folder)
        shutil.rmtree(old, ignore_errors=True)


def is_leftover(path: Path) -> bool:
    """Whether a path is what a killed process left of the functions above or of a checkpoint."""
    return path.name.startswith(".") and path.suffix in (".part", ".old")
