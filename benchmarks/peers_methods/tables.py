"""The results as a table per model, ratios against full fine-tuning of the same run, and what it was run on."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import slimfit_ds
from peers_methods.methods import METHODS
from peers_methods.workloads import CASES

__all__ = ["environment", "estimated_table", "hardware_name", "table"]

_PACKAGES = ("torch", "transformers", "deepspeed", "peft", "torchao", "bitsandbytes", "galore-torch", "badam")
_COLUMNS = (
    "method",
    "peak, MiB",
    "of full",
    "reserved (CPU: process RSS), MiB",
    "states on the device, MiB",
    "on the host, MiB",
    "saved for backward, MiB",
    "{clock} per step (quartiles)",
    "of full",
    "{unit}/s",
    "FLOPs of full",
    "TFLOP/s",
    "largest batch 24 / 32 GB",
    "loss, first and last",
)


def hardware_name(device: str) -> str:
    """The card's name, or the CPU's with its cores."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return f"{name or platform.processor()}, {os.cpu_count()} cores"


def environment(device: str, threads: int) -> dict[str, Any]:
    """What a result depends on besides its settings."""
    versions = {}
    for package in (*_PACKAGES, "apollo-torch", "triton"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            cwd=Path(slimfit_ds.__file__).parent,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return {
        "hardware": hardware_name(device),
        "device": device,
        "threads": threads,
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit,
        "cuda": torch.version.cuda,
    }


def table(cases: Sequence[str], methods: Sequence[str], results: Mapping[str, Mapping[str, Any]]) -> str:
    """A Markdown table for each case that has a result."""
    parts = []
    for case in cases:
        rows = [
            (method, results.get(f"{case}__{method}__step"), results.get(f"{case}__{method}__fit"))
            for method in methods
        ]
        if any(step is not None for _, step, _ in rows):
            parts.append(_one(case, rows))
    return "\n\n".join(parts)


def _one(case: str, rows: Sequence[tuple[str, Any, Any]]) -> str:
    full = next((step for method, step, _ in rows if method == "full" and _ok(step)), None)
    cuda = any(_ok(step) and step["settings"]["device"] == "cuda" for _, step, _ in rows)
    clock = "s" if cuda else "CPU s"
    header = [column.format(unit=CASES[case].unit, clock=clock) for column in _COLUMNS]
    lines = [f"### {CASES[case].label}", "", _line(header), _line(["---", *["---:"] * (len(header) - 1)])]
    for method, step, fit in rows:
        if step is None:
            continue
        label = METHODS[method].label
        if step.get("facts", {}).get("backend") == "slim":
            label += " (without DeepSpeed: states on the device, fp32 weights)"
        lines.append(_line([label, *(_cells(step, full) if _ok(step) else _reason(step)), *_last(step, fit)]))
    return "\n".join(lines)


def _ok(step: Any) -> bool:
    return step is not None and step["status"] == "ok"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _reason(step: Mapping[str, Any]) -> list[str]:
    reason = str(step.get("error", "")).replace("|", "/")
    return [f"{step['status']}: {reason}"[:180], *[""] * 10]


def _mib(value: float | None) -> str:
    return "" if value is None else f"{value / 2**20:,.1f}" if value < 2**30 else f"{value / 2**20:,.0f}"


def _cells(step: Mapping[str, Any], full: Mapping[str, Any] | None) -> list[str]:
    # On a CPU that others share, the time that this process had counts.
    clock = "seconds" if step["settings"]["device"] == "cuda" else "cpu_seconds"
    low, high = step[f"{clock}_quartiles"]
    seconds, flops = step[clock], step["flops"]

    def ratio(key: str) -> str:
        return f"{step[key] / full[key]:.3f}" if full else ""

    return [
        _mib(step["peak"]),
        ratio("peak"),
        _mib(step.get("cuda_peak_reserved") or step["process_rss"]),
        _mib(step["state_bytes"]),
        _mib(step["host_bytes"]) if step["host_bytes"] else "",
        _mib(step["saved_activations"]),
        f"{seconds:.4f} ({low:.4f} to {high:.4f})",
        ratio(clock),
        f"{step['per_step'] / seconds:,.0f}"
        if step["per_step"] / seconds > 100
        else f"{step['per_step'] / seconds:.1f}",
        ratio("flops"),
        f"{flops / seconds / 1e12:.3g}",
    ]


def _last(step: Mapping[str, Any], fit: Any) -> list[str]:
    largest = ""
    if fit is not None:
        if fit["status"] == "ok":
            largest = " / ".join(f"{size:,}" for size in fit["largest"].values())
        elif fit["status"] != "unavailable":
            largest = fit["status"]
    loss = f"{step['loss_first']:.3f}, {step['loss_last']:.3f}" if _ok(step) else ""
    return [largest, loss]


def estimated_table(methods: Sequence[str], estimated: Mapping[str, Mapping[str, Any]]) -> str:
    """What the estimator says of published shapes on a GPU: nothing here was measured."""
    parts = []
    for case in dict.fromkeys(name.split("__")[0] for name in estimated):
        full = _peak(estimated.get(f"{case}__full"))
        lines = [
            f"### {CASES[case].label}: estimated for a GPU, not measured",
            "",
            "| method | peak, GiB | of full | largest batch 24 GB | 32 GB |",
            "|---|---:|---:|---:|---:|",
        ]
        for method in methods:
            found = estimated.get(f"{case}__{method}")
            if found is None:
                continue
            peak = _peak(found)
            if peak is None:
                cells = [str(found["error"]).replace("|", "/")[:100], "", "", ""]
            else:
                cells = [f"{peak / 2**30:.2f}", f"{peak / full:.3f}" if full else ""]
                cells += [f"{size:,}" if size else "does not fit" for size in found["largest"].values()]
            lines.append(_line([METHODS[method].label, *cells]))
        parts.append("\n".join(lines))
    return "\n" + "\n\n".join(parts) + "\n" if parts else ""


def _peak(found: Mapping[str, Any] | None) -> int | None:
    return next(iter(found["peaks"].values())) if found and "peaks" in found else None
