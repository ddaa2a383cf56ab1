"""`history.jsonl` of a Trainer run, in the form that `slimfit-ds report` reads."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from slimfit_ds.schedule.schedule import FreezeSchedule

__all__ = ["RunLog"]


class RunLog(TrainerCallback):
    """A line for each step, written once the Trainer has had its chance to report loss and evaluation.

    Args:
        schedule: gives that of the layers once training has begun; None where all of them train.
    """

    def __init__(self, schedule: Callable[[], FreezeSchedule | None]):
        self._find_schedule = schedule
        self._schedule: FreezeSchedule | None = None
        self._line: dict[str, Any] | None = None
        self._started = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        folder = Path(args.output_dir or "trainer_output")
        writes = state.is_world_process_zero
        if writes:
            folder.mkdir(parents=True, exist_ok=True)
        self._schedule = self._find_schedule()
        # Lines of later steps are left over from a run that went further than its last checkpoint.
        self._history = _History(folder / "history.jsonl", state.global_step, writes=writes)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The line of the last step is complete."""
        self._flush()
        self._line = {
            "step": state.global_step,
            "epoch": state.epoch,
            "loss": None,
            "lr": float(kwargs["optimizer"].param_groups[0]["lr"]),
        }
        if self._schedule is not None:
            active = self._schedule.active_names
            self._line["lr_scale"] = self._schedule.lr_scale
            self._line["active_layers"] = [name for name in self._schedule.names if name in active]
        self._started = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._line is None:
            return
        if self._schedule is not None:
            statistics = {self._schedule.names[n]: value for n, value in self._schedule.statistics.items()}
            self._line["statistics"] = {name: statistics.get(name) for name in self._line["active_layers"]}
        self._line["seconds"] = time.perf_counter() - self._started

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self._line is not None and logs and "loss" in logs:
            self._line["loss"] = float(logs["loss"])
            self._line["gradient_norm"] = float(logs["grad_norm"]) if "grad_norm" in logs else None

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self._line is not None and metrics:
            numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
            self._line["evaluation"] = {n.removeprefix("eval_"): value for n, value in numbers.items()}

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._flush()
        self._history.sync()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._flush()
        self._history.close()

    def _flush(self) -> None:
        if self._line is not None:
            self._history.add(self._line)
        self._line = None


class _History:
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
            self._file.write(json.dumps(_finite(line), allow_nan=False) + "\n")
            self._file.flush()

    def sync(self) -> None:
        """Have all lines on disk, before a checkpoint says that they are there."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


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


def _finite(value: Any) -> Any:
    """The same structure with null for numbers that JSON cannot hold."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
