"""What each codec, in one operation at a time, does to the gradients of the active layers of a trained model.

    python benchmarks/activations/codec_gradient_error.py [--models vit minilm] [--cache FOLDER]

Models and measure are those of `gradient_error.py`, which compares whole presets: for several random active sets of
5 % of the weights, |g - g_exact| / |g_exact| over the active weights together, dropout on. Here all operations but
one are exact. For codecs that round stochastically the error of the mean gradient of several draws is shown too: that
of an unbiased codec falls as one over the root of their number, that of nearest rounding does not fall.
Writes `codec_gradient_error.json` and `.md`.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from gradient_error import MODELS, batch_noise, freeze, gradients
from trained_models import Trained

from slimfit_ds.activations.apply import compress
from slimfit_ds.activations.config import ActivationsConfig
from slimfit_ds.training.surroundings import hardware, versions

Spec = dict[str, Any]


def codec(name: str, **options: Any) -> Spec:
    """How a configuration names a codec."""
    return {"name": name, **options}


CASES: dict[str, list[Spec]] = {
    "norm": [codec(n) for n in ("topk10", "lm1", "lm2", "lm4")]
    + [codec("int4", group=g) for g in (64, 32, 16)]
    + [codec("int6"), codec("int8")],
    "activation": [codec(n) for n in ("fixed4", "step1", "step2", "step4", "step5", "int8")],
    "attention": [codec(n) for n in ("fixed8", "int4", "int6", "int8")],
    "linear": [codec(n) for n in ("fixed8", "int4", "int6", "int8")],
    "block": [codec("int4"), codec("int6"), *(codec("int8", group=g) for g in (64, 32, 16))],
}
DRAWN: dict[str, list[Spec]] = {
    "linear": [codec("int2", rounding=r) for r in ("nearest", "stochastic")]
    + [codec("int4", rounding=r) for r in ("nearest", "stochastic")]
}


def errors(
    trained: Trained, operation: str, spec: Spec, rate: float, sets: int, draws: int
) -> dict[str, float]:
    """Mean and largest relative error over the active sets, and the mean error of the mean of `draws` gradients."""
    single, averaged = [], []
    for seed in range(sets):
        active = freeze(trained.model, rate, seed)
        batch = trained.batches[seed % len(trained.batches)]
        exact = gradients(trained.model, active, batch, seed)
        handle = compress(trained.model, ActivationsConfig(operations={operation: spec}))
        found = [gradients(trained.model, active, batch, seed) for _ in range(draws)]
        handle.remove()
        single.append(float((found[0] - exact).norm() / exact.norm()))
        averaged.append(float((torch.stack(found).mean(0) - exact).norm() / exact.norm()))
    return {"mean": sum(single) / sets, "max": max(single), "of_mean": sum(averaged) / sets}


def measure(trained: Trained, rate: float, sets: int, draws: int) -> list[dict[str, Any]]:
    """One row for each operation and codec."""
    rows: list[dict[str, Any]] = []
    for cases, repeats in ((CASES, 1), (DRAWN, draws)):
        for operation, specs in cases.items():
            for spec in specs:
                row = {"operation": operation, "codec": spec, "draws": repeats}
                rows.append(row | errors(trained, operation, spec, rate, sets, repeats))
                print(rows[-1], file=sys.stderr, flush=True)
    return rows


def markdown(report: dict[str, Any]) -> str:
    """The report as one table for each model."""
    lines = [
        f"fp32, dropout on, {report['rate']:.0%} of the weights frozen, {report['sets']} active sets, seed 0, "
        f"{report['hardware']['cpu']}. `{report['command']}`",
        "",
    ]
    for name, model in report["models"].items():
        lines += [
            f"## {name}, accuracy {model['accuracy']:.3f}; gradients of two batches differ by {model['noise']:.2f}",
            "",
            "| operation | codec | relative error, mean | largest | of the mean of draws |",
            "|---|---|---:|---:|---:|",
        ]
        for r in model["rows"]:
            what = ", ".join(str(value) for value in r["codec"].values())
            of_mean = f"{r['of_mean']:.4f} ({r['draws']})" if r["draws"] > 1 else ""
            lines.append(f"| {r['operation']} | {what} | {r['mean']:.4f} | {r['max']:.4f} | {of_mean} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--rate", type=float, default=0.95)
    parser.add_argument("--sets", type=int, default=4, help="random active sets, each with its own batch")
    parser.add_argument("--draws", type=int, default=16, help="gradients that are averaged")
    parser.add_argument("--cache", type=Path, help="keep the trained models in this folder")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    report: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "rate": args.rate,
        "sets": args.sets,
        "hardware": hardware(torch.device("cpu")),
        "versions": versions(),
        "models": {},
    }
    for name in args.models:
        cached = args.cache / f"{name}.pt" if args.cache else None
        if cached is not None and cached.exists():
            trained = torch.load(cached, weights_only=False)
        else:
            trained = MODELS[name]()
            if cached is not None:
                cached.parent.mkdir(parents=True, exist_ok=True)
                torch.save(trained, cached)
        report["models"][name] = {
            "accuracy": trained.accuracy,
            "noise": batch_noise(trained, args.rate, args.sets),
            "rows": measure(trained, args.rate, args.sets, args.draws),
        }
        # After each model: a long run that is stopped keeps what it has.
        args.output.mkdir(parents=True, exist_ok=True)
        target = args.output / "codec_gradient_error.json"
        target.write_text(json.dumps(report, indent=1) + "\n")
        target.with_suffix(".md").write_text(markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    main()
