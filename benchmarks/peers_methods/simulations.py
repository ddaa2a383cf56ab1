"""Largest batches by simulation: a method's strategy in the memory estimator, or its own step on fake tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from peers_methods.batch_fit import CannotSimulate, Peak, estimated_batches
from peers_methods.methods import Method
from peers_methods.worker import Gone, Worker
from peers_methods.workloads import Case
from slimfit_ds.planner.estimator import Simulator

__all__ = ["Simulations"]


class Simulations:
    """The processes that simulate, and the peaks that they have found; use as a context manager.

    Args:
        program: command of a worker that knows the order `simulate`.
        log: file for what it prints.
    """

    def __init__(self, program: Sequence[str], log: Path):
        self._program, self._log = program, log
        self._worker: Worker | None = None
        self._simulator = Simulator()
        # Two cases may be one model at two batches.
        self._peaks: dict[tuple[str, str], dict[int, Peak]] = {}

    def __enter__(self) -> Simulations:
        self._simulator.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._simulator.__exit__(*error)
        if self._worker is not None:
            self._worker.end()
        self._log.unlink(missing_ok=True)

    def largest(self, case: Case, method: Method) -> dict[str, Any]:
        """What `estimated_batches` returns for a method that can be simulated, and `how`."""
        micro = method.micro_batch(case) if method.micro_batch is not None else None
        model = str(replace(case.workload, batch=1))
        known = self._peaks.setdefault((model, method.name), {}) if micro is None else {}

        def peak(batch: int) -> Peak:
            if method.strategy is None:
                known[batch] = self._own_step(case, method, batch)
            else:
                known[batch] = self._estimated(
                    case, method, batch if micro is None else min(batch, 2 * micro)
                )
            return known[batch]

        found = estimated_batches(case, peak, micro_batch=micro, known=known)
        how = "its own step on fake tensors" if method.strategy is None else "the memory estimator"
        return found | {"how": how}

    def _estimated(self, case: Case, method: Method, batch: int) -> Peak:
        assert method.strategy is not None
        workload = replace(case.workload, batch=batch)
        estimate = self._simulator.run(workload, method.strategy(case), "expected")
        if estimate.report is None:
            raise CannotSimulate(estimate.error)
        return Peak(estimate.report.peak, estimate.report.peak_phase, estimate.report.peak_module)

    def _own_step(self, case: Case, method: Method, batch: int) -> Peak:
        if self._worker is None:
            self._worker = Worker(self._program, self._log, Path.cwd())
        try:
            return Peak(**self._worker.ask("simulate", case=case.name, method=method.name, batch=batch))
        except Gone as error:
            self._worker = None
            raise CannotSimulate(f"{error.status}: {error.reason}") from error
