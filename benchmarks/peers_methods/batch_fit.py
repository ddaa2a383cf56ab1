"""The largest batch that fits a smaller card: measured under a cap of the allocator, or worked out by the estimator."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from peers_methods.building import Request
from peers_methods.methods import Method
from peers_methods.workloads import Case, make_batches

__all__ = [
    "CARDS",
    "RESERVE",
    "CannotSimulate",
    "Peak",
    "estimated_batches",
    "largest_within",
    "measured_batches",
]

CARDS = {"24 GB": 24 * 10**9, "32 GB": 32 * 10**9}
RESERVE = 600 * 10**6
"""Left free on a card for the CUDA context and fragmentation, as `slimfit-ds plan` does."""
LARGEST = 2048
_APART = 4
"""Factor between simulated batches."""
_FARTHEST = 2**14
_BENDS = 3
_MOST = 2**20


class CannotSimulate(RuntimeError):
    """The step does not run on fake tensors; the message is the reason that the table shows."""


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


@dataclass(frozen=True)
class Peak:
    """The most bytes of a simulated step, and where they were held."""

    bytes: int
    phase: str
    module: str = ""

    def same_line(self, smaller: Peak) -> bool:
        """Whether this peak and that of a smaller batch are held at the same place, and activations are part of it."""
        same = (self.phase, self.module) == (smaller.phase, smaller.module)
        return same and self.phase != "step" and self.bytes > smaller.bytes


def estimated_batches(
    case: Case,
    peak: Callable[[int], Peak],
    cards: Mapping[str, int] = CARDS,
    micro_batch: int | None = None,
    known: Mapping[int, Peak] | None = None,
) -> dict[str, Any]:
    """The same by simulated steps: the peak is a line in the batch wherever it stands at one place.

    The largest of several lines bends upwards only. Between two simulated batches their chord lies above it, so that
    what is found there fits; beyond the last one the line is followed only if the last two stand at one place.

    Args:
        case: the batch to begin with.
        peak: of a step of this many samples; may raise `CannotSimulate`.
        cards: name -> bytes.
        micro_batch: samples of a forward pass, whatever the batch: any batch fits, or none.
        known: peaks that have been simulated before.

    Returns:
        `largest` (samples, at most 2^20; `any`), `peaks` and `places` by batch, the case's own first; or `error`.
    """
    points = dict(known or {})

    def at(batch: int) -> Peak:
        if batch not in points:
            points[batch] = peak(batch)
        return points[batch]

    own, rooms = case.workload.batch, {card: size - RESERVE for card, size in cards.items()}
    try:
        at(own)
        if micro_batch is None:
            _surround(points, own, at, min(rooms.values()), max(rooms.values()))
            largest: dict[str, Any] = {card: _largest_in(room, points, at) for card, room in rooms.items()}
        else:
            largest = {card: "any" if at(own).bytes <= room else 0 for card, room in rooms.items()}
    except CannotSimulate as error:
        return {"error": str(error)}
    ordered = [own, *sorted(batch for batch in points if batch != own)]
    found: dict[str, Any] = {
        "largest": largest,
        "peaks": {batch: points[batch].bytes for batch in ordered},
        "places": {batch: f"{points[batch].phase} {points[batch].module}".strip() for batch in ordered},
    }
    return found | ({"micro_batch": micro_batch} if micro_batch is not None else {})


def _surround(points: Mapping[int, Peak], own: int, at: Callable[[int], Peak], least: int, most: int) -> None:
    """Simulate batches until both cards lie between two of them, or on the line of two at the same place."""
    low = own
    while at(low).bytes > least and low > 1:
        low = max(1, low // _APART)
    if at(low).bytes > most:
        return
    if len(points) == 1:
        # A smaller neighbour tells the same line for less: chunks of a large batch are many operations.
        at(own // _APART if own >= 4 * _APART else own * _APART)
    while True:
        before, last = sorted(points)[-2:]
        if points[last].bytes > most or last >= _FARTHEST or points[last].same_line(points[before]):
            return
        at(_APART * last)


def _largest_in(room: int, points: Mapping[int, Peak], at: Callable[[int], Peak]) -> int:
    """The batch at which the line through two neighbours reaches the room; simulated too where the line may bend."""
    for _ in range(_BENDS):
        found, small, large = _between(room, points)
        bends = found in range(small + 1, large) and not points[large].same_line(points[small])
        if not bends or found - small <= found // 16:
            break
        at(found)
    return _between(room, points)[0]


def _between(room: int, points: Mapping[int, Peak]) -> tuple[int, int, int]:
    """The largest batch by the segment that the room lies in, and the ends of that segment."""
    sizes = sorted(points)
    fitting = [size for size in sizes if points[size].bytes <= room]
    if not fitting or len(sizes) == 1:
        found = max(fitting, default=0)
        return found, found, found
    # Beyond the last batch the last segment goes on.
    place = min(sizes.index(fitting[-1]), len(sizes) - 2)
    small, large = sizes[place], sizes[place + 1]
    slope = (points[large].bytes - points[small].bytes) / (large - small)
    most = small + (room - points[small].bytes) / slope if slope > 0 else _MOST
    return min(_MOST, int(most)), small, large
