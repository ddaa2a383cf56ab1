"""One cell of the comparison: a method on a model, measured in this process alone."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import psutil
import torch

from peers_methods.building import Request
from peers_methods.flops import FlopCounter
from peers_methods.methods import Method
from peers_methods.trainers import Trainer
from peers_methods.workloads import Case, make_batches
from slimfit_ds.memory.tracker import MemoryTracker

__all__ = ["Effort", "measure"]


class Effort:
    """How much is measured.

    Args:
        warm_up: first steps that do not count.
        steps: timed steps at most.
        seconds: no further step is timed after this long, but three are.
        tracked: steps whose storages are tracked; the largest counts.
    """

    def __init__(self, warm_up: int = 3, steps: int = 10, seconds: float = 20.0, tracked: int = 2):
        self.warm_up, self.steps, self.seconds, self.tracked = warm_up, steps, seconds, tracked


def measure(
    method: Method,
    case: Case,
    device: torch.device,
    effort: Effort,
    seed: int = 0,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Train a few steps and measure them.

    Order: warm-up and timed steps as they are (and CUDA's own peak over all of them), then steps whose storages are
    tracked and FLOPs counted, which are slow.

    Returns:
        Plain values: seconds, bytes, FLOPs; see `_result`.

    Raises:
        Unavailable: the method cannot run here.
    """
    cuda = device.type == "cuda"
    before = psutil.Process().memory_info().rss
    started = time.perf_counter()
    trainer = method.build(Request(case, case.workload.batch, device, seed))
    batches = make_batches(case, case.workload.batch, device, seed=seed)
    if cuda:
        torch.cuda.synchronize()
    progress(f"built in {time.perf_counter() - started:.1f} s")
    position = 0

    def step() -> tuple[float, float]:
        nonlocal position
        begin, cpu_begin = time.perf_counter(), time.process_time()
        losses.append(trainer.step(batches[position % len(batches)]))
        if cuda:
            torch.cuda.synchronize()
        position += 1
        return time.perf_counter() - begin, time.process_time() - cpu_begin

    losses: list[torch.Tensor] = []
    warm_up = [step() for _ in range(effort.warm_up)]
    timed: list[float] = []
    cpu: list[float] = []
    while len(timed) < effort.steps and (sum(timed) < effort.seconds or len(timed) < 3):
        for values, value in zip((timed, cpu), step(), strict=True):
            values.append(value)
    result = {
        # Of all threads: on a machine that others share, their load does not count.
        "cpu_seconds": statistics.median(cpu),
        "cpu_seconds_quartiles": _quartiles(cpu),
        "seconds": statistics.median(timed),
        "seconds_quartiles": _quartiles(timed),
        "seconds_all": timed,
        "seconds_first_step": warm_up[0][0] if warm_up else None,
        "process_rss": psutil.Process().memory_info().rss,
        "process_rss_before_model": before,
    }
    if cuda:
        result |= {
            "cuda_peak_allocated": torch.cuda.max_memory_allocated(),
            "cuda_peak_reserved": torch.cuda.max_memory_reserved(),
        }
    values = [float(loss) for loss in losses]
    result |= {"loss_first": values[0], "loss_last": values[-1], "finite": all(map(math.isfinite, values))}
    progress(f"timed: {result['seconds']:.4f} s")
    result |= _instrumented(trainer, batches, device, effort.tracked)
    parameters = list(trainer.model.parameters())
    result |= {
        "parameters": sum(p.numel() for p in parameters),
        "trainable_now": sum(p.numel() for p in parameters if p.requires_grad),
        "weights": str(parameters[0].dtype).removeprefix("torch."),
        "facts": trainer.facts,
        "per_step": case.per_step(case.workload.batch),
    }
    return result


def _quartiles(values: list[float]) -> list[float]:
    if len(values) < 2:
        return [values[0], values[0]]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low, high]


def _instrumented(trainer: Trainer, batches: list, device: torch.device, steps: int) -> dict[str, Any]:
    """FLOPs (mean) and bytes of a few more steps: the largest peak, and what it was made of."""
    reports, flops = [], []
    for number in range(steps):
        gc.collect()
        tracker, counter = MemoryTracker(trainer.model, trainer.roots(), device), FlopCounter()
        # Compiled optimizers refuse to run under a dispatch mode.
        with torch.compiler.set_stance("force_eager"), tracker, counter:
            trainer.step(batches[number % len(batches)], tracker.phase)
        reports.append(tracker.report(without_phases=trainer.uncounted_phases))
        flops.append(counter.flops)
    largest = max(reports, key=lambda report: report.peak)
    return {
        "flops": statistics.fmean(flops),
        "tracked_peak": largest.peak,
        "peak_phase": largest.peak_phase,
        "peak_module": largest.peak_module,
        "at_peak": largest.at_peak,
        "state_bytes": max(r.model_states for r in reports),
        "host_bytes": max(r.optimizer_host for r in reports),
        "saved_activations": max(r.saved_activations for r in reports),
    }
