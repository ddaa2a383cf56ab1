"""What the states of one shard are: which tensors, in which precision, and how they age."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from slimfit_ds.optim import low_bit
from slimfit_ds.optim.config import OptimizerStatesConfig
from slimfit_ds.optim.rules import UpdateRule
from slimfit_ds.optim.state_store import LayerState

__all__ = ["UnitStates"]


class _Piece(Protocol):
    @property
    def start(self) -> int: ...
    @property
    def stop(self) -> int: ...


class UnitStates:
    """Creates, ages, reads and writes the states of shards.

    Args:
        rule: names the moments.
        config: their precision, and what becomes of the moments of a layer that was frozen.
    """

    def __init__(self, rule: UpdateRule, config: OptimizerStatesConfig):
        self.rule = rule
        self.config = config

    def create(self, shard: Tensor, options: Mapping[str, Any]) -> dict[str, Tensor]:
        """First states of a shard of weights `[n]`: zero moments, and a float32 master where needed.

        The master is made from the 16-bit weight, which has not changed by a bit until now.
        """
        return self.packed(LayerState(self.plain_zeros(shard, options))).tensors

    def plain_zeros(self, shard: Tensor, options: Mapping[str, Any]) -> dict[str, Tensor]:
        """The same, with every moment in float32."""
        tensors = {
            name: torch.zeros(shard.numel(), device=shard.device) for name in self.rule.states(options)
        }
        if self._needs_master(shard.dtype):
            tensors["master"] = shard.to(torch.float32, copy=True)
        return tensors

    def _needs_master(self, dtype: torch.dtype) -> bool:
        rounded = dtype is torch.bfloat16 and self.config.bf16_weights == "stochastic_rounding"
        return dtype is not torch.float32 and not rounded

    def refresh(self, state: LayerState, now: int, options: Mapping[str, Any]) -> None:
        """Count an update at global step `now`, after ageing the moments by the steps missed."""
        missed = now - state.last_step - 1 if state.last_step >= 0 else 0
        if missed > 0 and self.config.stale_moments != "keep":
            names = self.rule.states(options)
            moments = {name: self._unpack(state, name) for name in names}
            if self.config.stale_moments == "reset":
                for moment in moments.values():
                    moment.zero_()
                state.step = 0
            else:
                # As if the gradient had been zero in the missed steps, bias correction included.
                self.rule.decay(moments, missed, options)
                state.step += missed
            for name, moment in moments.items():
                self._write(state, name, moment)
        state.step += 1
        state.last_step = now

    def weight(self, state: LayerState, piece: _Piece, shard: Tensor) -> Tensor:
        """The float32 weights to update: the master, the float32 weights themselves, or a copy."""
        if "master" in state.tensors:
            return state.tensors["master"][piece.start : piece.stop]
        return shard if shard.dtype is torch.float32 else shard.to(torch.float32)

    def load(
        self, states: Sequence[LayerState], pieces: Sequence[_Piece], options: Mapping[str, Any]
    ) -> dict[str, list[Tensor]]:
        """The moments of several pieces, float32; views where they are stored in float32."""
        return {
            name: [
                self._unpack(state, name)[piece.start : piece.stop]
                for state, piece in zip(states, pieces, strict=True)
            ]
            for name in self.rule.states(options)
        }

    def store(self, states: Sequence[LayerState], moments: Mapping[str, list[Tensor]]) -> None:
        """Write updated moments back where they are not views; low-bit ones come as whole shards."""
        for name, values in moments.items():
            for state, value in zip(states, values, strict=True):
                if name not in state.tensors:
                    self._write(state, name, value)

    def plain(self, state: LayerState, length: int) -> LayerState:
        """The same states with every moment in float32 `[length]`."""
        names = {key.partition(".")[0] for key in state.tensors}
        tensors = {name: self._unpack(state, name)[:length] for name in sorted(names)}
        return LayerState(tensors, state.step, state.last_step)

    def packed(self, state: LayerState) -> LayerState:
        """The counterpart of `plain`."""
        tensors: dict[str, Tensor] = {}
        for name, value in state.tensors.items():
            tensors |= {name: value} if name == "master" else self._pack(name, value)
        return LayerState(tensors, state.step, state.last_step)

    def _pack(self, name: str, values: Tensor) -> dict[str, Tensor]:
        # Below a few blocks the scales would cost what the codes save, and biases are sensitive.
        if self.config.precision == "fp32" or values.numel() < 16 * low_bit.BLOCK:
            return {name: values}
        codes, scale = low_bit.quantize(values, signed=name != "exp_avg_sq")
        return {f"{name}.codes": codes, f"{name}.scale": scale}

    def _unpack(self, state: LayerState, name: str) -> Tensor:
        if name in state.tensors:
            return state.tensors[name]
        codes, scale = state.tensors[f"{name}.codes"], state.tensors[f"{name}.scale"]
        return low_bit.dequantize(codes, scale, codes.numel(), signed=name != "exp_avg_sq")

    def _write(self, state: LayerState, name: str, values: Tensor) -> None:
        if name in state.tensors:
            state.tensors[name].copy_(values)
            return
        codes, scale = low_bit.quantize(values, signed=name != "exp_avg_sq")
        state.tensors[f"{name}.codes"].copy_(codes)
        state.tensors[f"{name}.scale"].copy_(scale)
