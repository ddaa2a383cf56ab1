"""`slimfit-ds plan --longest`: the longest sequence that fits, for each way to train."""

from __future__ import annotations

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
_FEWEST, _MOST = 128, 1 << 23


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
    """Return the most tokens that fit, to a few per cent: by bisection, where a line through two lengths says.

    Args:
        needs: bytes that so many tokens take; None: not known. Never falls; called about six times.
        budget: bytes.
        exactness: how far the result may be from the first length that does not fit, relative.
    """

    def fits(tokens: int) -> bool:
        found = needs(tokens)
        known[tokens] = budget + 1 if found is None else found
        return known[tokens] <= budget

    known: dict[int, int] = {}
    low, high = 0, 4096
    while fits(high):
        low, high = high, 8 * high
        if low >= _MOST:
            return low
    while high - low > max(exactness * low, _FEWEST):
        middle = (low + high) / 2
        if low and len(known) % 4:
            # What grows evenly is found at once; now and then by halves, for what does not.
            share = (budget - known[low]) / (known[high] - known[low])
            near = exactness / 2
            middle = min(max(low + share * (high - low), low * (1 + near)), high * (1 - near))
        tokens = max(int(middle) // 64 * 64, low + 64)
        if fits(tokens):
            low = tokens
        else:
            high = tokens
    return low


def longest_rows(
    run: Callable[[Workload, Strategy], Estimate],
    workload: Workload,
    facts: Mapping[str, Any],
    stage: int,
    budget: int,
) -> Iterator[Longest]:
    """Search for each method, the rivals first.

    Args:
        run: simulates a step.
        workload: its length does not matter.
        facts: of `planner.step.inspect_model`.
        stage: ZeRO stage of SlimFit's settings.
        budget: bytes on the device.
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
    yield rival(lambda e: (e.peak, 0), f"LoRA rank 8, gradient checkpointing{in_chunks}")
    yield rival(packed, f"QLoRA rank 8 (NF4), gradient checkpointing{in_chunks}: weights by arithmetic")
    for label, block in _settings(loss):
        strategy = Strategy("longest", stage=stage, slimfit=block)
        seen: dict[int, Estimate] = {}

        def needs(tokens: int, strategy: Strategy = strategy, seen: dict[int, Estimate] = seen) -> int | None:
            seen[tokens] = run(replace(workload, seq=tokens), strategy)
            return None if seen[tokens].report is None else seen[tokens].peak

        tokens = longest_sequence(needs, budget)
        report = seen[tokens].report if tokens else None
        failed = next((e.error for e in seen.values() if e.report is None), "")
        yield Longest(
            label,
            tokens,
            report.peak if report else 0,
            report.host if report else 0,
            "" if tokens else failed,
        )


def _settings(loss: int | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """The settings of SlimFit, each with more on the host than the one before."""
    base: dict[str, Any] = {
        "freeze": {"rate": 0.95},
        "activations": {"preset": "minimal", "chunk_loss_tokens": loss},
    }
    streamed = {"frozen_weights": {"live": "host"}, "optimizer_states": {"active": "host"}}
    on_host = {**base, "activations": {**base["activations"], "offload": True}}
    in_four_bits = {**on_host, "activations": {**on_host["activations"], "operations": {"block": "int4"}}}
    yield "SlimFit minimal, 95% frozen", base
    yield "SlimFit minimal, block inputs on host", on_host
    yield "SlimFit minimal, frozen weights and states on host", {**base, **streamed}
    yield "SlimFit minimal, block inputs, frozen weights and states on host", {**on_host, **streamed}
    yield "the same, block inputs in int4", {**in_four_bits, **streamed}


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
