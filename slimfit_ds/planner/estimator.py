"""What a training step would hold, without the hardware: the real step on fake tensors, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from slimfit_ds.memory.tracker import MemoryReport
from slimfit_ds.planner.strategy import Strategy, get_strategy
from slimfit_ds.planner.workload import Workload

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
    """A child process that simulates steps for one world size; use as a context manager.

    Args:
        world_size: pretended ranks.
        real: run on real CPU tensors instead (one rank), to measure.
    """

    def __init__(self, world_size: int = 1, real: bool = False):
        if world_size < 1:
            raise ValueError(f"world_size must be at least 1, got {world_size}")
        if real and world_size > 1:
            raise ValueError(f"a measurement runs on one rank, got world_size {world_size}")
        self._command = [sys.executable, "-m", "slimfit_ds.planner.simulate", "--world-size", str(world_size)]
        self._command += ["--real"] if real else []
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Simulator:
        return self

    def __exit__(self, *error: object) -> None:
        if self._process is not None:
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            self._process.stdin.close()
            self._process.wait()
            self._process.stdout.close()
            self._process = None

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
        }
        return _read(strategy, self._ask(job))

    def inspect(self, workload: Workload) -> dict[str, Any]:
        """Facts of the model: `parameters`, `layers`, `embeddings` (names).

        Raises:
            ValueError: the model cannot be built.
        """
        answer = self._ask({"workload": workload.to_dict()})
        if "error" in answer:
            raise ValueError(f"model: {answer['error']}")
        return answer

    def _ask(self, job: dict[str, Any]) -> dict[str, Any]:
        if self._process is None or self._process.poll() is not None:
            # Ranks of a surrounding launcher must not reach the pretended world.
            launcher = ("TORCHELASTIC_", "OMPI_", "PMI_", "SLURM_")
            environment = {k: v for k, v in os.environ.items() if not k.startswith(launcher)}
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr(),
                text=True,
                env=environment,
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        code = self._process.wait()
        return {"error": f"the simulation ended with exit code {code}; set SLIMFIT_DEBUG=1 to see why"}

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
