"""Time of each fused kernel beside what it replaces, in the same run, and whether both give the same.

    python benchmarks/activations/kernel_speed.py --device cuda --tokens 49152
    python benchmarks/activations/kernel_speed.py --device cpu --tokens 8     # dry run in Triton's interpreter

`fused`: the kernels. `apart`: the codecs' kernels and PyTorch's operations around them, as without fusing. `plain`: PyTorch
without codecs. Bytes are those the fused kernel has to read and write. Writes `kernel_speed_<device>.json` and `.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

if "cpu" in sys.argv:
    # Read when Triton is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
from codec_speed import seconds
from torch import Tensor, nn

from slimfit_ds.activations import channels
from slimfit_ds.activations.codecs import absmax, exact, get_codec, magnitude_table
from slimfit_ds.activations.ops import fused_activation, norm, philox_dropout
from slimfit_ds.activations.ops.activation import compressed_activation
from slimfit_ds.activations.ops.norm import NormKind, compressed_norm
from slimfit_ds.training.surroundings import hardware, versions

Passes = tuple[Callable[[], Any], Callable[[], Any]]


@dataclass(frozen=True)
class Case:
    """One pair of passes.

    Attributes:
        name: what is fused, and the codec.
        decides: the module that chooses between the kernels and torch.
        run: the forward pass: results, and inputs whose gradients are wanted.
        plain: the same without codecs.
        stored: bytes per element that forward keeps.
        same_values: whether a fused forward pass gives the bits of PyTorch's (a mask of its own does not).
    """

    name: str
    decides: ModuleType
    run: Callable[[], tuple[Tensor, list[Tensor]]]
    plain: Callable[[], tuple[Tensor, list[Tensor]]]
    stored: float
    same_values: bool = True


@contextmanager
def triton_in(modules: Sequence[ModuleType], fuses: bool, interpreted: bool) -> Iterator[None]:
    """The modules take their kernels or do not; in the interpreter the codecs are told that theirs run too."""

    def on(x: Tensor) -> bool:
        return x.dtype != torch.float64

    def off(x: Tensor) -> bool:
        return False

    patches = (
        []
        if fuses and not interpreted
        else [mock.patch.object(m, "runs_in_triton", on if fuses else off) for m in modules]
    )
    if interpreted:
        patches += [
            mock.patch.object(m, "runs_in_triton", on) for m in (absmax, channels, exact, magnitude_table)
        ]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def cases(x: Tensor) -> list[Case]:
    """The cases for data like `x` [tokens, hidden]."""
    found = []
    for function, layer, spec in (
        ("gelu", nn.GELU(), {"name": "step5", "activation": "gelu", "scale": 2.0}),
        ("gelu_tanh", nn.GELU("tanh"), {"name": "step4", "activation": "gelu_tanh"}),
        ("relu", nn.ReLU(), {"name": "step1", "activation": "relu"}),
        ("silu", nn.SiLU(), {"name": "int4"}),
    ):
        codec, leaf = get_codec(**spec), x.detach().clone().requires_grad_()
        found.append(
            Case(
                f"{function}, {spec['name']}",
                fused_activation,
                lambda layer=layer, codec=codec, leaf=leaf, function=function: (
                    compressed_activation(layer.forward, leaf, codec, function=function),
                    [leaf],
                ),
                lambda layer=layer, leaf=leaf: (layer(leaf), [leaf]),
                codec.nbytes(x.shape, x.dtype) / x.numel(),
            )
        )
    for trains in (False, True):
        for centred in (True, False):
            found.append(_norm_case(x, centred, trains))
    drop, leaf = nn.Dropout(0.1), x.detach().clone().requires_grad_()
    found.append(
        Case(
            "dropout, philox",
            philox_dropout,
            lambda: (philox_dropout.philox_dropout(drop, leaf, 0.1), [leaf]),
            lambda: (drop(leaf), [leaf]),
            0.0,
            same_values=False,
        )
    )
    return found


def _norm_case(x: Tensor, centred: bool, trains: bool) -> Case:
    hidden, codec = x.shape[-1], get_codec("int6" if trains else "int4")
    layer = (nn.LayerNorm(hidden) if centred else nn.RMSNorm(hidden, eps=1e-5)).to(x)
    layer.requires_grad_(trains)
    kind, bias, leaf = (
        NormKind(centred, 1e-5),
        getattr(layer, "bias", None),
        x.detach().clone().requires_grad_(),
    )
    wanted = [leaf, *(p for p in layer.parameters() if trains)]
    return Case(
        f"{type(layer).__name__}{', trains' if trains else ''}, {codec.name}",
        norm,
        lambda: (compressed_norm(layer.forward, leaf, layer.weight, bias, kind, codec), wanted),
        lambda: (layer(leaf), wanted),
        codec.nbytes(x.shape, x.dtype) / x.numel(),
    )


def measure(x: Tensor, repeats: int, interpreted: bool) -> list[dict[str, Any]]:
    """Two rows for each case: forward and backward."""
    rows = []
    dy = torch.randn_like(x)
    for case in cases(x):
        ways: dict[str, Passes] = {}
        outputs, gradients = {}, {}
        for way in ("fused", "apart", "plain"):
            run = case.plain if way == "plain" else case.run

            def inside(task: Callable[[], Any], way: str = way, case: Case = case) -> Any:
                with triton_in([case.decides], way == "fused", interpreted):
                    return task()

            torch.manual_seed(0)
            y, wanted = inside(run)

            def back(y: Tensor = y, wanted: list[Tensor] = wanted) -> Any:
                return torch.autograd.grad(y, wanted, dy, retain_graph=True)

            ways[way] = (
                (lambda run=run, inside=inside: inside(run)),
                (lambda back=back, inside=inside: inside(back)),
            )
            outputs[way], gradients[way] = y.detach(), ways[way][1]()
        elements, size = x.numel(), x.element_size()
        for direction, name in enumerate(("forward", "backward")):
            taken = seconds({way: ways[way][direction] for way in ways}, x.device, repeats)
            moved = elements * (2 * size + case.stored)
            rows.append(
                {
                    "case": case.name,
                    "dtype": str(x.dtype).removeprefix("torch."),
                    "direction": name,
                    **{f"{way}_seconds": taken[way] for way in ways},
                    "fused_gb_per_s": moved / taken["fused"] / 1e9,
                    "difference": _difference(case, name, outputs, gradients),
                }
            )
    return rows + _operands(x, repeats, interpreted)


def _difference(
    case: Case, direction: str, outputs: dict[str, Tensor], gradients: dict[str, Any]
) -> float | None:
    """The largest difference between fused and apart over the largest value; `None` where masks differ."""
    if not case.same_values:
        return None
    pairs = [(outputs["fused"], outputs["apart"])]
    if direction == "backward":
        pairs = list(zip(gradients["fused"], gradients["apart"], strict=True))
    return max(float((a.double() - b.double()).abs().max() / b.double().abs().max()) for a, b in pairs)


def _operands(x: Tensor, repeats: int, interpreted: bool) -> list[dict[str, Any]]:
    """Queries, keys and values, packed and unpacked together or one by one."""
    codec = get_codec("int6", group=128)
    operands = [torch.randn_like(x) for _ in range(3)]
    with triton_in([absmax], True, interpreted):
        together = codec.encode_all(operands)
        alone = [codec.encode(t) for t in operands]
        equal = all(
            torch.equal(a, b)
            for p, q in zip(together, alone, strict=True)
            for a, b in zip(p.tensors, q.tensors, strict=True)
        )
        rows = []
        for name, fused, apart in (
            ("forward", lambda: codec.encode_all(operands), lambda: [codec.encode(t) for t in operands]),
            ("backward", lambda: codec.decode_all(together), lambda: [codec.decode(e) for e in together]),
        ):
            taken = seconds({"fused": fused, "apart": apart}, x.device, repeats)
            moved = sum(t.numel() * t.element_size() for t in operands) + sum(e.nbytes for e in together)
            rows.append(
                {
                    "case": "queries, keys, values, int6",
                    "dtype": str(x.dtype).removeprefix("torch."),
                    "direction": name,
                    "fused_seconds": taken["fused"],
                    "apart_seconds": taken["apart"],
                    "plain_seconds": None,
                    "fused_gb_per_s": moved / taken["fused"] / 1e9,
                    "difference": 0.0 if equal else float("inf"),
                }
            )
    return rows


def forms(device: torch.device, interpreted: bool) -> dict[str, dict[str, str | None]]:
    """By function and dtype: the form of the kernel that gives the module's values exactly; `None`: none does."""
    modules = {
        "gelu": nn.GELU(), "gelu_tanh": nn.GELU("tanh"), "silu": nn.SiLU(), "relu": nn.ReLU(),
        "gelu_tanh in single operations": _NewGELU(), "quick_gelu": _QuickGELU(),
    }  # fmt: skip
    found: dict[str, dict[str, str | None]] = {}
    for name, module in modules.items():
        for dtype in (torch.bfloat16, torch.float16):
            with torch.no_grad():
                x = torch.zeros(1, dtype=dtype, device=device)
                form = fused_activation._form_of(module.forward, name.split()[0], x)
            found.setdefault(name, {})[str(dtype)] = None if form is None else form.__name__
    return found


class _NewGELU(nn.Module):
    """transformers' `gelu_new`, in its words."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1.0 + torch.tanh((2.0 / torch.pi) ** 0.5 * (x + 0.044715 * torch.pow(x, 3.0))))


class _QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| kernel | dtype | pass | fused, µs | apart, µs | plain, µs | fused, GB/s | largest difference |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        times = [row[f"{way}_seconds"] for way in ("fused", "apart", "plain")]
        cells = ["" if t is None else f"{t * 1e6:.0f}" for t in times]
        difference = row["difference"]
        shown = "other mask" if difference is None else "none" if difference == 0 else f"{difference:.1e}"
        lines.append(
            f"| {row['case']} | {row['dtype']} | {row['direction']} | {' | '.join(cells)} "
            f"| {row['fused_gb_per_s']:.0f} | {shown} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tokens", type=int, default=128 * 384)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    device, interpreted = torch.device(args.device), args.device == "cpu"
    torch.manual_seed(args.seed)
    data = torch.randn(args.tokens, args.hidden).to(device)
    rows = [
        row
        for name in args.dtypes
        for row in measure(data.to(getattr(torch, name)), args.repeats, interpreted)
    ]
    report = {
        "command": shlex.join(["python", *sys.argv]),
        "seed": args.seed,
        "shape": list(data.shape),
        "hardware": hardware(device),
        "versions": versions(),
        "forms": forms(device, interpreted),
        "rows": rows,
    }
    place = report["hardware"].get("gpu") or "a CPU, in Triton's interpreter: times mean nothing"
    text = (
        f"Tensor {tuple(data.shape)}, N(0, 1), seed {args.seed}, on {place}, torch {torch.__version__}; "
        f"fastest of {args.repeats} calls in turns. `{report['command']}`\n\n{table(rows)}\n\n"
        f"Forms of the functions that give the module's values exactly: {json.dumps(report['forms'])}\n"
    )
    args.output.mkdir(parents=True, exist_ok=True)
    target = args.output / f"kernel_speed_{device.type}"
    target.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    target.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
