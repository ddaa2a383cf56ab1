"""What the schedule itself costs, apart from forward, backward and optimizer, by the number and the size of the layers.

    OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu python benchmarks/schedule_cost.py
    OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu python benchmarks/schedule_cost.py --layers 202 --steps 50 --bert-steps 0

Two tables, CPU milliseconds per step. The first has many tiny layers: what deciding (`advance`) and applying the
next active set take whatever the weights' size, and how many parameters an applied set touches, of how many that it
changes. The second has BERT-base's weights: what measuring them takes, in the median step and in the slowest, whose
active layers it names. Gradients are random numbers; no forward pass runs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import transformers as hf
from rich.console import Console
from rich.table import Table
from step_time_vs_full import start_one_rank
from torch import nn

import slimfit_ds


class Meter:
    """CPU seconds by name, and the parameters whose `requires_grad` was set, since the last `take`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.touched = 0
        original = nn.Parameter.requires_grad_

        def counted(parameter, *args):
            self.touched += 1
            return original(parameter, *args)

        nn.Parameter.requires_grad_ = counted  # type: ignore[method-assign]

    def watch(self, owner: object, name: str, key: str) -> None:
        function: Callable = getattr(owner, name)

        def timed(*args, **kwargs):
            start = time.process_time()
            result = function(*args, **kwargs)
            self.seconds[key] = self.seconds.get(key, 0.0) + time.process_time() - start
            return result

        setattr(owner, name, timed)

    def take(self) -> tuple[dict[str, float], int]:
        found = self.seconds, self.touched
        self.seconds, self.touched = {}, 0
        return found


def tiny(layers: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers)))


def bert_base() -> nn.Module:
    torch.manual_seed(0)
    return hf.BertForSequenceClassification(hf.BertConfig())


def slim_step(model: nn.Module, rate: float, meter: Meter) -> tuple[Callable[[], None], Callable]:
    handle = slimfit_ds.slim(model, {"freeze": {"rate": rate}})
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, fused=True)
    meter.watch(handle.schedule, "advance", "decide")
    meter.watch(handle, "_apply", "apply")
    meter.watch(handle, "_before_step", "measure")
    meter.watch(handle, "_after_step", "measure")
    handle.follow(optimizer)

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return step, lambda: handle.active_layers


def engine_step(model: nn.Module, rate: float, meter: Meter) -> tuple[Callable[[], None], Callable]:
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "AdamW", "params": {"lr": 5e-5, "torch_adam": True}},
        "steps_per_print": None,
        "slimfit": {"freeze": {"rate": rate}},
    }
    engine, *_ = slimfit_ds.initialize(model=model, config=config)
    meter.watch(engine.schedule, "advance", "decide")
    meter.watch(engine, "_apply_active_set", "apply")
    for name in ("_measure", "statistic_sums", "statistics"):
        meter.watch(engine.optimizer.updater, name, "measure")

    def step() -> None:
        engine.optimizer.collect_gradients(boundary=True)
        engine._take_model_step({})
        engine.zero_grad()

    return step, lambda: engine.active_layers


MAKERS = {"slim": slim_step, "engine": engine_step}


def measure(way: str, model: nn.Module, rate: float, steps: int) -> list[dict]:
    """One row for each step."""
    meter = Meter()
    step, active_layers = MAKERS[way](model, rate, meter)
    generator = torch.Generator().manual_seed(1)
    rows = []
    for _ in range(steps):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter).normal_(std=1e-3, generator=generator)
        before = active_layers()
        meter.take()
        step()
        seconds, touched = meter.take()
        # `slim` decides and applies within the hook that measures.
        nested = seconds["decide"] + seconds["apply"] if way == "slim" else 0.0
        rows.append(
            {
                "decide": 1000 * seconds["decide"],
                "apply": 1000 * seconds["apply"],
                "measure": 1000 * (seconds["measure"] - nested),
                "touched": touched,
                "changed": len(before ^ active_layers()),
                "active": before,
            }
        )
    return rows


def show(title: str, columns: list[str], rows: list[list[str]]) -> None:
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*row)
    Console(width=130).print(table)


def spread(rows: list[dict], key: str) -> str:
    values = [row[key] for row in rows]
    return f"{statistics.median(values):.3f} ({max(values):.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, nargs="*", default=[102, 202, 402])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--bert-steps", type=int, default=40)
    parser.add_argument("--rate", type=float, default=0.95)
    options = parser.parse_args()
    start_one_rank()
    torch.manual_seed(0)
    found = []
    for layers in options.layers:
        for way in MAKERS:
            rows = measure(way, tiny(layers), options.rate, options.steps)
            exact = all(row["touched"] == row["changed"] for row in rows)
            found.append(
                [
                    way,
                    str(layers),
                    *(spread(rows, key) for key in ("decide", "apply", "touched")),
                    "the changed ones" if exact else "more than changed",
                ]
            )
    show(
        f"Tiny layers, {options.rate:.0%} frozen, CPU ms per step: median (highest) of {options.steps}",
        ["way", "layers", "decide", "apply", "parameters touched", "which"],
        found,
    )
    if not options.bert_steps:
        return
    found = []
    for way in MAKERS:
        model = bert_base()
        sizes = {name: p.numel() for name, p in model.named_parameters()}
        rows = measure(way, model, options.rate, options.bert_steps)
        slowest = max(rows, key=lambda row: row["measure"])
        largest = max(slowest["active"], key=lambda name: sizes[name])
        mean = statistics.fmean(row["measure"] for row in rows)
        found.append(
            [
                way,
                *(spread(rows, key) for key in ("decide", "apply", "measure")),
                f"{mean:.3f}",
                f"{largest}, {sizes[largest] / 1e6:.1f} million",
            ]
        )
    show(
        f"BERT-base, {options.rate:.0%} frozen, CPU ms per step: median (highest) of {options.bert_steps}",
        ["way", "decide", "apply", "measure", "mean", "largest layer of the slowest step"],
        found,
    )


if __name__ == "__main__":
    main()
