"""Runs cells one after the other, each in a fresh process, in turns with full fine-tuning, inside a budget; resumes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peers_methods.methods import METHODS
from peers_methods.turns import Turns, compare, take_turns
from peers_methods.worker import Gone, Worker
from peers_methods.workloads import CASES

__all__ = ["FIT_TIER", "Cell", "Plan", "plan_cells", "read_cell", "run_cells"]

FIT_TIER = 2
"""The first of these cells comes after the methods of tiers 0 and 1."""
_FIRST_CASES = 3
_FIT_FIRST = ("full", "checkpointing", "minimal", "balanced", "lora_checkpointing", "minimal_tuned")


@dataclass(frozen=True)
class Cell:
    """A measurement: `step` or `fit` of a method on a case; `reference`: the process that all others of a case meet."""

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
        program: command of a worker, to which `--cell NAME` is added.
        settings: what a result must agree with to be used again.
        device: `cuda` or `cpu`.
        turns: how long a method and full fine-tuning take turns.
        cell_seconds: limit of one cell.
        budget_seconds: limit of all; cells that would not end within it are dropped.
        prepare: start the next process while a cell runs, so that it imports meanwhile (GPU only: it costs CPU time).
        folder: working directory of workers.
        circumstances: noted in each result: commit, command.
    """

    cells: Sequence[Cell]
    output: Path
    program: Sequence[str]
    settings: dict[str, Any]
    device: str
    turns: Turns
    cell_seconds: float
    budget_seconds: float
    prepare: bool
    folder: Path
    circumstances: dict[str, Any] = field(default_factory=dict)


def plan_cells(cases: Sequence[str], methods: Sequence[str], fit: bool, by_case: bool = False) -> list[Cell]:
    """All cells, the most telling first: tier by tier, case by case; all but the first cases come two tiers later.

    Args:
        fit: measure the largest batches too.
        by_case: finish a case before the next one: fewer references to build where no budget presses.
    """
    ranked: list[tuple[int, int, int, Cell]] = []
    for row, method in enumerate(methods):
        for column, case in enumerate(cases):
            late = 0 if column < _FIRST_CASES else 2
            ranked.append((METHODS[method].tier + late, column, row, Cell(case, method)))
            if fit and method != "full_again":
                tier = FIT_TIER if method in _FIT_FIRST and not late else 8
                ranked.append((tier, column, row, Cell(case, method, "fit")))
    ranked.sort(key=lambda entry: (entry[1], entry[0], entry[2]) if by_case else entry[:3])
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
    crew = _Crew(plan, folder, progress)
    try:
        for number, cell in enumerate(waiting):
            left = plan.budget_seconds - (time.monotonic() - started)
            if left < 1.2 * sorted(took)[len(took) // 2]:
                results[cell.name] = {"status": "dropped", "error": "the time budget was spent"}
                continue
            begin = time.monotonic()
            following = waiting[number + 1] if plan.prepare and number + 1 < len(waiting) else None
            result = crew.measure(cell, following, begin + min(plan.cell_seconds, left))
            took.append(time.monotonic() - begin)
            result |= {"case": cell.case, "method": cell.method, "kind": cell.kind}
            result |= {"settings": plan.settings, "measured": plan.circumstances}
            # Whole or not at all: a run may be interrupted anywhere.
            part = folder / f"{cell.name}.part"
            part.write_text(json.dumps(result, indent=1) + "\n")
            part.replace(folder / f"{cell.name}.json")
            results[cell.name] = result
            progress(f"[{number + 1}/{len(waiting)}] {cell.name}: {_summary(result)} ({took[-1]:.0f} s)")
    finally:
        crew.end()
    dropped = sum(result["status"] == "dropped" for result in results.values())
    if dropped:
        progress(
            f"{dropped} cells dropped: the budget was spent; run again with the same --output to add them"
        )
    return results


class _Crew:
    """The processes of a run: that of the cell, those prepared for the next one, and the reference of the case."""

    def __init__(self, plan: Plan, folder: Path, progress: Callable[[str], None]):
        self._plan, self._folder, self._progress = plan, folder, progress
        self._ahead: dict[str, Worker] = {}
        self._reference: Worker | None = None
        self._of = ""
        self._alone: set[str] = set()

    def end(self) -> None:
        """End all that still run."""
        self._dismiss()
        for worker in self._ahead.values():
            worker.end()
            worker.log.unlink(missing_ok=True)
        self._ahead = {}

    def measure(self, cell: Cell, following: Cell | None, deadline: float) -> dict[str, Any]:
        """The cell's result, whatever comes."""
        own = self._worker(cell)
        own.deadline = deadline
        if cell.kind != "step":
            # Largest batches are looked for under caps of the whole card.
            self._dismiss()
        try:
            full = self._full(cell, deadline) if cell.kind == "step" else None
            self._prepare(following)
            if cell.kind == "fit":
                result = own.ask("fit")
            else:
                result = self._paired(own, full)
        except _MateGone as error:
            own.end()
            if error.status == "timeout":
                self._dismiss()
                return {"status": "timeout", "error": error.reason}
            return self._again_alone(cell, following, deadline, str(error))
        except Gone as error:
            if (
                error.status == "out of memory"
                and self._reference is not None
                and self._plan.device == "cuda"
            ):
                return self._again_alone(cell, following, deadline, "there was no room beside it")
            if error.status == "unavailable":
                own.log.unlink(missing_ok=True)
            return {"status": error.status, "error": error.reason}
        own.end()
        own.log.unlink(missing_ok=True)
        return {"status": "ok", **result}

    def _paired(self, own: Worker, full: Worker | None) -> dict[str, Any]:
        own.ask("build")
        rounds = take_turns(own, _Mate(full) if full else None, self._plan.turns)
        return {**compare(rounds), **own.ask("finish"), "rounds": rounds}

    def _full(self, cell: Cell, deadline: float) -> Worker | None:
        """The reference of the cell's case, built when it is first asked for; None where there can be none."""
        if cell.case in self._alone:
            return None
        if self._of != cell.case:
            self._dismiss()
            reference = self._worker(Cell(cell.case, "full", "reference"))
            reference.deadline = deadline
            self._reference, self._of = reference, cell.case
            try:
                reference.ask("build", reference=True)
            except Gone as error:
                self._leave_alone(cell.case, str(error))
        if self._reference is not None:
            self._reference.deadline = deadline
        return self._reference

    def _again_alone(
        self, cell: Cell, following: Cell | None, deadline: float, reason: str
    ) -> dict[str, Any]:
        self._leave_alone(cell.case, reason)
        return self.measure(cell, following, deadline)

    def _leave_alone(self, case: str, reason: str) -> None:
        self._progress(f"{case}: no turns with full fine-tuning ({reason})")
        self._alone.add(case)
        self._dismiss(keep_log=True)

    def _dismiss(self, keep_log: bool = False) -> None:
        if self._reference is not None:
            self._reference.end()
            if not keep_log:
                self._reference.log.unlink(missing_ok=True)
        self._reference, self._of = None, ""

    def _worker(self, cell: Cell) -> Worker:
        return self._ahead.pop(cell.name, None) or Worker(
            [*self._plan.program, "--cell", cell.name], self._folder / f"{cell.name}.log", self._plan.folder
        )

    def _prepare(self, following: Cell | None) -> None:
        if following is None:
            return
        wanted = [following]
        if following.kind == "step" and following.case not in self._alone and following.case != self._of:
            wanted.append(Cell(following.case, "full", "reference"))
        for cell in wanted:
            if cell.name not in self._ahead:
                self._ahead[cell.name] = self._worker(cell)


class _MateGone(Gone):
    """It was the reference that failed, not the cell."""


class _Mate:
    """The reference within the turns of a cell."""

    def __init__(self, worker: Worker):
        self._worker = worker

    def turn(self, steps: int) -> Mapping[str, Sequence[float]]:
        try:
            return self._worker.turn(steps)
        except Gone as error:
            raise _MateGone(error.status, f"full fine-tuning beside it: {error.reason}") from error


def _known(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    result = json.loads(path.read_text())
    usable = result.get("settings") == settings and result["status"] in ("ok", "unavailable", "out of memory")
    return result if usable else None


def _summary(result: dict[str, Any]) -> str:
    if result["status"] != "ok":
        return f"{result['status']}: {result.get('error', '')}"[:160]
    if result["kind"] == "fit":
        return f"largest batches {result['largest']}"
    paired = f", {result['of_full']['cpu_seconds']:.3f} of full (CPU)" if "of_full" in result else ""
    return f"{result['seconds']:.4f} s{paired}, {result['peak'] / 2**20:.0f} MiB"


def read_cell(name: str) -> Cell:
    """The cell of a file name.

    Raises:
        ValueError: an unknown case or method.
    """
    case, method, kind = name.split("__")
    if case not in CASES or method not in METHODS:
        raise ValueError(f"cell {name!r}: unknown case or method")
    return Cell(case, method, kind)
