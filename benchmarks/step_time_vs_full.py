"""Time of a whole training step of SlimFit against full fine-tuning, in one process and in turns.

    OMP_NUM_THREADS=2 python benchmarks/step_time_vs_full.py --run mine              # BERT-base, 8 x 128 tokens, fp32
    OMP_NUM_THREADS=2 python benchmarks/step_time_vs_full.py --run mine --dtype bf16 --methods full balanced
    DS_ACCELERATOR=cpu python benchmarks/step_time_vs_full.py --run mine --methods engine-full engine-balanced

A step is zero_grad, forward, backward and optimizer. `full` trains everything with PyTorch's fused AdamW and SDPA;
`frozen` freezes 95 % by the same schedule and stores as autograd does; presets add compressed activations;
`engine-<preset>` runs the DeepSpeed engine on one rank (ZeRO 1; bf16: its weights with fp32 masters), `engine-full` the
stock one. Reported: the ratio to the first method (median over rounds, and of the means), and the share of a step's CPU
time that the schedule takes: choosing layers, setting `requires_grad`, measuring updates. Rows are added to
`benchmarks/results/step_time_vs_full.csv` (`--csv`) under the name `--run`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import Study, in_turns, machine, markdown
from methods import EngineTrainer, PlainTrainer, Trainer
from torch import nn


class Clock:
    """Adds up the CPU seconds spent in some functions."""

    seconds = 0.0

    def around(self, owner: Any, *names: str) -> None:
        """Replace methods of an object by ones that are timed."""
        for name in names:
            setattr(owner, name, self._timed(getattr(owner, name)))

    def _timed(self, function: Callable) -> Callable:
        def timed(*args, **kwargs):
            start = time.process_time()
            result = function(*args, **kwargs)
            self.seconds += time.process_time() - start
            return result

        return timed


def bert_base(options: argparse.Namespace) -> nn.Module:
    """Return BERT-base with a classification head, random weights; the same for every method."""
    import transformers as hf

    torch.manual_seed(0)
    config = hf.BertConfig(  # type: ignore[call-arg]
        num_hidden_layers=options.layers,
        attention_probs_dropout_prob=options.attention_dropout,
        attn_implementation="sdpa",
    )
    return hf.BertForSequenceClassification(config).to(options.device).train()


def build(method: str, options: argparse.Namespace, clock: Clock) -> Trainer:
    """Return the trainer of a method; the clock runs where statistics are taken and sets are chosen."""
    import slimfit_ds

    model, bf16 = bert_base(options), options.dtype == "bf16"
    block = {"freeze": {"policy": "ils", "rate": options.rate}}
    if method.startswith("engine-"):
        preset = method.removeprefix("engine-")
        # Fused, as in `full`: the stock engine steps with it, ours has its own update.
        optimizer = {"type": "AdamW", "params": {"lr": 5e-5, "torch_adam": True, "fused": True}}
        config: dict = {"train_micro_batch_size_per_gpu": options.rows, "zero_optimization": {"stage": 1}}
        config |= {"optimizer": optimizer, "steps_per_print": None, "bf16": {"enabled": bf16}}
        if preset != "full":
            config["slimfit"] = block | {"activations": preset}
        trainer = EngineTrainer(model, config)
        if preset != "full":
            clock.around(trainer.engine.schedule, "advance")
            clock.around(trainer.engine, "_apply_active_set")
            clock.around(trainer.engine.optimizer.updater, "statistic_sums", "statistics", "_measure")
        return trainer
    handle = None
    if method != "full":
        preset = "exact" if method == "frozen" else method
        handle = slimfit_ds.slim(model, block | {"activations": preset})
        clock.around(handle, "_before_step", "_after_step")
    stepper = torch.optim.AdamW(model.parameters(), lr=5e-5, fused=True)
    if handle is not None:
        handle.follow(stepper)
    return PlainTrainer(model, stepper, autocast=bf16)


def measure(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return seconds and ratios to the first method, by method."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 30000, (options.rows, options.tokens), generator=generator)
    labels = torch.randint(0, 2, (options.rows,), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    batch = {key: value.to(options.device) for key, value in batch.items()}
    clocks = {method: Clock() for method in options.methods}
    trainers = {method: build(method, options, clocks[method]) for method in options.methods}
    scheduled: dict[str, list[float]] = {method: [] for method in options.methods}

    def step(method: str) -> None:
        clocks[method].seconds = 0.0
        trainers[method].step(batch)
        scheduled[method].append(clocks[method].seconds)

    steps = {method: lambda method=method: step(method) for method in options.methods}
    synchronize = torch.cuda.synchronize if options.device == "cuda" else lambda: None
    times = in_turns(steps, options.rounds, options.warm_up, options.seconds, synchronize)
    first = times[options.methods[0]]
    table = {}
    for method, taken in times.items():
        ratios, cpu_ratios = (
            [a / b for a, b in zip(taken[clock], first[clock], strict=True)]
            for clock in ("seconds", "cpu_seconds")
        )
        parts = scheduled[method][options.warm_up :]
        shares = [a / b for a, b in zip(parts, taken["cpu_seconds"], strict=True)]
        table[method] = {
            "rounds": len(ratios),
            "seconds": statistics.median(taken["seconds"]),
            "ratio": statistics.median(ratios),
            "ratio_lowest": min(ratios),
            "ratio_highest": max(ratios),
            "ratio_of_means": sum(taken["seconds"]) / sum(first["seconds"]),
            "cpu_seconds": statistics.median(taken["cpu_seconds"]),
            "cpu_ratio": statistics.median(cpu_ratios),
            "cpu_ratio_of_means": sum(taken["cpu_seconds"]) / sum(first["cpu_seconds"]),
            "schedule": statistics.median(shares),
            "schedule_mean": sum(parts) / sum(taken["cpu_seconds"]),
            "schedule_highest": max(shares),
        }
    return table


def table(rows: list[dict[str, Any]], labels: dict[str, str]) -> str:
    """Return the table of some runs."""
    lines = []
    for run, label in labels.items():
        own = [row for row in rows if row["run"] == run]
        for row in own:
            reference = next(r for r in own if r["method"] == row["first"])
            if row is reference:
                continue
            seconds = [
                f"{r['cpu_seconds']:.2f}" if r["cpu_seconds"] else f"{r['seconds']:.2f} (wall)"
                for r in (reference, row)
            ]
            spread = f"{row['ratio']:.3f} ({row['ratio_lowest']:.2f} to {row['ratio_highest']:.2f})"
            shares = [
                f"{100 * row[key]:.2g} %"
                for key in ("schedule", "schedule_mean", "schedule_highest")
                if row[key] is not None
            ]
            cpu = [f"{row[key]:.3f}" for key in ("cpu_ratio", "cpu_ratio_of_means") if row[key] is not None]
            wall = f"{spread}, {row['ratio_of_means']:.3f}"
            lines.append(
                [label, row["rounds"], row["method"], *seconds, ", ".join(cpu), wall, ", ".join(shares)]
            )
    titles = ["", "rounds", "method", "CPU s of full", "of the method", "CPU time of full: median, of means"]
    titles += [
        "wall clock of full: median (range), of means",
        "schedule, share of a step: median, mean, highest",
    ]
    return markdown(titles, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--methods", nargs="*", default=["full", "frozen", "balanced", "minimal"])
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="bf16: autocast")
    parser.add_argument("--rate", type=float, default=0.95)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=200, help="start no new round after this time")
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--attention-dropout", type=float, default=0.0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--run", help="name of the rows; without one they are printed only")
    parser.add_argument(
        "--csv", default="step_time_vs_full", help="name of a study, or a path that ends in .csv"
    )
    options = parser.parse_args()
    found = measure(options)
    keys = ("dtype", "rate", "warm_up", "layers", "rows", "tokens", "attention_dropout", "device")
    settings = {key: getattr(options, key) for key in keys}
    settings |= {"run": options.run or "this run", "first": options.methods[0], "seed": 0}
    settings |= {"threads": torch.get_num_threads(), **machine(options.device)}
    rows = [{"method": method, **row, **settings} for method, row in found.items()]
    if options.run:
        Study(options.csv, ("run", "method")).add(*rows)
    print(table(rows, {settings["run"]: settings["run"]}))


if __name__ == "__main__":
    main()
