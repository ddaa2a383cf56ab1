"""`slimfit-ds report RUN_DIR`: draw the freeze schedule of a run, finished or not, from its `history.jsonl`."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slimfit_ds.report.schedule_plot import plot_schedule

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Write `schedule.png`; return the exit code, 2 if the folder holds no history."""
    parser = argparse.ArgumentParser(
        prog="slimfit-ds report", description="Draw which layers of a run trained at which step."
    )
    parser.add_argument("run", metavar="RUN_DIR", type=Path, help="output folder of a run, finished or not")
    parser.add_argument("--output", type=Path, help="the picture; default: RUN_DIR/schedule.png")
    arguments = parser.parse_args(argv)
    file, output = arguments.run / "history.jsonl", arguments.output or arguments.run / "schedule.png"
    try:
        history = _read(file)
        layers = sorted({name for line in history for name in line.get("active_layers") or ()}, key=_order)
        plot_schedule(history, layers, output)
    except OSError as error:
        print(f"slimfit-ds report: {error}; name the output folder of a run", file=sys.stderr)
        return 2
    print(f"{len(history)} steps: {output}")
    return 0


def _read(file: Path) -> list[dict[str, Any]]:
    """Read the whole lines; the last one of a run that goes on may be half written."""
    lines = []
    for text in file.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def _order(name: str) -> tuple[bool, list[tuple[int, str]]]:
    """Sort embeddings first, then by the numbers in the name."""
    parts = re.split(r"(\d+)", name)
    return "embed" not in name, [(int(part), "") if part.isdecimal() else (0, part) for part in parts]


if __name__ == "__main__":
    sys.exit(main())
