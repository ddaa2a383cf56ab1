"""Bytes and mean squared error of each codec on N(0, 1), and of each step derivative on f'(N(0, 1)).

    python benchmarks/activations/codec_error.py

Softmax probabilities (`ufixed8`) are rows of softmax(3 N(0, 1)) over 128 positions; bytes are those of a bf16
tensor. Adds what `benchmarks/results/codec_error.csv` (`--csv`) lacks.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import Study, machine, markdown


def cases(x: Tensor) -> Iterator[tuple[str, str, Tensor, Tensor, dict[str, Any]]]:
    """Yield codec, name of the data, the data, what it should decode to, and options of the codec."""
    from slimfit_ds.activations.codecs import codec_names
    from slimfit_ds.activations.codecs.step_derivative import ACTIVATIONS

    probabilities = torch.softmax(3 * x, dim=-1)
    for name in codec_names():
        if name.startswith("step"):
            for function in ACTIVATIONS:
                slope = ACTIVATIONS[function].derivative(x.double())
                yield name, f"f'(N(0,1)), f = {function}", x, slope, {"activation": function}
        elif name == "ufixed8":
            yield name, "softmax(3 N(0,1))", probabilities, probabilities, {}
        else:
            yield name, "N(0,1)", x, x, {}


def main() -> None:
    from slimfit_ds.activations.codecs import get_codec

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--numel", type=int, default=1 << 22, help="elements")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", default="codec_error", help="name of a study, or a path that ends in .csv")
    args = parser.parse_args()
    study = Study(args.csv, ("codec", "rounding", "data"))
    x = torch.randn(args.numel // 128, 128, generator=torch.Generator().manual_seed(args.seed))
    for name, data, given, wanted, options in cases(x):
        row = {"codec": name, "rounding": options.get("rounding"), "data": data}
        if study.has(row):
            continue
        codec = get_codec(name, **options)
        mse = (codec.decode(codec.encode(given)).double() - wanted.double()).square().mean().item()
        row["bytes_per_element"] = codec.nbytes(given.shape, torch.bfloat16) / given.numel()
        row |= {"mse": mse, "relative_error": (mse / wanted.double().square().mean().item()) ** 0.5}
        study.add(row | {"elements": args.numel, "dtype": "fp32", "seed": args.seed} | machine())
    titles = ["codec", "rounding", "data", "bytes/element", "mean squared error", "relative error"]
    lines = [
        [
            r["codec"],
            r["rounding"] or "",
            r["data"],
            r["bytes_per_element"],
            f"{r['mse']:.4g}",
            f"{r['relative_error']:.3g}",
        ]
        for r in study.rows()
    ]
    print(markdown(titles, lines, left=3))


if __name__ == "__main__":
    main()
