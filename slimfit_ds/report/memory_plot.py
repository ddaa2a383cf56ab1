"""Pictures of memory: live bytes over one step, and stacked bars of several strategies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from slimfit_ds.report.units import human_bytes

__all__ = ["plot_stacked_bars", "plot_timeline"]

_COLOURS = {
    "parameters": "#4c72b0",
    "gradients": "#dd8452",
    "optimizer": "#c44e52",
    "saved_activations_dynamic": "#55a868",
    "saved_activations_static": "#a6d9a8",
    "communication": "#937860",
    "working": "#c9c9c9",
}
_LABELS = {
    "parameters": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer states",
    "saved_activations_dynamic": "saved, dynamic",
    "saved_activations_static": "saved, static",
    "communication": "communication",
    "working": "working set",
}


def _scale(largest: float) -> tuple[float, str]:
    """The unit in which `largest` bytes are readable."""
    for size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if largest >= size:
            return size, unit
    return 1, "bytes"


def plot_timeline(
    timeline: Sequence[tuple[str, str, Mapping[str, int]]], path: str | Path, title: str = "One training step"
) -> Path:
    """Draw live device bytes by kind over a step, with the phases and the outer modules below.

    Args:
        timeline: `(phase, module path, bytes by kind)` at every change, as `MemoryTracker.timeline`.
        path: the PNG to write.
        title: the heading of the picture.

    Returns:
        The path written.

    Raises:
        ValueError: the timeline is empty.
    """
    if not timeline:
        raise ValueError("the timeline is empty: track a step with MemoryTracker(..., timeline=True)")
    # The object interface needs no global backend, so a caller's own figures are left alone.
    from matplotlib.figure import Figure

    totals = [sum(size for kind, size in live.items() if kind in _COLOURS) for _, _, live in timeline]
    unit, name = _scale(max(totals))
    x = range(len(timeline))
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    top, flame = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    kinds = [kind for kind in _COLOURS if any(live.get(kind) for _, _, live in timeline)]
    top.stackplot(
        x,
        [[live.get(kind, 0) / unit for _, _, live in timeline] for kind in kinds],
        colors=[_COLOURS[kind] for kind in kinds],
        labels=[_LABELS[kind] for kind in kinds],
        linewidth=0,
    )
    at = max(x, key=totals.__getitem__)
    phase, module, _ = timeline[at]
    where = f"peak {totals[at] / unit:.2f} {name}\n{phase} {module}".rstrip()
    left = at > len(totals) / 2
    top.annotate(
        where,
        (at, totals[at] / unit),
        xytext=(-12 if left else 12, 8),
        textcoords="offset points",
        ha="right" if left else "left",
        arrowprops={"arrowstyle": "->"},
    )
    top.set_ylim(0, 1.2 * max(totals) / unit)
    top.set_ylabel(f"live bytes on the device, {name}")
    top.set_title(title)
    top.legend(loc="upper left", ncols=4, fontsize=8, frameon=False)
    _draw_flame(flame, timeline)
    flame.set_xlabel("allocations in order of time")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def _draw_flame(axes, timeline: Sequence[tuple[str, str, Mapping[str, int]]]) -> None:
    """Rows of what ran when: the phase, then the module path, one depth per row."""
    phases = {"forward": "#4c72b0", "backward": "#dd8452", "step": "#55a868"}
    shades = ("#d0d7e5", "#e8dccf")
    # The blocks (`layer.3`) and what is inside them tell most; wrappers above them change nothing.
    paths = [module.split(".") if module else [] for _, module, _ in timeline]
    numbered = [next((i for i, part in enumerate(p) if part.isdigit()), None) for p in paths]
    first = min((i for i in numbered if i is not None), default=0)
    levels = [max(first, 1), first + 1, first + 2] if first else [1, 2, 3]
    rows = [[phase for phase, _, _ in timeline]]
    rows += [[".".join(p[:d]) if len(p) >= d else "" for p in paths] for d in levels]
    for row, names in enumerate(rows):
        start, shade = 0, 0
        for i in range(1, len(names) + 1):
            if i == len(names) or names[i] != names[start]:
                name = names[start]
                colour = (
                    phases.get(name, "#eeeeee") if row == 0 else (shades[shade % 2] if name else "#ffffff")
                )
                axes.barh(-row, i - start, left=start, height=0.95, color=colour, linewidth=0)
                text = name if row == 0 else name.split(".")[-1]
                if (i - start) / len(names) > 0.012 * max(len(text), 1):
                    axes.text((start + i) / 2, -row, text, ha="center", va="center", fontsize=7)
                start, shade = i, shade + 1
    axes.set_yticks([])
    axes.set_ylim(-len(rows) + 0.5, 0.5)


def plot_stacked_bars(
    rows: Sequence[tuple[str, Mapping[str, int]]],
    path: str | Path,
    title: str,
    limit: int | None = None,
    note: str = "",
) -> Path:
    """Draw a horizontal bar for each strategy: its peak, divided into kinds.

    Args:
        rows: `(label, bytes by kind at the peak)`, drawn from top to bottom; an empty mapping is a failed row.
        path: the PNG to write.
        title: the heading.
        limit: bytes of a GPU to mark with a line.
        note: a line below the picture (hardware, dtype, seed).

    Returns:
        The path written.
    """
    from matplotlib.figure import Figure

    totals = [sum(parts.get(kind, 0) for kind in _COLOURS) for _, parts in rows]
    unit, name = _scale(sorted([*totals, 1])[len(totals) // 2])
    figure = Figure(figsize=(10, 1.6 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots()
    y = list(range(len(rows)))[::-1]
    left = [0.0] * len(rows)
    for kind, colour in _COLOURS.items():
        widths = [parts.get(kind, 0) / unit for _, parts in rows]
        if any(widths):
            axes.barh(y, widths, left=left, color=colour, label=_LABELS[kind], height=0.7, clip_on=True)
            left = [a + b for a, b in zip(left, widths, strict=True)]
    # One bar that dwarfs the others (default buckets do) is cut, or nothing else could be read.
    ordered = sorted(left)
    longest = ordered[-1] or 1e-9
    if len(ordered) > 2 and ordered[-1] > 6 * ordered[-2]:
        longest = 1.25 * ordered[-2]
    for position, total, size, (_, parts) in zip(y, left, totals, rows, strict=True):
        cut = total > longest
        text = (human_bytes(size) + (" (bar cut)" if cut else "")) if parts else "failed"
        axes.text(min(total, longest) + 0.01 * longest, position, text, va="center", fontsize=8)
    if limit is not None and limit / unit < 1.6 * longest:
        axes.axvline(limit / unit, color="black", linestyle="--", linewidth=1)
    axes.set_yticks(y, [label for label, _ in rows])
    axes.set_xlim(0, 1.16 * longest)
    axes.set_xlabel(f"peak memory of one rank, {name}")
    axes.set_title(title, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(len(labels) or 1, 7), fontsize=8, frameon=False
    )
    if note:
        axes.text(1.0, 1.02, note, transform=axes.transAxes, ha="right", fontsize=7, color="#555555")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path
