"""Relative error of gradients against exact ones, on trained models, for each preset.

    python benchmarks/activations/gradient_error.py [--models smollm2 minilm vit] [--rate 0.0] [--csv results.csv]

A step is run with plain PyTorch and with each preset, with the same random state (dropout on), in fp32 on a CPU. For
what trains, the error is |g - g_exact| / |g_exact|: of all of it together (whole), and of each matrix (median, worst). Several
random active sets, each with its batch, give one row: the mean of whole and median, the worst matrix of all sets.

Batches of SmolLM2: `padded`, 4 questions and answers of GSM8K cut at 160 tokens; `packed`, the same in one row without
padding, each with its own positions; `text`, one row of 1024 tokens of sentences. `--planted` adds that many medians to two
channels of the first token of what enters the first block. `--steps` trains that many steps before (SmolLM2).

A row of `benchmarks/results/gradient_error.csv` is one preset in one setting; those that are there are not measured again.
The preset `two batches` is the difference between the gradients of two batches, for scale.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import Study, machine
from trained_models import Trained, minilm_on_sst2, smollm2, vit_on_digits

from slimfit_ds.activations.apply import compress
from slimfit_ds.activations.config import PRESETS, ActivationsConfig

MODELS: dict[str, Callable[[], Trained]] = {
    "smollm2": smollm2,
    "minilm": minilm_on_sst2,
    "vit": vit_on_digits,
}
SETTING = ("model", "batch", "steps", "frozen", "planted", "preset")
NOISE = "two batches"


def freeze(model: nn.Module, rate: float, seed: int) -> list[Tensor]:
    """Freeze that share of the weights at random; return those that train. Biases train."""
    weights = [p for name, p in model.named_parameters() if name.endswith("weight")]
    model.requires_grad_(True)
    frozen = random.Random(seed).sample(range(len(weights)), int(rate * len(weights)))
    for position in frozen:
        weights[position].requires_grad_(False)
    return [w for w in weights if w.requires_grad]


def gradients(model: nn.Module, active: list[Tensor], batch: dict[str, Tensor], seed: int) -> list[Tensor]:
    """Return the gradient of each of `active`."""
    model.zero_grad()
    torch.manual_seed(seed)
    model(**batch).loss.backward()
    return [torch.zeros_like(w) if w.grad is None else w.grad for w in active]


def relative(found: list[Tensor], exact: list[Tensor]) -> float:
    """Return |found - exact| / |exact| of all tensors together."""
    off = sum(float((a - b).square().sum()) for a, b in zip(found, exact, strict=True))
    return (off / sum(float(b.square().sum()) for b in exact)) ** 0.5


@contextmanager
def planted(model: nn.Module, medians: float) -> Iterator[None]:
    """Add outliers to two channels of the first token of what the embeddings give, in every sample."""
    embedding = next(
        m for m in model.modules() if isinstance(m, nn.Embedding) or type(m).__name__.endswith("Embeddings")
    )

    def add(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        size = medians * output.detach().abs().median()
        spike = torch.zeros_like(output)
        spike[:, 0, [5, output.shape[-1] // 2]] = size
        return output + spike

    handle = embedding.register_forward_hook(add) if medians else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


def measure(
    trained: Trained, preset: str, rate: float, sets: range, medians: float, overrides: dict[str, str]
) -> dict[str, Any]:
    """Return the whole, the median and the worst error, and the worst matrix."""
    names = {id(p): name for name, p in trained.model.named_parameters()}
    # Masks of `philox` are not those of the exact gradients.
    config = ActivationsConfig(preset=preset, operations={"dropout": "replay"} | overrides, chunk_tokens=None)
    wholes, middles, worst = [], [], (0.0, "")
    for seed in sets:
        active = freeze(trained.model, rate, seed)
        batch = trained.batches[seed % len(trained.batches)]
        with planted(trained.model, medians):
            exact = exact_gradients(trained, rate, seed, medians)
            handle = compress(trained.model, config)
            rough = gradients(trained.model, active, batch, seed)
            handle.remove()
        each = sorted(
            (relative([a], [b]), names[id(w)])
            for w, a, b in zip(active, rough, exact, strict=True)
            if w.dim() > 1 and b.any()
        )
        wholes.append(relative(rough, exact))
        middles.append(each[len(each) // 2][0])
        worst = max(worst, each[-1])
    return {
        "whole": round(sum(wholes) / len(wholes), 5),
        "whole_worst_set": round(max(wholes), 5),
        "median": round(sum(middles) / len(middles), 5),
        "worst": round(worst[0], 5),
        "worst_matrix": worst[1],
    }


_EXACT: dict[tuple[Any, ...], list[Tensor]] = {}


def exact_gradients(trained: Trained, rate: float, seed: int, medians: float) -> list[Tensor]:
    """Return the gradients of plain PyTorch; the last ones are remembered, for the next preset."""
    key = (id(trained), rate, seed, medians)
    if key not in _EXACT:
        if len(_EXACT) > 20 or sum(p.numel() for p in trained.model.parameters()) > 10**8:
            _EXACT.clear()
        active = freeze(trained.model, rate, seed)
        batch = trained.batches[seed % len(trained.batches)]
        _EXACT[key] = [g.clone() for g in gradients(trained.model, active, batch, seed)]
    return _EXACT[key]


def batch_noise(trained: Trained, rate: float, sets: range) -> float:
    """Return the mean relative difference between the gradients of two batches."""
    found = []
    for seed in sets:
        active = freeze(trained.model, rate, seed)
        batches = (trained.batches[(seed + i) % len(trained.batches)] for i in range(2))
        first, second = ([g.clone() for g in gradients(trained.model, active, b, seed)] for b in batches)
        found.append(relative(second, first))
    return sum(found) / len(found)


def load(name: str, cache: Path | None, **options: Any) -> Trained:
    """Return a trained model, from the folder `cache` where it lies there already."""
    file = None if cache is None else cache / f"{'-'.join([name, *map(str, options.values())])}.pt"
    if file is not None and file.exists():
        return torch.load(file, weights_only=False)
    trained = MODELS[name](**options)
    if file is not None:
        torch.save(trained, file)
    return trained


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--presets", nargs="*", default=[p for p in PRESETS if p != "exact"])
    parser.add_argument("--override", nargs="*", default=[], metavar="OPERATION=CODEC")
    parser.add_argument("--rate", type=float, default=0.0, help="share of the weights that is frozen")
    parser.add_argument("--sets", type=int, default=1, help="random active sets, each with its own batch")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first set")
    parser.add_argument("--batch", choices=("padded", "packed", "text"), default="padded", help="of SmolLM2")
    parser.add_argument("--steps", type=int, default=0, help="train SmolLM2 before")
    parser.add_argument("--planted", type=float, default=0, help="outliers, in medians of the hidden state")
    parser.add_argument("--cache", type=Path, help="keep the trained models in this folder")
    options = parser.parse_args()
    sets = range(options.seed, options.seed + options.sets)
    overrides = dict(item.split("=", 1) for item in options.override)
    study = Study("gradient_error", SETTING)
    for name in options.models:
        decoder = {"batch": options.batch, "steps": options.steps} if name == "smollm2" else {}
        setting = {
            "model": name,
            "batch": decoder.get("batch", "task"),
            "steps": decoder.get("steps"),
            "frozen": options.rate,
            "planted": options.planted,
        }
        trained = load(name, options.cache, **decoder)
        presets = [*options.presets, *([NOISE] if len(trained.batches) > 1 and not options.planted else [])]
        for preset in presets:
            row = {**setting, "preset": preset}
            if not overrides and study.has(row):
                continue
            if preset == NOISE:
                row["whole"] = round(batch_noise(trained, options.rate, sets), 3)
            else:
                row |= measure(trained, preset, options.rate, sets, options.planted, overrides)
            print(
                *(f"{key} {value}" for key, value in row.items() if value not in (None, "")),
                sep=", ",
                flush=True,
            )
            if not overrides:
                study.add({**row, "sets": len(sets), **machine()})


if __name__ == "__main__":
    main()
