"""One self-contained page about a run: no library, no font and no picture from anywhere else."""

from __future__ import annotations

import base64
import hashlib
import os
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from slimfit_ds.report.run_bars import memory_bars, time_bars
from slimfit_ds.report.run_charts import learning_charts, other_charts
from slimfit_ds.report.run_data import RunData, clean, is_run_folder, read_run
from slimfit_ds.report.run_figures import comparison_rows, figures, progress
from slimfit_ds.report.run_schedule import schedule
from slimfit_ds.report.run_status import RunStatus, run_status
from slimfit_ds.report.schedule_map import RAMP
from slimfit_ds.report.units import human_bytes

__all__ = ["render_run", "write_run_page"]

_HERE = Path(__file__).parent


def write_run_page(
    folder: Path, output: Path, baseline: Path | None = None, refresh: int | None = None
) -> RunStatus:
    """Write the page of a run, whole or not at all.

    Args:
        folder: the run's output folder.
        output: the HTML file.
        baseline: output folder of a run to compare with.
        refresh: seconds after which a browser loads the page again, while the run goes on.

    Returns:
        the state of the run.

    Raises:
        ValueError: a folder holds no run.
        OSError: the page cannot be written.
    """
    run = read_run(folder)
    base = read_run(baseline) if baseline is not None else None
    status = run_status(run)
    text = render_run(run, base, status, refresh if status.live else None)
    output.parent.mkdir(parents=True, exist_ok=True)
    handle, place = tempfile.mkstemp(dir=output.parent, prefix=f".{output.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
        os.chmod(place, 0o644)
        os.replace(place, output)
    except BaseException:
        Path(place).unlink(missing_ok=True)
        raise
    return status


def render_run(
    run: RunData,
    base: RunData | None = None,
    status: RunStatus | None = None,
    refresh: int | None = None,
) -> str:
    """The page as text.

    Args:
        run: the run.
        base: the run to compare with.
        status: its state; None: found out.
        refresh: seconds between loads; None: never.
    """
    script = (_HERE / "run_page.js").read_text(encoding="utf-8")
    ramp = ", ".join(f"rgb({r} {g} {b})" for r, g, b in RAMP)
    style = (_HERE / "run_page.css").read_text(encoding="utf-8").replace("{{RAMP}}", ramp)
    status = status or run_status(run)
    return _template().render(
        title=_title(run),
        status=status,
        refresh=refresh,
        style=Markup(style),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        progress=progress(run),
        notes=_notes(run),
        figures=figures(run),
        comparison=comparison_rows(run, base) if base is not None else [],
        baseline_title=_title(base) if base is not None else "",
        baseline_status=run_status(base).text if base is not None else "",
        learning=learning_charts(run, base),
        schedule=schedule(run),
        memory=memory_bars(run, base),
        time=time_bars(run, base),
        other=other_charts(run),
        surroundings=_surroundings(run),
        recipe=run.recipe,
        made=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        folder=clean(run.folder),
    )


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("run_page.html.j2")


def _title(run: RunData) -> str:
    return clean(run.folder.resolve().name)


def _notes(run: RunData) -> list[str]:
    """What the reader should know of the files."""
    notes = []
    if not len(run.steps):
        notes.append("The history holds no step yet." if run.facts else "There is no history of steps.")
    if run.unreadable:
        notes.append(f"{run.unreadable} lines of history.jsonl could not be read and are left out.")
    lost = int((run.columns["loss"] != run.columns["loss"]).sum())
    if lost > len(run.steps) / 2:
        # A Trainer reports its loss every few hundred steps only.
        notes.append(f"The loss is known of {len(run.steps) - lost} of {len(run.steps)} steps.")
    elif lost:
        notes.append(f"{lost} of {len(run.steps)} steps have no finite loss.")
    return notes


def _surroundings(run: RunData) -> list[tuple[str, str]]:
    """Names and values that say where the numbers come from."""
    rows: list[tuple[str, str]] = []
    for source in (run.facts, run.result):
        for key in ("world_size", "launcher", "seed", "dtype"):
            value = source.get(key)
            if isinstance(value, str | int | float) and key.replace("_", " ") not in dict(rows):
                rows.append((key.replace("_", " "), clean(value)))
    hardware: Any = run.result.get("hardware") or run.facts.get("hardware")
    for key, value in hardware.items() if isinstance(hardware, dict) else ():
        if str(key).endswith("bytes") and isinstance(value, int | float):
            rows.append((clean(key).removesuffix("_bytes").replace("_", " "), human_bytes(value)))
        else:
            rows.append((clean(key).replace("_", " "), clean(value)))
    versions: Any = run.result.get("versions") or run.facts.get("versions")
    rows += [(clean(k), clean(v)) for k, v in (versions.items() if isinstance(versions, dict) else ())]
    return rows


def folder_problem(folder: Path) -> str | None:
    """Why this is no folder of a run; None if it is one."""
    if is_run_folder(folder):
        return None
    try:
        read_run(folder)
    except (ValueError, OSError) as error:
        return str(error)
    return None
