"""What a run's folder says of it, while it runs or afterwards, however much of it is there.

Nothing here trusts the files: a killed run leaves half a line, a copied folder lacks some, a name may be anything.
"""

from __future__ import annotations

import json
import math
import re
import time
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Evaluation", "RunData", "is_run_folder", "read_run"]

SCALARS = ("loss", "lr", "gradient_norm", "seconds", "memory_bytes", "frozen_parameters", "tokens")
"""Numbers of a line of the history that become columns."""
MARKS = ("history.jsonl", "run.json", "recipe.yaml", "metrics.json")
"""Files by which a folder is known as that of a run."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclass(frozen=True)
class Evaluation:
    """Metrics after `step` steps, and the seconds of training until then."""

    step: int
    seconds: float
    metrics: dict[str, float]


@dataclass
class RunData:
    """A run as far as its folder tells.

    Args:
        folder: the folder.
        steps: `[n]` numbers of the steps in the history.
        columns: name -> `[n]` float64, NaN where a line does not say.
        times: phase of a step -> `[n]` seconds.
        memory: kind -> `[n]` bytes held between steps, NaN where a line does not say.
        peak: kind -> `[n]` bytes at the peak of a tracked step, NaN at all others.
        layers: every layer that is known, in model order.
        trained: `[m, 2]` (row of the history, layer) of each layer that trained.
        statistics: `[m]` their statistics, NaN where there was none.
        active_counts: `[n]` how many layers trained; -1: no freezing.
        evaluations: in the order of steps.
        unreadable: lines of the history that were no JSON objects, a half-written last one not counted.
        facts: `run.json`: start, size of the layers, surroundings.
        result: `metrics.json`; empty while the run goes on.
        measures: `measures.json` of a comparison.
        recipe: text of `recipe.yaml`.
        last_sign: seconds since the epoch at which the folder last changed.
    """

    folder: Path
    steps: np.ndarray
    columns: dict[str, np.ndarray]
    times: dict[str, np.ndarray]
    memory: dict[str, np.ndarray]
    peak: dict[str, np.ndarray]
    layers: list[str]
    trained: np.ndarray
    statistics: np.ndarray
    active_counts: np.ndarray
    evaluations: list[Evaluation] = field(default_factory=list)
    unreadable: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)
    measures: dict[str, Any] = field(default_factory=dict)
    recipe: str = ""
    last_sign: float = 0.0

    @property
    def elapsed(self) -> np.ndarray:
        """`[n]` seconds of training at the end of each step."""
        return np.cumsum(np.nan_to_num(self.columns["seconds"]))

    @property
    def freezes(self) -> bool:
        """Whether layers were frozen at all."""
        return bool((self.active_counts >= 0).any())

    @property
    def layer_sizes(self) -> dict[str, int]:
        """Layer -> its parameters, where `run.json` tells."""
        sizes = self.facts.get("layers")
        if not isinstance(sizes, dict):
            return {}
        return {clean(name): int(size) for name, size in sizes.items() if math.isfinite(number(size))}


def is_run_folder(folder: Path) -> bool:
    """Whether a training run has written here."""
    return any((folder / name).is_file() for name in MARKS)


def read_run(folder: Path) -> RunData:
    """Everything that can be read of a run's folder.

    Args:
        folder: the `output_dir` of a run.

    Raises:
        ValueError: the folder holds no run; says what would be right.
    """
    if not is_run_folder(folder):
        raise ValueError(_not_a_run(folder))
    columns: dict[str, array] = {name: array("d") for name in SCALARS}
    families: dict[str, _Family] = {name: _Family() for name in ("times", "memory", "memory_at_peak")}
    steps, counts = array("q"), array("q")
    rows, names, values = array("q"), array("q"), array("d")
    facts = _load(folder / "run.json")
    sizes = facts.get("layers")
    index = {clean(name): i for i, name in enumerate(sizes)} if isinstance(sizes, dict) else {}
    ordered = bool(index)
    evaluations, unreadable, elapsed = [], 0, 0.0
    for line in _lines(folder / "history.jsonl"):
        if line is None:
            unreadable += 1
            continue
        row = len(steps)
        step = line.get("step")
        steps.append(step if isinstance(step, int) and abs(step) < 2**62 else row)
        for name, column in columns.items():
            column.append(number(line.get(name)))
        for key, family in families.items():
            family.add(row, line.get(key))
        seconds = columns["seconds"][-1]
        elapsed += 0.0 if math.isnan(seconds) else seconds
        active = line.get("active_layers")
        active = [name for name in active if isinstance(name, str)] if isinstance(active, list) else None
        counts.append(-1 if active is None else len(active))
        statistics = line.get("statistics")
        for name in active or ():
            rows.append(row)
            names.append(index.setdefault(clean(name), len(index)))
            values.append(number(statistics.get(name)) if isinstance(statistics, dict) else math.nan)
        metrics = line.get("evaluation")
        if isinstance(metrics, dict):
            found = {clean(k): number(v) for k, v in metrics.items()}
            evaluations.append(Evaluation(steps[-1] + 1, elapsed, found))
    layers = list(index)
    layer_of = np.frombuffer(names, dtype=np.int64) if names else np.zeros(0, np.int64)
    if not ordered:
        # Without `run.json` the order of the model is unknown; that of numbered names is the best guess.
        order = sorted(range(len(layers)), key=lambda i: natural(layers[i]))
        place = np.empty(len(layers), np.int64)
        place[order] = np.arange(len(layers))
        layers, layer_of = [layers[i] for i in order], place[layer_of]
    count = len(steps)
    return RunData(
        folder=folder,
        steps=np.array(steps, np.int64),
        columns={name: np.array(column, np.float64) for name, column in columns.items()},
        times=families["times"].columns(count),
        memory=families["memory"].columns(count),
        peak=families["memory_at_peak"].columns(count),
        layers=layers,
        trained=np.stack([np.array(rows, np.int64), layer_of], axis=1),
        statistics=np.array(values, np.float64),
        active_counts=np.array(counts, np.int64),
        evaluations=evaluations,
        unreadable=unreadable,
        facts=facts,
        result=_load(folder / "metrics.json"),
        measures=_load(folder / "measures.json"),
        recipe=_text(folder / "recipe.yaml"),
        last_sign=max((_changed(folder / name) for name in MARKS), default=0.0),
    )


class _Family:
    """Columns whose names are met while reading."""

    def __init__(self) -> None:
        self._rows: dict[str, array] = {}
        self._values: dict[str, array] = {}

    def add(self, row: int, values: Any) -> None:
        for name, value in values.items() if isinstance(values, dict) else ():
            name = clean(name)
            # A hostile file must not make a column for each line.
            if name not in self._rows and len(self._rows) >= 32:
                continue
            self._rows.setdefault(name, array("q")).append(row)
            self._values.setdefault(name, array("d")).append(number(value))

    def columns(self, count: int) -> dict[str, np.ndarray]:
        found = {}
        for name, rows in self._rows.items():
            column = np.full(count, np.nan)
            column[np.array(rows, np.int64)] = self._values[name]
            found[name] = column
        return found


def _lines(path: Path) -> Iterator[dict[str, Any] | None]:
    """Each line as a mapping, None for one that is none; the last one is left out if it is half written."""
    try:
        file = path.open("rb")
    except OSError:
        return
    with file:
        for text in file:
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                line = None
            if isinstance(line, dict):
                yield line
            elif text.endswith(b"\n") and text.strip():
                yield None


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")[:20_000]
    except OSError:
        return ""


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def number(value: Any) -> float:
    """The value as a float; NaN if it is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        converted = float(value)
    except OverflowError:
        return math.nan
    return converted if math.isfinite(converted) else math.nan


def clean(name: Any) -> str:
    """A name that a page can hold: text without control characters, of bounded length."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", str(name))[:200]


def natural(name: str) -> tuple[int, list[tuple[int, int | str]]]:
    """Sort key: embeddings, then numbered blocks (numbers count as numbers), then norms and heads."""
    parts = re.split(r"(\d{1,9})", name)
    group = 0 if "embed" in name else 1 if len(parts) > 1 else 2
    return group, [(0, int(p)) if p.isdecimal() and p.isascii() else (1, p) for p in parts]


def _not_a_run(folder: Path) -> str:
    if not folder.is_dir():
        return (
            f"{str(folder)!r} is no folder; name the output_dir of a training run, such as outputs/digits_vit"
        )
    inside = sorted(place.name for place in folder.iterdir() if place.is_dir() and is_run_folder(place))
    hint = (
        f"runs inside it: {', '.join(inside[:8])}; name one of them"
        if inside
        else "name the output_dir of a training run, such as outputs/digits_vit"
    )
    return f"{str(folder)!r} holds no run (none of {', '.join(MARKS)} in it); {hint}"


def age(run: RunData, now: float | None = None) -> float:
    """Seconds since the last sign of life."""
    return max(0.0, (time.time() if now is None else now) - run.last_sign)


def steps_planned(run: RunData) -> int | None:
    """Optimizer steps of the whole run, if the folder tells."""
    for source in (run.result, run.facts):
        planned: Mapping[str, Any] = source
        value = planned.get("steps")
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**62:
            return value
    return None
