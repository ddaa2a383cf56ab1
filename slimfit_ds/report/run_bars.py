"""Memory by kind and time by phase, as stacked bars."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from slimfit_ds.report.charts import MISSING
from slimfit_ds.report.run_data import RunData
from slimfit_ds.report.run_numbers import held_bytes, median_of, tracked_bytes, typical_seconds
from slimfit_ds.report.units import human_bytes, human_seconds

__all__ = ["HOST_KINDS", "KINDS", "memory_bars", "time_bars"]

KINDS = {
    "parameters": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer states",
    "saved_activations_dynamic": "saved activations, dynamic",
    "saved_activations_static": "saved activations, static",
    "communication": "communication",
    "working": "working set",
}
HOST_KINDS = {"optimizer_host": "optimizer states on the host"}
PHASES = {
    "data": "data",
    "forward": "forward",
    "backward": "backward",
    "step": "optimizer step",
    "schedule": "schedule",
}


def memory_bars(run: RunData, base: RunData | None) -> list[dict[str, Any]]:
    """Groups of stacked bars of bytes by kind: at the peak of a tracked step, and held between steps."""
    pairs = [("this run", run)] + ([("baseline", base)] if base is not None else [])
    tracked = [(name, tracked_bytes(data)) for name, data in pairs]
    held = [(name, held_bytes(data)) for name, data in pairs]
    groups = [
        _bars("At the peak of a tracked step, on the device", tracked, KINDS),
        _bars("Held between steps, on the device", held, KINDS),
        _bars("Held between steps, in host memory", held, HOST_KINDS),
    ]
    return [group for group in groups if group is not None]


def time_bars(run: RunData, base: RunData | None) -> dict[str, Any] | None:
    """Median seconds of a step by phase, as stacked bars."""
    pairs = [("this run", run)] + ([("baseline", base)] if base is not None else [])
    rows = []
    for name, data in pairs:
        parts = {
            phase: median_of(column[2:] if len(column) > 4 else column)
            for phase, column in data.times.items()
        }
        parts = {phase: value for phase, value in parts.items() if math.isfinite(value)}
        if parts:
            # What no phase covers: waiting for the other ranks and reading the loss.
            parts["other"] = max(0.0, typical_seconds(data) - sum(parts.values()))
        rows.append((name, parts))
    return _bars("Median step", rows, {**PHASES, "other": "other"}, show=human_seconds)


def _bars(
    title: str,
    rows: Iterable[tuple[str, dict[str, float]]],
    kinds: dict[str, str],
    show: Any = human_bytes,
) -> dict[str, Any] | None:
    """Stacked horizontal bars with a legend; None if there is nothing to show."""
    kept = []
    for name, parts in rows:
        sound = {k: parts[k] for k in kinds if parts.get(k, 0) > 0 and math.isfinite(parts[k])}
        if sound:
            kept.append((name, sound))
    if not kept:
        return None
    longest = max(sum(parts.values()) for _, parts in kept)
    order = [kind for kind in kinds if any(kind in parts for _, parts in kept)]
    colours = {kind: number % 7 + 1 for number, kind in enumerate(kinds)}
    bars = [
        {
            "name": name,
            "total": show(sum(parts.values())),
            "parts": [
                {
                    "label": kinds[kind],
                    "value": show(parts[kind]),
                    "share": f"{parts[kind] / sum(parts.values()):.1%}",
                    "width": f"{100 * parts[kind] / longest:.3f}",
                    "colour": colours[kind],
                }
                for kind in order
                if kind in parts
            ],
        }
        for name, parts in kept
    ]
    table = [
        {
            "label": kinds[kind],
            "colour": colours[kind],
            "cells": [
                f"{show(parts[kind])} ({parts[kind] / sum(parts.values()):.1%})" if kind in parts else MISSING
                for _, parts in kept
            ],
        }
        for kind in order
    ]
    return {"title": title, "bars": bars, "table": table, "names": [name for name, _ in kept]}
