"""Peak memory on fake tensors and bytes sent in pretended worlds: model size, batch, sequence and ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from slimfit_ds.planner.estimator import Simulator
from slimfit_ds.planner.strategy import Strategy, slimfit_block
from slimfit_ds.planner.workload import Workload

__all__ = ["METHODS", "RANK_METHODS", "SWEEPS", "memory_sweep", "rank_sweep", "traffic"]

_PLAIN = Strategy("plain", stage=None, dtype="bf16_autocast")
METHODS = {
    "full": _PLAIN,
    "checkpointing": _PLAIN.with_(gradient_checkpointing=True),
    "balanced": Strategy("balanced", stage=0, dtype="bf16", slimfit=slimfit_block("balanced")),
    "minimal": Strategy("minimal", stage=0, dtype="bf16", slimfit=slimfit_block("minimal")),
    # Language models only: with a vocabulary of 128,000 the logits outweigh everything else.
    "minimal, loss in chunks": Strategy(
        "minimal", stage=0, dtype="bf16", slimfit=slimfit_block("minimal"), loss_chunk=1024
    ),
}
RANK_METHODS = {
    "full, ZeRO 2": Strategy("zero2", stage=2, dtype="bf16"),
    "checkpointing, ZeRO 2": Strategy("zero2c", stage=2, dtype="bf16", gradient_checkpointing=True),
    "minimal, ZeRO 1": Strategy("minimal", stage=1, dtype="bf16", slimfit=slimfit_block("minimal")),
}
_BERT = Workload("bert-base-uncased", 8, 384, "question_answering")
_LLAMA = Workload("meta-llama/Llama-3.2-1B", 1, 2048)
_MODELS = ("Qwen/Qwen3-0.6B", "meta-llama/Llama-3.2-1B", "Qwen/Qwen3-1.7B", "meta-llama/Meta-Llama-3-8B")
# sweep -> (title, x axis, points)
SWEEPS: dict[str, tuple[str, str, list[tuple[Any, Workload]]]] = {
    "model": (
        "model size, batch 1 of 2048 tokens",
        "model",
        [(name.rpartition("/")[2], replace(_LLAMA, model=name)) for name in _MODELS],
    ),
    "batch": (
        "batch, BERT-base QA, 384 tokens",
        "samples",
        [(size, replace(_BERT, batch=size)) for size in (8, 32, 128)],
    ),
    "sequence": (
        "sequence, Llama-3.2-1B, batch 1",
        "tokens",
        [(size, replace(_LLAMA, seq=size)) for size in (1024, 4096, 16384)],
    ),
}
RANKS = (1, 8, 64)


def memory_sweep(known: dict[str, Any], save: Callable[[], None]) -> None:
    """Fill `known` with peaks: `sweep/x/method` -> bytes by kind at the peak, and the peak."""
    with Simulator() as simulator:
        for sweep, (_, _, points) in SWEEPS.items():
            for x, workload in points:
                for name, strategy in METHODS.items():
                    if strategy.loss_chunk is not None and workload.task == "question_answering":
                        continue
                    _estimate(simulator, known, f"{sweep}/{x}/{name}", workload, strategy, save)


def rank_sweep(known: dict[str, Any], save: Callable[[], None]) -> None:
    """The same over pretended ranks: peak of one rank, one sample of 2048 tokens each."""
    for ranks in RANKS:
        with Simulator(ranks) as simulator:
            for name, strategy in RANK_METHODS.items():
                _estimate(simulator, known, f"ranks/{ranks}/{name}", _LLAMA, strategy, save)


def _estimate(
    simulator: Simulator, known: dict, key: str, workload: Workload, strategy: Strategy, save
) -> None:
    if key in known:
        return
    found = simulator.run(workload, strategy, "expected")
    if found.report is None:
        known[key] = {"error": found.error}
    else:
        known[key] = {
            "peak": found.report.peak,
            "at_peak": found.report.at_peak,
            "parameters": found.parameters,
        }
    print(key, known[key].get("peak", known[key].get("error")), flush=True)
    save()


def traffic(known: dict[str, Any], save: Callable[[], None]) -> None:
    """Bytes sent per step in pretended worlds, in a process for each: `traffic/ranks/method`."""
    for ranks in (2, 64):
        for name in ("full, ZeRO 1", "full, ZeRO 3", "minimal, ZeRO 1", "minimal, ZeRO 3"):
            key = f"traffic/{ranks}/{name}"
            if key in known:
                continue
            command = [sys.executable, str(Path(__file__).parent / "fake_traffic.py"), str(ranks), name]
            done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
            lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            known[key] = (
                json.loads(lines[-1].removeprefix("RESULT ")) if lines else {"error": done.stderr[-300:]}
            )
            print(key, known[key], flush=True)
            save()
