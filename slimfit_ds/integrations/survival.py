"""Callbacks of a Trainer that keep a run from losing its work: whole checkpoints, requests to stop, broken steps.

The Trainer writes `checkpoint-N` file by file and removes the older ones before all ranks are done. `WholeCheckpoints`
marks a checkpoint once every rank has written its part, removes older ones only then, and `last_checkpoint` resumes
from marked ones only. So kill -9 at any moment costs at most the work since the last checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from slimfit_ds.files import flush, write_atomically

__all__ = [
    "NonFiniteError",
    "NonFiniteSteps",
    "StopTogether",
    "WholeCheckpoints",
    "how_to_go_on",
    "last_checkpoint",
    "name_last_checkpoint",
    "skip_finished_loop",
]

MARK = "whole.json"
"""The files of a checkpoint with their sizes in bytes; written last."""


def last_checkpoint(output_dir: str | os.PathLike) -> Path | None:
    """Return the newest whole `checkpoint-N` of an output folder; say why newer ones are passed over."""
    for path in reversed(_checkpoints(Path(output_dir))):
        if (problem := _damage(path)) is None:
            return path
        print(f"{path} is passed over: {problem}", file=sys.stderr)
    return None


class WholeCheckpoints(TrainerCallback):
    """Mark each checkpoint that all ranks have written, then remove those beyond `save_total_limit`.

    All ranks must write to one file system.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the removal of old checkpoints over from the Trainer."""
        self._limit, args.save_total_limit = args.save_total_limit, None
        if state.is_world_process_zero:
            # Resumed from an earlier point: later checkpoints are about to be overwritten.
            for path in _checkpoints(Path(args.output_dir or "trainer_output")):
                if _step_of(path) > state.global_step:
                    (path / MARK).unlink(missing_ok=True)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _barrier()
        if state.is_world_process_zero:
            folder = Path(args.output_dir or "trainer_output")
            _mark(folder / f"checkpoint-{state.global_step}")
            _remove_old(folder, state.global_step, self._limit, state.best_model_checkpoint)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        args.save_total_limit = self._limit


def _checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder, whole or not, by step."""
    found = [path for path in folder.glob("checkpoint-*") if path.name[11:].isdecimal() and path.is_dir()]
    return sorted(found, key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.name[11:])


def _damage(path: Path) -> str | None:
    """Return what keeps a checkpoint from being whole, or None; looks at sizes, not at contents."""
    try:
        sizes: dict[str, int] = json.loads((path / MARK).read_text())
        wrong = [name for name, size in sizes.items() if (path / name).stat().st_size != size]
    except FileNotFoundError as error:
        name = Path(error.filename).name
        return "the run ended while it was written" if name == MARK else f"{name} is missing"
    except (OSError, ValueError, AttributeError) as error:
        return f"{MARK} or a file that it names cannot be read ({error})"
    return f"{wrong[0]} has another size than when it was written" if wrong else None


def _mark(checkpoint: Path) -> None:
    files = [path for path in checkpoint.rglob("*") if path.is_file() and path.name != MARK]
    for path in files:
        flush(path)
    sizes = {str(path.relative_to(checkpoint)): path.stat().st_size for path in files}
    write_atomically(checkpoint / MARK, json.dumps(sizes, indent=1))


def _remove_old(folder: Path, step: int, limit: int | None, best: str | None) -> None:
    """Keep the newest `limit` whole checkpoints up to this step and the best one; None or 0 keeps all."""
    if not limit or limit < 0:
        return
    found = _checkpoints(folder)
    whole = [path for path in found if _step_of(path) <= step and (path / MARK).exists()]
    kept = {path.name for path in whole[-limit:]} | ({Path(best).name} if best else set())
    for path in found:
        if path.name not in kept:
            _remove(path)


def _remove(checkpoint: Path) -> None:
    (checkpoint / MARK).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


class StopTogether(TrainerCallback):
    """Save and stop all ranks after the step in which a rank gets SIGTERM, SIGINT or SIGUSR1; a second signal ends at once.

    The ranks agree after each step (an all-reduce of one number between hosts), so all stop at the same one. A rank that
    falls silent ends the others after `ddp_timeout`, in the groups that DeepSpeed makes as well.

    Attributes:
        reason: why training stopped early; None: it did not.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    """What a scheduler, a keyboard and Slurm's `--signal` send."""

    ECHO_SECONDS = 1.0
    """A terminal and a launcher may both deliver one request."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self._received: tuple[str, float] | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._group: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.reason = self._received = None
        if _many() and dist.get_backend() != "gloo" and self._group is None:
            self._group = dist.new_group(backend="gloo")  # does not wait for the GPU
        # DeepSpeed makes its groups with torch's own limit of half an hour.
        for group in list(dist.distributed_c10d._world.pg_map) if _many() else ():
            dist.distributed_c10d._set_pg_timeout(args.ddp_timeout_delta, group)
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in self.SIGNALS}

    def _note(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if self._received is None:
            self._received = (signal.Signals(number).name, now)
        elif now - self._received[1] > self.ECHO_SECONDS:
            print(f"second {signal.Signals(number).name}: ends at once, unsaved", file=sys.stderr, flush=True)
            os._exit(128 + number)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        received = torch.tensor(float(self._received is not None))
        if _many():
            dist.all_reduce(received, group=self._group)
        if received.item() and state.global_step < state.max_steps:
            name = self._received[0] if self._received is not None else "another rank was asked"
            self.reason = f"stopped on request ({name}) after step {state.global_step} of {state.max_steps}"
            # An evaluation that is due stays: it moves the random state, and the run is to end as if nobody had asked.
            control.should_save = control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # After a stop the handlers stay: a launcher in a hurry signals again while the processes end.
        if self.reason is None:
            for number, handler in self._previous.items():
                signal.signal(number, handler)


class NonFiniteError(FloatingPointError):
    """A loss or gradient is NaN or infinite, and the policy says to stop."""


class NonFiniteSteps(TrainerCallback):
    """Decide about steps whose gradients are NaN or infinite; no weight is changed by them in either case.

    Under the SlimFit engine (and stock DeepSpeed in fp16) the engine leaves such steps out; without DeepSpeed the
    gradients are dropped here.

    Args:
        policy: `stop` raises NonFiniteError, so that no checkpoint is made; `skip` goes on.
        most: steps in a row that may be skipped.
    """

    def __init__(self, policy: Literal["stop", "skip"] = "stop", most: int = 10):
        self.skipped = 0
        self._policy, self._most = policy, most

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        optimizer = kwargs["optimizer"]
        inner = getattr(optimizer, "optimizer", optimizer)
        if not hasattr(inner, "overflow"):
            self._judge(self._drop_gradients(inner), state)
        # In fp16 the loss scale is found by overflowing gradients; that is no defect of the run.
        elif not getattr(getattr(inner, "loss_scaler", None), "dynamic", False):
            self._judge(bool(inner.overflow), state)

    @staticmethod
    def _drop_gradients(optimizer: torch.optim.Optimizer) -> bool:
        weights = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms = torch._foreach_norm([p.grad for p in weights]) if weights else []
        broken = bool(norms) and not bool(torch.stack([norm.float() for norm in norms]).isfinite().all())
        for weight in weights if broken else ():
            weight.grad = None
        return broken

    def _judge(self, broken: bool, state: TrainerState) -> None:
        if not broken:
            self.skipped = 0
            return
        self.skipped += 1
        what = f"step {state.global_step + 1}: the loss or a gradient is NaN or infinite"
        if self._policy == "stop":
            raise NonFiniteError(
                f"{what}; no weight was changed by it. Lower learning_rate or max_grad_norm, or leave such steps out "
                "(on_nonfinite: skip)"
            )
        if self.skipped > self._most:
            raise NonFiniteError(
                f"{what}, as for the {self.skipped - 1} steps before (max_nonfinite: {self._most}); none of them "
                "changed a weight. Lower learning_rate, or look at the data of these steps"
            )
        if state.is_world_process_zero:
            print(f"{what}; left out", file=sys.stderr, flush=True)


@contextmanager
def name_last_checkpoint(output_dir: str | os.PathLike) -> Iterator[None]:
    """Say on this rank where a run that fails in the body can go on; the error goes on as it is."""
    try:
        yield
    except Exception as error:
        rank = dist.get_rank() if dist.is_initialized() else 0
        if rank == 0 or not isinstance(error, NonFiniteError):  # in which all ranks end together
            text = f"rank {rank} ends: {type(error).__name__}: {error}"
            print(f"{text}\n{how_to_go_on(output_dir)}", file=sys.stderr, flush=True)
        raise


def skip_finished_loop(trainer: Any) -> None:
    """Keep a Trainer that resumes at its last step from taking one more: transformers does, in the middle of an epoch."""
    run_epoch = trainer._run_epoch

    def unless_done(*args: Any, **kwargs: Any) -> None:
        if trainer.state.global_step < trainer.state.max_steps:
            run_epoch(*args, **kwargs)

    trainer._run_epoch = unless_done


def how_to_go_on(output_dir: str | os.PathLike) -> str:
    """Return where a run stands and what to do to go on."""
    last = last_checkpoint(output_dir)
    place = f"the last checkpoint is {last}" if last else "there is no checkpoint yet"
    return f"{place}; the same command goes on from there"


def _many() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _barrier() -> None:
    if _many():
        dist.barrier()
