"""The schedule of a run: which units train now, and what has to be saved to go on from here."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from slimfit_ds.errors import ConfigError
from slimfit_ds.schedule.config import FreezeConfig
from slimfit_ds.schedule.front import depths, front_of, mean_of_blocks
from slimfit_ds.schedule.policies import POLICIES, Budget, Selection
from slimfit_ds.trainable.new_words import warn_of_new_words
from slimfit_ds.trainable.plan import Plan, plan_units
from slimfit_ds.trainable.split import split_columns
from slimfit_ds.trainable.units import (
    ParameterRoles,
    Unit,
    discover,
    find_blocks,
    is_part,
    match_always_and_never,
    split_record,
)

__all__ = ["FreezeSchedule", "freeze_problems", "prepare_units", "room_at"]

_LR_SCALES = ("lr_scale", "always_lr_scale")


def prepare_units(
    model: nn.Module,
    config: FreezeConfig,
    whole: Callable[[Tensor], AbstractContextManager[Any]] = lambda weight: nullcontext(),
) -> bool:
    """Split the layers of a model where the freezing wants narrow units; a model that is split already stays as it is.

    Args:
        model: is changed in place.
        config: of the freezing.
        whole: a context in which a weight that ZeRO 3 has cut is whole.

    Returns:
        Whether the model was split.

    Raises:
        ConfigError: what `plan_units` finds.
    """
    if not config.splits or split_record(model) is not None:
        return False
    split_columns(model, _plan(model, config), config.seed, whole)
    warn_of_new_words(model, whole)
    return True


def _plan(model: nn.Module, config: FreezeConfig) -> Plan:
    return plan_units(
        model,
        rate=config.rate if config.width is None else None,
        width=config.width,
        always=config.always_active,
        never=config.never_active,
    )


def freeze_problems(model: nn.Module, config: FreezeConfig) -> list[str]:
    """What is wrong with a `freeze` block for this model, a line each; the model is not changed."""
    try:
        narrow = config.splits and split_record(model) is None and bool(discover(model).units)
        FreezeSchedule(_plan(model, config).roles if narrow else discover(model), config)
    except ConfigError as error:
        return error.problems
    return []


class FreezeSchedule:
    """Holds a policy's state and the active set of the coming step.

    Args:
        roles: the parameters of the model, from `discover`.
        config: the `freeze` block.

    Attributes:
        is_static: whether the active set never changes.
        measures: whether what trains follows from statistics: otherwise nothing has to be measured.
        front: the lowest block that trains in the coming step; 0: all do.
        active: positions of the units that train in the coming step.
        step: optimizer steps done.
        statistics: unit position -> its latest statistic.

    Raises:
        ConfigError: globs that match nothing or contradict each other, units that always train and cost more than the
            rate leaves, a rate that leaves room for nothing.
    """

    def __init__(self, roles: ParameterRoles, config: FreezeConfig):
        self.units = roles.units
        self.names = roles.names
        self.config = config
        self._policy = POLICIES[config.policy]
        self._always, self._never, self._budget = _resolve(roles, config)
        fixed = self._always | self._never
        self._candidates = tuple(i for i in range(len(self.units)) if i not in fixed)
        self._set_depths(roles)
        whole = self._policy.trains_all or self._budget.fits(self._always | {*self._candidates})
        self.is_static = whole and config.front == "none"
        self.measures = not whole or config.front == "statistics"
        self._state = self._policy.init(len(self.units), config.seed)
        self.step = 0
        self.statistics: dict[int, float] = {}
        self._last = [-1] * len(self.units)
        self._last_of_depths = [-1] * (max(self.depths.values(), default=0) + 1)
        self.front = 0
        self.active = self._select()

    def _set_depths(self, roles: ParameterRoles) -> None:
        self.depths: dict[str, int] = {}
        """Of each parameter that may train, by its name; empty without a front."""
        self._pinned: frozenset[int] = frozenset()
        if self.config.front == "none":
            return
        self.depths = depths(roles.order or (*roles.names, *roles.small))
        self._depth_of = [self.depths[name] for name in self.names]
        self._blocks = len(find_blocks(list(self.depths)).blocks)
        if self._blocks < 2:
            raise ConfigError(
                [f"slimfit.freeze.front {self.config.front}: the model has no list of blocks; set none"]
            )
        # Who asks for a layer at every step gets it, and the graph that it needs.
        self._pinned = match_always_and_never(self.config.always_active, (), roles, [])[0]

    def trains(self, name: str) -> bool:
        """Whether a small parameter trains in the coming step, as far as the front goes."""
        return self.depths.get(name, self.front) >= self.front

    @property
    def oversized(self) -> tuple[str, ...]:
        """Units that never train because each costs more than a set may."""
        if self._policy.trains_all:
            return ()
        return tuple(self.names[i] for i in self._candidates if not self._budget.fits(self._always | {i}))

    def warn_of_oversized(self) -> None:
        """Say once which units the budget keeps from ever training."""
        if self.oversized:
            warnings.warn(
                f"slimfit.freeze.budget {self.config.budget}: never trains {', '.join(self.oversized)}, larger than a "
                f"whole active set may be; lower the rate, or choose budget: layers, if it must train",
                stacklevel=3,
            )

    @property
    def active_names(self) -> frozenset[str]:
        """Names of the units that train in the coming step."""
        return frozenset(self.names[unit] for unit in self.active)

    @property
    def never_names(self) -> frozenset[str]:
        """Names of the units that `never_active` keeps from training."""
        return frozenset(self.names[unit] for unit in self._never)

    @property
    def trained_names(self) -> frozenset[str]:
        """Names of the units that have trained at any step."""
        return frozenset(name for name, last in zip(self.names, self._last, strict=True) if last >= 0)

    def advance(self, statistics: Mapping[int, float]) -> frozenset[int]:
        """Count a step, take in its statistics and return the active set of the next one.

        Args:
            statistics: unit position -> statistic, for units that were updated in this step. Empty
                when the step was skipped (overflow), which leaves the policy's state as it was.
        """
        self._state = self._policy.observe(self._state, statistics)
        self.statistics.update(statistics)
        for unit in self.active:
            self._last[unit] = self.step
        for depth in range(self.front, len(self._last_of_depths)):
            self._last_of_depths[depth] = self.step
        self.step += 1
        if self.step % self.config.interval == 0 and not self.is_static:
            self.active = self._select()
        return self.active

    def _select(self) -> frozenset[int]:
        selection = Selection(
            units=self.units,
            step=self.step,
            choice=self.step // self.config.interval,
            budget=self._budget,
            candidates=self._candidates,
            always=self._always,
            seed=self.config.seed,
        )
        active = self._policy.select(self._state, selection)
        if not self.depths:
            return active
        moved = mean_of_blocks(self.statistics, self._depth_of, self._blocks)
        self.front = front_of(self.config.front, moved, selection.choice)
        return frozenset(i for i in active if self._depth_of[i] >= self.front or i in self._pinned)

    def missed(self, unit: int) -> int:
        """Steps in a row, up to the coming one, in which a unit did not train."""
        return self.step - self._last[unit] - 1

    def missed_small(self, name: str) -> int:
        """The same of a small parameter."""
        return self.step - self._last_of_depths[self.depths.get(name, -1)] - 1

    @cached_property
    def lr_scale(self) -> float:
        """Factor of the learning rate of narrow units.

        `auto`: a layer of which k of n input columns train changes its output by k/n of what the same step of all columns
        would do, whether the optimizer's step has the size of the gradient (SGD) or of the rate (Adam). n/k makes up for
        it. k is the same in all layers, n is taken as most of them have it. One factor for all, as in the runs that
        docs/fidelity.md compares: the rates of narrow layers and of what trains whole beside them were not searched
        apart.
        """
        if self.config.lr_scale != "auto":
            return self.config.lr_scale
        counts = Counter(unit.width for unit in self.units if is_part(unit.name))
        return 1 / max(counts, key=lambda width: (counts[width], width)) if counts else 1.0

    @property
    def always_lr_scale(self) -> float:
        """Factor of the learning rate of what trains whole at every step."""
        config = self.config
        if config.always_lr_scale != "auto":
            return config.always_lr_scale
        return self.lr_scale if config.lr_scale == "auto" else 1.0

    def lr_factors(self) -> dict[int | None, float]:
        """What the learning rate of each active unit, and of small parameters (None), is multiplied by."""
        always = self.always_lr_scale
        factors: dict[int | None, float] = {None: always}
        for i in self.active:
            factors[i] = always if i in self._always else self.lr_scale
            if self.units[i].kind == "embedding" and is_part(self.names[i]):
                # auto: the step of a vector has the norm that it would have if all of its places trained.
                scale = self.config.embedding_lr_scale
                factors[i] *= 1 / math.sqrt(self.units[i].width) if scale == "auto" else scale
        return factors

    def fingerprint(self) -> int:
        """A 63-bit hash of step and active set; equal on ranks that will train the same units."""
        text = f"{self.step}:{self.front}:{sorted(self.active)}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on, as JSON types."""
        return {
            "layers": list(self.names),
            "policy": self.config.policy,
            "state": dict(self._state),
            "step": self.step,
            "active": sorted(self.active),
            "front": self.front,
            "last": list(self._last),
            "last_of_depths": list(self._last_of_depths),
            "lr_scales": {name: getattr(self, name) for name in _LR_SCALES},
            "statistics": {self.names[unit]: value for unit, value in self.statistics.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state.

        The state of another policy is not taken over (there is none that both understand): the new
        policy starts afresh at the saved step. Warns where learning rates are multiplied by other factors than before.

        Raises:
            ConfigError: the saved units are not this model's; names the difference.
        """
        if problems := _difference(state["layers"], self.names):
            before, policy = state["policy"], self.config.policy
            if before != policy:
                problems.append(
                    f"the checkpoint is of slimfit.freeze.policy {before!r}, this run of {policy!r}, which trains other parts: set "
                    f"{before!r}"
                )
            raise ConfigError(problems)
        self._warn_of_rates(state.get("lr_scales"))
        self.step = int(state["step"])
        # Checkpoints of earlier versions hold no counts: as if every unit had trained just now.
        self._last = list(state.get("last") or [self.step - 1] * len(self.units))
        depths = len(self._last_of_depths)
        saved = list(state.get("last_of_depths") or [])
        self._last_of_depths = saved if len(saved) == depths else [self.step - 1] * depths
        positions = {name: unit for unit, name in enumerate(self.names)}
        self.statistics = {positions[name]: value for name, value in state["statistics"].items()}
        if state["policy"] != self.config.policy:
            self.active = self._select()
            return
        self._state = dict(state["state"])
        if self.is_static:
            self.active = self._select()
        else:
            self.active, self.front = frozenset(state["active"]), int(state.get("front", 0))

    def _warn_of_rates(self, saved: Mapping[str, float] | None) -> None:
        """Say where the learning rate jumps."""
        if saved is None:
            # The checkpoint is older than auto: a factor that nobody had set was 1.
            saved = {name: 1.0 for name in _LR_SCALES if getattr(self.config, name) == "auto"}
        changed = {
            name: (before, value)
            for name, before in saved.items()
            if not math.isclose(before, value := getattr(self, name))
        }
        if changed:
            said = ", ".join(
                f"{name} was {before:g} and is {value:g}" for name, (before, value) in changed.items()
            )
            remedy = ", ".join(f"{name}: {before:g}" for name, (before, _) in changed.items())
            warnings.warn(
                f"slimfit.freeze: learning rates go on multiplied otherwise than in the run that the checkpoint is from: "
                f"{said}; set {remedy} to go on as before",
                stacklevel=3,
            )


def room_at(
    roles: ParameterRoles, currency: str, rate: float, uncounted: frozenset[int] = frozenset()
) -> Budget:
    """The budget of a freezing rate: at most `1 - rate` of what training all layers whole would cost.

    Args:
        roles: of the model.
        currency: `layers`: a unit costs its width, and of whole layers there is room for one at least; `parameters`: its
            elements, against those of the model before any layer was split.
        rate: share that is frozen, in [0, 1).
        uncounted: positions of units that cost nothing in `layers`.
    """
    if currency == "parameters":
        return Budget(tuple(unit.numel for unit in roles.units), (1 - rate) * roles.numel)
    costs = tuple(0.0 if i in uncounted else unit.width for i, unit in enumerate(roles.units))
    n_layers = roles.layers - len(uncounted)
    if roles.split is not None:
        return Budget(costs, (1 - rate) * n_layers)
    # 0.29 * 100 is 28.999999999999996 in floating point; the user meant 29.
    return Budget(costs, max(n_layers - math.floor(rate * n_layers + 1e-9), 1))


def _resolve(roles: ParameterRoles, config: FreezeConfig) -> tuple[frozenset[int], frozenset[int], Budget]:
    """The positions of the units that always and that never train, and what a set may cost."""
    names = roles.names
    problems: list[str] = []
    if not names and not (roles.small and POLICIES[config.policy].trains_all and not config.splits):
        problems.append(_no_layers(roles))
    always, never = match_always_and_never(config.always_active, config.never_active, roles, problems)
    if names and len(never) == len(names):
        problems.append("slimfit.freeze.never_active matches every layer: nothing would train")
    # Beside narrow units, norms and heads train whole at every step. They are no choice, so `layers` does not count them.
    whole = frozenset() if roles.split is None else _whole(roles.units)
    budget = room_at(roles, config.budget, config.rate, whole - always)
    always |= whole - never
    if names and not POLICIES[config.policy].trains_all:
        problems += _room_problems(roles.units, config, always, never, budget)
    if problems:
        raise ConfigError(problems)
    return always, never, budget


def _no_layers(roles: ParameterRoles) -> str:
    if not roles.small:
        return "the model has no trainable layer: every weight has requires_grad=False"
    shown = ", ".join(roles.small[:3]) + (", ..." if len(roles.small) > 3 else "")
    return (
        f"slimfit.freeze: the model has no layer to freeze, only vectors ({shown}), which train at every step: set policy "
        "to none, or leave the slimfit block out"
    )


def _whole(units: Sequence[Unit]) -> frozenset[int]:
    return frozenset(i for i, unit in enumerate(units) if not is_part(unit.name))


def _room_problems(
    units: Sequence[Unit], config: FreezeConfig, always: frozenset[int], never: frozenset[int], budget: Budget
) -> list[str]:
    """Whether what always trains, and the smallest other unit, fit into the budget."""
    if not budget.fits(always):
        return [
            f"slimfit.freeze.rate {config.rate} leaves {budget.room:,.10g} {config.budget} active, but always_active and "
            f"what else trains at every step take {budget.spent(always):,.10g}: lower the rate or match fewer layers"
        ]
    free = [unit for unit in range(len(units)) if unit not in always | never]
    if not always and free and not any(budget.fits([unit]) for unit in free):
        return [
            f"slimfit.freeze.rate: {config.rate} leaves room for {budget.room:,.10g} {config.budget}, less than the smallest "
            "layer takes: lower the rate"
        ]
    return []


def _difference(saved: Sequence[str], present: Sequence[str]) -> list[str]:
    if list(saved) == list(present):
        return []
    problems = [f"the checkpoint has {len(saved)} freezable layers, the model {len(present)}"]
    problems += [f"only in the checkpoint: {name}" for name in saved if name not in set(present)]
    problems += [f"only in the model: {name}" for name in present if name not in set(saved)]
    if len(problems) == 1:
        problems.append("the same layers stand in another order")
    return problems
