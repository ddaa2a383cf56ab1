"""Bytes and mean squared error of each codec on N(0, 1), and of each step derivative on f'(N(0, 1)).

    python benchmarks/activations/codec_error.py

Softmax probabilities (`uint8`, `ufixed8`) are rows of softmax(3 N(0, 1)) over 128 positions.
Writes `codec_error.json` and `.md`.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimfit_ds.activations.codecs import codec_names, get_codec
from slimfit_ds.activations.codecs.step_derivative import ACTIVATIONS
from slimfit_ds.training.surroundings import versions

PROBABILITIES = ("uint8", "ufixed8")


def row(name: str, x: Tensor, reference: Tensor, data: str, **options: Any) -> dict[str, Any]:
    """Bytes and error of one codec; `reference` is what it should decode to."""
    codec = get_codec(name, **options)
    decoded = codec.decode(codec.encode(x)).double()
    error = (decoded - reference.double()).square().mean().item()
    return {
        "codec": name,
        "options": options,
        "data": data,
        "bytes_per_element": codec.nbytes(x.shape, torch.bfloat16) / x.numel(),
        "mse": error,
        "relative_error": (error / reference.double().square().mean().item()) ** 0.5,
    }


def measure(numel: int, seed: int) -> list[dict[str, Any]]:
    """One row for each codec, on fp32 data."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(numel // 128, 128, generator=generator)
    probabilities = torch.softmax(3 * x, dim=-1)
    rows = []
    for name in codec_names():
        if name.startswith("step"):
            for function in ACTIVATIONS:
                slope = ACTIVATIONS[function].derivative(x.double())
                rows.append(row(name, x, slope, f"f'(N(0,1)), f = {function}", activation=function))
        elif name in PROBABILITIES:
            rows.append(row(name, probabilities, probabilities, "softmax(3 N(0,1))"))
        elif name == "mask":
            rows.append(row(name, x > 0, x > 0, "booleans"))
        elif name.startswith("int"):
            rows += [row(name, x, x, "N(0,1)", rounding=r) for r in ("nearest", "stochastic")]
        else:
            rows.append(row(name, x, x, "N(0,1)"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--numel", type=int, default=1 << 22)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    rows = measure(args.numel, args.seed)
    command = shlex.join(["python", *sys.argv])
    lines = [
        f"{args.numel} fp32 elements, seed {args.seed}; bytes are those of a bf16 tensor. `{command}`",
        "",
        "| codec | options | data | bytes/element | mean squared error | relative error |",
        "|---|---|---|---:|---:|---:|",
    ]
    for r in rows:
        options = ", ".join(str(v) for k, v in r["options"].items() if k != "activation")
        lines.append(
            f"| {r['codec']} | {options} | {r['data']} | {r['bytes_per_element']:.4g} | {r['mse']:.4g} "
            f"| {r['relative_error']:.3g} |"
        )
    text = "\n".join(lines) + "\n"
    args.output.mkdir(parents=True, exist_ok=True)
    report = {"command": command, "seed": args.seed, "versions": versions(), "rows": rows}
    (args.output / "codec_error.json").write_text(json.dumps(report, indent=1) + "\n")
    (args.output / "codec_error.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
