"""`history.jsonl`: one JSON line for each optimizer step."""

from __future__ import annotations

import json
import math
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
            kept = [line for line in read_history(path) if line["step"] < first_step] if path.exists() else []
            self._file = path.open("w", encoding="utf-8")
            for line in kept:
                self.add(line)

    def add(self, line: dict[str, Any]) -> None:
        """Write one line at once, so that a run that dies leaves all its steps."""
        if self._file is not None:
            self._file.write(json.dumps(finite(line), allow_nan=False) + "\n")
            self._file.flush()

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


def finite(value: Any) -> Any:
    """The same structure with null for numbers that JSON cannot hold."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
