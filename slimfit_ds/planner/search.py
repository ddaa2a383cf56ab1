"""The fastest setting that fits a budget: a ladder of settings from fastest to leanest, searched by simulation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

from slimfit_ds.config import SlimFitConfig
from slimfit_ds.errors import ConfigError
from slimfit_ds.planner.simulate import Estimate
from slimfit_ds.planner.strategies import GRADIENT_ERROR, Strategy
from slimfit_ds.planner.workload import Workload
from slimfit_ds.report.units import human_bytes
from slimfit_ds.schedule.policies import POLICIES

__all__ = ["Choice", "Rung", "Setting", "find_setting", "label_of", "ladder", "merged"]

Run = Callable[[Workload, Strategy], Estimate]


@dataclass(frozen=True)
class Rung:
    """One setting of the ladder, as changes to a `"slimfit"` block."""

    label: str
    changes: Mapping[str, Any]

    @property
    def preset(self) -> str:
        """The activation preset."""
        return self.changes["activations"]["preset"]


def _rung(
    preset: str,
    residency: str,
    rate: float = 0.9,
    chunk: int | None = None,
    loss: int | None = None,
    frozen_embeddings: bool = False,
    small_states: bool = False,
    streamed: bool = False,
) -> dict[str, dict[str, Any]]:
    """Return the changes of a rung; `chunk` and `loss` in tokens."""
    blocks: dict[str, dict[str, Any]] = {
        "freeze": {"rate": rate, "never_active": "embeddings" if frozen_embeddings else None},
        "activations": {"preset": preset, "chunk_tokens": chunk, "chunk_loss_tokens": loss},
        "optimizer_states": {
            "inactive": residency,
            "precision": "8bit" if small_states else None,
            "active": "host" if streamed else None,
        },
        "frozen_weights": {"live": "host" if streamed else None},
    }
    return {
        name: {key: value for key, value in block.items() if value is not None}
        for name, block in blocks.items()
    }


def _rungs(loss: int | None) -> list[dict[str, dict[str, Any]]]:
    """Return all settings; `loss` tokens at a time of a language model's head and loss, once anything is compressed."""
    small: dict[str, Any] = {"loss": loss, "frozen_embeddings": True, "small_states": True}
    return [
        _rung("exact", "device"),
        _rung("exact", "host"),
        _rung("balanced", "host"),
        # No matrix product more: the gradients of the head are worked out with the loss, chunk by chunk.
        _rung("balanced", "host", loss=loss),
        _rung("minimal", "device", loss=loss),
        _rung("minimal", "host", loss=loss),
        _rung("minimal", "host", 0.95, loss=loss),
        _rung("minimal", "host", 0.95, 2048, loss=loss),
        _rung("minimal", "host", 0.95, 2048, loss=loss, frozen_embeddings=True),
        _rung("minimal", "host", 0.95, 2048, **small),
        _rung("minimal", "host", 0.98, 2048, **small),
        _rung("ultra", "host", 0.98, 1024, **small),
        _rung("minimal", "host", 0.95, 2048, loss=loss and _FEWER_LOSS_TOKENS, streamed=True),
        _rung("ultra", "host", 0.98, 1024, **(small | {"loss": loss and _FEWER_LOSS_TOKENS}), streamed=True),
    ]


def label_of(changes: Mapping[str, Mapping[str, Any]]) -> str:
    """Return what a rung or a whole `"slimfit"` block changes, in words."""
    freeze, activations, states = (
        changes.get(key, {}) for key in ("freeze", "activations", "optimizer_states")
    )
    words = [activations.get("preset"), f"{freeze['rate']:.0%} frozen" if "rate" in freeze else None]
    words += [f"states on {states['inactive']}" if "inactive" in states else None]
    words += [f"chunks of {activations['chunk_tokens']} tokens" if "chunk_tokens" in activations else None]
    words += ["loss in chunks" if "chunk_loss_tokens" in activations else None]
    words += ["embeddings frozen" if "never_active" in freeze else None]
    words += ["8-bit states" if "precision" in states else None]
    weights = changes.get("frozen_weights", {})
    away = "frozen weights and states on host" if states.get("active") == "host" else "frozen weights on host"
    words += [away if weights.get("live") == "host" else None]
    words += [f"{weights['resident']} blocks on the device" if weights.get("resident") else None]
    return ", ".join(word for word in words if word)


# Tokens whose logits exist at a time: 0.5 GiB of fp32 logits and gradients each for a vocabulary of 128,000.
_LOSS_TOKENS = 1024
# Where weights are streamed the logits would be the largest of what is left.
_FEWER_LOSS_TOKENS = 256


def ladder(
    fixed: Mapping[str, Any] | None = None, stage: int = 1, language_model: bool = False
) -> list[Rung]:
    """Return the settings that are left when the user has fixed some of them.

    Args:
        fixed: the user's own `"slimfit"` block; what it states is never changed.
        stage: ZeRO stage; stage 3 has no 8-bit states.
        language_model: the loss can be computed in chunks of tokens.

    Returns:
        Distinct settings, from fastest to leanest.
    """
    fixed = _as_blocks(fixed)
    # Where all units train at every step no state is ever that of a frozen one.
    freeze = SlimFitConfig.parse({"freeze": fixed.get("freeze", {})}).freeze
    trains_all = POLICIES[freeze.policy].trains_all
    rungs: list[Rung] = []
    for every in _rungs(_LOSS_TOKENS if language_model else None):
        if every["frozen_weights"] and not freeze.splits:
            continue
        changes = {
            key: {name: value for name, value in block.items() if name not in fixed.get(key, {})}
            for key, block in every.items()
        }
        if stage == 3:
            changes["optimizer_states"].pop("precision", None)
        if trains_all:
            changes["optimizer_states"].pop("inactive", None)
            if "width" in fixed.get("freeze", {}):
                # It says what is frozen.
                changes["freeze"].pop("rate", None)
        partly = any(fixed.get(key) for key in changes)
        preset = fixed.get("activations", {}).get("preset")
        if preset is not None:
            changes["activations"]["preset"] = preset
        if all(changes != known.changes for known in rungs):
            label = label_of(changes)
            rungs.append(Rung(f"{label}, within what is fixed" if partly else label, changes))
    return rungs


def _as_blocks(fixed: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the user's block without its budget, and with `activations` as a mapping."""
    blocks = {key: value for key, value in (fixed or {}).items() if key != "memory_budget"}
    if isinstance(blocks.get("activations"), str):
        blocks["activations"] = {"preset": blocks["activations"]}
    return blocks


def merged(fixed: Mapping[str, Any] | None, rung: Rung, embeddings: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the whole `"slimfit"` block: the user's values, completed by a rung.

    Args:
        fixed: the user's block.
        rung: what to add.
        embeddings: names of the model's embedding layers, for rungs that freeze them.
    """
    block = _as_blocks(fixed)
    for key, value in rung.changes.items():
        block[key] = {**value, **block.get(key, {})}
    freeze = block["freeze"]
    if freeze.get("never_active") == "embeddings":
        freeze["never_active"] = list(embeddings)
        if not embeddings:
            del freeze["never_active"]
    if block.get("frozen_weights", {}).get("live") != "host":
        # What else is stated there is about weights on the host.
        block.pop("frozen_weights", None)
    return block


@dataclass(frozen=True)
class Setting:
    """One tried setting and what it would need."""

    label: str
    block: dict[str, Any]
    preset: str
    estimate: Estimate

    @property
    def gradient_error(self) -> str:
        """Expected relative error of the gradients."""
        return GRADIENT_ERROR.get(self.preset, "not measured")


@dataclass(frozen=True)
class Choice:
    """The outcome of a search."""

    setting: Setting | None
    """The fastest setting that fits; None: nothing does."""
    smallest: Setting
    """The setting that needs least, of those tried."""
    tried: tuple[Setting, ...]

    def reason(self, budget: int) -> str:
        """Return why this setting, in a line for the log."""
        if self.setting is None:
            return (
                f"nothing fits {human_bytes(budget)}: the leanest setting ({self.smallest.label}) needs "
                f"{human_bytes(self.smallest.estimate.peak)}"
            )
        over = [s for s in self.tried if s.estimate.report is not None and s.estimate.peak > budget]
        text = f"{self.setting.label}: {human_bytes(self.setting.estimate.peak)} of {human_bytes(budget)}"
        if over:
            nearest = min(over, key=lambda s: s.estimate.peak)
            text += f"; the next larger tried ({nearest.label}) needs {human_bytes(nearest.estimate.peak)}"
        return text


def find_setting(
    budget: int,
    workload: Workload,
    run: Run,
    fixed: Mapping[str, Any] | None = None,
    embeddings: tuple[str, ...] = (),
    strategy: Strategy | None = None,
    language_model: bool = False,
    beside: Executor | None = None,
) -> Choice:
    """Search the ladder for the fastest setting within a budget.

    Settings need less and less along the ladder (nearly always), so few of them are simulated: first the leanest,
    which tells whether anything fits, then by bisection.

    Args:
        budget: bytes that one rank may hold.
        workload: model and batch of a rank.
        run: simulates a strategy (a `Simulator`'s `run`, with the worst active set).
        fixed: the user's `"slimfit"` block; what it states is kept.
        embeddings: names of the model's embedding layers.
        strategy: carries what is not in the block: stage, buckets, micro-batches. Default: ZeRO 1.
        language_model: the loss can be computed in chunks of tokens.
        beside: where the leanest setting is simulated while the others are searched as if it fitted.

    Raises:
        ConfigError: no setting can be simulated at all.
    """
    base = strategy or Strategy("slimfit", stage=1)
    rungs = ladder(fixed, base.stage or 0, language_model)
    done: dict[int, Setting] = {}

    def at(index: int) -> Setting:
        if index not in done:
            block = merged(fixed, rungs[index], embeddings)
            estimate = run(workload, base.with_(name=f"slimfit-{index}", slimfit=block))
            done[index] = Setting(rungs[index].label, block, rungs[index].preset, estimate)
        return done[index]

    def fits(setting: Setting) -> bool:
        return setting.estimate.report is not None and setting.estimate.peak <= budget

    def bisect(high: int) -> None:
        low = 0
        while low < high:
            middle = (low + high) // 2
            if fits(at(middle)):
                high = middle
            else:
                low = middle + 1

    leanest = len(rungs) - 1
    if beside is not None:
        asked = beside.submit(at, leanest)
        bisect(leanest)
        asked.result()
    # A small model cannot keep the highest rates: the leanest setting is the last that it can.
    while leanest and at(leanest).estimate.report is None:
        leanest -= 1
    if fits(at(leanest)):
        bisect(leanest)
    tried = tuple(done[index] for index in sorted(done))
    sound = [setting for setting in tried if setting.estimate.report is not None]
    if not sound:
        raise ConfigError([f"memory_budget: no setting can be simulated: {tried[-1].estimate.error}"])
    chosen = next((setting for setting in tried if fits(setting)), None)
    if chosen is not None and "resident" not in chosen.block.get("frozen_weights", {}):
        chosen = _with_residents(
            chosen, budget, lambda block: run(workload, base.with_(name="resident", slimfit=block))
        )
        tried = (*(each for each in tried if each.label != chosen.label), chosen)
    return Choice(chosen, min(sound, key=lambda setting: setting.estimate.peak), tried)


def _with_residents(setting: Setting, budget: int, run: Callable[[dict[str, Any]], Estimate]) -> Setting:
    """Return a setting that streams blocks with as many of them on the device as the budget allows."""
    estimate = setting.estimate
    room = min((budget - estimate.peak) // max(estimate.block, 1), estimate.blocks - 1)
    while room > 0:
        block = {**setting.block, "frozen_weights": {**setting.block["frozen_weights"], "resident": room}}
        found = run(block)
        if found.report is not None and found.peak <= budget:
            total = estimate.blocks
            return Setting(f"{setting.label} but {room} of {total} blocks", block, setting.preset, found)
        room -= 1 + room // 8
    return setting
