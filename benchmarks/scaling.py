"""How the cost of a step grows with model size, batch, sequence and ranks: SlimFit, full fine-tuning, checkpointing.

    python benchmarks/scaling.py --parts memory,ranks,traffic    # simulated: minutes, no GPU
    python benchmarks/scaling.py --parts time,time_ranks         # measured on this CPU
    python benchmarks/scaling.py --picture                       # benchmarks/results/scaling.png from what is there

Memory: a real step on fake CUDA tensors (slimfit_ds.planner.simulate), of one rank or of pretended worlds. Traffic:
collectives counted in pretended worlds. Time: CPU time of real steps, methods in turns; wall time of 1, 2 and 4 gloo
ranks. Adds what `benchmarks/results/scaling.csv` (`--csv`) lacks.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, Failed, Process, Study, in_turns, launch_ranks, machine, markdown
from methods import METHODS, EngineTrainer, Request
from shapes import SHAPES, Shape, make_batches

from slimfit_ds.memory.tracker import MemoryTracker
from slimfit_ds.memory.traffic import TrafficCounter
from slimfit_ds.planner.simulate import Simulator
from slimfit_ds.planner.strategies import Strategy, slimfit_block
from slimfit_ds.planner.workload import Workload

_PLAIN = Strategy("plain", stage=None, dtype="bf16_autocast")
_BALANCED, _MINIMAL = (
    Strategy(preset, stage=0, dtype="bf16", slimfit=slimfit_block(preset, 0.95, "host", "ils"))
    for preset in ("balanced", "minimal")
)
# Methods by part. With a vocabulary of 128,000 the logits outweigh everything else: loss in chunks.
MEMORY = {
    "full": _PLAIN,
    "checkpointing": _PLAIN.with_(gradient_checkpointing=True),
    "balanced": _BALANCED,
    "minimal": _MINIMAL,
    "minimal, loss in chunks": _MINIMAL.with_(loss_chunk=1024),
}
RANKS = {
    "full, ZeRO 2": Strategy("zero2", stage=2, dtype="bf16"),
    "checkpointing, ZeRO 2": Strategy("zero2c", stage=2, dtype="bf16", gradient_checkpointing=True),
    "minimal, ZeRO 1": _MINIMAL.with_(stage=1),
}
TRAFFIC = {
    f"{name}, ZeRO {stage}": strategy.with_(stage=stage)
    for name, strategy in (("full", Strategy("full")), ("minimal", _MINIMAL))
    for stage in (1, 3)
}
TIME = ("full", "checkpointing", "balanced", "minimal")
TIME_RANKS = {f"{name}, ZeRO 1": (name, 1) for name in ("full", "balanced", "minimal")}

_BERT = Workload("bert-base-uncased", 8, 384, "question_answering")
_LLAMA = Workload("meta-llama/Llama-3.2-1B", 1, 2048)
_MODELS = ("Qwen/Qwen3-0.6B", "meta-llama/Llama-3.2-1B", "Qwen/Qwen3-1.7B", "meta-llama/Meta-Llama-3-8B")
_SMALL = SHAPES["bert-small"]


def _wide(hidden: int) -> Shape:
    model = {"model_type": "bert", "hidden_size": hidden, "num_hidden_layers": 4, "vocab_size": 4096}
    return _SMALL.with_(model=model | {"num_attention_heads": hidden // 64, "intermediate_size": 4 * hidden})


# (part, sweep) -> title, name of the x axis, points
SWEEPS: dict[tuple[str, str], tuple[str, str, dict[Any, Any]]] = {
    ("memory", "model"): (
        "Model size, batch 1 of 2048 tokens",
        "model",
        {name.rpartition("/")[2]: replace(_LLAMA, model=name) for name in _MODELS},
    ),
    ("memory", "batch"): (
        "Batch, BERT-base QA, 384 tokens",
        "samples",
        {size: replace(_BERT, batch=size) for size in (8, 32, 128)},
    ),
    ("memory", "sequence"): (
        "Sequence, Llama-3.2-1B, batch 1",
        "tokens",
        {size: replace(_LLAMA, seq=size) for size in (1024, 4096, 16384)},
    ),
    ("ranks", "ranks"): (
        "Ranks, Llama-3.2-1B, 1 x 2048 per rank",
        "ranks",
        dict.fromkeys((1, 8, 64), _LLAMA),
    ),
    ("traffic", "ranks"): (
        "Mean over a cycle of the schedule, minimal: 95 % frozen",
        "ranks",
        dict.fromkeys((2, 64), Workload("bert-base-uncased", 1, 32, "sequence_classification", dtype="bf16")),
    ),
    ("time", "model"): (
        "Model width, BERT of 4 layers, 8 x 128",
        "h",
        {hidden: _wide(hidden) for hidden in (128, 256, 512, 768)},
    ),
    ("time", "batch"): (
        "Batch, BERT 4 x h256, 128 tokens",
        "samples",
        {size: _SMALL.with_(batch=size) for size in (2, 8, 32)},
    ),
    ("time", "sequence"): (
        "Sequence, BERT 4 x h256, batch 8",
        "tokens",
        {size: _SMALL.with_(seq=size) for size in (64, 128, 512)},
    ),
    ("time_ranks", "ranks"): (
        "Real gloo ranks, a thread each (4 ranks share the 2 cores): seconds, bytes sent, peak of a rank",
        "ranks",
        dict.fromkeys((1, 2, 4), _SMALL),
    ),
}
METHODS_OF: dict[str, Any] = {
    "memory": MEMORY,
    "ranks": RANKS,
    "traffic": TRAFFIC,
    "time": TIME,
    "time_ranks": TIME_RANKS,
}


class Traffic:
    """Bytes that one rank of a pretended world sends per step; in a process of its own."""

    steps = 20
    """A cycle of the schedule at 95 % frozen: each layer trains once."""

    def count(self, ranks: int, workload: Workload, strategy: Strategy) -> dict[str, Any]:
        """Return mean and largest bytes of a step."""
        os.environ["DS_ACCELERATOR"] = "cpu"
        import slimfit_ds
        from slimfit_ds.planner import simulate
        from slimfit_ds.planner.fake_world import FakeWorld

        simulate._prepare()
        counter = TrafficCounter().install()
        steps = 2 if strategy.slimfit is None else self.steps
        with FakeWorld(ranks):
            model = workload.build()
            config = strategy.deepspeed_config(1, "bf16", ranks)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
            engine = slimfit_ds.initialize(model=model, optimizer=optimizer, config=config)[0]
            sent = []
            for _ in range(steps + 1):
                counter.reset()
                engine.backward(engine(**workload.inputs(1)).loss)
                engine.step()
                sent.append(counter.total)
        # ZeRO 3 learns in the first step when to fetch what.
        return {"bytes_sent": sum(sent[1:]) / steps, "largest_bytes_sent": max(sent[1:]), "steps": steps}


def estimated(simulator: Simulator, workload: Workload, strategy: Strategy) -> dict[str, Any]:
    found = simulator.run(workload, strategy, "expected")
    if found.report is None:
        return {"error": found.error}
    at_peak = {f"peak_{kind}": size for kind, size in found.report.at_peak.items()}
    return {"peak_bytes": found.report.peak, **at_peak, "parameters": found.parameters}


def timed(shape: Shape, rounds: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield CPU seconds (median) of each method and the ratio to full (median of rounds), all in turns here."""
    batches = make_batches(shape)
    trainers = {name: METHODS[name].build(Request(shape, torch.device("cpu"))) for name in TIME}
    steps = {name: lambda trainer=trainer: trainer.step(batches[0]) for name, trainer in trainers.items()}
    times = in_turns(steps, rounds)
    for name in TIME:
        pairs = zip(times[name]["cpu_seconds"], times["full"]["cpu_seconds"], strict=True)
        seconds = statistics.median(times[name]["cpu_seconds"])
        yield name, {"cpu_seconds": seconds, "ratio": statistics.median(a / b for a, b in pairs)}


def rank_worker(rounds: int) -> None:
    """Program of one rank: stock DeepSpeed ZeRO 1 against SlimFit at stage 1, in turns, on the small BERT."""
    torch.set_num_threads(1)
    counter = TrafficCounter().install()
    ranks, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    trainers: dict[str, EngineTrainer] = {}
    for name, (preset, stage) in TIME_RANKS.items():
        block = None if preset == "full" else slimfit_block(preset, 0.95, "host", "ils")
        config = Strategy(preset, stage, slimfit=block).deepspeed_config(_SMALL.workload.batch, "bf16", ranks)
        model = Request(_SMALL, torch.device("cpu")).model("bf16")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        trainers[name] = EngineTrainer(model, config, optimizer)
    batches, sent = make_batches(_SMALL, seed=rank), dict.fromkeys(trainers, 0)

    def step(name: str) -> None:
        counter.reset()
        trainers[name].step(batches[0])
        torch.distributed.barrier()
        sent[name] += counter.total

    warm_up = 2
    steps = {name: lambda name=name: step(name) for name in trainers}
    times = in_turns(steps, rounds, warm_up, synchronize=torch.distributed.barrier)
    result, full = {}, times["full, ZeRO 1"]["seconds"]
    for name, trainer in trainers.items():
        with MemoryTracker(trainer.model, trainer.roots()) as tracker:
            trainer.step(batches[0], tracker.phase)
        seconds = times[name]["seconds"]
        result[name] = {
            "seconds": statistics.median(seconds),
            "ratio": statistics.median(a / b for a, b in zip(seconds, full, strict=True)),
            "bytes_sent": sent[name] / (warm_up + rounds),
            "peak_bytes": tracker.report().peak,
        }
    if rank == 0:
        print("RESULT " + json.dumps(result), flush=True)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def run(part: str, study: Study, rounds: int) -> None:
    """Measure what the study lacks of a part."""
    for (of, sweep), (_, _, points) in SWEEPS.items():
        if of != part:
            continue
        for x, what in points.items():
            place = {"part": part, "sweep": sweep, "x": x}
            missing = [name for name in METHODS_OF[part] if not study.has(place | {"method": name})]
            if not missing:
                continue
            found: Any
            if part == "time":
                found = dict(timed(what, rounds))
            elif part == "time_ranks":
                found = launch_ranks(x, __file__, "--rank-worker", "--rounds", rounds)
            elif part == "traffic":
                found = {}
                for name in missing:
                    with Process(Traffic, seconds=1800) as process:
                        try:
                            found[name] = process.call("count", x, what, TRAFFIC[name])
                        except Failed as error:
                            found[name] = {"error": str(error)[:200].replace("\n", " ")}
            else:
                with Simulator(x if part == "ranks" else 1) as simulator:
                    found = {
                        name: estimated(simulator, what, METHODS_OF[part][name])
                        for name in missing
                        if "chunks" not in name or what.task != "question_answering"
                    }
            rows = [place | {"method": name} | values for name, values in found.items() if name in missing]
            for row in rows:
                study.add(row | machine())
                print(row, flush=True)


def _grid(rows: Sequence[dict[str, Any]], part: str, sweep: str) -> str:
    title, axis, points = SWEEPS[part, sweep]
    found = {(row["x"], row["method"]): row for row in rows if (row["part"], row["sweep"]) == (part, sweep)}

    def cell(x: Any, method: str) -> str:
        row = found.get((x, method), {})
        if part in ("memory", "ranks") and row.get("peak_bytes"):
            return f"{row['peak_bytes'] / 2**30:.2f}"
        if part == "traffic" and row.get("bytes_sent"):
            return f"{row['bytes_sent'] / 1e6:.1f}"
        if part == "time" and row:
            return f"{row['cpu_seconds']:.3f} s" if method == "full" else f"{row['ratio']:.2f}"
        if part == "time_ranks" and row:
            sent, peak = row["bytes_sent"] / 1e6, row["peak_bytes"] / 2**20
            return f"{row['seconds']:.3f} s, {sent:.2f} MB, {peak:.1f} MiB"
        return ""

    methods = [m for m in METHODS_OF[part] if any(cell(x, m) for x in points)]
    names = [f"{m}, of full" if part == "time" and m != "full" else m for m in methods]
    lines = [[x, *(cell(x, m) for m in methods)] for x in points]
    return f"{title}:\n\n{markdown([axis, *names], lines)}"


def tables(csv: str = "scaling") -> dict[str, str]:
    """Return the tables of the documents by their mark."""
    rows = Study(csv, ()).rows()
    headings = {
        ("memory", "model"): "#### Memory of one device, simulated, GiB at the peak",
        (
            "traffic",
            "ranks",
        ): "#### Bytes sent by a rank per step, pretended worlds, BERT-base, MB of payload",
        ("time", "model"): "#### CPU time of a step, measured, one thread",
    }
    parts = [part for key in SWEEPS for part in (headings.get(key), _grid(rows, *key)) if part]
    return {"scaling": "\n\n".join(parts)}


_STYLE = {
    "full": ("#555555", "o"),
    "checkpointing": ("#d08020", "s"),
    "balanced": ("#3070c0", "^"),
    "minimal": ("#1a9050", "D"),
    "minimal, loss in chunks": ("#80c060", "v"),
}


def draw(csv: str, path: Path) -> None:
    """Draw simulated memory above, measured time below; one curve for each method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = Study(csv, ()).rows()
    figure, axes = plt.subplots(2, 4, figsize=(17, 8), layout="tight")
    shown = [key for key in SWEEPS if key[0] != "traffic"]
    values = {"memory": ("peak_bytes", 2**30, "GiB at the peak"), "time": ("ratio", 1, "of full fine-tuning")}
    values |= {"ranks": values["memory"], "time_ranks": ("seconds", 1, "s per step")}
    for axis, (part, sweep) in zip(axes.flat, shown, strict=True):
        title, label, points = SWEEPS[part, sweep]
        key, unit, y_label = values[part]
        for method in METHODS_OF[part]:
            found = [
                row for row in rows if [row[k] for k in ("part", "sweep", "method")] == [part, sweep, method]
            ]
            found = [row for row in found if row["x"] in points and row.get(key)]
            color, marker = _STYLE[method if method in _STYLE else method.split(",")[0]]
            xs, ys = [str(row["x"]) for row in found], [row[key] / unit for row in found]
            axis.plot(xs, ys, color=color, marker=marker, label=method)
        kind = "memory, simulated" if part in ("memory", "ranks") else "time, measured"
        axis.set_title(f"{kind}:\n{title.partition(' (')[0]}", fontsize=10)
        axis.set(xlabel=label, ylabel=y_label)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
        axis.tick_params(axis="x", labelsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--parts", default="", help=f"comma-separated, of: {', '.join(METHODS_OF)}")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each method at each point (5)")
    parser.add_argument("--csv", default="scaling", help="name of a study, or a path that ends in .csv")
    parser.add_argument("--picture", action="store_true")
    parser.add_argument("--rank-worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_worker:
        return rank_worker(arguments.rounds)
    torch.set_num_threads(1)
    for part in filter(None, arguments.parts.split(",")):
        if part not in METHODS_OF:
            raise SystemExit(f"--parts: {part} unknown; known: {', '.join(METHODS_OF)}")
        run(part, Study(arguments.csv, ("part", "sweep", "x", "method")), arguments.rounds)
    if arguments.picture:
        draw(arguments.csv, RESULTS / "scaling.png")
    print(tables(arguments.csv)["scaling"])


if __name__ == "__main__":
    main()
