"""Relative error of the active layers' gradients against exact ones, on trained models, for each preset.

    python benchmarks/activations/gradient_error.py [--models minilm vit] [--rate 0.95] [--json out.json]

For each of several random active sets and held-out batches, the step is run with plain PyTorch and with the preset,
with the same random state (dropout on). The error of a set is |g - g_exact| / |g_exact| over the weights of its
active layers together; the table shows the mean over sets and the worst set, and the noise between two batches for
scale. fp32 on CPU.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from trained_models import Trained, minilm_on_sst2, vit_on_digits

from slimfit_ds.activations.apply import compress
from slimfit_ds.activations.config import ActivationsConfig

MODELS: dict[str, Callable[[], Trained]] = {"minilm": minilm_on_sst2, "vit": vit_on_digits}
PRESETS = ("paper", "balanced", "lean", "minimal", "ultra")


def freeze(model: nn.Module, rate: float, seed: int) -> list[Tensor]:
    """Freeze that share of the weights at random; returns those that train. Biases train."""
    weights = [p for name, p in model.named_parameters() if name.endswith("weight")]
    model.requires_grad_(True)
    frozen = random.Random(seed).sample(range(len(weights)), int(rate * len(weights)))
    for position in frozen:
        weights[position].requires_grad_(False)
    return [w for w in weights if w.requires_grad]


def gradients(model: nn.Module, active: list[Tensor], batch: dict[str, Tensor], seed: int) -> Tensor:
    """The gradients of `active` in one vector."""
    model.zero_grad()
    torch.manual_seed(seed)
    model(**batch).loss.backward()
    return torch.cat([w.grad.flatten() if w.grad is not None else torch.zeros(w.numel()) for w in active])


def errors(trained: Trained, preset: str, rate: float, sets: range, overrides: dict[str, str]) -> list[float]:
    """The relative error for each random active set."""
    found = []
    for seed in sets:
        active = freeze(trained.model, rate, seed)
        batch = trained.batches[seed % len(trained.batches)]
        exact = gradients(trained.model, active, batch, seed)
        # Masks of `philox` are not those of the exact gradients.
        operations = {"dropout": "replay"} | overrides
        handle = compress(
            trained.model, ActivationsConfig(preset=preset, operations=operations, chunk_tokens=None)
        )
        approximate = gradients(trained.model, active, batch, seed)
        handle.remove()
        found.append(float((approximate - exact).norm() / exact.norm()))
    return found


def batch_noise(trained: Trained, rate: float, sets: range) -> float:
    """The mean relative difference between the gradients of two batches."""
    found = []
    for seed in sets:
        active = freeze(trained.model, rate, seed)
        first, second = (
            gradients(trained.model, active, trained.batches[(seed + i) % len(trained.batches)], seed)
            for i in range(2)
        )
        found.append(float((first - second).norm() / first.norm()))
    return sum(found) / len(found)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--presets", nargs="*", default=list(PRESETS))
    parser.add_argument("--override", nargs="*", default=[], metavar="OPERATION=CODEC")
    parser.add_argument("--rate", type=float, default=0.95)
    parser.add_argument("--sets", type=int, default=10, help="random active sets, each with its own batch")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first set")
    parser.add_argument("--cache", type=Path, help="keep the trained models in this folder")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    sets = range(options.seed, options.seed + options.sets)
    overrides = dict(item.split("=", 1) for item in options.override)
    numbers: dict[str, dict[str, list[float]]] = {}
    table = Table(
        title=f"relative gradient error, mean (worst) of {options.sets} active sets, {options.rate:.0%} frozen"
    )
    for column in ("model", "accuracy", *options.presets, "batch noise"):
        table.add_column(column)
    for name in options.models:
        cached = options.cache / f"{name}.pt" if options.cache else None
        if cached is not None and cached.exists():
            trained = torch.load(cached, weights_only=False)
        else:
            trained = MODELS[name]()
            if cached is not None:
                torch.save(trained, cached)
        numbers[name] = {p: errors(trained, p, options.rate, sets, overrides) for p in options.presets}
        cells = [f"{sum(e) / len(e):.4f} ({max(e):.4f})" for e in numbers[name].values()]
        noise = f"{batch_noise(trained, options.rate, sets):.2f}"
        table.add_row(name, f"{trained.accuracy:.3f}", *cells, noise)
    Console(width=160).print(table)
    if options.json:
        options.json.write_text(json.dumps(numbers, indent=2) + "\n")


if __name__ == "__main__":
    main()
