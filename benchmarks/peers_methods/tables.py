"""The results as a table per model, ratios against full fine-tuning that took turns, and what it was run on."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import slimfit_ds
from peers_methods.methods import METHODS
from peers_methods.turns import noise
from peers_methods.workloads import CASES

__all__ = ["BRIEF", "Row", "environment", "estimated_table", "ground", "heading", "rows_of", "table"]

_PACKAGES = ("torch", "transformers", "deepspeed", "peft", "torchao", "bitsandbytes", "galore-torch", "badam")
BRIEF = (
    "peak",
    "peak_of_full",
    "states",
    "host",
    "time",
    "time_of_full",
    "wall_of_full",
    "throughput",
    "flops",
    "fit",
)
"""Columns for a document; the table of the results folder has all."""


def hardware_name(device: str) -> str:
    """The card's name, or the CPU's with its cores."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return f"{name or platform.processor()}, {os.cpu_count()} cores"


def environment(device: str, threads: int) -> dict[str, Any]:
    """What a result depends on besides its settings."""
    versions: dict[str, str | None] = {}
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


@dataclass(frozen=True)
class Row:
    """What a row is made of.

    Args:
        method: its name.
        step: result of its step cell; any status.
        fit: result of its fit cell, measured; None: none.
        full: result of full fine-tuning of the same case where it is `ok`.
        estimated: largest batches by the estimator; None: none.
    """

    method: str
    step: Mapping[str, Any]
    fit: Mapping[str, Any] | None = None
    full: Mapping[str, Any] | None = None
    estimated: Mapping[str, Any] | None = None

    @property
    def ok(self) -> bool:
        """Whether there is anything to tell."""
        return bool(self.step["status"] == "ok")

    @property
    def label(self) -> str:
        """The method, and how it differs from what its name says."""
        label = METHODS[self.method].label
        if self.step.get("facts", {}).get("backend") == "slim":
            label += " (without DeepSpeed: states on the device, fp32 weights)"
        return label

    @property
    def reason(self) -> str:
        """Why there are no numbers."""
        return f"{self.step['status']}: {str(self.step.get('error', '')).replace('|', '/')}"[:180]

    @property
    def clock(self) -> str:
        """On a CPU that others share, the time that this process had counts."""
        return "seconds" if self.step["settings"]["device"] == "cuda" else "cpu_seconds"

    def ratio(self, key: str) -> float | None:
        """Against full fine-tuning in its own process."""
        return self.step[key] / self.full[key] if self.full else None

    def time_ratio(self, clock: str) -> tuple[float, bool] | None:
        """Against full fine-tuning, and whether both took turns."""
        if "of_full" in self.step:
            return self.step["of_full"][clock], True
        ratio = self.ratio(clock)
        return None if ratio is None else (ratio, False)


def _mib(value: float | None) -> str:
    return "" if not value else f"{value / 2**20:,.1f}" if value < 2**30 else f"{value / 2**20:,.0f}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _reserved(row: Row) -> str:
    return _mib(row.step.get("cuda_peak_reserved") or row.step["process_rss"])


def _time(row: Row) -> str:
    low, high = row.step[f"{row.clock}_quartiles"]
    return f"{row.step[row.clock]:.4f} ({low:.4f} to {high:.4f})"


def _meanwhile(row: Row) -> str:
    return f"{row.step['full_meanwhile'][row.clock]:.4f}" if "full_meanwhile" in row.step else ""


def _time_of_full(row: Row, clock: str | None = None) -> str:
    clock = clock or row.clock
    found = row.time_ratio(clock)
    if found is None:
        return ""
    ratio, paired = found
    if not paired:
        return f"{ratio:.3f} †"
    low, high = row.step["of_full_quartiles"][clock]
    return f"{ratio:.3f} ({low:.3f} to {high:.3f})"


def _throughput(row: Row) -> str:
    rate = row.step["per_step"] / row.step[row.clock]
    return f"{rate:,.0f}" if rate > 100 else f"{rate:.1f}"


def _fit(row: Row) -> str:
    if row.fit is not None:
        if row.fit["status"] == "ok":
            return " / ".join(f"{size:,}" for size in row.fit["largest"].values())
        return "" if row.fit["status"] == "unavailable" else str(row.fit["status"])
    if row.estimated is None:
        return ""
    return " / ".join(dict.fromkeys(_batches(row.estimated))) or f"not simulated: {_why(row.estimated)}"


def _batches(found: Mapping[str, Any]) -> list[str]:
    """The largest batches of an estimate as texts, one per card; none if it failed."""
    micro = f", micro-batch {found['micro_batch']}" if "micro_batch" in found else ""
    texts = {"any": f"any{micro}", 0: f"none{micro}"}
    return [texts.get(size) or f"{size:,}" for size in found.get("largest", {}).values()]


def _why(found: Mapping[str, Any]) -> str:
    return str(found["error"]).replace("|", "/")[:100]


# key -> title (CUDA, CPU), value; no title: no such column there.
_COLUMNS: dict[str, tuple[str | None, str | None, Callable[[Row], str]]] = {
    "peak": ("peak allocated, MiB", "peak, MiB", lambda row: _mib(row.step["peak"])),
    "peak_of_full": ("of full", "of full", lambda row: _number(row.ratio("peak"), ".3f")),
    "reserved": ("reserved, MiB", "process, resident, MiB", _reserved),
    "states": (
        "model states on the device, MiB",
        "model states on the device, MiB",
        lambda row: _mib(row.step["state_bytes"]),
    ),
    "host": ("on the host, MiB", "on the host, MiB", lambda row: _mib(row.step["host_bytes"])),
    "saved": (
        "saved for backward, MiB",
        "saved for backward, MiB",
        lambda row: _mib(row.step["saved_activations"]),
    ),
    "time": ("s per step (quartiles)", "CPU s per step (quartiles)", _time),
    "meanwhile": ("full meanwhile, s", "full meanwhile, CPU s", _meanwhile),
    "time_of_full": ("of full (rounds)", "CPU s of full (rounds)", _time_of_full),
    "wall_of_full": (None, "wall clock of full (rounds)", lambda row: _time_of_full(row, "seconds")),
    "throughput": ("{unit}/s", "{unit} per CPU s", _throughput),
    "flops": ("FLOPs of full", "FLOPs of full", lambda row: _number(row.ratio("flops"), ".3f")),
    "tflops": ("TFLOP/s", "TFLOP/s", lambda row: f"{row.step['flops'] / row.step[row.clock] / 1e12:.3g}"),
    "fit": ("largest batch 24 / 32 GB", "largest batch 24 / 32 GB, simulated", _fit),
    "loss": (
        "loss, first and last",
        "loss, first and last",
        lambda row: f"{row.step['loss_first']:.3f}, {row.step['loss_last']:.3f}",
    ),
}


def rows_of(
    case: str,
    methods: Sequence[str],
    results: Mapping[str, Mapping[str, Any]],
    estimated: Mapping[str, Mapping[str, Any]],
) -> list[Row]:
    """The rows of a case, in the order of the methods; what was not asked for has none."""
    full = results.get(f"{case}__full__step")
    full = full if full is not None and full["status"] == "ok" else None
    return [
        Row(
            method,
            results[f"{case}__{method}__step"],
            results.get(f"{case}__{method}__fit"),
            full,
            estimated.get(f"{case}__{method}"),
        )
        for method in methods
        if f"{case}__{method}__step" in results
    ]


def table(
    cases: Sequence[str],
    methods: Sequence[str],
    results: Mapping[str, Mapping[str, Any]],
    estimated: Mapping[str, Mapping[str, Any]] | None = None,
    columns: Sequence[str] = tuple(_COLUMNS),
) -> str:
    """A Markdown table for each case that has a result."""
    tables = ((case, rows_of(case, methods, results, estimated or {})) for case in cases)
    return "\n\n".join(_one(case, rows, columns) for case, rows in tables if rows)


def _one(case: str, rows: Sequence[Row], columns: Sequence[str]) -> str:
    place = 0 if any(row.ok and row.step["settings"]["device"] == "cuda" for row in rows) else 1
    shown = [_COLUMNS[key] for key in columns if _COLUMNS[key][place] is not None]
    titles = [str(column[place]).format(unit=CASES[case].unit) for column in shown]
    lines = [
        f"### {CASES[case].label}",
        "",
        _line(["method", *titles]),
        _line(["---", *["---:"] * len(titles)]),
    ]
    for row in rows:
        cells = [column[2](row) for column in shown] if row.ok else [row.reason, *[""] * (len(shown) - 1)]
        lines.append(_line([row.label, *cells]))
    if said := _noise(rows):
        lines += ["", said]
    return "\n".join(lines)


def _noise(rows: Sequence[Row]) -> str:
    """How far full fine-tuning is from full fine-tuning."""
    cells = [row.step for row in rows if row.method in ("full", "full_again") and row.ok]
    if not any("of_full" in cell for cell in cells):
        return ""
    clocks = {"seconds": "wall clock", "cpu_seconds": "CPU time"}
    said = [
        f"{noise(cells, clock):.1%} ({name})"
        for clock, name in clocks.items()
        if cells[0]["settings"]["device"] == "cpu" or clock == "seconds"
    ]
    return f"Noise: full fine-tuning in turns with itself differs by up to {', '.join(said)}."


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def ground(facts: Mapping[str, Any], results: Mapping[str, Mapping[str, Any]]) -> str:
    """What everything was measured on."""
    commits = sorted({result["measured"]["commit"] for result in results.values() if "measured" in result})
    seeds = sorted({result["settings"]["seed"] for result in results.values() if "settings" in result})
    return (
        f"{facts['hardware']}, {facts['threads']} CPU threads, torch {facts['versions']['torch']}, cells measured at "
        f"commit {', '.join(commits)}; bf16 arithmetic, seed {', '.join(map(str, seeds))}."
    )


def heading(facts: Mapping[str, Any], results: Mapping[str, Mapping[str, Any]]) -> str:
    """The ground, the command, and what the budget left out."""
    dropped = [name for name, result in results.items() if result["status"] == "dropped"]
    lines = [ground(facts, results), "", f"Tables by `{facts['command']}`", ""]
    if any(
        row["status"] == "ok" and row["kind"] == "step" and "of_full" not in row for row in results.values()
    ):
        lines += ["† not in turns: against the process of full fine-tuning alone, at another time.", ""]
    if dropped:
        lines += [f"Dropped, because the time budget was spent: {', '.join(dropped)}", ""]
    return "\n".join(lines) + "\n"


def estimated_table(methods: Sequence[str], estimated: Mapping[str, Mapping[str, Any]]) -> str:
    """What the estimator says of published shapes on a GPU: nothing here was measured."""
    parts = []
    for case in dict.fromkeys(name.split("__")[0] for name in estimated):
        if CASES[case].device != "cuda":
            continue
        full = _peak(estimated.get(f"{case}__full"))
        lines = [
            f"### {CASES[case].label}: simulated for a GPU, not measured",
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
                cells = [f"not simulated: {_why(found)}", "", "", ""]
            else:
                cells = [f"{peak / 2**30:.2f}", f"{peak / full:.3f}" if full else "", *_batches(found)]
            lines.append(_line([METHODS[method].label, *cells]))
        parts.append("\n".join(lines))
    return "\n" + "\n\n".join(parts) + "\n" if parts else ""


def _peak(found: Mapping[str, Any] | None) -> int | None:
    return next(iter(found["peaks"].values())) if found and "peaks" in found else None
