"""Compressed activations and freezing on any module, without DeepSpeed."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slimfit_ds import private_names
from slimfit_ds.activations.apply import CompressionHandle, compress
from slimfit_ds.activations.proof import Proof
from slimfit_ds.config import SlimFitConfig
from slimfit_ds.deltas.base import DeltaError, base_problems
from slimfit_ds.deltas.delta import Source, write_delta
from slimfit_ds.deltas.reference import hold_reference
from slimfit_ds.errors import ConfigError
from slimfit_ds.optim.rules import rule_of
from slimfit_ds.optim.states import HostStates
from slimfit_ds.schedule.schedule import FreezeSchedule, prepare_units
from slimfit_ds.schedule.statistics import of_units, sums_of_moves
from slimfit_ds.streaming.find import streaming_problems
from slimfit_ds.streaming.streaming import Streaming, stream
from slimfit_ds.trainable.split import (
    SplitModule,
    adopt_columns,
    check_columns,
    column_places,
    unsplit_columns,
)
from slimfit_ds.trainable.units import COLUMNS, discover

__all__ = ["SlimHandle", "slim"]


class _ScaledRates:
    """Learning rates of single parameters for the length of a step, by parameter groups of their own."""

    def __init__(self) -> None:
        self._groups: list[dict[str, Any]] = []
        self._split: list[list[dict[str, Any]]] = []

    def scale(self, optimizer: torch.optim.Optimizer, factors: Mapping[nn.Parameter, float]) -> None:
        """Multiply the learning rates of these parameters.

        Raises:
            ValueError: the optimizer has no learning rate to multiply.
        """
        self.restore(optimizer)
        if not factors:
            return
        for group in optimizer.param_groups:
            parts: dict[float, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                parts.setdefault(factors.get(parameter, 1.0), []).append(parameter)
            if group.get("lr") is None:
                raise ValueError(
                    f"{type(optimizer).__name__} works out its learning rate itself, so layers cannot have one of their "
                    f"own: give it a rate, or set slimfit.freeze.lr_scale and embedding_lr_scale (and always_lr_scale, if "
                    "it is set) to 1"
                )
            self._split.append(
                [{**group, "params": part, "lr": group["lr"] * factor} for factor, part in parts.items()]
            )
        self._groups = list(optimizer.param_groups)
        # In place: schedulers and wrappers hold the list.
        optimizer.param_groups[:] = [part for parts in self._split for part in parts]

    def restore(self, optimizer: torch.optim.Optimizer) -> None:
        """Give the groups back; what the optimizer has written into them (some count their steps there) stays."""
        if not self._groups:
            return
        for group, parts in zip(self._groups, self._split, strict=True):
            for part in parts:
                group.update({key: value for key, value in part.items() if key not in ("params", "lr")})
        optimizer.param_groups[:] = self._groups
        self._groups, self._split = [], []


class SlimHandle:
    """What `slim` did to a model, and the schedule that it follows.

    Attributes:
        schedule: the freeze schedule.
        compression: the compressed activations; its `report()` says what was recognised.
        proof: compares changed blocks with themselves unchanged on the first batch; `None`: switched off.
        trainable: every parameter that may train at some step, by name.
        source: the model and the base that it was loaded from.
        streaming: the blocks whose frozen weights live on the host; None: none do.
    """

    def __init__(self, model: nn.Module, config: SlimFitConfig):
        self._model = model
        problems = streaming_problems(
            model, config.frozen_weights, config.freeze.splits, config.activations.compile
        )
        if config.optimizer_states.active == "host":
            problems.append(
                "slimfit.optimizer_states.active 'host': an optimizer of torch updates all layers at once; set 'device', or "
                "train with slimfit_ds.initialize, whose optimizer updates a layer at a time"
            )
        problems += config.frozen_weights.undecided
        if config.frozen_weights.columns == "host":
            problems.append(
                "slimfit.frozen_weights.columns 'host': an optimizer of torch would update them on the host; set 'device', or "
                "train with slimfit_ds.initialize"
            )
        if config.checkpoints == "delta":
            problems += base_problems(model)
        if problems:
            raise ConfigError(problems)
        self.source = Source(model)
        self._splits = prepare_units(model, config.freeze)
        self.trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        roles = discover(model)
        self._parameters = [model.get_parameter(name) for name in roles.names]
        self._small_names = roles.small
        small = [model.get_parameter(name) for name in roles.small]
        self._biases, self._small = (small, []) if config.freeze.train_biases else ([], small)
        self._frozen_by_user: set[str] = set()
        self.schedule = FreezeSchedule(roles, config.freeze)
        self.schedule.warn_of_oversized()
        self.compression: CompressionHandle = compress(model, config.activations)
        self.streaming: Streaming | None = stream(model, config.frozen_weights)
        # Freshly discovered layers all train.
        self._applied = frozenset(range(len(self._parameters)))
        self._small_applied = frozenset(self._small_names if self._biases else ())
        inactive = config.optimizer_states.inactive
        self._host_states = HostStates(self._parameters) if inactive == "host" else None
        self._stale_moments = config.optimizer_states.stale_moments
        self._before: dict[int, Tensor] = {}
        self._sizes: dict[int, int] = {}
        self._rates = _ScaledRates()
        self._combine: Callable[[Tensor], Tensor] = lambda sums: sums
        self._hooks: list[Any] = []
        self._followed: list[torch.optim.Optimizer] = []
        hold_reference(model, self.trainable)
        for parameter in self._small:
            parameter.requires_grad_(False)
        self.proof = Proof(model, self.compression, config.activations) if config.activations.proof else None
        self._apply()

    @property
    def active_layers(self) -> frozenset[str]:
        """The layers that train in the coming step."""
        return self.schedule.active_names

    def follow(
        self, optimizer: torch.optim.Optimizer, combine: Callable[[Tensor], Tensor] | None = None
    ) -> SlimHandle:
        """Move on to the next active set after each step of an optimizer.

        Any optimizer that skips parameters without a gradient will do, as those of torch do: a frozen
        layer has none. Where units are chosen by how far they moved, the active weights (not all of them) are copied
        for the length of a step; the DeepSpeed engine needs no copy.

        Args:
            optimizer: steps this model.
            combine: makes the sums of the statistic `[layers]`, float32, of this process those of all processes;
                None: this process is alone.

        Returns:
            This handle.

        Raises:
            ConfigError: the optimizer lacks layers that the schedule trains; names them.
        """
        if combine is not None:
            self._combine = combine
        # An optimizer may be older than the split.
        adopt_columns(self._model, optimizer.param_groups, optimizer.state)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        lacking = [
            name
            for name, p in zip(self.schedule.names, self._parameters, strict=True)
            if id(p) not in held and name not in self.schedule.never_names
        ]
        if lacking:
            raise ConfigError(
                [
                    f"the optimizer lacks {_first(lacking)}, which train in their turn: make it of handle.trainable.values() or "
                    f"model.parameters() (layers that wait have requires_grad=False), or freeze for good before slim()"
                ]
            )
        if self._host_states is not None:
            # It stays when this handle goes: the optimizer finds its states in any case.
            optimizer.register_step_pre_hook(self._host_states.fetch)
        self._followed.append(optimizer)
        self._hooks.append(optimizer.register_step_pre_hook(self._before_step))
        self._hooks.append(optimizer.register_step_post_hook(self._after_step))
        if self._host_states is not None:
            self._hooks.append(optimizer.register_step_post_hook(self._host_states.store))
            self._host_states.store(optimizer)
        return self

    def _heed_user(self) -> None:
        """Find what somebody else has frozen or woken since `slim`, so that it is not undone in silence.

        Raises:
            ConfigError: it cannot be honoured: where layers wait for their turn, what the user froze looks like them.
        """
        units = zip(self.schedule.names, self._parameters, strict=True)
        flags = [(name, p, i in self._applied) for i, (name, p) in enumerate(units)]
        biases = self._biases or self._small
        flags += [
            (name, p, name in self._small_applied) for name, p in zip(self._small_names, biases, strict=True)
        ]
        changed = [name for name, p, expected in flags if p.requires_grad != expected]
        changed = [name for name in changed if name not in self._frozen_by_user]
        woken = [
            f"{name}.weight"
            for name, module in self._model.named_modules()
            if self._splits and isinstance(module, SplitModule) and module.frozen_weight.requires_grad
        ]
        if woken or (changed and not self.schedule.is_static):
            raise ConfigError(
                [
                    f"requires_grad of {_first(woken or changed)} was changed after slim(), whose schedule sets it: freeze before "
                    f"slim() or by slimfit.freeze.never_active, let layers train whole by always_active"
                ]
            )
        if changed:
            warnings.warn(f"frozen after slim(), and stays so: {_first(changed)}", stacklevel=2)
            self._frozen_by_user.update(changed)

    @torch.no_grad()
    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._heed_user()
        active = sorted(self.schedule.active)
        if self.proof is not None and not self.proof.settled:
            self.proof.see_gradients(
                {self.schedule.names[layer]: self._parameters[layer] for layer in active}
            )
            self.proof.settle(self._combine)
        present = {layer: p for layer in active if (p := self._parameters[layer]).grad is not None}
        factors = self.schedule.lr_factors()
        scaled = {p: factors[layer] for layer, p in present.items() if factors[layer] != 1.0}
        if factors[None] != 1.0:
            scaled |= {p: factors[None] for p in self._biases if p.grad is not None}
        if not self.schedule.is_static:
            self._age(optimizer, {p: self.schedule.missed(layer) for layer, p in present.items()})
            named = zip(self._small_names, self._biases, strict=True) if self._biases else ()
            self._age(
                optimizer, {p: self.schedule.missed_small(name) for name, p in named if p.grad is not None}
            )
        if self.schedule.measures:
            self._before = {layer: torch.empty_like(parameter) for layer, parameter in present.items()}
            if present:
                torch._foreach_copy_(list(self._before.values()), list(present.values()))
            still = {p for g in optimizer.param_groups if float(g["lr"]) == 0.0 for p in g["params"]}
            self._sizes = {
                layer: self._parameters[layer].numel()
                for layer in active
                if self._parameters[layer] not in still
            }
        self._rates.scale(optimizer, scaled)

    def _age(self, optimizer: torch.optim.Optimizer, present: Mapping[nn.Parameter, int]) -> None:
        """What becomes of the moments of parameters that have missed so many steps."""
        if self._stale_moments == "keep":
            return
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        for parameter, missed in present.items():
            if not missed or parameter not in optimizer.state:
                continue
            if self._stale_moments == "reset":
                del optimizer.state[parameter]
                continue
            state, options = optimizer.state[parameter], groups[id(parameter)]
            rule = rule_of(optimizer)
            rule.decay({name: state[name] for name in rule.states(options)}, missed, options)
            if "step" in state:
                state["step"] += missed

    @torch.no_grad()
    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._rates.restore(optimizer)
        before, self._before = self._before, {}
        # A fused optimizer finds out on the device whether a loss scaler lets it step; a skipped step is tried
        # again with the same layers.
        if (overflow := getattr(optimizer, "found_inf", None)) is not None and float(overflow):
            return
        if not self.schedule.measures:
            self.advance({})
            return
        sums = sums_of_moves(list(before.values()), [self._parameters[layer] for layer in before])
        # One transfer for all layers.
        totals = self._combine(torch.stack(sums)).tolist() if sums else []
        self.advance(of_units(dict(zip(before, totals, strict=True)), self._sizes))

    def advance(self, statistics: Mapping[int, float]) -> None:
        """Count a step and freeze all but the next active set; `follow` calls this."""
        self.schedule.advance(statistics)
        self._apply()

    def state_dict(self) -> dict[str, Any]:
        """Schedule and places of trained columns, as JSON types: all to go on with, beside weights and optimizer states."""
        return {**self.schedule.state_dict(), "columns": column_places(self._model)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved schedule.

        Raises:
            ConfigError: it is of another model, or of other columns; names the difference.
        """
        # States of earlier versions do not say where the columns stood.
        if "columns" in state and list(state["layers"]) == list(self.schedule.names):
            check_columns(state["columns"], column_places(self._model))
        self.schedule.load_state_dict(state)
        self._apply()

    def _apply(self) -> None:
        """Freeze and wake the layers that the schedule's active set differs in from the one in force."""
        active = self.schedule.active
        for layer in self._applied - active:
            self._parameters[layer].requires_grad_(False)
            self._parameters[layer].grad = None
        for layer in active - self._applied:
            self._parameters[layer].requires_grad_(True)
        self._applied = active
        if not self._biases:
            return
        small = frozenset(name for name in self._small_names if self.schedule.trains(name))
        for name, parameter in zip(self._small_names, self._biases, strict=True):
            if (name in small) != (name in self._small_applied):
                parameter.requires_grad_(name in small)
                parameter.grad = None
        self._small_applied = small

    def save_delta(self, path: str | os.PathLike) -> None:
        """Write what has trained, and nothing else, as one safetensors file; `slimfit-ds merge` puts it into the base.

        Raises:
            DeltaError: the model was not loaded by transformers from safetensors, or the path is that of another file or cannot
                be written.
        """
        if problem := self.source.target_problem(path):
            raise DeltaError(problem)
        write_delta(self.source.capture(self.trained_names), path)

    @property
    def trained_names(self) -> frozenset[str]:
        """Every parameter that has trained so far."""
        return self.schedule.trained_names | {*(self._small_names if self._biases else ())}

    def remove(self) -> None:
        """Restore the model exactly: every layer trains again (but what you froze since), nothing is compressed.

        Optimizers that were followed hold the whole weights again, without moments for those whose columns trained.
        """
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self.streaming is not None:
            self.streaming.remove()
        resting = {*self._small_names} - self._small_applied
        for parameter in [*self._parameters, *(self._model.get_parameter(name) for name in resting)]:
            parameter.requires_grad_(True)
        if self.proof is not None:
            self.proof.remove()
        self.compression.remove()
        places = column_places(self._model)
        if self._splits:
            unsplit_columns(self._model, self._followed)
            # What trained has other names from here on.
            self.source.forget()
        wholes = {f"{name.removesuffix('weight')}{COLUMNS}": name for name in places}
        for name in self._frozen_by_user:
            self._model.get_parameter(wholes.get(name, name)).requires_grad_(False)


def _first(names: Sequence[str], count: int = 3) -> str:
    """The first of many names, and how many more there are."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def slim(model: nn.Module, config: SlimFitConfig | Mapping[str, Any] | None = None) -> SlimHandle:
    """Freeze and compress any module in a plain training loop.

    Args:
        model: the module; its `state_dict` keys do not change.
        config: the `"slimfit"` block.

    Returns:
        A handle: `follow(optimizer)` keeps the schedule going, `remove()` restores the model.

    Raises:
        ConfigError: all problems of the block at once.

    Example:
        handle = slimfit_ds.slim(model, {"freeze": {"rate": 0.9}, "activations": "minimal"})
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
        handle.follow(optimizer)
    """
    private_names.check()
    return SlimHandle(model, SlimFitConfig.parse(config))
