"""Faults for the tests of survival, injected from outside: the program itself knows nothing of them.

The calls of a few functions are numbered through. At one of them the process kills itself, stops, fails, or is asked
to end.
"""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WATCHED = {
    "step": "slimfit_ds.training.run:Run._step",
    "backward": "slimfit_ds.engine.engine:SlimFitEngine.backward",
    "update": "slimfit_ds.engine.engine:SlimFitEngine.step",
    "all_reduce": "torch.distributed:all_reduce",
    "evaluate": "slimfit_ds.training.run:evaluate",
    "write_shards": "slimfit_ds.engine.checkpoint_files:save_file",
    "write_weights": "slimfit_ds.engine.checkpoint:save_file",
    "fsync": "os:fsync",
    "replace": "os:replace",
    "rename": "os:rename",
    "rmtree": "shutil:rmtree",
    "result": "slimfit_ds.training.run:write_result",
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

    def suspend(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        """A scheduler stops the whole job for a while."""
        subprocess.Popen(["sh", "-c", f"sleep 6; kill -CONT {os.getpid()}"])
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
        """Somebody else's file takes what is left on the disk."""
        assert self._fault is not None
        with Path(self._fault["file"]).open("wb", buffering=0) as file:
            for size in (1 << 16, 1 << 10, 1):
                try:
                    while True:
                        file.write(b"\0" * size)
                except OSError:
                    continue
        return function(*args, **kwargs)

    def not_finite(self, function: Callable, run: Any, step: int, loader: Any) -> Any:
        """Each loss of this step is NaN (or what the fault says) on this rank."""
        assert self._fault is not None
        value = self._fault.get("value", float("nan"))
        if self._fault.get("lasts"):
            self._fault["number"] += 1
        engine = run.engine
        forward = engine.forward

        def broken(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            output.loss = output.loss * value
            return output

        engine.forward = broken
        try:
            return function(run, step, loader)
        finally:
            engine.forward = forward
