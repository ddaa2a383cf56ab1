"""Compressed activations and freezing on any module, without DeepSpeed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from slimfit_ds.activations.apply import CompressionHandle, compress
from slimfit_ds.config import SlimFitConfig
from slimfit_ds.freezing import FreezeSchedule, discover
from slimfit_ds.freezing.statistics import STATISTICS

__all__ = ["SlimHandle", "slim"]


class SlimHandle:
    """What `slim` did to a model, and the schedule that it follows.

    Attributes:
        schedule: the freeze schedule.
        compression: the compressed activations; its `report()` says what was recognised.
    """

    def __init__(self, model: nn.Module, config: SlimFitConfig):
        roles = discover(model)
        self._parameters = [model.get_parameter(name) for name in roles.names]
        self._statistic = STATISTICS.get(config.freeze.statistic)
        self._small = (
            [] if config.freeze.train_biases else [model.get_parameter(name) for name in roles.small]
        )
        self.schedule = FreezeSchedule(roles.layers, config.freeze)
        self.schedule.warn_of_oversized()
        self.compression: CompressionHandle = compress(model, config.activations)
        self._before: dict[int, Tensor] = {}
        self._hooks: list[Any] = []
        for parameter in self._small:
            parameter.requires_grad_(False)
        self._apply()

    @property
    def active_layers(self) -> frozenset[str]:
        """The layers that train in the coming step."""
        return self.schedule.active_names

    def follow(self, optimizer: torch.optim.Optimizer) -> SlimHandle:
        """Move on to the next active set after each step of an optimizer.

        Any optimizer that skips parameters without a gradient will do, as those of torch do: a frozen
        layer has none. The active weights (not all of them) are copied for the length of a step, to
        measure how far they moved; the DeepSpeed engine needs no copy.

        Returns:
            This handle.
        """
        self._hooks.append(optimizer.register_step_pre_hook(self._before_step))
        self._hooks.append(optimizer.register_step_post_hook(self._after_step))
        return self

    def _before_step(self, *_: Any) -> None:
        self._before = {
            layer: self._parameters[layer].detach().clone()
            for layer in self.schedule.active
            if self._parameters[layer].grad is not None
        }

    @torch.no_grad()
    def _after_step(self, *_: Any) -> None:
        assert self._statistic is not None
        sums = []
        for layer, before in self._before.items():
            old = before.float().flatten()
            sums.append(self._statistic.partial(self._parameters[layer].float().flatten() - old, old))
        # One transfer for all layers.
        totals = torch.stack(sums).tolist() if sums else []
        statistics = {
            layer: self._statistic.finish(total, before.numel())
            for (layer, before), total in zip(self._before.items(), totals, strict=True)
        }
        self._before = {}
        self.advance(statistics)

    def advance(self, statistics: Mapping[int, float]) -> None:
        """Count a step and freeze all but the next active set; `follow` calls this."""
        self.schedule.advance(statistics)
        self._apply()

    def _apply(self) -> None:
        for layer, parameter in enumerate(self._parameters):
            active = layer in self.schedule.active
            if parameter.requires_grad != active:
                parameter.requires_grad_(active)
            if not active:
                parameter.grad = None

    def remove(self) -> None:
        """Restore the model exactly: every layer trains again, nothing is compressed."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for parameter in [*self._parameters, *self._small]:
            parameter.requires_grad_(True)
        self.compression.remove()


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
    return SlimHandle(model, SlimFitConfig.parse(config))
