"""The largest batch that fits a smaller card: measured under a cap of the allocator, or worked out by the estimator."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from peers_methods.building import Request
from peers_methods.methods import Method
from peers_methods.workloads import Case, make_batches

__all__ = ["CARDS", "RESERVE", "estimated_batches", "largest_within", "measured_batches"]

CARDS = {"24 GB": 24 * 10**9, "32 GB": 32 * 10**9}
RESERVE = 600 * 10**6
"""Left free on a card for the CUDA context and fragmentation, as `slimfit-ds plan` does."""
LARGEST = 2048


def largest_within(fits: Callable[[int], bool], known: int = 0, highest: int = LARGEST) -> int:
    """The largest batch that fits, to within a sixteenth: doubling, then bisection.

    Args:
        fits: whether a batch fits; called with growing and then with intermediate sizes.
        known: a batch that fits.
        highest: where to stop.

    Returns:
        0 if not even one sample fits.
    """
    low, high = known, None
    while high is None:
        candidate = min(max(2 * low, 1), highest)
        if candidate == low:
            return low
        if fits(candidate):
            low = candidate
        else:
            high = candidate
    while high - low > max(1, low // 16):
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low


def measured_batches(method: Method, case: Case, device: torch.device, seed: int = 0) -> dict[str, Any]:
    """Train two steps at growing batches with the allocator capped at each card's size, the smallest card first.

    Raises:
        Unavailable: the method cannot run here.
        torch.OutOfMemoryError: the model and its first step do not fit the largest card.
    """
    total = torch.cuda.get_device_properties(device).total_memory
    # The first step makes all optimizer states; under the largest cap, so that what does not fit says so at once.
    torch.cuda.set_per_process_memory_fraction((max(CARDS.values()) - RESERVE) / total, device)
    trainer = method.build(Request(case, case.workload.batch, device, seed))
    if hasattr(trainer, "engine"):
        # The engine only divides by this number; every trial here is one step of one micro-batch.
        trainer.facts["built_for_batch"] = case.workload.batch
    largest: dict[str, int] = {}
    known = 0
    for card, size in CARDS.items():
        torch.cuda.set_per_process_memory_fraction(min(1.0, (size - RESERVE) / total), device)

        def fits(batch: int) -> bool:
            try:
                inputs = make_batches(case.with_batch(batch), batch, device, count=1, seed=seed)[0]
                for _ in range(2):
                    trainer.step(inputs)
                torch.cuda.synchronize()
                return True
            except torch.OutOfMemoryError:
                return False
            finally:
                trainer.recover()
                gc.collect()
                torch.cuda.empty_cache()

        known = largest[card] = largest_within(fits, known)
    return {"largest": largest, "how": "measured under an allocator cap", "facts": trainer.facts}


def estimated_batches(
    method: Method, case: Case, run: Callable[..., Any], cards: Mapping[str, int] = CARDS
) -> dict[str, Any] | None:
    """The same by two simulated steps: the peak grows linearly with the batch.

    Where states are far larger than activations at small batches the line starts lower than the truth, and the
    estimate is on the safe side.

    Args:
        run: `Simulator.run` of one rank.

    Returns:
        `largest` (at most 2^20) and `peaks` (batch -> bytes), or `error`; None where the estimator has no such method.
    """
    if method.strategy is None:
        return None
    strategy = method.strategy(case)
    peaks = {}
    for batch in (case.workload.batch, 4 * case.workload.batch):
        estimate = run(replace(case.workload, batch=batch), strategy, "expected")
        if estimate.report is None:
            return {"error": estimate.error}
        peaks[batch] = estimate.report.peak
    (small, at_small), (large, at_large) = peaks.items()
    slope = (at_large - at_small) / (large - small)
    largest = {}
    for card, size in cards.items():
        room = size - RESERVE - at_small
        most = small + room / slope if slope > 0 else (2**20 if room >= 0 else 0)
        largest[card] = max(0, min(2**20, int(most)))
    return {"largest": largest, "how": "estimated from two simulated steps", "peaks": peaks}
