"""CPU seconds of a step: methods take turns in one process. Wall time of real gloo ranks."""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peers_methods.building import Request
from peers_methods.methods import METHODS
from peers_methods.workloads import CASES, Case, make_batches

__all__ = ["SWEEPS", "rank_sweep", "time_sweep"]

METHOD_NAMES = ("full", "checkpointing", "balanced", "minimal")
_BASE = CASES["bert-small"]


def _wide(hidden: int, layers: int) -> Case:
    shape = {"model_type": "bert", "hidden_size": hidden, "num_hidden_layers": layers, "vocab_size": 4096}
    shape |= {"num_attention_heads": hidden // 64, "intermediate_size": 4 * hidden}
    return replace(_BASE, workload=replace(_BASE.workload, model=shape))


# sweep -> (title, x axis, points)
SWEEPS: dict[str, tuple[str, str, list[tuple[Any, Case]]]] = {
    "model": (
        "model width, BERT of 4 layers, 8 x 128",
        "h",
        [(hidden, _wide(hidden, 4)) for hidden in (128, 256, 512, 768)],
    ),
    "batch": (
        "batch, BERT 4 x h256, 128 tokens",
        "samples",
        [(size, _BASE.with_batch(size)) for size in (2, 8, 32)],
    ),
    "sequence": (
        "sequence, BERT 4 x h256, batch 8",
        "tokens",
        [(size, replace(_BASE, workload=replace(_BASE.workload, seq=size))) for size in (64, 128, 512)],
    ),
}
RANKS = (1, 2, 4)


def time_sweep(known: dict[str, Any], save: Callable[[], None], rounds: int, threads: int) -> None:
    """Fill `known`: `time/sweep/x` -> method -> CPU seconds (median) and the ratio to full (median of rounds)."""
    torch.set_num_threads(threads)
    for sweep, (_, _, points) in SWEEPS.items():
        for x, case in points:
            key = f"time/{sweep}/{x}"
            if key not in known:
                known[key] = _turns(case, rounds)
                print(key, {name: round(one["seconds"], 4) for name, one in known[key].items()}, flush=True)
                save()


def _turns(case: Case, rounds: int, warm_up: int = 2) -> dict[str, dict[str, float]]:
    device = torch.device("cpu")
    batches = make_batches(case, case.workload.batch, device)
    trainers = {
        name: METHODS[name].build(Request(case, case.workload.batch, device)) for name in METHOD_NAMES
    }
    seconds: dict[str, list[float]] = {name: [] for name in METHOD_NAMES}
    for number in range(warm_up + rounds):
        for name, trainer in trainers.items():
            # CPU time: what other jobs of the machine do counts least.
            begin = time.process_time()
            trainer.step(batches[number % len(batches)])
            if number >= warm_up:
                seconds[name].append(time.process_time() - begin)
    reference = seconds["full"]
    return {
        name: {
            "seconds": statistics.median(values),
            "ratio": statistics.median(a / b for a, b in zip(values, reference, strict=True)),
        }
        for name, values in seconds.items()
    }


def rank_sweep(known: dict[str, Any], save: Callable[[], None]) -> None:
    """`time/ranks/N` -> variant -> seconds, bytes sent and peak of a rank: real gloo ranks, a thread each."""
    for ranks in RANKS:
        key = f"time/ranks/{ranks}"
        if key in known:
            continue
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
        command += ["--master_port", str(port), str(Path(__file__).parent / "rank_worker.py")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        known[key] = json.loads(lines[-1].removeprefix("RESULT ")) if lines else {"error": done.stderr[-500:]}
        print(key, known[key], flush=True)
        save()
