"""Estimates: what a training step would hold, from the real step on fake tensors in a process of its own.

`estimate` and `Simulator` ask; this module run as a program answers, one JSON job per line on stdin, one JSON result
per line on stdout. With `--real` its tensors are real, for measurements. It is a process of its own because a fake
process group has one size for life, because DeepSpeed keeps groups and the codecs keep tables that must not be fake
in the caller, and because a failed job may then not take the caller along.

    echo '{"workload": {...}, "strategy": {...}}' | python -m slimfit_ds.planner.simulate --world-size 8
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from queue import Queue
from threading import Lock
from typing import TYPE_CHECKING, Any

from slimfit_ds.integrations.ranks import free_port
from slimfit_ds.memory.tracker import MemoryReport
from slimfit_ds.planner import answers
from slimfit_ds.planner.strategies import Strategy, get_strategy
from slimfit_ds.planner.workload import Workload

if TYPE_CHECKING:
    from slimfit_ds.planner.depth import DeepSteps

__all__ = ["Estimate", "Simulator", "estimate", "measure"]


@dataclass(frozen=True)
class Estimate:
    """What one rank would hold under a strategy, or why that could not be told."""

    strategy: Strategy
    report: MemoryReport | None
    error: str = ""
    parameters: int = 0
    layers: int = 0
    active: tuple[str, ...] = ()
    seconds: float = 0.0
    flops: int = 0
    """Of the matrix products of the step."""
    copied: int = 0
    """Bytes from host to device in the step."""
    blocks: int = 0
    """How many blocks are streamed."""
    block: int = 0
    """Bytes of the largest of them."""

    @property
    def peak(self) -> int:
        """Peak bytes on the device.

        Raises:
            ValueError: the simulation failed.
        """
        if self.report is None:
            raise ValueError(f"{self.strategy.name} has no estimate: {self.error}")
        return self.report.peak


class Simulator:
    """Child processes that simulate steps for one world size; use as a context manager.

    Args:
        world_size: pretended ranks.
        real: run on real CPU tensors instead (one rank), to measure.
        deep: work a model of many blocks out from shallow ones where that is exact (`planner.depth`), and keep answers in
            the user's cache folder.
        processes: how many jobs may run at once, asked from as many threads.
    """

    def __init__(self, world_size: int = 1, real: bool = False, deep: bool = False, processes: int = 1):
        if world_size < 1:
            raise ValueError(f"world_size must be at least 1, got {world_size}")
        if real and world_size > 1:
            raise ValueError(f"a measurement runs on one rank, got world_size {world_size}")
        self._world_size, self._deep = world_size, deep
        self._command = [sys.executable, "-m", "slimfit_ds.planner.simulate", "--world-size", str(world_size)]
        self._command += ["--real"] if real else []
        self._processes: list[subprocess.Popen[str]] = []
        self._count, self._starting = processes, Lock()
        self._free: Queue[int] = Queue()
        for number in range(processes):
            self._free.put(number)

    def __enter__(self) -> Simulator:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self._processes:
            assert process.stdout is not None
            process.wait()
            process.stdout.close()
        self._processes = []

    def run(
        self,
        workload: Workload,
        strategy: Strategy,
        active: str | Sequence[str] | None = "expected",
        target: str = "cuda",
    ) -> Estimate:
        """Simulate one strategy; a failure becomes an estimate with an error, never an exception."""
        job = {
            "workload": workload.to_dict(),
            "strategy": strategy.to_dict(),
            "active": active,
            "target": target,
            "deep": self._deep,
        }
        return _read(strategy, self._answer(job, workload))

    def inspect(self, workload: Workload) -> dict[str, Any]:
        """Facts of the model: `parameters`, `layers`, `embeddings` (names).

        Raises:
            ValueError: the model cannot be built.
        """
        answer = self._answer({"workload": workload.to_dict()}, workload)
        if "error" in answer:
            raise ValueError(f"model: {answer['error']}")
        return answer

    def _answer(self, job: dict[str, Any], workload: Workload) -> dict[str, Any]:
        """Return what is known of a job, or ask the child."""
        if not self._deep:
            return self._ask(job)
        file = answers.place(job, workload, self._world_size)
        answer = answers.read(file)
        if answer is None:
            answer = self._ask(job)
            if "error" not in answer:
                answers.write(file, answer)
        return answer

    def _ask(self, job: dict[str, Any]) -> dict[str, Any]:
        number = self._free.get()
        try:
            return self._ask_process(number, job)
        finally:
            self._free.put(number)

    def _ask_process(self, number: int, job: dict[str, Any]) -> dict[str, Any]:
        with self._starting:
            # All at once: one imports while another answers.
            self._processes += [self._start() for _ in range(self._count - len(self._processes))]
            if self._processes[number].poll() is not None:
                self._processes[number] = self._start()
        process = self._processes[number]
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if line:
            return json.loads(line)
        code = process.wait()
        return {"error": f"the simulation ended with exit code {code}; set SLIMFIT_DEBUG=1 to see why"}

    def _start(self) -> subprocess.Popen[str]:
        # Ranks of a surrounding launcher must not reach the pretended world.
        launcher = ("TORCHELASTIC_", "OMPI_", "PMI_", "SLURM_")
        environment = {k: v for k, v in os.environ.items() if not k.startswith(launcher)}
        return subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr(),
            text=True,
            env=environment,
        )

    @staticmethod
    def _stderr() -> int | None:
        return None if os.environ.get("SLIMFIT_DEBUG") else subprocess.DEVNULL


def _read(strategy: Strategy, answer: dict[str, Any]) -> Estimate:
    report = answer.get("report")
    return Estimate(
        strategy,
        None if report is None else MemoryReport(**report),
        answer.get("error", ""),
        answer.get("parameters", 0),
        answer.get("layers", 0),
        tuple(answer.get("active", ())),
        answer.get("seconds", 0.0),
        **{key: answer.get(key, 0) for key in ("flops", "copied", "blocks", "block")},
    )


def estimate(
    workload: Workload,
    strategies: Sequence[Strategy | str],
    world_size: int = 1,
    active: str | Sequence[str] | None = "expected",
    target: str = "cuda",
) -> list[Estimate]:
    """Peak memory of one rank under each strategy, from one real training step on fake tensors.

    The model class, the engine, the optimizer, the activation codecs and the process group's buckets are the real
    ones; only the data of the tensors are missing. What a kernel allocates inside itself, the CUDA context and
    fragmentation are not included.

    Args:
        workload: model and batch of one rank.
        strategies: registered names or own strategies.
        world_size: ranks that share the model states under ZeRO.
        active: for SlimFit, the active layers: `expected`, `worst`, their names, or None for the policy's first set.
        target: `cuda`: attention and autocast keep what they keep there; `cpu`: what this machine keeps.

    Returns:
        An estimate for each strategy, in order; a strategy that cannot run carries its error.

    Raises:
        ValueError: an unknown strategy, an impossible world size or target.

    Example:
        workload = Workload("bert-base-uncased", batch=32, seq=128)
        for row in estimate(workload, ["full", "minimal"], world_size=2):
            print(row.strategy.name, row.peak)
    """
    if target not in ("cuda", "cpu"):
        raise ValueError(f"target must be cuda or cpu, got {target!r}")
    chosen = [get_strategy(s) if isinstance(s, str) else s for s in strategies]
    with Simulator(world_size) as simulator:
        return [simulator.run(workload, strategy, active, target) for strategy in chosen]


def measure(
    workload: Workload, strategies: Sequence[Strategy | str], active: str | Sequence[str] | None = "expected"
) -> list[Estimate]:
    """The same steps on real CPU tensors, tracked: what `estimate(..., target="cpu")` is checked against."""
    chosen = [get_strategy(s) if isinstance(s, str) else s for s in strategies]
    with Simulator(real=True) as simulator:
        return [simulator.run(workload, strategy, active, "cpu") for strategy in chosen]


# The program that answers.


def main(argv: list[str] | None = None) -> int:
    """Read jobs until stdin ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world-size", type=int, default=1)
    parser.add_argument("--real", action="store_true", help="real tensors on the CPU, one rank")
    arguments = parser.parse_args(argv)
    os.environ["DS_ACCELERATOR"] = "cpu"
    # What libraries print must not end up among the results.
    results = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    if arguments.real:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}
        os.environ["MASTER_PORT"] = str(free_port())
    _prepare()
    from slimfit_ds.planner.depth import DeepSteps
    from slimfit_ds.planner.fake_world import FakeWorld

    deep = DeepSteps(arguments.world_size, partial(FakeWorld, arguments.world_size))
    for number, line in enumerate(sys.stdin):
        answer = _run(json.loads(line), arguments.world_size, arguments.real, deep)
        results.write(json.dumps(answer) + "\n")
        results.flush()
        if number == 0:
            # Each step collects garbage first, which need not go through all that the first one imported.
            gc.collect()
            gc.freeze()
    # Native libraries with hooks at exit meet fake tensors there; everything has been written.
    os._exit(0)


def _prepare() -> None:
    """Import what jobs need, outside the fake world, and take the checks out that compare ranks' values."""
    warnings.filterwarnings("ignore")
    from deepspeed.runtime.zero import partitioned_param_coordinator

    from slimfit_ds.engine.processes import skip_shm_build

    logging.disable(logging.ERROR)
    # For the life of this process.
    skip_shm_build()
    # Compares lists of integers across ranks, and fake tensors carry none.
    partitioned_param_coordinator.assert_ints_same_as_other_ranks = lambda *_: None


def _run(job: dict[str, Any], world_size: int, real: bool, deep: DeepSteps) -> dict[str, Any]:
    from slimfit_ds.planner.fake_world import FakeWorld
    from slimfit_ds.planner.step import inspect_model, track_step

    started = time.perf_counter()
    try:
        workload = Workload(**job["workload"])
        if "strategy" not in job:
            with FakeWorld(world_size):
                return inspect_model(workload)
        strategy = Strategy(**job["strategy"])
        found = None
        if job.get("deep") and not real:
            with suppress(
                Exception
            ):  # a model that cannot be made with few blocks; what is wrong otherwise shows below
                found = deep.track(workload, strategy, job.get("active"), job["target"])
        if found is None:
            with nullcontext() if real else FakeWorld(world_size):
                target = "cpu" if real else job["target"]
                found = track_step(workload, strategy, world_size, job.get("active"), target)
        report, facts = found
    except Exception as error:
        if os.environ.get("SLIMFIT_DEBUG"):
            raise
        text = "; ".join(line.strip() for line in str(error).splitlines()[:4] if line.strip())
        return {"error": f"{type(error).__name__}: {text}"[:500], "seconds": time.perf_counter() - started}
    return {"report": report.to_dict(), **facts, "seconds": time.perf_counter() - started}


if __name__ == "__main__":
    sys.exit(main())
