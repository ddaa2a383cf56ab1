"""What a step costs with a front: FLOPs by torch's formulas and CPU seconds, of MiniLM, all settings in turn in one process.

    python benchmarks/fidelity/front_cost.py --rounds 12

A round is a step of each setting. Medians over the rounds; of `half` the mean of both kinds of step. fp32, one thread, AdamW.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import markdown
from problems import minilm

import slimfit_ds

SETTINGS: dict[str, dict[str, Any] | None] = {"full": None} | {
    f"{preset}, front {front}": {"freeze": {"rate": 0.9, "front": front}, "activations": preset}
    for preset in ("exact", "minimal")
    for front in ("none", "half")
}


class Flops(TorchDispatchMode):
    """`torch.utils.flop_counter` without its hooks on modules, which a recomputation inside a backward pass does not bear."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


class Run:
    """A model in training under one setting.

    Attributes:
        seconds, flops: of its steps, by whether they went down the whole way.
    """

    def __init__(self, block: dict[str, Any] | None):
        from transformers import AutoModelForSequenceClassification

        torch.manual_seed(0)
        self.model = AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=2).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        self.handle = slimfit_ds.slim(self.model, block).follow(self.optimizer) if block else None
        self.seconds: dict[bool, list[float]] = {}
        self.flops: dict[bool, int] = {}

    def step(self, batch: dict[str, torch.Tensor]) -> None:
        """Take a step; the first two of each kind are not timed, one of them is counted."""
        whole = self.handle is None or self.handle.schedule.front == 0
        seconds = self.seconds.setdefault(whole, [])
        started = time.process_time()
        with Flops() if len(seconds) == 1 else nullcontext() as counter:
            self.model(**batch).loss.backward()
        if counter is not None:
            self.flops[whole] = counter.total
        self.optimizer.step()
        self.optimizer.zero_grad()
        seconds.append(time.process_time() - started)

    def cost(self) -> tuple[float, float]:
        """Return FLOPs and CPU seconds of a step, in the mean over both kinds."""
        kinds = [statistics.median(times[2:]) for times in self.seconds.values()]
        return statistics.mean(self.flops.values()), statistics.mean(kinds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    shape = (options.rows, options.tokens)
    batch = {"input_ids": torch.randint(1000, 20000, shape), "labels": torch.arange(options.rows) % 2}
    runs = {name: Run(block) for name, block in SETTINGS.items()}
    for _ in range(options.rounds):
        for run in runs.values():
            run.step(batch)
    flops, seconds = runs["full"].cost()
    lines = []
    for name, run in runs.items():
        own, took = run.cost()
        lines.append([name, f"{own / 1e9:.1f}", f"{own / flops:.2f}", f"{took / seconds:.2f}"])
    print(markdown(["", "GFLOP a step", "of full", "CPU time of full"], lines))


if __name__ == "__main__":
    main()
