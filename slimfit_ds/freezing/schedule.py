"""The schedule of a run: which layers train now, and what has to be saved to go on from here."""

from __future__ import annotations

import difflib
import hashlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from slimfit_ds.config import ConfigError, FreezeConfig
from slimfit_ds.freezing.budget import Budget, room_at
from slimfit_ds.freezing.layers import Layer, match_globs
from slimfit_ds.freezing.policies import POLICIES, Selection
from slimfit_ds.freezing.statistics import STATISTICS

__all__ = ["FreezeSchedule"]


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
        self.active = self._select()

    @property
    def oversized(self) -> tuple[str, ...]:
        """Layers that never train because each costs more than a set may, at the least strict rate."""
        if self.config.policy == "none":
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
        self.step += 1
        if self.step % self.config.interval == 0:
            self.active = self._select()
        return self.active

    def _select(self) -> frozenset[int]:
        n_layers = len(self.layers)
        selection = Selection(
            step=self.step,
            budget=self._budget(self.config.rate_at(self.step)),
            candidates=tuple(i for i in range(n_layers) if i not in self._always | self._never),
            always=self._always,
            seed=self.config.seed,
        )
        return self._policy.select(self._state, selection)

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
    always = match_globs(config.always_active, names, "slimfit.freeze.always_active", problems)
    never = match_globs(config.never_active, names, "slimfit.freeze.never_active", problems)
    problems += [
        f"slimfit.freeze: {names[layer]!r} is matched by always_active and by never_active"
        for layer in sorted(always & never)
    ]
    if names and len(never) == len(names):
        problems.append("slimfit.freeze.never_active matches every layer: nothing would train")
    if names and config.policy != "none":
        problems += _room_problems(layers, config, always, never)
    if problems:
        raise ConfigError(problems)
    return always, never


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
