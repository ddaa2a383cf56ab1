"""Time of a training step with each preset, as a ratio to plain PyTorch in the same run.

    OMP_NUM_THREADS=1 python benchmarks/activations/step_time.py [--models bert llama bert-768] [--steps 5] [--json out.json]

Forward and backward at fp32, 95 % of the weights frozen, on the CPU (or CUDA with --device). The methods take turns
within each round, so that a busy machine slows all of them; the table shows the median over rounds of the ratio.
`full` is plain PyTorch with everything trainable; `torch` is torch.utils.checkpoint on each block, with the same
weights frozen.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers as hf
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.checkpoint import checkpoint

from slimfit_ds.activations.apply import compress
from slimfit_ds.activations.config import ActivationsConfig

METHODS = ("exact", "full", "torch", "paper", "balanced", "lean", "minimal", "ultra")


def bert(hidden: int = 256, layers: int = 4) -> nn.Module:
    """Heads of 64, a feed-forward part of 4 h."""
    return hf.BertForSequenceClassification(
        hf.BertConfig(
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
            intermediate_size=4 * hidden,
            vocab_size=1000,
        )
    )


def llama() -> nn.Module:
    """4 layers, h 256."""
    return hf.LlamaForCausalLM(
        hf.LlamaConfig(
            hidden_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=896, vocab_size=1000, use_cache=False,
        )
    )  # fmt: skip


MODELS: dict[str, Callable[[], nn.Module]] = {
    "bert": bert,
    "llama": llama,
    # The width of BERT-base: matrix products cost h^2, codecs h.
    "bert-768": functools.partial(bert, 768, 3),
}


def freeze(model: nn.Module, rate: float, seed: int) -> None:
    """Freeze that share of the weights at random."""
    weights = [p for name, p in model.named_parameters() if name.endswith("weight")]
    for weight in random.Random(seed).sample(weights, int(rate * len(weights))):
        weight.requires_grad_(False)


def step_of(name: str, method: str, rate: float, rows: int, tokens: int, device: str) -> Callable[[], None]:
    """A function that runs one forward and backward pass."""
    torch.manual_seed(0)
    model = MODELS[name]().to(device).train()
    if method != "full":
        freeze(model, rate, seed=0)
    if method == "torch":
        model._set_gradient_checkpointing(True, functools.partial(checkpoint, use_reentrant=False))
    elif method != "full":
        compress(model, ActivationsConfig(preset=method))
    ids = torch.randint(1, 1000, (rows, tokens), device=device)
    labels = ids if name == "llama" else torch.zeros(rows, dtype=torch.long, device=device)

    def step() -> None:
        model.zero_grad()
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss.backward()
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def measure(
    name: str, rate: float, steps: int, rows: int, tokens: int, device: str
) -> dict[str, list[float]]:
    """Seconds of each round for each method."""
    runs = {method: step_of(name, method, rate, rows, tokens, device) for method in METHODS}
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    for _ in range(steps):
        for method, run in runs.items():
            # CPU seconds of this process: other jobs of the machine do not count.
            start = time.process_time() if device == "cpu" else time.perf_counter()
            run()
            end = time.process_time() if device == "cpu" else time.perf_counter()
            seconds[method].append(end - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--rate", type=float, default=0.95)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    shape = f"{options.rows} x {options.tokens} tokens, fp32, {options.rate:.0%} frozen"
    table = Table(title=f"seconds of a step as a ratio to plain PyTorch ({shape}, {options.device})")
    for column in ("model", "plain", *METHODS[1:]):
        table.add_column(column, justify="left" if column == "model" else "right")
    numbers = {}
    for name in options.models:
        seconds = measure(name, options.rate, options.steps, options.rows, options.tokens, options.device)
        plain = seconds["exact"]
        ratios = {
            m: statistics.median(s / p for s, p in zip(seconds[m], plain, strict=True)) for m in METHODS
        }
        numbers[name] = {"plain_seconds": statistics.median(plain), **ratios}
        table.add_row(name, f"{statistics.median(plain):.3f} s", *(f"{ratios[m]:.2f}" for m in METHODS[1:]))
    Console(width=120).print(table)
    if options.json:
        options.json.write_text(json.dumps(numbers, indent=2) + "\n")


if __name__ == "__main__":
    main()
