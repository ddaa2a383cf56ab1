"""Whether a run is running, finished, failed or gone, from what its folder says."""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil

from slimfit_ds.report.run_data import RunData, clean

__all__ = ["RunStatus", "human_age", "run_status"]

SILENCE = 120.0
"""Seconds without a line after which a run elsewhere counts as silent, unless its steps take longer."""


@dataclass(frozen=True)
class RunStatus:
    """State of a run.

    Args:
        kind: `running`, `finished`, `stopped`, `failed` or `silent`.
        text: a sentence for people.
        live: whether more is to be expected.
    """

    kind: str
    text: str
    live: bool = False


def run_status(run: RunData, now: float | None = None) -> RunStatus:
    """The state of a run.

    Args:
        run: from `read_run`.
        now: seconds since the epoch; None: the clock.
    """
    now = time.time() if now is None else now
    ago = f"{human_age(max(0.0, now - run.last_sign))} ago"
    said, error = run.facts.get("status"), clean(run.facts.get("error") or "")
    if run.result or said == "finished":
        when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(run.last_sign))
        return RunStatus("finished", f"finished {ago}, on {when}")
    if said == "failed":
        return RunStatus("failed", f"failed {ago}" + (f": {error}" if error else ""))
    if said == "stopped":
        return RunStatus("stopped", f"stopped {ago}; the same command goes on from the last checkpoint")
    if _process_gone(run.facts):
        return RunStatus("failed", f"died {ago}: its process is gone, without a last word")
    seconds = run.columns["seconds"]
    typical = float(np.nanmedian(seconds)) if np.isfinite(seconds).any() else 0.0
    if now - run.last_sign > max(SILENCE, 20 * typical):
        return RunStatus("silent", f"no sign of life for {human_age(now - run.last_sign)}")
    return RunStatus(
        "running", f"running; last step {ago}" if len(run.steps) else "running; no step yet", True
    )


def _process_gone(facts: dict[str, Any]) -> bool:
    pid, host, born = facts.get("pid"), facts.get("host"), facts.get("process_started")
    if host != socket.gethostname() or not isinstance(pid, int) or not 0 < pid < 2**31:
        return False
    try:
        # A number that was given to another process since is not this run.
        again = psutil.Process(pid).create_time()
        return isinstance(born, int | float) and abs(again - born) > 2
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:
        return False


def human_age(seconds: float) -> str:
    """`12 s`, `5 min`, `3 h 20 min`, `2 d 4 h`."""
    seconds = int(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
    if minutes < 60:
        return f"{minutes} min"
    if hours < 48:
        return f"{hours} h {minutes % 60} min"
    return f"{days} d {hours % 24} h"
