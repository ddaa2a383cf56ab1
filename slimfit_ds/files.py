"""Write files that are there whole or not at all, whenever the process is killed."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["flush", "folder_for_writing", "latest_tag", "new_folder", "replacing", "write_atomically"]


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


@contextmanager
def folder_for_writing(path: str | os.PathLike) -> Iterator[Path]:
    """Make a folder, or take the one that is there, and try it before the body does its work; what was made is removed if the
    body fails and has left nothing in it.

    Raises:
        OSError: no file can be made in it; names the folder.
    """
    path = Path(path)
    made = [each for each in (path, *path.parents) if not each.exists()]
    try:
        try:
            path.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=path).close()
        except OSError as error:
            raise OSError(
                f"nothing can be written to {path} ({error.strerror}): choose another place"
            ) from None
        yield path
    except BaseException:
        for each in made:
            with suppress(OSError):
                each.rmdir()
        raise


@contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Give an empty folder, which takes the name of one that is not there yet when the body ends; nothing is left of a body
    that fails.

    Raises:
        OSError: before the body, if nothing can be written beside it.
    """
    path = Path(path)
    with folder_for_writing(path.parent) as parent:
        part = parent / f".{path.name}.{uuid.uuid4().hex[:12]}.part"
        part.mkdir()
        try:
            yield part
            for each in part.iterdir():
                flush(each)
            part.rename(path)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        flush(parent)


def flush(path: str | os.PathLike) -> None:
    """Wait until a file, or the list of a folder's entries, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
