"""Times that do not drift: a method and full fine-tuning take turns within the same seconds, and ratios are taken there."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

__all__ = ["Turns", "compare", "noise", "take_turns"]

CLOCKS = ("seconds", "cpu_seconds")
Times = Mapping[str, Sequence[float]]
_LEAST = 3


class Timed(Protocol):
    """Whatever can be asked to time some steps."""

    def turn(self, steps: int) -> Times:
        """Time that many steps: one value per step for each of `CLOCKS`."""
        ...


@dataclass(frozen=True)
class Turns:
    """How long two take turns.

    Args:
        rounds: at most; each has one turn of either.
        steps: of a turn.
        seconds: no further round starts after this long, but three are done.
    """

    rounds: int = 5
    steps: int = 2
    seconds: float = 20.0


def take_turns(own: Timed, full: Timed | None, turns: Turns) -> list[dict[str, Times]]:
    """Time both in turns; who begins changes from round to round, so that a steady drift cancels out.

    Args:
        own: the method.
        full: full fine-tuning; None: the method is timed alone.

    Returns:
        For each round: `own` and `full` -> seconds of their steps.
    """
    begun = time.monotonic()
    rounds: list[dict[str, Times]] = []
    while len(rounds) < turns.rounds:
        if len(rounds) >= _LEAST and time.monotonic() - begun > turns.seconds:
            break
        pair = {"own": own} if full is None else {"own": own, "full": full}
        order = list(pair) if len(rounds) % 2 == 0 else list(pair)[::-1]
        rounds.append({name: pair[name].turn(turns.steps) for name in order})
    return rounds


def compare(rounds: Sequence[Mapping[str, Times]]) -> dict[str, Any]:
    """Medians and their ratios.

    Returns:
        `seconds` and `cpu_seconds` (median of all steps), the same with `_quartiles`; where full fine-tuning took
        turns also `full_meanwhile` (its medians), `of_full` (ratio of the medians) and `of_full_quartiles` (of the
        ratios of the rounds).
    """
    own = {clock: [v for one in rounds for v in one["own"][clock]] for clock in CLOCKS}
    result: dict[str, Any] = {clock: statistics.median(own[clock]) for clock in CLOCKS}
    result |= {f"{clock}_quartiles": _quartiles(own[clock]) for clock in CLOCKS}
    if all("full" in one for one in rounds):
        full = {
            clock: statistics.median([v for one in rounds for v in one["full"][clock]]) for clock in CLOCKS
        }
        result["full_meanwhile"] = full
        result["of_full"] = {clock: result[clock] / full[clock] for clock in CLOCKS}
        result["of_full_quartiles"] = {
            clock: _quartiles(
                [
                    statistics.median(one["own"][clock]) / statistics.median(one["full"][clock])
                    for one in rounds
                ]
            )
            for clock in CLOCKS
        }
    return result


def noise(cells: Sequence[Mapping[str, Any]], clock: str) -> float | None:
    """How far full fine-tuning seems from full fine-tuning: the largest factor between them, less 1.

    Args:
        cells: results of full fine-tuning that took turns with full fine-tuning in another process.
        clock: of `CLOCKS`.
    """
    ratios = [cell["of_full"][clock] for cell in cells if "of_full" in cell]
    return math.exp(max(abs(math.log(ratio)) for ratio in ratios)) - 1 if ratios else None


def _quartiles(values: Sequence[float]) -> list[float]:
    if len(values) < 2:
        return [values[0], values[0]]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low, high]
