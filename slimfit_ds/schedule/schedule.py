"""The schedule of a run: which layers train now, and what has to be saved to go on from here."""

from __future__ import annotations

import difflib
import hashlib
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from slimfit_ds.errors import ConfigError
from slimfit_ds.schedule.budget import Budget, room_at
from slimfit_ds.schedule.config import FreezeConfig
from slimfit_ds.schedule.policies import POLICIES, Selection
from slimfit_ds.schedule.statistics import STATISTICS
from slimfit_ds.trainable.blocks import find_head
from slimfit_ds.trainable.layers import Layer, is_part, match_globs

__all__ = ["FreezeSchedule"]

_PRIOR_UPDATES = 2


class FreezeSchedule:
    """Holds a policy's state and the active set of the coming step.

    Args:
        layers: the freezable layers, in model order.
        config: the `freeze` block.

    Raises:
        ConfigError: unknown policy or statistic, globs that match nothing or contradict each other,
            always-active layers that cost more than the rate leaves, a rate that leaves room for nothing.
    """

    def __init__(self, layers: Sequence[Layer], config: FreezeConfig):
        self.layers = tuple(layers)
        self.names = tuple(layer.name for layer in layers)
        self.config = config
        self._always, self._never = _resolve(self.layers, config)
        self._policy = POLICIES[config.policy]
        self._state = self._policy.init(len(self.layers), config.seed)
        self.step = 0
        self.statistics: dict[int, float] = {}
        self._visits = [0] * len(self.layers)
        self._last = [-1] * len(self.layers)
        self.active = self._select()

    @property
    def oversized(self) -> tuple[str, ...]:
        """Layers that never train because each costs more than a set may, at the least strict rate."""
        if not self._policy.keeps_budget:
            return ()
        budget = self._budget(min(self.config.rates))
        free = (layer for layer in range(len(self.layers)) if layer not in self._always | self._never)
        return tuple(self.names[layer] for layer in free if not budget.fits(self._always | {layer}))

    def warn_of_oversized(self) -> None:
        """Say once which layers the budget keeps from ever training."""
        if self.oversized:
            warnings.warn(
                f"slimfit.freeze.budget {'+'.join(self.config.budget)}: never trains "
                f"{', '.join(self.oversized)}, larger than a whole active set may be; lower the rate, or choose "
                f"budget: layers, if it must train",
                stacklevel=3,
            )

    def _budget(self, rate: float) -> Budget:
        return room_at(self.layers, self.config.budget, rate)

    @property
    def is_static(self) -> bool:
        """True if the active set never changes: there is nothing to measure, to compare or to apply again."""
        return not self._policy.keeps_budget

    @property
    def active_names(self) -> frozenset[str]:
        return frozenset(self.names[layer] for layer in self.active)

    def advance(self, statistics: Mapping[int, float]) -> frozenset[int]:
        """Count a step, take in its statistics and return the active set of the next one.

        Args:
            statistics: layer position -> statistic, for layers that were updated in this step. Empty
                when the step was skipped (overflow), which leaves the policy's state as it was.
        """
        self._state = self._policy.observe(self._state, statistics)
        self.statistics.update(statistics)
        for layer in self.active:
            self._visits[layer] += 1
            self._last[layer] = self.step
        self.step += 1
        if self.step % self.config.interval == 0 and not self.is_static:
            self.active = self._select()
        return self.active

    def _select(self) -> frozenset[int]:
        n_layers = len(self.layers)
        budget = self._budget(self.config.rate_at(self.step))
        candidates = tuple(i for i in range(n_layers) if i not in self._always | self._never)
        # Overdue layers are chosen as if they were always active, until the set is full of them.
        always = budget.fill(self._overdue(candidates), self._always)
        selection = Selection(
            layers=self.layers,
            step=self.step,
            choice=self.step // self.config.interval,
            budget=budget,
            candidates=tuple(i for i in candidates if i not in always),
            always=always,
            seed=self.config.seed,
        )
        return self._policy.select(self._state, selection)

    def _overdue(self, candidates: Sequence[int]) -> list[int]:
        """Layers that have waited for `refresh` steps or more, the longest first."""
        limit = self.config.refresh
        if limit is None:
            return []
        late = [layer for layer in candidates if self.step - self._last[layer] > limit]
        return sorted(late, key=lambda layer: (self._last[layer], layer))

    def missed(self, layer: int) -> int:
        """Steps in a row, up to the coming one, in which a layer did not train."""
        return self.step - self._last[layer] - 1

    def lr_factors(self) -> dict[int | None, float]:
        """What the learning rate of each active layer, and of small parameters (None), is multiplied by.

        A layer that trains in a share `s` of the steps moves `s` times as far at the same rate, and its noise is `s`
        times the variance. `auto` raises the rate by `1 / sqrt(s)`: between making up for the distance and keeping the
        noise as it was. The share is counted for each layer, from a prior of two updates at the freezing rate's share.
        """
        factors: dict[int | None, float] = {None: self.config.always_lr_scale}
        for layer in self.active:
            factors[layer] = self.config.always_lr_scale if layer in self._always else self._scale(layer)
            if self.layers[layer].kind == "embedding" and is_part(self.names[layer]):
                factors[layer] *= self._embedding_scale(self.layers[layer])
        return factors

    def _embedding_scale(self, layer: Layer) -> float:
        """`auto`: the step of a vector has the norm that it would have if all of its places trained."""
        scale = self.config.embedding_lr_scale
        return 1 / math.sqrt(layer.share) if scale == "auto" else scale

    def _scale(self, layer: int) -> float:
        if self.config.lr_scale != "auto":
            return self.config.lr_scale
        prior = _PRIOR_UPDATES / (1 - self.config.rate_at(self.step))
        return math.sqrt((self.step + prior) / (self._visits[layer] + _PRIOR_UPDATES))

    def fingerprint(self) -> int:
        """A 63-bit hash of step and active set; equal on ranks that will train the same layers."""
        text = f"{self.step}:{sorted(self.active)}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on, as JSON types."""
        return {
            "layers": list(self.names),
            "policy": self.config.policy,
            "state": dict(self._state),
            "step": self.step,
            "active": sorted(self.active),
            "visits": list(self._visits),
            "last": list(self._last),
            "statistics": {self.names[layer]: value for layer, value in self.statistics.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state.

        The state of another policy is not taken over (there is none that both understand): the new
        policy starts afresh at the saved step.

        Raises:
            ConfigError: the saved layers are not this model's; names the difference.
        """
        if problems := _difference(state["layers"], self.names):
            raise ConfigError(problems)
        self.step = int(state["step"])
        # Checkpoints of earlier versions hold no counts: as if every layer had trained just now, at the rate's share.
        self._visits = list(state.get("visits") or [0] * len(self.layers))
        self._last = list(state.get("last") or [self.step - 1] * len(self.layers))
        positions = {name: layer for layer, name in enumerate(self.names)}
        self.statistics = {positions[name]: value for name, value in state["statistics"].items()}
        if state["policy"] == self.config.policy:
            self._state = dict(state["state"])
            self.active = frozenset(state["active"])
        else:
            self.active = self._select()


def _resolve(layers: Sequence[Layer], config: FreezeConfig) -> tuple[frozenset[int], frozenset[int]]:
    """The positions of the always-active and of the never-active layers."""
    names = [layer.name for layer in layers]
    problems: list[str] = []
    if not names:
        problems.append("the model has no trainable layer: every weight has requires_grad=False")
    for key, value, known in (
        ("policy", config.policy, POLICIES),
        ("statistic", config.statistic, STATISTICS),
    ):
        if value not in known:
            near = difflib.get_close_matches(value, known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            problems.append(f"slimfit.freeze.{key}: unknown {value!r}; {hint}known: {', '.join(known)}")
    policy = POLICIES.get(config.policy)
    keeps_budget = policy is None or policy.keeps_budget
    if policy is not None and policy.splits_columns:
        # The globs were for the weights before the split: what is left of them trains.
        whole = frozenset(i for i, name in enumerate(names) if not is_part(name))
        if problems:
            raise ConfigError(problems)
        return whole, frozenset()
    always = match_globs(config.always_active, names, "slimfit.freeze.always_active", problems)
    never = match_globs(config.never_active, names, "slimfit.freeze.never_active", problems)
    always |= _head(layers, config) - never
    problems += [
        f"slimfit.freeze: {names[layer]!r} is matched by always_active and by never_active"
        for layer in sorted(always & never)
    ]
    if names and len(never) == len(names):
        problems.append("slimfit.freeze.never_active matches every layer: nothing would train")
    if names and keeps_budget:
        problems += _room_problems(layers, config, always, never)
    if problems:
        raise ConfigError(problems)
    return always, never


def _head(layers: Sequence[Layer], config: FreezeConfig) -> frozenset[int]:
    """The head, where it is to train at every step and leaves at least half of the strictest budget."""
    head = find_head(layers) if config.head == "always" else None
    if head is None:
        return frozenset()
    budget = room_at(layers, config.budget, max(config.rates))
    modest = all(2 * spent <= room for spent, room in zip(budget.spent([head]), budget.room, strict=True))
    return frozenset([head]) if modest else frozenset()


def _room_problems(
    layers: Sequence[Layer], config: FreezeConfig, always: frozenset[int], never: frozenset[int]
) -> list[str]:
    """What does not fit at the strictest rate of a run."""
    rate = max(config.rates)
    budget = room_at(layers, config.budget, rate)
    total = budget.spent(range(len(layers)))
    problems = [
        f"slimfit.freeze.always_active matches {spent:,} {name}, but rate {rate} leaves {room:,} of {all_:,} "
        f"active: lower the rate or match fewer layers"
        for name, spent, room, all_ in zip(
            config.budget, budget.spent(always), budget.room, total, strict=True
        )
        if spent > room
    ]
    free = [layer for layer in range(len(layers)) if layer not in always | never]
    if not problems and not always and free and not any(budget.fits([layer]) for layer in free):
        limits = ", ".join(f"{room:,} {name}" for name, room in zip(config.budget, budget.room, strict=True))
        problems.append(
            f"slimfit.freeze.rate: {rate} leaves room for {limits}, less than the smallest layer takes: "
            "lower the rate"
        )
    return problems


def _difference(saved: Sequence[str], present: Sequence[str]) -> list[str]:
    if list(saved) == list(present):
        return []
    problems = [f"the checkpoint has {len(saved)} freezable layers, the model {len(present)}"]
    problems += [f"only in the checkpoint: {name}" for name in saved if name not in set(present)]
    problems += [f"only in the model: {name}" for name in present if name not in set(saved)]
    if len(problems) == 1:
        problems.append("the same layers stand in another order")
    return problems
