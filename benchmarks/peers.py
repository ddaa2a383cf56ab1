"""Every way to train the same model with less memory, side by side: peak memory, time, FLOPs of a step.

    python benchmarks/peers.py --device cpu --threads 1             # small shapes of five families, BERT-base
    python benchmarks/peers.py --device cuda --budget-minutes 9     # on a GPU: published shapes
    python benchmarks/peers.py --device cpu --models bert-small --methods full,minimal --csv /tmp/peers.csv

Each method trains the same model (random weights) on the same random batches in a fresh process. bf16 arithmetic: under
autocast with fp32 weights, or with bf16 weights where the method is made for that. Time: a second process trains the same
model in full, and both take turns, a few steps each; the ratio is that of the medians of these steps, so that neither a
busy machine nor a warm card moves it. `full` itself takes turns with such a twin: what its ratio differs from 1 is noise.
Peak: CUDA's own counter over all steps, on a CPU the storages of a step (slimfit_ds.memory.tracker). FLOPs of matrix
products and attention, recomputation included. Adds what `benchmarks/results/peers.csv` (`--csv`) lacks.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import statistics
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import psutil
import torch
from common import Failed, Process, Study, machine, markdown, quartiles
from methods import METHODS, Request
from shapes import SHAPES, Shape, make_batches, shapes_for
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from slimfit_ds.memory.tracker import MemoryTracker

CLOCKS = ("seconds", "cpu_seconds")
# Of a card's memory: full fine-tuning whose states alone take more is not kept beside the methods.
REFERENCE_SHARE = 0.4


class FlopCounter(TorchDispatchMode):
    """Counts the FLOPs of matrix products, convolutions and attention while open.

    torch's own counter brings module hooks, which break where a function differentiates inside of its backward pass.
    """

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        # torch has no formula for the attention of CPUs. Backward: five products instead of two.
        if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
            self.flops += sdpa_flop_count(*(t.shape for t in args[:3]))
        elif packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
            self.flops += 5 * sdpa_flop_count(*(t.shape for t in args[1:4])) // 2
        elif packet in flop_registry:
            self.flops += int(flop_registry[packet](*args, **(kwargs or {}), out_val=result))
        return result


class Bench:
    """One method on one shape, alone in its process: built, timed turn by turn, and looked into.

    Between turns nothing but model states stays in the caching allocator (CUDA), so that a reference and a method fit
    one card side by side; the first step after that is not timed.
    """

    def __init__(self, shape: Shape, method: str, device: str, warm_up: int, seed: int, threads: int):
        torch.set_num_threads(threads)
        if device == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"
        self._shape, self._method, self._device = shape, METHODS[method], torch.device(device)
        self._warm_up, self._seed, self._cuda = warm_up, seed, device == "cuda"
        self._losses: list[torch.Tensor] = []
        self._peaks: dict[str, int] = {}

    def build(self, reference: bool = False) -> None:
        """Build the trainer, warm it up and look into a few steps.

        The steps that are looked into come at fixed places, so that methods which draw what trains draw the same. A
        reference does all of it too: what its heap went through moves a step on a CPU by several per cent.
        """
        if reference and self._cuda:
            meta = Request(self._shape, torch.device("meta"), self._seed).model("fp32")
            # fp32 weights and two moments.
            states = 12 * sum(p.numel() for p in meta.parameters())
            if states > REFERENCE_SHARE * torch.cuda.get_device_properties(self._device).total_memory:
                raise Failed("unavailable", f"states of {states / 2**30:.0f} GiB would crowd the card")
        self._trainer = self._method.build(Request(self._shape, self._device, self._seed))
        self._batches = make_batches(self._shape, self._device, seed=self._seed)
        for _ in range(max(1, self._warm_up)):
            self._step()
        self._result = {"resident_bytes": psutil.Process().memory_info().rss}
        self._note_cuda_peaks()
        self._result |= self._looked_into()
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.empty_cache()

    def turn(self, steps: int) -> dict[str, list[float]]:
        """Time a few steps: seconds of the wall and CPU seconds of all threads, for each."""
        if self._cuda:
            self._step()
        timed = [self._step() for _ in range(steps)]
        if self._cuda:
            torch.cuda.empty_cache()
        return {clock: [pair[place] for pair in timed] for place, clock in enumerate(CLOCKS)}

    def finish(self) -> dict[str, Any]:
        """Return everything but times: bytes, FLOPs, losses."""
        self._note_cuda_peaks()
        losses = [float(loss) for loss in self._losses]
        if not all(map(math.isfinite, losses)):
            raise Failed("failed", "a loss is not finite")
        parameters = list(self._trainer.model.parameters())
        peak = self._peaks.get("allocated") or self._result["peak_bytes"]
        return self._result | {
            "peak_bytes": peak,
            "resident_bytes": self._peaks.get("reserved") or self._result["resident_bytes"],
            "per_step": self._shape.per_step,
            "loss_first": losses[0],
            "loss_last": losses[-1],
            "parameters": sum(p.numel() for p in parameters),
            "weights": str(parameters[0].dtype).removeprefix("torch."),
            "steps": len(losses),
        }

    def _step(self) -> tuple[float, float]:
        begin, cpu_begin = time.perf_counter(), time.process_time()
        self._losses.append(self._trainer.step(self._batches[len(self._losses) % len(self._batches)]))
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - begin, time.process_time() - cpu_begin

    def _note_cuda_peaks(self) -> None:
        """Note CUDA's own counters over all steps but those that are looked into."""
        for name in ("allocated", "reserved") if self._cuda else ():
            self._peaks[name] = max(self._peaks.get(name, 0), getattr(torch.cuda, f"max_memory_{name}")())

    def _looked_into(self) -> dict[str, Any]:
        """Return FLOPs (mean) and bytes of a few steps: the largest peak, and where it was held."""
        reports, flops, trainer = [], [], self._trainer
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
        return {
            "peak_bytes": largest.peak,
            "peak_phase": largest.peak_phase,
            "peak_module": largest.peak_module,
            "state_bytes": max(report.model_states for report in reports),
            "host_bytes": max(report.optimizer_host for report in reports),
            "saved_bytes": max(report.saved_activations for report in reports),
            "flops": sum(flops) / len(flops),
        }


def take_turns(own: Any, full: Any, rounds: int, steps: int, seconds: float) -> list[dict[str, Any]]:
    """Time both in turns; who begins changes from round to round, so that a steady drift cancels out.

    Args:
        own, full: whatever has `call("turn", steps)`; `full` may be None: timed alone.
        rounds: at most; each has one turn of either.
        steps: of a turn.
        seconds: no further round starts after this long, but three are done.
    """
    begun = time.monotonic()
    done: list[Any] = []
    while len(done) < rounds and (len(done) < 3 or time.monotonic() - begun < seconds):
        pair = {"own": own} if full is None else {"own": own, "full": full}
        order = list(pair) if len(done) % 2 == 0 else list(pair)[::-1]
        done.append({name: pair[name].call("turn", steps) for name in order})
    return done


def compare(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return medians, quartiles, ratios of the medians, and quartiles of the ratios of the rounds."""
    result: dict[str, Any] = {"rounds": len(rounds)}
    for clock in CLOCKS:
        own = [value for one in rounds for value in one["own"][clock]]
        low, high = quartiles(own)
        result |= {clock: statistics.median(own), f"{clock}_q1": low, f"{clock}_q3": high}
        if "full" in rounds[0]:
            full = statistics.median(value for one in rounds for value in one["full"][clock])
            medians = [[statistics.median(one[side][clock]) for side in ("own", "full")] for one in rounds]
            low, high = quartiles([a / b for a, b in medians])
            name = f"{clock}_of_full"
            result |= {f"full_{clock}": full, name: result[clock] / full}
            result |= {f"{name}_q1": low, f"{name}_q3": high}
    return result


def measure(arguments: argparse.Namespace, shape: str, method: str, full: Process | None) -> dict[str, Any]:
    """Measure one method in a fresh process, in turns with full fine-tuning."""
    with Process(Bench, *bench_arguments(arguments, shape, method), seconds=arguments.seconds) as own:
        own.call("build")
        turns = (arguments.rounds, arguments.steps, arguments.turn_seconds)
        return compare(take_turns(own, full, *turns)) | own.call("finish")


def bench_arguments(arguments: argparse.Namespace, shape: str, method: str) -> tuple[Any, ...]:
    return (SHAPES[shape], method, arguments.device, arguments.warm_up, arguments.seed, arguments.threads)


def run(arguments: argparse.Namespace, shapes: Sequence[str], methods: Sequence[str]) -> None:
    """Measure what the study lacks within the time budget; on a GPU the most telling methods of all shapes first."""
    study, started = Study(arguments.csv, ("model", "method")), time.monotonic()
    cells = [(shape, method) for shape in shapes for method in methods]
    cells = [cell for cell in cells if not study.has(dict(zip(study.keys, cell, strict=True)))]
    if arguments.device == "cuda":
        cells.sort(key=lambda cell: METHODS[cell[1]].tier)
    full, of = None, None
    for number, (shape, method) in enumerate(cells):
        if time.monotonic() - started > 60 * arguments.budget_minutes:
            print(f"the time budget is spent: {len(cells) - number} left; run again to add them")
            break
        row: dict[str, Any] = {"model": shape, "method": method, "status": "ok"}
        if of != shape:
            if full is not None:
                full.end()
            full, of = Process(Bench, *bench_arguments(arguments, shape, "full")), shape
            try:
                full.call("build", reference=True)
            except Failed as error:
                print(f"{shape}: no turns with full fine-tuning ({error})")
                full = None
        try:
            try:
                row |= measure(arguments, shape, method, full)
            except Failed as error:
                if error.status != "out of memory" or full is None or arguments.device != "cuda":
                    raise
                # Perhaps there was no room beside full fine-tuning: alone, without a ratio of times.
                full.end()
                full = None
                row |= measure(arguments, shape, method, None)
        except Failed as error:
            row |= {"status": error.status, "error": error.reason.replace("\n", " ")}
        print(
            f"[{number + 1}/{len(cells)}] {shape} {method}: {row['status']} {row.get('error', '')}"
            f"{row.get('seconds', 0):.4f} s, {row.get('peak_bytes', 0) / 2**20:.0f} MiB",
            flush=True,
        )
        if row["status"] in ("ok", "unavailable", "out of memory"):
            settings = {key: getattr(arguments, key) for key in ("device", "threads", "seed")}
            study.add(row | settings | machine(arguments.device))
    if full is not None:
        full.end()


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return peak and time as shares of full fine-tuning's, a column per shape; the least is bold."""
    shapes = list(dict.fromkeys(row["model"] for row in rows))
    shares: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        full = next((r for r in rows if (r["model"], r["method"]) == (row["model"], "full")), None)
        clock = "seconds_of_full" if row["device"] == "cuda" else "cpu_seconds_of_full"
        if full and row["status"] == "ok" and row.get(clock):
            ratios = (row["peak_bytes"] / full["peak_bytes"], row[clock])
            shares[row["model"], row["method"]] = [f"{ratio:.2f}" for ratio in ratios]
    least = {
        (shape, place): min((cell[place] for (s, _), cell in shares.items() if s == shape), default="")
        for shape in shapes
        for place in (0, 1)
    }
    lines = []
    for name, method in METHODS.items():
        cells = []
        for shape in shapes:
            cell = shares.get((shape, name), [])
            # By what is printed: nobody is ahead by less than that.
            bold = [f"**{text}**" if text == least[shape, i] else text for i, text in enumerate(cell)]
            cells.append("/".join(bold))
        if any(cells):
            lines.append([method.label, *cells])
    return markdown(["peak/time, of full", *(SHAPES[shape].label for shape in shapes)], lines)


def ground(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return what everything was measured on."""

    def said(key: str) -> str:
        return ", ".join(sorted({str(row[key]) for row in rows}))

    return (
        f"{said('hardware')}, {said('threads')} CPU threads, torch {said('torch')}, rows measured at commit "
        f"{said('commit')}; bf16 arithmetic, seed {said('seed')}."
    )


PRINTED = {"balanced", "minimal", "ultra", "minimal_tuned"}
"""Settings of whole layers, which are not in the documents."""


def tables(csv: str = "peers", left_out: Collection[str] = PRINTED) -> dict[str, str]:
    """Return the table of the documents by its mark."""
    # Methods that were measured on one shape only have left the catalogue.
    rows = [row for row in Study(csv, ()).rows() if row["method"] in METHODS.keys() - left_out]
    return {"peers-summary": f"{ground(rows)}\n\n{summary(rows)}"}


def choose(text: str | None, default: Sequence[str], known: Mapping[str, Any], what: str) -> list[str]:
    """Return the names of a comma-separated list."""
    names = [part.strip() for part in text.split(",") if part.strip()] if text else list(default)
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"--{what}: {', '.join(unknown)} unknown; known: {', '.join(known)}")
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=default)
    parser.add_argument("--models", help=f"comma-separated, of: {', '.join(SHAPES)}")
    parser.add_argument("--methods", help=f"comma-separated, of: {', '.join(METHODS)}")
    parser.add_argument(
        "--budget-minutes", type=float, default=math.inf, help="start no measurement after that"
    )
    parser.add_argument("--seconds", type=float, default=900.0, help="limit of one measurement (900)")
    parser.add_argument(
        "--rounds", type=int, help="turns of a method and of full fine-tuning (cuda 3, cpu 5)"
    )
    parser.add_argument("--steps", type=int, default=2, help="timed steps of a turn (2)")
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--turn-seconds", type=float, default=20.0, help="no further round after this (20)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads of a process")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", default="peers", help="name of a study, or a path that ends in .csv")
    arguments = parser.parse_args()
    arguments.rounds = arguments.rounds or (3 if arguments.device == "cuda" else 5)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no CUDA device")
    shapes = choose(arguments.models, shapes_for(arguments.device), SHAPES, "models")
    run(arguments, shapes, choose(arguments.methods, list(METHODS), METHODS, "methods"))
    print(tables(arguments.csv, ())["peers-summary"])


if __name__ == "__main__":
    main()
