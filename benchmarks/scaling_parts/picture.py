"""The picture and the tables of a scaling run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scaling_parts import measured, simulated

__all__ = ["draw", "tables"]

_STYLE = {
    "full": ("#555555", "o"),
    "checkpointing": ("#d08020", "s"),
    "balanced": ("#3070c0", "^"),
    "minimal": ("#1a9050", "D"),
    "minimal, loss in chunks": ("#80c060", "v"),
}
GIB = 2**30


def _value(known: Mapping[str, Any], key: str, *path: str) -> float | None:
    entry: Any = known.get(key)
    for part in path:
        entry = entry.get(part) if isinstance(entry, Mapping) else None
    return entry


def draw(known: Mapping[str, Any], path: Path) -> None:
    """Simulated memory above, measured time below; one curve for each method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 4, figsize=(17, 8))
    for axis, (sweep, (title, label, points)) in zip(axes[0], simulated.SWEEPS.items(), strict=False):
        for method in simulated.METHODS:
            ys = [_value(known, f"{sweep}/{x}/{method}", "peak") for x, _ in points]
            _curve(axis, [x for x, _ in points], [y / GIB if y else None for y in ys], method, method)
        _label(axis, f"memory, simulated:\n{title}", label, "GiB at the peak")
    for method in simulated.RANK_METHODS:
        ys = [_value(known, f"ranks/{n}/{method}", "peak") for n in simulated.RANKS]
        _curve(
            axes[0][3], simulated.RANKS, [y / GIB if y else None for y in ys], method.split(",")[0], method
        )
    _label(
        axes[0][3],
        "memory of a rank, simulated:\nLlama-3.2-1B, 1 x 2048 per rank",
        "ranks",
        "GiB at the peak",
    )
    for axis, (sweep, (title, label, points)) in zip(axes[1], measured.SWEEPS.items(), strict=False):
        for method in measured.METHOD_NAMES:
            ys = [_value(known, f"time/{sweep}/{x}", method, "ratio") for x, _ in points]
            _curve(axis, [x for x, _ in points], ys, method, method)
        _label(axis, f"CPU time, measured:\n{title}", label, "of full fine-tuning")
    for method in ("full, ZeRO 1", "balanced, ZeRO 1", "minimal, ZeRO 1"):
        ys = [_value(known, f"time/ranks/{n}", method, "seconds") for n in measured.RANKS]
        _curve(axes[1][3], measured.RANKS, ys, method.split(",")[0], method)
    _label(
        axes[1][3],
        "time, measured, ranks on 2 cores:\nBERT 4 x h256, 8 x 128 per rank",
        "ranks",
        "s per step",
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _curve(axis: Any, xs: Any, ys: list[float | None], style: str, label: str) -> None:
    color, marker = _STYLE[style]
    kept = [(x, y) for x, y in zip(xs, ys, strict=True) if y is not None]
    if kept:
        axis.plot([str(x) for x, _ in kept], [y for _, y in kept], color=color, marker=marker, label=label)


def _label(axis: Any, title: str, x: str, y: str) -> None:
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    if axis.lines:
        axis.legend(fontsize=8)
    axis.tick_params(axis="x", labelsize=8)


def tables(known: Mapping[str, Any]) -> str:
    """Markdown."""
    parts = ["## Memory of one device, simulated, GiB at the peak"]
    for sweep, (title, label, points) in simulated.SWEEPS.items():
        parts.append(_memory(known, sweep, title, label, [x for x, _ in points], simulated.METHODS))
    parts.append(
        _memory(
            known,
            "ranks",
            "ranks, Llama-3.2-1B, 1 x 2048 per rank",
            "ranks",
            simulated.RANKS,
            simulated.RANK_METHODS,
        )
    )
    parts.append("## Bytes sent by a rank per step, pretended worlds, BERT-base, MB of payload")
    parts.append(_traffic(known))
    parts.append("## CPU time of a step, measured, one thread")
    for sweep, (title, label, points) in measured.SWEEPS.items():
        parts.append(_time(known, sweep, title, label, [x for x, _ in points]))
    parts.append(_rank_time(known))
    return "\n\n".join(parts) + "\n"


def _grid(title: str, first: str, columns: list[str], rows: list[list[str]]) -> str:
    rows = [row for row in rows if any(row[1:])]
    if not rows:
        return f"{title[0].upper()}{title[1:]}: not run"
    kept = [i for i in range(len(columns)) if any(row[i + 1] for row in rows)]
    columns, rows = [columns[i] for i in kept], [[row[0], *(row[i + 1] for i in kept)] for row in rows]
    lines = [f"{title[0].upper()}{title[1:]}:", "", "| " + " | ".join([first, *columns]) + " |"]
    lines += ["|---|" + "---:|" * len(columns), *("| " + " | ".join(row) + " |" for row in rows)]
    return "\n".join(lines)


def _memory(known: Mapping, sweep: str, title: str, label: str, xs: Any, methods: Any) -> str:
    rows = []
    for x in xs:
        peaks = [_value(known, f"{sweep}/{x}/{method}", "peak") for method in methods]
        rows.append([str(x), *("" if peak is None else f"{peak / GIB:.2f}" for peak in peaks)])
    return _grid(title, label, list(methods), rows)


def _traffic(known: Mapping) -> str:
    keys = [key for key in known if key.startswith("traffic/")]
    names = list(dict.fromkeys(key.split("/", 2)[2] for key in keys))
    rows = []
    for ranks in dict.fromkeys(key.split("/")[1] for key in keys):
        values = [_value(known, f"traffic/{ranks}/{name}", "bytes") for name in names]
        rows.append([ranks, *("" if value is None else f"{value / 1e6:.1f}" for value in values)])
    return _grid("mean over a cycle of the schedule, minimal: 95 % frozen", "ranks", names, rows)


def _time(known: Mapping, sweep: str, title: str, label: str, xs: Any) -> str:
    rows = []
    for x in xs:
        seconds = _value(known, f"time/{sweep}/{x}", "full", "seconds")
        ratios = [_value(known, f"time/{sweep}/{x}", m, "ratio") for m in measured.METHOD_NAMES[1:]]
        cells = ["" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
        rows.append([str(x), "" if seconds is None else f"{seconds:.3f} s", *cells])
    return _grid(title, label, ["full", *(f"{m}, of full" for m in measured.METHOD_NAMES[1:])], rows)


def _rank_time(known: Mapping) -> str:
    names = ("full, ZeRO 1", "balanced, ZeRO 1", "minimal, ZeRO 1")
    rows = []
    for ranks in measured.RANKS:
        cells = []
        for name in names:
            entry = _value(known, f"time/ranks/{ranks}", name)
            cells.append(
                f"{entry['seconds']:.3f} s, {entry['bytes_sent'] / 1e6:.2f} MB, {entry['peak'] / 2**20:.1f} MiB"
                if isinstance(entry, Mapping)
                else ""
            )
        rows.append([str(ranks), *cells])
    title = "real gloo ranks, a thread each (4 ranks share the 2 cores): seconds, bytes sent, peak of a rank"
    return _grid(title, "ranks", list(names), rows)
