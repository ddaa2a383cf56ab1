"""About how long the cells of a plan take on a GPU, before any has run: arithmetic on assumptions, not a measurement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch

from peers_methods.building import Request, build_model
from peers_methods.methods import METHODS
from peers_methods.running import Cell
from peers_methods.turns import Turns
from peers_methods.workloads import CASES

__all__ = ["Assumptions", "cell_seconds", "planned", "step_flops"]


class Assumptions:
    """What the estimate rests on; a card of the class of an A100 or H100."""

    flops_per_second = 100e12
    start_seconds = 4.0
    """Of a process whose imports are done: CUDA's context, the weights, the first kernels."""
    slow = 3.0
    """A step that is looked into, in ordinary steps."""
    fit_seconds = 30.0
    """Of a search for the largest batches."""


@cache
def step_flops(case: str) -> float:
    """FLOPs of a step of full fine-tuning: six per weight and token, without attention's own products."""
    workload = CASES[case].workload
    config = workload.config()
    model = build_model(Request(CASES[case], 1, torch.device("meta")), "fp32")
    weights = sum(p.numel() for p in model.parameters())
    if CASES[case].task == "image_classification":
        seq = (config.image_size // config.patch_size) ** 2 + 1
    else:
        seq = workload.seq
    return 6.0 * weights * seq * workload.batch


def cell_seconds(
    cell: Cell,
    turns: Turns,
    warm_up: int,
    new_reference: bool,
    flops: Callable[[str], float] = step_flops,
) -> float:
    """Of one cell.

    Args:
        cell: a step or a fit.
        turns: with full fine-tuning.
        warm_up: steps before.
        new_reference: its case has no reference yet, which is then built first.
        flops: of a step, by case.
    """
    if cell.kind == "fit":
        return Assumptions.fit_seconds
    step = flops(cell.case) / Assumptions.flops_per_second
    per_side = turns.rounds * (turns.steps + 1)
    steps = warm_up + METHODS[cell.method].tracked * Assumptions.slow + 2 * per_side
    seconds = Assumptions.start_seconds + steps * step
    if new_reference:
        seconds += Assumptions.start_seconds + (warm_up + METHODS["full"].tracked * Assumptions.slow) * step
    return seconds


def planned(
    cells: Sequence[Cell],
    turns: Turns,
    warm_up: int,
    minutes: float,
    flops: Callable[[str], float] = step_flops,
) -> str:
    """The cells in their order with estimated seconds, and where the budget ends."""
    lines = ["Estimated, not measured:", ""]
    spent, reference, inside = 0.0, "", 0
    for cell in cells:
        new = cell.kind == "step" and cell.case != reference
        seconds = cell_seconds(cell, turns, warm_up, new, flops)
        reference = cell.case if cell.kind == "step" else ""
        if inside >= 0 and spent + seconds > 60 * minutes:
            lines.append(f"-- the budget of {minutes:g} minutes ends about here, after {inside} cells --")
            inside = -1
        spent += seconds
        inside += inside >= 0
        lines.append(f"{cell.name:45} {seconds:6.0f} s, {spent / 60:6.1f} min in all")
    return "\n".join(lines)
