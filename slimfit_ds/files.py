"""Write files that are there whole or not at all, whenever the process is killed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["flush", "latest_tag", "replacing", "write_atomically"]


def write_atomically(path: str | os.PathLike, content: str | bytes) -> None:
    """Write a file in one go, on disk before this returns; an older one is replaced."""
    with replacing(path) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Give a path to write to, which takes the name of a file when the body ends; nothing is left of a body that fails."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        flush(part)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    flush(path.parent)


def latest_tag(directory: str | os.PathLike) -> str | None:
    """The tag of the newest whole checkpoint that an engine has written to a folder, or `None`."""
    path = Path(directory) / "latest"
    return path.read_text().strip() or None if path.is_file() else None


def flush(path: str | os.PathLike) -> None:
    """Wait until a file, or the list of a folder's entries, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
