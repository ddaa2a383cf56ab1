"""A deep model from two shallow ones: where all blocks are alike, each adds the same bytes to every moment of a step."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from torch import nn

from slimfit_ds.activations.recognise import find_blocks
from slimfit_ds.config import SlimFitConfig
from slimfit_ds.memory.probe import StepCost
from slimfit_ds.memory.tracker import MemoryReport, Peak
from slimfit_ds.planner.step import track_cost
from slimfit_ds.planner.strategies import Strategy
from slimfit_ds.planner.workload import Workload
from slimfit_ds.schedule.config import FreezeConfig
from slimfit_ds.trainable.plan import Plan, plan_units

__all__ = ["DeepSteps", "blocks_alike"]

_SHALLOW, _DEEPER = 2, 3
_COUNTED = ("flops", "copied", "layers", "parameters")

Moments = dict[tuple[str, str], Peak]


def blocks_alike(model: nn.Module) -> int:
    """Return how many blocks a model has, if they differ in nothing but their values and `num_hidden_layers` counts them; or 0."""
    blocks = find_blocks(model)
    same = len({_signature(block) for block in blocks.values()}) == 1
    prefixes = {name.rpartition(".")[0] for name in blocks}
    counted = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    return len(blocks) if same and len(prefixes) == 1 and counted == len(blocks) > _DEEPER + 1 else 0


def _signature(block: nn.Module) -> str:
    """Return what a block is made of: classes, shapes and plain attributes, without its position."""
    parts: list[Any] = [(name, tuple(p.shape), str(p.dtype)) for name, p in block.named_parameters()]
    for name, module in block.named_modules():
        plain = {k: v for k, v in vars(module).items() if isinstance(v, bool | int | float | str | None)}
        plain = {k: v for k, v in plain.items() if not re.search("layer_?(idx|index|id|number)$", k)}
        parts.append((name, type(module).__qualname__, sorted(plain.items(), key=lambda pair: pair[0])))
    return repr(parts)


class DeepSteps:
    """Steps of a model of many blocks, worked out from steps with two and with three of them.

    For each phase and module, of the first and of the last block, the largest total is taken; what lies between grows
    evenly from one to the other. Columns are those of the whole model. `tests/planner/test_depth.py` compares with the
    step of all blocks.

    Args:
        world_size: pretended ranks.
        fake: a fake world, to be entered for each step.
    """

    def __init__(self, world_size: int, fake: Callable[[], Any]):
        self._world_size, self._fake = world_size, fake
        self._models: dict[str, nn.Module] = {}
        self._steps: dict[str, tuple[StepCost, dict[str, Any]]] = {}

    def track(
        self, workload: Workload, strategy: Strategy, active: str | Sequence[str] | None, target: str
    ) -> tuple[MemoryReport, dict[str, Any]] | None:
        """As `track_step`; None where a step of all blocks has to be done."""
        block = strategy.slimfit
        freeze = SlimFitConfig.parse(dict(block)).freeze if block is not None else None
        if freeze is not None and (not freeze.splits or freeze.front != "none"):
            return None  # sets of whole layers, and where a backward pass ends, do not grow evenly
        if strategy.stage == 3:
            return None  # gathers ahead in an order of its own
        model = self._whole(workload)
        depth = blocks_alike(model)
        if not depth:
            return None
        like = None if freeze is None else _plan(model, freeze)
        resident = int((block or {}).get("frozen_weights", {}).get("resident", 0) or 0)
        if resident > depth - _SHALLOW:
            return None
        prefix = next(iter(find_blocks(model))).rpartition(".")[0]

        def step(count: int, kept: int = 0) -> tuple[StepCost, Moments, dict[str, Any]]:
            how = strategy if not resident else strategy.with_(slimfit=_with_resident(block or {}, kept))
            small = replace(workload, overrides={**workload.overrides, "num_hidden_layers": count})
            key = json.dumps([small.to_dict(), how.with_(name="", note="").to_dict(), active, target])
            if key not in self._steps:
                with self._fake():
                    self._steps[key] = track_cost(
                        small, how, self._world_size, active, target, like, warm=False
                    )
            cost, facts = self._steps[key]
            return cost, _moments(cost.peaks, prefix, count), facts

        (low, at_low, facts), (high, at_high, more) = step(_SHALLOW), step(_DEEPER)
        times = depth - _SHALLOW
        reports = [(low.memory, -times + 1), (high.memory, times)]
        moments = [(at_low, -times + 1), (at_high, times)]
        counts = [(facts, -times + 1), (more, times)]
        if resident:
            kept, at_kept, with_kept = step(_DEEPER, 1)
            reports += [(high.memory, -resident), (kept.memory, resident)]
            moments += [(at_high, -resident), (at_kept, resident)]
            counts += [(more, -resident), (with_kept, resident)]
        found = _sum_moments(moments)
        if found is None:
            return None
        peak = max(found.values(), key=lambda each: each.total)
        report = _sum_reports(reports)
        summed = {key: sum(f[key] * n for f, n in counts) for key in _COUNTED if key in facts}
        streamed = {"blocks": depth - resident, "block": more["block"]} if "block" in more else {}
        module = peak.module.replace(f"{prefix}.last", f"{prefix}.{depth - 1}")
        return replace(
            report, peak=peak.total, at_peak=peak.live, peak_phase=peak.phase, peak_module=module
        ), {**summed, **streamed}

    def _whole(self, workload: Workload) -> nn.Module:
        key = json.dumps([workload.model, workload.task, workload.overrides, workload.image_size])
        if key not in self._models:
            with self._fake():
                self._models[key] = workload.build()
        return self._models[key]


def _plan(model: nn.Module, freeze: FreezeConfig) -> Plan:
    rate = freeze.rate if freeze.width is None else None
    return plan_units(
        model, rate=rate, width=freeze.width, always=freeze.always_active, never=freeze.never_active
    )


def _with_resident(block: Mapping[str, Any], count: int) -> dict[str, Any]:
    return {**block, "frozen_weights": {**block["frozen_weights"], "resident": count}}


def _moments(peaks: Sequence[Peak], prefix: str, count: int) -> Moments:
    """Return the largest totals by phase and module, without those of blocks between the first and the last."""
    found: Moments = {}
    pattern = re.compile(rf"(?<![^.]){re.escape(prefix)}\.(\d+)(?![^.])")
    for peak in peaks:
        match = pattern.search(peak.module)
        if match and 0 < int(match[1]) < count - 1:
            continue
        last = match is not None and int(match[1]) == count - 1
        module = pattern.sub(f"{prefix}.last", peak.module) if last else peak.module
        found[peak.phase, module] = replace(peak, module=module)
    return found


def _sum_moments(parts: Sequence[tuple[Moments, int]]) -> Moments | None:
    """Return the sums of moments, times a number each; None if they would be below nothing."""
    found: Moments = {}
    for key in set.intersection(*(set(moments) for moments, _ in parts)):
        kinds = {kind for moments, _ in parts for kind in moments[key].live}
        live = {kind: sum(m[key].live.get(kind, 0) * n for m, n in parts) for kind in sorted(kinds)}
        if min(live.values(), default=0) < 0:
            return None
        live = {kind: size for kind, size in live.items() if size}
        found[key] = replace(parts[0][0][key], total=sum(live.values()), live=live)
    return found or None


def _sum_reports(parts: Sequence[tuple[MemoryReport | None, int]]) -> MemoryReport:
    names = [each.name for each in fields(MemoryReport) if each.type == "int" and each.name != "host_rss"]
    sums = {name: sum(getattr(report, name) * n for report, n in parts) for name in names}
    return MemoryReport(**{name: max(value, 0) for name, value in sums.items()})
