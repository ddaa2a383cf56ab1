"""A step of any method on fake tensors: the method's own builder, optimizer included, without a byte of weights."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from typing import Any

import torch

from peers_methods.building import Request, Unavailable
from peers_methods.methods import get_method
from peers_methods.trainers import Trainer
from peers_methods.workloads import CASES, make_batches
from slimfit_ds.memory.tracker import HOST, MemoryReport, MemoryTracker
from slimfit_ds.planner.cuda_semantics import CudaSemantics
from slimfit_ds.planner.fake_world import FakeWorld

__all__ = ["simulate"]


def simulate(case: str, method: str, batch: int, target: str = "cuda") -> dict[str, Any]:
    """The peak of the second step of a method, when its states exist; of two more where what trains changes.

    Args:
        case: of `CASES`.
        method: of `METHODS`.
        batch: samples of the step.
        target: `cuda`: attention, dropout and autocast keep what they keep there; `cpu`: what this machine keeps.

    Returns:
        `bytes` on the device, `phase` and `module` in which they were held.

    Raises:
        Unavailable: the method cannot run here, or not on fake tensors.
    """
    chosen = get_method(method)
    if chosen.fake is None:
        raise Unavailable(f"{method} has no step on fake tensors")
    device = torch.device("cpu")
    sample = make_batches(CASES[case], 1, device, count=1)[0]
    with FakeWorld(1):
        trainer = chosen.fake(Request(CASES[case].with_batch(batch), batch, device))
        inputs = {key: torch.zeros(batch, *one.shape[1:], dtype=one.dtype) for key, one in sample.items()}
        semantics = CudaSemantics(trainer.autocast) if target == "cuda" else nullcontext()
        # Compiled optimizers refuse to run under a dispatch mode.
        with semantics, torch.compiler.set_stance("force_eager"):
            trainer.step(inputs)
            reports = [_tracked(trainer, inputs) for _ in range(1 if chosen.tracked <= 2 else 2)]
    report = max(reports, key=lambda one: one.peak)
    return {"bytes": report.peak, "phase": report.peak_phase, "module": report.peak_module}


def _tracked(trainer: Trainer, inputs: dict[str, torch.Tensor]) -> MemoryReport:
    gc.collect()
    roots = dict(trainer.roots())
    hosted = roots.get(HOST, tuple)
    # The batch itself does not count, as in the memory estimator.
    roots[HOST] = lambda: [*hosted(), *inputs.values()]
    tracker = MemoryTracker(trainer.model, roots)
    with tracker:
        trainer.step(inputs, tracker.phase)
    return tracker.report(without_phases=trainer.uncounted_phases)
