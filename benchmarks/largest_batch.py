"""The largest batch that fits a card of 24 or 32 GB, for the methods of `peers.py`, and their peaks: simulated.

    python benchmarks/largest_batch.py --models bert-base,vit-384,llama-8b

Steps on fake tensors at growing batches, with the CUDA semantics of attention and autocast: a strategy of the
planner in its estimator, any other method with its own optimizer. The peak is a line in the batch wherever it stands at
one place. The largest of several lines bends upwards only, so between two simulated batches their chord lies above it and
what is found there fits; beyond the last one the line is followed only if the last two stand at one place. 600 MB of a
card stay free. Adds what `benchmarks/results/largest_batch.csv` (`--csv`) lacks.
"""

from __future__ import annotations

import argparse
import gc
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from common import Failed, Process, Study, machine, markdown
from methods import METHODS, Request, micro_batch
from peers import choose
from shapes import SHAPES, Shape, make_batches, shapes_for

from slimfit_ds.memory.tracker import HOST, MemoryTracker
from slimfit_ds.planner.fake_world import CudaSemantics, FakeWorld
from slimfit_ds.planner.simulate import Simulator

CARDS = {"24gb": 24 * 10**9, "32gb": 32 * 10**9}
RESERVE = 600 * 10**6
"""Left free on a card for the CUDA context and fragmentation, as `slimfit-ds plan` does."""
_APART = 4
"""Factor between simulated batches."""
_FARTHEST = 2**14
_MOST = 2**20


@dataclass(frozen=True)
class Peak:
    """The most bytes of a simulated step, and where they were held: phase and module."""

    bytes: int
    place: str

    def same_line(self, smaller: Peak) -> bool:
        """Whether this peak and that of a smaller batch are held at one place, and activations are part of it."""
        return (
            self.place == smaller.place and not self.place.startswith("step") and self.bytes > smaller.bytes
        )


class FakeSteps:
    """Steps of a method's own trainer on fake tensors; in a process of its own, for a pretended world is for life."""

    def __init__(self) -> None:
        os.environ["DS_ACCELERATOR"] = "cpu"

    def peak(self, shape: Shape, name: str) -> Peak:
        """Return the peak of the second step, when states exist; of two more where what trains changes."""
        method = METHODS[name]
        sample = make_batches(shape.with_(batch=1), count=1)[0]
        batch = shape.workload.batch
        with FakeWorld(1):
            request = Request(shape, torch.device("cpu"))
            trainer = method.fake(request) if method.fake else method.build(request)
            inputs = {key: torch.zeros(batch, *one.shape[1:], dtype=one.dtype) for key, one in sample.items()}
            # Compiled optimizers refuse to run under a dispatch mode.
            with CudaSemantics(trainer.autocast), torch.compiler.set_stance("force_eager"):
                trainer.step(inputs)
                reports = []
                for _ in range(1 if method.tracked <= 2 else 2):
                    gc.collect()
                    roots = dict(trainer.roots())
                    hosted = roots.get(HOST, tuple)
                    # The batch itself does not count, as in the memory estimator.
                    roots[HOST] = lambda hosted=hosted: [*hosted(), *inputs.values()]  # type: ignore[misc]
                    with MemoryTracker(trainer.model, roots) as tracker:
                        trainer.step(inputs, tracker.phase)
                    reports.append(tracker.report(without_phases=trainer.uncounted_phases))
        report = max(reports, key=lambda one: one.peak)
        return Peak(report.peak, f"{report.peak_phase} {report.peak_module}".strip())


def largest_by_lines(own: int, peak: Callable[[int], Peak], rooms: Mapping[str, int]) -> dict[str, int]:
    """Return the largest batch for each room, at most 2^20, 0 if not one sample fits.

    Args:
        own: the batch to begin with.
        peak: of a step of this many samples.
        rooms: bytes.
    """
    points: dict[int, Peak] = {}

    def at(batch: int) -> Peak:
        if batch not in points:
            points[batch] = peak(batch)
        return points[batch]

    low = own
    while at(low).bytes > min(rooms.values()) and low > 1:
        low = max(1, low // _APART)
    most = max(rooms.values())
    if at(low).bytes <= most and len(points) == 1:
        # A smaller neighbour tells the same line for less: chunks of a large batch are many operations.
        at(own // _APART if own >= 4 * _APART else own * _APART)
    while len(points) > 1:
        before, last = sorted(points)[-2:]
        if points[last].bytes > most or last >= _FARTHEST or points[last].same_line(points[before]):
            break
        at(_APART * last)
    return {name: _in_room(room, points, at) for name, room in rooms.items()}


def _in_room(room: int, points: Mapping[int, Peak], at: Callable[[int], Peak]) -> int:
    """Return the batch at which the line through two neighbours reaches the room; it is simulated where the line may bend."""
    for attempt in range(4):
        sizes = sorted(points)
        fitting = [size for size in sizes if points[size].bytes <= room]
        if not fitting or len(sizes) == 1:
            return max(fitting, default=0)
        # Beyond the last batch the last segment goes on.
        place = min(sizes.index(fitting[-1]), len(sizes) - 2)
        small, large = sizes[place], sizes[place + 1]
        slope = (points[large].bytes - points[small].bytes) / (large - small)
        found = min(_MOST, int(small + (room - points[small].bytes) / slope)) if slope > 0 else _MOST
        bends = small < found < large and not points[large].same_line(points[small])
        if not bends or found - small <= found // 16 or attempt == 3:
            break
        at(found)
    return found


def simulate(shape: Shape, name: str, simulator: Simulator, fakes: Process) -> dict[str, Any]:
    """Return a row's results by simulated steps.

    Raises:
        Failed: the step does not run on fake tensors.
    """
    method, micro = METHODS[name], None
    own = shape.workload.batch
    if name == "accumulation":
        micro = micro_batch(own)
    seen: dict[int, Peak] = {}

    def peak(batch: int) -> Peak:
        # Two micro-batches hold what any number of them holds.
        sized = shape.with_(batch=batch if micro is None else min(batch, 2 * micro))
        if method.strategy is None:
            found = fakes.call("peak", sized, name)
        else:
            estimate = simulator.run(sized.workload, method.strategy(sized), "expected")
            if estimate.report is None:
                raise Failed("failed", estimate.error)
            report = estimate.report
            found = Peak(report.peak, f"{report.peak_phase} {report.peak_module}".strip())
        seen.setdefault(batch, found)
        return found

    rooms = {card: size - RESERVE for card, size in CARDS.items()}
    if micro is None:
        largest: dict[str, Any] = largest_by_lines(own, peak, rooms)
    else:
        largest = {card: "any" if peak(own).bytes <= room else 0 for card, room in rooms.items()}
    how = "its own step on fake tensors" if method.strategy is None else "the memory estimator"
    return {
        "batch": own,
        "peak_bytes": seen[own].bytes,
        "peak_place": seen[own].place,
        **{f"largest_{card}": size for card, size in largest.items()},
        "micro_batch": micro,
        "how": how,
        "target": "cuda, simulated",
    }


def largest_of(row: Mapping[str, Any]) -> str:
    """Return the largest batch that 24 GB hold, as text."""
    size, micro = row["largest_24gb"], row["micro_batch"]
    if size not in ("any", 0):
        return f"{size:,}"
    return ("any" if size == "any" else "none") + (f", micro-batch {micro}" if micro else "")


def tables(csv: str = "largest_batch") -> dict[str, str]:
    """Return the table of published shapes by its mark."""
    rows = Study(csv, ()).rows()
    shapes = [
        shape for shape in dict.fromkeys(row["model"] for row in rows) if SHAPES[shape].device == "cuda"
    ]
    found = {(row["method"], row["model"]): row for row in rows}
    lines = []
    for name, method in METHODS.items():
        cells = [found.get((name, shape)) for shape in shapes]
        if any(cells):
            lines.append(
                [
                    method.label,
                    *(f"{row['peak_bytes'] / 2**30:.2f}; {largest_of(row)}" if row else "" for row in cells),
                ]
            )
    return {
        "peers-estimated": markdown(["peak, GiB; largest batch", *(SHAPES[s].label for s in shapes)], lines)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", help=f"comma-separated, of: {', '.join(SHAPES)}")
    parser.add_argument("--methods", help=f"comma-separated, of: {', '.join(METHODS)}")
    parser.add_argument("--csv", default="largest_batch", help="name of a study, or a path that ends in .csv")
    arguments = parser.parse_args()
    study = Study(arguments.csv, ("model", "method"))
    with Simulator() as simulator, Process(FakeSteps) as fakes:
        for shape in choose(arguments.models, shapes_for("cuda"), SHAPES, "models"):
            for method in choose(arguments.methods, list(METHODS), METHODS, "methods"):
                row: dict[str, Any] = {"model": shape, "method": method}
                if study.has(row) or method == "full_again":
                    continue
                try:
                    row |= simulate(SHAPES[shape], method, simulator, fakes)
                except Failed as error:
                    print(f"{shape} {method}: {error}", flush=True)
                    continue
                study.add(row | machine())
                print(f"{shape} {method}: {largest_of(row)}", flush=True)
    print(tables(arguments.csv)["peers-estimated"])


if __name__ == "__main__":
    main()
