"""`run.json`: what stands fast when a run starts, and how it ended if it did not finish."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

import psutil

__all__ = ["RunCard"]


class RunCard:
    """Keeps the file on the rank that writes; does nothing on the others.

    Args:
        path: of the file.
        facts: what to write beside process, host and state.
        writes: whether this rank writes.
    """

    def __init__(self, path: Path, facts: dict[str, Any], *, writes: bool):
        self._path, self._writes = path, writes
        process = psutil.Process()
        self._content = {
            "status": "running",
            "started": time.time(),
            "host": socket.gethostname(),
            "pid": process.pid,
            "process_started": process.create_time(),
            **facts,
        }
        self._write()

    def end(self, status: str, error: str | None = None) -> None:
        """Write how the run ended.

        Args:
            status: `finished`, `stopped` (it can go on) or `failed`.
            error: the reason of a failure.
        """
        self._content |= {"status": status, "error": error, "ended": time.time()}
        try:
            self._write()
        except OSError as problem:
            # The reason of the end is on its way up; a full disk must not take its place.
            print(f"{self._path} could not be written: {problem}", file=sys.stderr)

    def _write(self) -> None:
        if not self._writes:
            return
        beside = self._path.with_suffix(".json.new")
        beside.write_text(json.dumps(self._content, indent=2) + "\n", encoding="utf-8")
        os.replace(beside, self._path)
