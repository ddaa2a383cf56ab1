"""Checks of what comes out: the folder, the monitors."""

from __future__ import annotations

from slimfit_ds.monitoring.backends import BACKENDS, monitor_blocks
from slimfit_ds.training.checks.registry import Inspection, needs
from slimfit_ds.training.output import plan_output


@needs("output_dir", "resume")
def output(found: Inspection) -> None:
    found.output = plan_output(found.draft)


@needs("report_to", after=("deepspeed_values", "output"))
def monitors(found: Inspection) -> None:
    found.monitors = monitor_blocks(found.recipe.report_to, found.base, found.output.folder)
    # They are opened when the run's folder may be written to, not when the engine is made.
    for backend in BACKENDS.values():
        found.deepspeed.pop(backend.block, None)
