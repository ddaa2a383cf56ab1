"""`slimfit-ds plan --longest`: the longest sequence that fits, for each way to train."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from slimfit_ds.planner.rivals import rivals_by_arithmetic
from slimfit_ds.planner.simulate import Estimate
from slimfit_ds.planner.strategies import STRATEGIES, Strategy
from slimfit_ds.planner.workload import Workload
from slimfit_ds.report.units import human_bytes

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Longest", "longest_rows", "longest_sequence", "longest_table"]

_LOSS_TOKENS = 256
_FEWEST, _FIRST, _MOST = 512, 1 << 15, 1 << 23


@dataclass(frozen=True)
class Longest:
    """The longest sequence of a method.

    Args:
        label: the method.
        tokens: of the sequence; 0: not even the shortest fits.
        needs: bytes on the device there.
        host: bytes on the host there.
        error: why there is none, if it cannot be simulated.
    """

    label: str
    tokens: int
    needs: int = 0
    host: int = 0
    error: str = ""


def longest_sequence(needs: Callable[[int], int | None], budget: int, exactness: float = 0.02) -> int:
    """Return the most tokens that fit, to a few per cent: three lengths are asked for where memory grows evenly.

    What grows by pieces grows ever faster (the largest of several lines does): beyond two lengths, and below them, it lies above the
    line through them, between them below it.

    Args:
        needs: bytes that so many tokens take; None: not known. Never falls.
        budget: bytes.
        exactness: how far the result may be from the first length that does not fit, relative.
    """
    known: dict[int, int] = {}
    low, high, tokens = 0, math.inf, _FIRST
    while True:
        found = needs(tokens)
        if found is None:
            return low
        known[tokens] = found
        if found <= budget:
            low = tokens
        else:
            high = tokens
        if low >= _MOST:
            return low
        below, above = sorted(t for t in known if t <= low), sorted(t for t in known if t > low)
        # No more than this fits.
        bound = high
        for pair in (below[-2:], above[:2]):
            if len(pair) == 2 and known[pair[1]] > known[pair[0]]:
                bound = min(bound, _crossing(known, pair[0], pair[1], budget))
        if bound - low <= max(exactness * low, _FEWEST):
            return low
        near = exactness / 2
        if not low:
            middle = min(bound * (1 - near), high / 8)
        elif not above:
            middle = bound * (1 - near) if bound < math.inf else 8.0 * low
        elif len(known) % 4:
            middle = min(max(_crossing(known, low, above[0], budget), low * (1 + near)), bound * (1 - near))
        else:
            # Now and then by halves, for what grows otherwise.
            middle = (low + bound) / 2
        tokens = max(int(middle) // 64 * 64, low + 64)


def _crossing(known: Mapping[int, int], one: int, other: int, budget: int) -> float:
    """Return where the line through two lengths reaches the budget."""
    return one + (other - one) * (budget - known[one]) / (known[other] - known[one])


def longest_rows(
    run: Callable[[Workload, Strategy], Estimate],
    workload: Workload,
    facts: Mapping[str, Any],
    stage: int,
    budget: int,
    rivals: bool = True,
) -> Iterator[Longest]:
    """Search for each method, the rivals first.

    Args:
        run: simulates a step.
        workload: its length does not matter.
        facts: of `planner.step.inspect_model`.
        stage: ZeRO stage of SlimFit's settings.
        budget: bytes on the device.
        rivals: search for them too.
    """
    loss = _LOSS_TOKENS if facts["loss_in_chunks"] else None
    lora = STRATEGIES["lora"].with_(gradient_checkpointing=True, loss_chunk=loss)
    simulated: dict[int, Estimate] = {}

    def rival(pick: Callable[[Estimate], tuple[int, int] | None], label: str) -> Longest:
        def needs(tokens: int) -> int | None:
            if tokens not in simulated:
                simulated[tokens] = run(replace(workload, seq=tokens), lora)
            found = None if simulated[tokens].report is None else pick(simulated[tokens])
            return None if found is None else found[0]

        tokens = longest_sequence(needs, budget)
        found = pick(simulated[tokens]) if tokens else (0, 0)
        return Longest(label, tokens, *(found or (0, 0)))

    def packed(estimate: Estimate) -> tuple[int, int] | None:
        assert estimate.report is not None
        found = rivals_by_arithmetic(facts, estimate.report, workload.dtype)
        return (found[0].needs, found[0].host) if found else None

    in_chunks = ", loss in chunks" if loss else ""
    if rivals:
        yield rival(lambda e: (e.peak, 0), f"LoRA rank 8, gradient checkpointing{in_chunks}")
        yield rival(packed, f"QLoRA rank 8 (NF4), gradient checkpointing{in_chunks}: weights by arithmetic")
    before: Longest | None = None
    for label, block in _settings(loss):
        strategy = Strategy("longest", stage=stage, slimfit=block)
        seen: dict[int, Estimate] = {}

        def needs(tokens: int, strategy: Strategy = strategy, seen: dict[int, Estimate] = seen) -> int | None:
            seen[tokens] = run(replace(workload, seq=tokens), strategy)
            return None if seen[tokens].report is None else seen[tokens].peak

        if label == _FEWER_BITS and before is not None and before.tokens:
            # On the device a tile of inputs is decoded, whatever the others are stored as.
            tokens = before.tokens if (needs(before.tokens) or budget + 1) <= budget else 0
        else:
            tokens = longest_sequence(needs, budget)
        report = seen[tokens].report if tokens else None
        failed = next((e.error for e in seen.values() if e.report is None), "")
        before = Longest(
            label,
            tokens,
            report.peak if report else 0,
            report.host if report else 0,
            "" if tokens else failed,
        )
        yield before


_FEWER_BITS = "the same, block inputs in int4"


def _settings(loss: int | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """The settings of SlimFit, each with more on the host than the one before."""
    base: dict[str, Any] = {
        "freeze": {"rate": 0.95},
        "activations": {"preset": "minimal", "chunk_loss_tokens": loss},
    }
    on_host = {**base, "activations": {**base["activations"], "offload": True}}
    all_on_host = {
        **on_host,
        "frozen_weights": {"live": "host", "columns": "host"},
        "optimizer_states": {"active": "host"},
    }
    in_four_bits = {**on_host["activations"], "operations": {"block": "int4"}}
    yield "SlimFit minimal, 95% frozen", base
    yield "SlimFit minimal, block inputs on host", on_host
    yield "SlimFit minimal, block inputs, frozen weights, columns and states on host", all_on_host
    yield _FEWER_BITS, {**all_on_host, "activations": in_four_bits}


def longest_table(rows: Sequence[Longest], title: str) -> Table:
    """Return a rich table."""
    from rich.table import Table

    caption = (
        "Simulated, to 2 %. Not in it: what kernels take inside themselves (flash attention's backward pass)."
    )
    made = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for name in ("setting", "tokens", "on the GPU", "on the host"):
        made.add_column(name, justify="left" if name == "setting" else "right", overflow="fold")
    for row in rows:
        needs = human_bytes(row.needs) if row.tokens else row.error
        made.add_row(row.label, f"{row.tokens:,}", needs, human_bytes(row.host) if row.host else "")
    return made
