"""Runs cells one after the other, each in a fresh process with a time limit, inside a budget, and resumes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peers_methods.methods import METHODS
from peers_methods.workloads import CASES

__all__ = ["FIT_TIER", "Cell", "Plan", "plan_cells", "read_cell", "run_cells"]

FIT_TIER = 2
"""The first of these cells comes after the methods of tiers 0 and 1."""
_FIRST_CASES = 3
_FIT_FIRST = ("full", "checkpointing", "minimal", "balanced", "lora_checkpointing", "minimal_tuned")


@dataclass(frozen=True)
class Cell:
    """A measurement: `step` or `fit` of a method on a case."""

    case: str
    method: str
    kind: str = "step"

    @property
    def name(self) -> str:
        """File name without its ending."""
        return f"{self.case}__{self.method}__{self.kind}"


@dataclass
class Plan:
    """What is run and how.

    Args:
        cells: in the order of their priority.
        output: folder; `cells/*.json` inside.
        program: command of a worker, to which `--cell NAME --into FILE` is added.
        settings: what a result must agree with to be used again.
        device: `cuda` or `cpu`.
        cell_seconds: limit of one process.
        budget_seconds: limit of all; cells that would not end within it are dropped.
        prepare: start the next process while a cell runs, so that it imports meanwhile (GPU only: it costs CPU time).
    """

    cells: Sequence[Cell]
    output: Path
    program: Sequence[str]
    settings: dict[str, Any]
    device: str
    cell_seconds: float
    budget_seconds: float
    prepare: bool


def plan_cells(cases: Sequence[str], methods: Sequence[str], fit: bool) -> list[Cell]:
    """All cells, the most telling first: tier by tier, case by case; all but the first cases come two tiers later.

    Args:
        fit: measure the largest batches too.
    """
    ranked: list[tuple[int, int, int, Cell]] = []
    for row, method in enumerate(methods):
        for column, case in enumerate(cases):
            late = 0 if column < _FIRST_CASES else 2
            ranked.append((METHODS[method].tier + late, column, row, Cell(case, method)))
            if fit and method != "full_again":
                tier = FIT_TIER if method in _FIT_FIRST and not late else 8
                ranked.append((tier, column, row, Cell(case, method, "fit")))
    ranked.sort(key=lambda entry: entry[:3])
    return [cell for *_, cell in ranked]


def run_cells(plan: Plan, progress: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """Run what is not there yet.

    Returns:
        cell name -> result; `status` is `ok`, `unavailable`, `out of memory`, `failed`, `timeout` or `dropped`.
    """
    folder = plan.output / "cells"
    folder.mkdir(parents=True, exist_ok=True)
    results, waiting = {}, []
    for cell in plan.cells:
        known = _known(folder / f"{cell.name}.json", plan.settings)
        if known is None:
            waiting.append(cell)
        else:
            results[cell.name] = known
    if results:
        progress(f"{len(results)} cells are there already")
    started, took = time.monotonic(), [15.0]
    ahead: dict[str, subprocess.Popen] = {}
    try:
        for number, cell in enumerate(waiting):
            left = plan.budget_seconds - (time.monotonic() - started)
            if left < 1.2 * sorted(took)[len(took) // 2]:
                results[cell.name] = {"status": "dropped", "error": "the time budget was spent"}
                continue
            begin = time.monotonic()
            process = ahead.pop(cell.name, None) or _start(plan, cell, folder)
            following = waiting[number + 1 : number + 2] if plan.prepare else []
            for one in following:
                ahead[one.name] = _start(plan, one, folder)
            result = _finish(plan, cell, process, folder, min(plan.cell_seconds, left))
            took.append(time.monotonic() - begin)
            result |= {"case": cell.case, "method": cell.method, "kind": cell.kind, "settings": plan.settings}
            (folder / f"{cell.name}.json").write_text(json.dumps(result, indent=1) + "\n")
            results[cell.name] = result
            progress(f"[{number + 1}/{len(waiting)}] {cell.name}: {_summary(result)} ({took[-1]:.0f} s)")
    finally:
        for process in ahead.values():
            process.kill()
            process.wait()
    dropped = sum(result["status"] == "dropped" for result in results.values())
    if dropped:
        progress(
            f"{dropped} cells dropped: the budget was spent; run again with the same --output to add them"
        )
    return results


def _known(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    result = json.loads(path.read_text())
    usable = result.get("settings") == settings and result["status"] in ("ok", "unavailable", "out of memory")
    return result if usable else None


def _start(plan: Plan, cell: Cell, folder: Path) -> subprocess.Popen:
    """A worker that has been told its cell and waits for a line before it touches the device."""
    into = folder / f"{cell.name}.json"
    into.unlink(missing_ok=True)
    with (folder / f"{cell.name}.log").open("w") as log:
        return subprocess.Popen(
            [*plan.program, "--cell", cell.name, "--into", str(into)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
            cwd=Path(sys.argv[0]).resolve().parent.parent,
        )


def _finish(
    plan: Plan, cell: Cell, process: subprocess.Popen, folder: Path, seconds: float
) -> dict[str, Any]:
    into, log = folder / f"{cell.name}.json", folder / f"{cell.name}.log"
    try:
        process.communicate("go\n", timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return {"status": "timeout", "error": f"took more than {seconds:.0f} s"}
    if into.is_file():
        result = json.loads(into.read_text())
        if result["status"] in ("ok", "unavailable"):
            log.unlink(missing_ok=True)
        return result
    # A process that the kernel kills for memory leaves no message of its own.
    status = "out of memory" if process.returncode == -9 else "failed"
    return {"status": status, "error": f"exit code {process.returncode}; see {log.name}"}


def _summary(result: dict[str, Any]) -> str:
    if result["status"] != "ok":
        return f"{result['status']}: {result.get('error', '')}"[:160]
    if result["kind"] == "fit":
        return f"largest batches {result['largest']}"
    return f"{result['seconds']:.4f} s, {result['peak'] / 2**20:.0f} MiB"


def read_cell(name: str) -> Cell:
    """The cell of a file name.

    Raises:
        ValueError: an unknown case or method.
    """
    case, method, kind = name.split("__")
    if case not in CASES or method not in METHODS:
        raise ValueError(f"cell {name!r}: unknown case or method")
    return Cell(case, method, kind)
