"""`history.jsonl`: one JSON line for each optimizer step."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, TextIO

__all__ = ["History", "finite", "read_history"]


class History:
    """Appends lines on the rank that writes; does nothing on the others.

    Args:
        path: the file; lines of steps from `first_step` on are left over from a run that went further than its last
            checkpoint, and are dropped.
        first_step: the step that comes next.
        writes: whether this rank writes.
    """

    def __init__(self, path: Path, first_step: int, *, writes: bool):
        self._file: TextIO | None = None
        if writes:
            self._file = path.open("a", encoding="utf-8")
            # Cut in place: a run that is killed here loses nothing of what it keeps.
            self._file.truncate(_bytes_before(path, first_step))

    def add(self, line: dict[str, Any]) -> None:
        """Write one line at once, so that a run that dies leaves all its steps."""
        if self._file is not None:
            self._file.write(json.dumps(finite(line), allow_nan=False) + "\n")
            self._file.flush()

    def sync(self) -> None:
        """Have all lines on disk, before a checkpoint says that they are there."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def read_history(path: Path) -> list[dict[str, Any]]:
    """All whole lines; a last line that a killed run left half written is skipped."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def _bytes_before(path: Path, first_step: int) -> int:
    """Length of the part of a history that holds the steps before this one."""
    length = 0
    with path.open("rb") as file:
        for line in file:
            try:
                if not line.endswith(b"\n") or json.loads(line)["step"] >= first_step:
                    break
            except ValueError:
                break
            length += len(line)
    return length


def finite(value: Any) -> Any:
    """The same structure with null for numbers that JSON cannot hold."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
