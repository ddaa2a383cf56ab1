"""The policies that choose which units train: small classes on an explicit, JSON-serialisable state.

A policy knows no tensors, devices, process groups or global random state. Ranks that hold the same state choose the same
units. A new policy is one class and one line in `POLICIES`.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slimfit_ds.trainable.units import Unit, find_blocks

__all__ = ["POLICIES", "PRIMING", "Budget", "Policy", "Selection", "State"]

State = Mapping[str, Any]

# Sums of widths such as 0.1 are not exact.
_SLACK = 1e-6


@dataclass(frozen=True)
class Budget:
    """What units cost while they train, and how much of it an active set may cost.

    Args:
        costs: of each unit.
        room: the most that a set may cost.
    """

    costs: tuple[float, ...]
    room: float

    def spent(self, units: Iterable[int]) -> float:
        """What a set of units costs."""
        return sum(self.costs[unit] for unit in units)

    def fits(self, units: Iterable[int]) -> bool:
        """Whether a set of units keeps within the limit."""
        return self.spent(units) <= self.room + _SLACK

    def fill(self, ranking: Iterable[int], always: frozenset[int] = frozenset()) -> frozenset[int]:
        """`always`, then each unit of a ranking that still fits, best first."""
        chosen = set(always)
        left = self.room + _SLACK - self.spent(always)
        for unit in ranking:
            if unit not in chosen and self.costs[unit] <= left:
                chosen.add(unit)
                left -= self.costs[unit]
        return frozenset(chosen)


@dataclass(frozen=True)
class Selection:
    """What is asked of a policy at one step."""

    units: tuple[Unit, ...]
    """All units, in model order; every other field names them by their position here."""
    step: int
    """Optimizer steps done so far."""
    choice: int
    """How many sets a run of this interval has chosen before."""
    budget: Budget
    """What the active set may cost, those in `always` included."""
    candidates: tuple[int, ...]
    """Units to choose from, in model order; neither `always` nor `never` active ones."""
    always: frozenset[int]
    """Units that train in any case."""
    seed: int

    def fill(self, ranking: Iterable[int]) -> frozenset[int]:
        """`always` plus the candidates of a ranking that fit, best first."""
        free = set(self.candidates)
        return self.budget.fill((unit for unit in ranking if unit in free), self.always)

    def best(self, scores: Sequence[float]) -> frozenset[int]:
        """`always` plus the candidates with the largest scores that fit; of equals, the first in model order."""
        return self.fill(sorted(self.candidates, key=lambda unit: (-scores[unit], unit)))


class Policy:
    """A way to choose the active units.

    Example:
        state = policy.init(n_units=40, seed=0)
        active = policy.select(state, selection)
        state = policy.observe(state, {3: 0.012, 7: 0.004})
    """

    trains_all = False
    """Whether every unit trains at every step, whatever the rate."""

    def init(self, n_units: int, seed: int) -> State:
        """The first state."""
        return {}

    def select(self, state: State, selection: Selection) -> frozenset[int]:
        """The active units of the coming step."""
        raise NotImplementedError

    def observe(self, state: State, statistics: Mapping[int, float]) -> State:
        """The state after a step: unit -> statistic, for the units that were active."""
        return state


class Everything(Policy):
    """Every unit trains at every step: `none` (full fine-tuning), and `static`, where the units are narrow.

    That a fixed, structured part of every weight suffices is the finding of S2FT (Yang et al., arXiv 2412.06289) and SMT
    (He et al., arXiv 2405.15525). There it is channels or blocks that are chosen for their weight or gradient; here evenly
    spaced input columns of every linear layer, which bounds the inputs that are kept as well.
    """

    trains_all = True

    def select(self, state: State, selection: Selection) -> frozenset[int]:
        return selection.always | frozenset(selection.candidates)


class InterLayerScheduling(Policy):
    """Train the units whose last update was relatively largest.

    Source: Ardakani et al., "SlimFit", arXiv 2305.18513, section 3 and the behaviour of its reference code.
    """

    # Distances that no statistic reaches: a unit that never trained goes before all that did, so each
    # unit trains within the first choices, in random order.
    _UNSEEN = 1e10

    def init(self, n_units: int, seed: int) -> State:
        generator = random.Random(seed)
        return {"distance": [self._UNSEEN * (1 + generator.random()) for _ in range(n_units)]}

    def select(self, state: State, selection: Selection) -> frozenset[int]:
        return selection.best(state["distance"])

    def observe(self, state: State, statistics: Mapping[int, float]) -> State:
        """The distance of each unit that trained becomes its statistic; a frozen unit keeps its last."""
        distance = list(state["distance"])
        for unit, value in statistics.items():
            distance[unit] = value
        return {"distance": distance}


class Random(Policy):
    """Uniformly random units at each choice: the baseline that any policy has to beat."""

    def select(self, state: State, selection: Selection) -> frozenset[int]:
        """A fresh draw for each step from (seed, step), so that nothing has to be saved."""
        generator = random.Random(f"{selection.seed}/{selection.step}")
        return selection.fill(generator.sample(selection.candidates, len(selection.candidates)))


class Lisa(Policy):
    """Random whole blocks for a stretch of steps; embeddings, final norm and head always, as far as the budget holds them.

    Source: Pan et al., "LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model Fine-Tuning",
    arXiv 2403.17919, algorithm 1. There the number of blocks is given; here the budget decides how many are drawn, and the
    last one of them may be drawn in part. `interval` is the paper's sampling period K.
    """

    def select(self, state: State, selection: Selection) -> frozenset[int]:
        parts = find_blocks([unit.name for unit in selection.units])
        order = list(parts.blocks)
        random.Random(f"{selection.seed}/{selection.step}").shuffle(order)
        return selection.fill([*parts.after, *parts.before, *(unit for block in order for unit in block)])


class BAdam(Policy):
    """One group of neighbouring units after the other, in an order that is shuffled anew for each cycle.

    Source: Luo et al., "BAdam: A Memory Efficient Full Parameter Optimization Method for Large Language Models",
    arXiv 2404.02827, with random reshuffling. There a group is a transformer block; here it is as many neighbours as the
    budget holds, so a block that costs more than the budget is trained in parts. `interval` is the paper's K; the paper
    starts each group with fresh moments (`optimizer_states.stale_moments: reset`).
    """

    def select(self, state: State, selection: Selection) -> frozenset[int]:
        """The group whose turn it is: each trains once in every cycle of as many choices as there are groups."""
        groups = self._groups(selection)
        if not groups:
            return selection.always
        cycle, turn = divmod(selection.choice, len(groups))
        random.Random(f"{selection.seed}/{cycle}").shuffle(groups)
        return selection.always | groups[turn]

    @staticmethod
    def _groups(selection: Selection) -> list[frozenset[int]]:
        """The candidates in model order, cut wherever the next one does not fit; one that never fits is left out."""
        groups: list[frozenset[int]] = []
        current: frozenset[int] = frozenset()
        for unit in selection.candidates:
            if not selection.budget.fits(selection.always | {unit}):
                continue
            if not selection.budget.fits(selection.always | current | {unit}):
                groups.append(current)
                current = frozenset()
            current |= {unit}
        return [*groups, current] if current else groups


PRIMING = 3
"""Updates of each unit before `far` and `bsr` choose."""


class Far(Policy):
    """Let every unit train a little, then keep those that moved most for the rest of the run.

    Source: Vucetic et al., "Efficient Fine-Tuning of BERT Models on the Edge" (FAR, freeze and reconfigure),
    arXiv 2205.01541: a priming phase sorts learners from non-learners once. FAR sorts the neurons of feed-forward layers
    and trains all of them in the priming phase; here units are sorted, and they are primed in turn, within the budget.
    """

    def init(self, n_units: int, seed: int) -> State:
        """No updates yet; the order of priming is random."""
        order = list(range(n_units))
        random.Random(seed).shuffle(order)
        return {"order": order, "visits": [0] * n_units, "moved": [0.0] * n_units}

    def select(self, state: State, selection: Selection) -> frozenset[int]:
        """Those with the fewest updates, in random order; once all that fit are primed, the choice."""
        visits, order = state["visits"], state["order"]
        if all(
            visits[unit] >= PRIMING or not selection.budget.fits(selection.always | {unit})
            for unit in selection.candidates
        ):
            mean = [moved / max(count, 1) for moved, count in zip(state["moved"], visits, strict=True)]
            return self.choose(mean, selection)
        return selection.fill(sorted(selection.candidates, key=lambda unit: (visits[unit], order[unit])))

    def choose(self, movement: Sequence[float], selection: Selection) -> frozenset[int]:
        """The units that train for the rest of the run, by what each moved per update."""
        return selection.best(movement)

    def observe(self, state: State, statistics: Mapping[int, float]) -> State:
        """Count updates and add up statistics while a unit is being primed; the choice is made once."""
        visits, moved = list(state["visits"]), list(state["moved"])
        for unit, value in statistics.items():
            if visits[unit] < PRIMING:
                visits[unit] += 1
                moved[unit] += value
        return {"order": state["order"], "visits": visits, "moved": moved}


class Bsr(Far):
    """As `far`, but whole blocks by their mean movement; the head comes first.

    Source: Sarkar et al., "Block Selective Reprogramming for On-device Training of Vision Transformers" (BSR),
    arXiv 2405.10951, of which only the choice of blocks is taken up here (the paper drops tokens too).
    """

    def choose(self, movement: Sequence[float], selection: Selection) -> frozenset[int]:
        parts = find_blocks([unit.name for unit in selection.units])
        blocks = sorted(parts.blocks, key=lambda b: sum(movement[unit] for unit in b) / len(b), reverse=True)
        return selection.fill([*parts.after, *(unit for block in blocks for unit in block), *parts.before])


POLICIES: dict[str, Policy] = {
    "static": Everything(),
    "none": Everything(),
    "ils": InterLayerScheduling(),
    "random": Random(),
    "lisa": Lisa(),
    "badam": BAdam(),
    "far": Far(),
    "bsr": Bsr(),
}
