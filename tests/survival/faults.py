"""Faults for the tests of survival, injected from outside: the program itself knows nothing of them.

The calls of a few functions are numbered through. At one of them the process kills itself, stops, fails, or is asked
to end.
"""

from __future__ import annotations

import importlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WATCHED = {
    "step": "transformers:Trainer.training_step",
    "backward": "slimfit_ds.engine.engine:SlimFitEngine.backward",
    "update": "slimfit_ds.engine.engine:SlimFitEngine.step",
    "all_reduce": "torch.distributed:all_reduce",
    "evaluate": "transformers:Trainer.evaluate",
    "save_model": "transformers:Trainer.save_model",
    "write_shards": "slimfit_ds.engine.checkpoint_files:save_file",
    "write_weights": "slimfit_ds.engine.checkpoint:save_file",
    "write_delta": "slimfit_ds.deltas.delta:save_file",
    "save_random_state": "transformers:Trainer._save_rng_state",
    "save_state": "transformers:TrainerState.save_to_json",
    "mark": "slimfit_ds.integrations.survival:_mark",
    "write_mark": "slimfit_ds.integrations.survival:write_atomically",
    "remove_old": "slimfit_ds.integrations.survival:_remove_old",
    "remove_folder": "slimfit_ds.integrations.survival:_remove",
    "rename": "os:rename",
    "write_result": "slimfit_ds.files:write_atomically",
    "finish": "slimfit_ds.integrations.output_folder:is_finished",
}
"""Kinds of events, and the functions whose calls they are."""


class Events:
    """The events of this process.

    Args:
        fault: {"rank", "kind", "number", "how"}: what happens before the call `number` (from 1) of a kind; "how" is a
            method of this class. None: nothing happens.
        rank: of this process.

    Attributes:
        names: the kinds of all events, in order.
    """

    def __init__(self, fault: dict | None, rank: int):
        self.names: list[str] = []
        self._fault = fault if fault is not None and fault["rank"] in (rank, "all") else None
        for kind, place in WATCHED.items():
            module, _, path = place.partition(":")
            owner: Any = importlib.import_module(module)
            *inner, name = path.split(".")
            for part in inner:
                owner = getattr(owner, part)
            setattr(owner, name, self._watched(kind, getattr(owner, name)))

    def _watched(self, kind: str, function: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.names.append(kind)
            fault = self._fault
            if fault is not None and fault["kind"] == kind and self.names.count(kind) == fault["number"]:
                return getattr(self, fault["how"])(function, *args, **kwargs)
            return function(*args, **kwargs)

        return call

    def kill(self, function: Callable, *args: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def kill_torn(self, function: Callable, tensors: Any, path: Path, *args: Any, **kwargs: Any) -> None:
        """Half of the file is written."""
        function(tensors, path, *args, **kwargs)
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    def stop(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGSTOP)
        return function(*args, **kwargs)

    def fail(self, function: Callable, *args: Any, **kwargs: Any) -> None:
        raise ValueError("boom")

    def signal(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        assert self._fault is not None
        os.kill(os.getpid(), self._fault["signal"])
        return function(*args, **kwargs)

    def signal_twice(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        """The second one comes while the process still works on the step of the first one."""
        assert self._fault is not None
        os.kill(os.getpid(), self._fault["signal"])
        time.sleep(1.5)
        os.kill(os.getpid(), self._fault["signal"])
        time.sleep(60)

    def fill_disk(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        """Another process's file takes what is left on the disk."""
        assert self._fault is not None
        with Path(self._fault["file"]).open("wb", buffering=0) as file:
            for size in (1 << 16, 1 << 10, 1):
                try:
                    while True:
                        file.write(b"\0" * size)
                except OSError:
                    continue
        return function(*args, **kwargs)

    def not_finite(self, function: Callable, trainer: Any, model: Any, inputs: Any, *args: Any) -> Any:
        """A pixel of this step's batch is NaN on this rank, and with "lasts" of all later ones."""
        assert self._fault is not None
        if self._fault.get("lasts"):
            self._fault["number"] += 1
        inputs["pixel_values"] = inputs["pixel_values"] * float("nan")
        return function(trainer, model, inputs, *args)
