"""The cheapest setting that fits a budget, found by simulating settings from a ladder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from slimfit_ds.errors import ConfigError
from slimfit_ds.planner.estimator import Estimate, Simulator
from slimfit_ds.planner.ladder import ERROR_CLASSES, ladder, merged
from slimfit_ds.planner.strategy import Strategy
from slimfit_ds.planner.workload import Workload
from slimfit_ds.report.units import human_bytes

__all__ = ["Choice", "Setting", "choose_settings", "find_setting"]

Run = Callable[[Workload, Strategy], Estimate]


@dataclass(frozen=True)
class Setting:
    """One tried setting and what it would need."""

    label: str
    block: dict[str, Any]
    preset: str
    estimate: Estimate

    @property
    def error_class(self) -> str:
        """Expected relative error of the gradients."""
        return ERROR_CLASSES.get(self.preset, "not measured")


@dataclass(frozen=True)
class Choice:
    """The outcome of a search."""

    setting: Setting | None
    """The fastest setting that fits; None: nothing does."""
    smallest: Setting
    """The setting that needs least, of those tried."""
    tried: tuple[Setting, ...]

    def reason(self, budget: int) -> str:
        """Why this setting, in a line for the log."""
        if self.setting is None:
            return (
                f"nothing fits {human_bytes(budget)}: the leanest setting ({self.smallest.label}) needs "
                f"{human_bytes(self.smallest.estimate.peak)}"
            )
        over = [s for s in self.tried if s.estimate.report is not None and s.estimate.peak > budget]
        text = f"{self.setting.label}: {human_bytes(self.setting.estimate.peak)} of {human_bytes(budget)}"
        if over:
            nearest = min(over, key=lambda s: s.estimate.peak)
            text += f"; the next faster tried ({nearest.label}) needs {human_bytes(nearest.estimate.peak)}"
        return text


def find_setting(
    budget: int,
    workload: Workload,
    run: Run,
    fixed: Mapping[str, Any] | None = None,
    stage: int = 1,
    accumulation: int = 1,
    embeddings: tuple[str, ...] = (),
    strategy: Strategy | None = None,
    language_model: bool = False,
) -> Choice:
    """Search the ladder for the fastest setting within a budget.

    Settings need less and less along the ladder (nearly always), so few of them are simulated: first the leanest,
    which tells whether anything fits, then by bisection.

    Args:
        budget: bytes that one rank may hold.
        workload: model and batch of a rank.
        run: simulates a strategy (a `Simulator`'s `run`, with the worst active set).
        fixed: the user's `"slimfit"` block; what it states is kept.
        stage: ZeRO stage.
        accumulation: micro-batches per step.
        embeddings: names of the model's embedding layers.
        strategy: carries further settings, such as the buckets.
        language_model: the loss can be taken in chunks of tokens.

    Raises:
        ConfigError: no setting can be simulated at all.
    """
    rungs = ladder(fixed, stage, language_model)
    done: dict[int, Setting] = {}
    base = strategy or Strategy("slimfit", stage=stage, accumulation=accumulation)

    def at(index: int) -> Setting:
        if index not in done:
            block = merged(fixed, rungs[index], embeddings)
            estimate = run(workload, base.with_(name=f"slimfit-{index}", slimfit=block))
            done[index] = Setting(rungs[index].label, block, rungs[index].preset, estimate)
        return done[index]

    def fits(setting: Setting) -> bool:
        return setting.estimate.report is not None and setting.estimate.peak <= budget

    low, high = 0, len(rungs) - 1
    if fits(at(high)):
        while low < high:
            middle = (low + high) // 2
            if fits(at(middle)):
                high = middle
            else:
                low = middle + 1
    tried = tuple(done[index] for index in sorted(done))
    sound = [setting for setting in tried if setting.estimate.report is not None]
    if not sound:
        raise ConfigError([f"memory_budget: no setting can be simulated: {tried[-1].estimate.error}"])
    chosen = next((setting for setting in tried if fits(setting)), None)
    return Choice(chosen, min(sound, key=lambda setting: setting.estimate.peak), tried)


def choose_settings(
    budget: int,
    workload: Workload,
    fixed: Mapping[str, Any] | None = None,
    world_size: int = 1,
    stage: int = 1,
    accumulation: int = 1,
    strategy: Strategy | None = None,
    target: str = "cuda",
    simulator: Simulator | None = None,
) -> tuple[dict[str, Any], str]:
    """The `"slimfit"` block for a memory budget; what `slimfit_ds.initialize` asks when `memory_budget` is set.

    The worst active set is assumed (the largest layers at once), because a run has to stay below its budget.

    Args:
        budget: bytes that one rank may hold.
        workload: model and batch of a rank.
        fixed: the user's `"slimfit"` block; what it states is kept.
        world_size: ranks.
        stage: ZeRO stage.
        accumulation: micro-batches per step.
        strategy: carries further settings, such as the buckets.
        target: `cuda` or `cpu`.
        simulator: of `world_size` ranks, left open; None: one of its own.

    Returns:
        The block, and why it was chosen, for the log.

    Raises:
        ConfigError: nothing fits; names the smallest budget that would do.
    """
    with nullcontext(simulator) if simulator is not None else Simulator(world_size) as simulator:
        try:
            facts = simulator.inspect(workload)
        except ValueError as error:
            raise ConfigError([f"slimfit.memory_budget: {error}"]) from None

        def run(work: Workload, how: Strategy) -> Estimate:
            return simulator.run(work, how, "worst", target)

        embeddings, language = tuple(facts["embeddings"]), facts["loss_in_chunks"]
        choice = find_setting(
            budget, workload, run, fixed, stage, accumulation, embeddings, strategy, language
        )
    if choice.setting is None:
        least = choice.smallest
        raise ConfigError(
            [
                f"slimfit.memory_budget: {human_bytes(budget)} is too small; the smallest feasible budget within what "
                f"is fixed is {least.estimate.peak} bytes ({human_bytes(least.estimate.peak)}), with {least.label}"
            ]
        )
    return choice.setting.block, choice.reason(budget)
