"""Time of a whole training step of SlimFit against full fine-tuning, in one process and in turns.

    OMP_NUM_THREADS=2 python benchmarks/step_time_vs_full.py                    # BERT-base, 8 x 128 tokens, fp32
    OMP_NUM_THREADS=2 python benchmarks/step_time_vs_full.py --dtype bf16 --methods full balanced
    OMP_NUM_THREADS=2 DS_ACCELERATOR=cpu python benchmarks/step_time_vs_full.py --methods engine-full engine-balanced

A step is zero_grad, forward, backward and optimizer. `full` trains everything with PyTorch's fused AdamW and SDPA;
`frozen` freezes 95 % by the same schedule and stores as autograd does; presets add compressed activations;
`engine-<preset>` runs the DeepSpeed engine on one rank (ZeRO 1; bf16: its weights with fp32 masters), `engine-full` the
stock one. The methods take turns within each round, so that a busy machine slows all of them. Reported: the median over
rounds of the ratio to the first method, the median seconds (wall clock, and CPU seconds of all threads, which other
jobs disturb less), and the share of a step's CPU time that the schedule takes: choosing layers, setting `requires_grad`, measuring
updates (and, in `slim`, copying the active weights to measure them).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import socket
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers as hf
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import slimfit_ds

METHODS = ("full", "frozen", "balanced", "minimal")


class Clock:
    """Adds up the CPU seconds spent in some functions."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function: Callable) -> Callable:
        def timed(*args, **kwargs):
            start = time.process_time()
            result = function(*args, **kwargs)
            self.seconds += time.process_time() - start
            return result

        return timed


def bert_base(layers: int, attention_dropout: float, device: str) -> nn.Module:
    """BERT-base with a classification head, random weights; the same for every method."""
    torch.manual_seed(0)
    config = hf.BertConfig(
        num_hidden_layers=layers, attention_probs_dropout_prob=attention_dropout, attn_implementation="sdpa"
    )
    return hf.BertForSequenceClassification(config).to(device).train()


def loop(model: nn.Module, dtype: torch.dtype, device: str, optimizer: torch.optim.Optimizer) -> Callable:
    """One training step in plain PyTorch."""

    def step(batch: dict[str, Tensor]) -> None:
        optimizer.zero_grad()
        autocast = contextlib.nullcontext() if dtype is torch.float32 else torch.autocast(device, dtype=dtype)
        with autocast:
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()

    return step


def slim_step(model: nn.Module, preset: str, rate: float, dtype: torch.dtype, device: str, clock: Clock):
    """A step with `slimfit_ds.slim`; the clock runs in the hooks around the optimizer."""
    handle = slimfit_ds.slim(model, {"freeze": {"rate": rate}, "activations": preset})
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, fused=True)
    for name in ("_before_step", "_after_step"):
        setattr(handle, name, clock.around(getattr(handle, name)))
    handle.follow(optimizer)
    return loop(model, dtype, device, optimizer)


def engine_step(model: nn.Module, method: str, options: argparse.Namespace, clock: Clock) -> Callable:
    """A step of a DeepSpeed engine; the clock runs where statistics are taken and sets are chosen."""
    # Fused, as in `full`: the stock engine steps with it, ours has its own update.
    optimizer = {"lr": 5e-5, "torch_adam": True, "fused": True}
    config: dict = {
        "train_micro_batch_size_per_gpu": options.rows,
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "AdamW", "params": optimizer},
        "steps_per_print": None,
    }
    if options.dtype == "bf16":
        config["bf16"] = {"enabled": True}
    if method != "full":
        config["slimfit"] = {"freeze": {"rate": options.rate}, "activations": method}
    engine, *_ = slimfit_ds.initialize(model=model, config=config)
    if method != "full":
        engine.schedule.advance = clock.around(engine.schedule.advance)
        engine._apply_active_set = clock.around(engine._apply_active_set)
        updater = engine.optimizer.updater
        for name in ("statistic_sums", "statistics", "_measure"):
            setattr(updater, name, clock.around(getattr(updater, name)))

    def step(batch: dict[str, Tensor]) -> None:
        engine.backward(engine(**batch).loss)
        engine.step()

    return step


def start_one_rank() -> None:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel("ERROR")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    deepspeed.init_distributed("gloo")


def build(method: str, options: argparse.Namespace, clock: Clock) -> Callable:
    model = bert_base(options.layers, options.attention_dropout, options.device)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.dtype]
    if method == "full":
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, fused=True)
        return loop(model, dtype, options.device, optimizer)
    if method.startswith("engine-"):
        return engine_step(model, method.removeprefix("engine-"), options, clock)
    preset = "exact" if method == "frozen" else method
    return slim_step(model, preset, options.rate, dtype, options.device, clock)


def batch_of(options: argparse.Namespace) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 30000, (options.rows, options.tokens), generator=generator)
    labels = torch.randint(0, 2, (options.rows,), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return {key: value.to(options.device) for key, value in batch.items()}


def measure(options: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Seconds of each round's step by the clock and by the processor, and CPU seconds of the schedule in it, by method."""
    if any(method.startswith("engine-") for method in options.methods):
        start_one_rank()
    clocks = {method: Clock() for method in options.methods}
    steps = {method: build(method, options, clocks[method]) for method in options.methods}
    batch = batch_of(options)

    def run(method: str) -> dict[str, float]:
        clocks[method].seconds = 0.0
        start, processor = time.perf_counter(), time.process_time()
        steps[method](batch)
        if options.device == "cuda":
            torch.cuda.synchronize()
        step, processor = time.perf_counter() - start, time.process_time() - processor
        return {"step": step, "processor": processor, "schedule": clocks[method].seconds}

    rows: dict[str, dict[str, list[float]]] = {
        m: {"step": [], "processor": [], "schedule": []} for m in options.methods
    }
    start = time.perf_counter()
    for number in range(options.warm_up + options.rounds):
        if time.perf_counter() - start > options.seconds and number > options.warm_up:
            break
        for method in options.methods:
            taken = run(method)
            if number >= options.warm_up:
                for kind, seconds in taken.items():
                    rows[method][kind].append(seconds)
    return rows


def summary(rows: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    """Medians and ratios to the first method."""
    first = next(iter(rows.values()))
    reference = first["step"]
    table = {}
    for method, times in rows.items():
        ratios = [a / b for a, b in zip(times["step"], reference, strict=True)]
        shares = [a / b for a, b in zip(times["schedule"], times["processor"], strict=True)]
        table[method] = {
            "seconds": statistics.median(times["step"]),
            "ratio": statistics.median(ratios),
            "lowest": min(ratios),
            "highest": max(ratios),
            "ratio_of_means": sum(times["step"]) / sum(reference),
            "processor_seconds": statistics.median(times["processor"]),
            "processor_ratio": statistics.median(
                a / b for a, b in zip(times["processor"], first["processor"], strict=True)
            ),
            "processor_ratio_of_means": sum(times["processor"]) / sum(first["processor"]),
            "schedule": statistics.median(shares),
            "schedule_mean": sum(times["schedule"]) / sum(times["processor"]),
            "schedule_highest": max(shares),
        }
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
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
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = measure(options)
    found = summary(rows)
    table = Table(
        title=f"BERT-base shape, {options.layers} layers, {options.rows} x {options.tokens} tokens, "
        f"{options.dtype}, {options.rate:.0%} frozen, {options.device}, {torch.get_num_threads()} threads"
    )
    for column in (
        "method",
        "s per step",
        "of the first (median)",
        "range",
        "of means",
        "CPU seconds",
        "of the first",
        "of means, CPU",
        "schedule, mean",
    ):
        table.add_column(column, justify="left" if column == "method" else "right")
    for method, row in found.items():
        table.add_row(
            method,
            f"{row['seconds']:.3f}",
            f"{row['ratio']:.3f}",
            f"{row['lowest']:.2f} - {row['highest']:.2f}",
            f"{row['ratio_of_means']:.3f}",
            f"{row['processor_seconds']:.3f}",
            f"{row['processor_ratio']:.3f}",
            f"{row['processor_ratio_of_means']:.3f}",
            f"{row['schedule_mean']:.2%} (median {row['schedule']:.2%}, max {row['schedule_highest']:.2%})",
        )
    Console(width=150).print(table)
    if options.json:
        settings = {key: value for key, value in vars(options).items() if key != "json"}
        settings |= {
            "rounds": len(rows[options.methods[0]]["step"]),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "machine": platform.processor() or platform.machine(),
        }
        options.json.write_text(json.dumps({"settings": settings, **found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
