"""Imports of the package run down only, and in no circle: also those inside functions and for type checkers."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "slimfit_ds"

FLOORS = (
    {"errors", "files", "environment", "private_names", "report", "memory", "triton_rounding"},
    {"trainable", "optim"},
    {"schedule", "activations", "streaming", "deltas"},
    {"config"},
    {"engine"},
    {"integrations", "tasks"},
    {"planner", "doctor"},
    {"comparison", "facade"},
    {"slimfit_ds", "cli", "train"},
)


def imported(path: Path) -> Iterator[str]:
    """The modules of the package that a file names in its imports, as `room.module`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from room import module` names a module where there is such a file.
            names = [
                f"{node.module}.{a.name}" if is_module(f"{node.module}.{a.name}") else node.module
                for a in node.names
            ]
        else:
            continue
        yield from (name.partition(".")[2] for name in names if name.startswith("slimfit_ds."))


def is_module(name: str) -> bool:
    path = PACKAGE.parent.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or path.is_dir()


def modules() -> dict[str, set[str]]:
    """File -> what it imports of the package."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "slimfit_ds"
        found[name] = set(imported(path)) - {name}
    return found


def floor(module: str) -> int:
    room = module.split(".")[0]
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


def test_imports_run_down():
    upwards = [
        f"{name} -> {target}"
        for name, targets in modules().items()
        for target in targets
        if floor(target) > floor(name)
    ]
    assert not upwards


def test_no_two_files_import_each_other():
    graph = modules()
    assert len(graph) > 100
    list(TopologicalSorter(graph).static_order())  # raises CycleError with the circle


def test_a_step_enters_few_files(no_ranks):
    """What a reader has to know to follow one optimizer step."""
    program = [sys.executable, str(ROOT / "benchmarks" / "files_per_step.py")]
    text = subprocess.run(program, check=True, capture_output=True, text=True, timeout=120).stdout
    files = {
        (policy, preset): int(count) for policy, preset, count, *_ in map(str.split, text.splitlines()[1:])
    }
    assert files["static", "exact"] <= 15
    assert files["ils", "balanced"] <= 25
