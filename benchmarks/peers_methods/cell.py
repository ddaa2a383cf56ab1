"""One method on one model in this process alone: built, timed turn by turn, and looked into."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from typing import Any

import psutil
import torch

from peers_methods.building import Request, Unavailable, build_model
from peers_methods.flops import FlopCounter
from peers_methods.methods import Method
from peers_methods.trainers import Trainer
from peers_methods.workloads import Case, make_batches
from slimfit_ds.memory.tracker import MemoryTracker

__all__ = ["REFERENCE_SHARE", "Bench"]

REFERENCE_SHARE = 0.4
"""Of a card's memory: a reference whose states alone take more is not kept beside the methods it is compared with."""
_FULL_BYTES = 12
"""Per parameter between two steps of full fine-tuning: fp32 weights and two moments."""


class Bench:
    """A trainer with its batches.

    Between turns nothing but model states stays in the caching allocator (CUDA), so that a reference and a method fit
    one card side by side; the first step after that is not timed.

    Args:
        method: builds the trainer.
        case: model and batch.
        device: where it trains.
        warm_up: steps that do not count, the slow ones that make states and compile.
        seed: of weights and batches.
        progress: told what has been done.
    """

    def __init__(
        self,
        method: Method,
        case: Case,
        device: torch.device,
        warm_up: int = 3,
        seed: int = 0,
        progress: Callable[[str], None] = lambda text: None,
    ):
        self._method, self._case, self._device = method, case, device
        self._warm_up, self._seed, self._progress = warm_up, seed, progress
        self._cuda = device.type == "cuda"
        self._losses: list[torch.Tensor] = []
        self._result: dict[str, Any] = {}
        self._trainer: Trainer | None = None

    def build(self, reference: bool = False) -> dict[str, Any]:
        """Build the trainer, warm it up and look into a few steps.

        The steps that are looked into come at fixed places, so that methods which draw what trains draw the same. A
        reference does all of it too: what its heap went through moves a step on a CPU by several per cent.

        Returns:
            `seconds` of the last step of the warm-up.

        Raises:
            Unavailable: the method cannot run here, or a reference would crowd the card.
        """
        case, device = self._case, self._device
        if reference and self._cuda:
            self._check_room()
        before = psutil.Process().memory_info().rss
        started = time.perf_counter()
        self._trainer = self._method.build(Request(case, case.workload.batch, device, self._seed))
        self._batches = make_batches(case, case.workload.batch, device, seed=self._seed)
        self._synchronize()
        self._progress(f"built in {time.perf_counter() - started:.1f} s")
        warm_up = [self._step()[0] for _ in range(max(1, self._warm_up))]
        self._result |= {"seconds_first_step": warm_up[0], "process_rss_before_model": before}
        self._progress(f"warm: {warm_up[-1]:.4f} s")
        self._result["process_rss"] = psutil.Process().memory_info().rss
        self._note_cuda_peaks()
        self._result |= self._instrumented(self._trainer)
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        self._release()
        return {"seconds": warm_up[-1]}

    def turn(self, steps: int) -> dict[str, list[float]]:
        """Time a few steps; `seconds` of the wall and `cpu_seconds` of all threads, for each."""
        if self._cuda:
            self._step()
        timed = [self._step() for _ in range(steps)]
        self._release()
        return {"seconds": [wall for wall, _ in timed], "cpu_seconds": [cpu for _, cpu in timed]}

    def finish(self) -> dict[str, Any]:
        """Everything but times: bytes, FLOPs, losses, facts."""
        assert self._trainer is not None
        self._note_cuda_peaks()
        losses = [float(loss) for loss in self._losses]
        parameters = list(self._trainer.model.parameters())
        return self._result | {
            "loss_first": losses[0],
            "loss_last": losses[-1],
            "finite": all(map(math.isfinite, losses)),
            "steps": len(losses),
            "parameters": sum(p.numel() for p in parameters),
            "trainable_now": sum(p.numel() for p in parameters if p.requires_grad),
            "weights": str(parameters[0].dtype).removeprefix("torch."),
            "facts": self._trainer.facts,
            "per_step": self._case.per_step(self._case.workload.batch),
            "peak": self._result.get("cuda_peak_allocated") or self._result["tracked_peak"],
        }

    def _check_room(self) -> None:
        meta = build_model(Request(self._case, 1, torch.device("meta"), self._seed), "fp32")
        states = _FULL_BYTES * sum(p.numel() for p in meta.parameters())
        total = torch.cuda.get_device_properties(self._device).total_memory
        if states > REFERENCE_SHARE * total:
            raise Unavailable(
                f"states of {states / 2**30:.0f} GiB take more than {REFERENCE_SHARE:.0%} of the card"
            )

    def _step(self) -> tuple[float, float]:
        assert self._trainer is not None
        begin, cpu_begin = time.perf_counter(), time.process_time()
        self._losses.append(self._trainer.step(self._batches[len(self._losses) % len(self._batches)]))
        self._synchronize()
        return time.perf_counter() - begin, time.process_time() - cpu_begin

    def _synchronize(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()

    def _release(self) -> None:
        if self._cuda:
            torch.cuda.empty_cache()

    def _note_cuda_peaks(self) -> None:
        """CUDA's own counters over all steps but those that are looked into."""
        if self._cuda:
            for name in ("allocated", "reserved"):
                peak = getattr(torch.cuda, f"max_memory_{name}")()
                key = f"cuda_peak_{name}"
                self._result[key] = max(self._result.get(key, 0), peak)

    def _instrumented(self, trainer: Trainer) -> dict[str, Any]:
        """FLOPs (mean) and bytes of a few steps: the largest peak, and what it was made of."""
        reports, flops = [], []
        for _ in range(self._method.tracked):
            gc.collect()
            tracker, counter = MemoryTracker(trainer.model, trainer.roots(), self._device), FlopCounter()
            # Compiled optimizers refuse to run under a dispatch mode.
            with torch.compiler.set_stance("force_eager"), tracker, counter:
                batch = self._batches[len(self._losses) % len(self._batches)]
                self._losses.append(trainer.step(batch, tracker.phase))
            reports.append(tracker.report(without_phases=trainer.uncounted_phases))
            flops.append(counter.flops)
        largest = max(reports, key=lambda report: report.peak)
        self._progress(f"looked into {len(reports)} steps: {[r.peak >> 20 for r in reports]} MiB")
        return {
            "flops": sum(flops) / len(flops),
            "flops_all": flops,
            "tracked_peak": largest.peak,
            "tracked_peaks": [report.peak for report in reports],
            "peak_phase": largest.peak_phase,
            "peak_module": largest.peak_module,
            "at_peak": largest.at_peak,
            "state_bytes": max(r.model_states for r in reports),
            "host_bytes": max(r.optimizer_host for r in reports),
            "saved_activations": max(r.saved_activations for r in reports),
        }
