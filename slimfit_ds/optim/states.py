"""Optimizer states of units that come and go: what they are, in which precision, how they age, where they live.

States of one unit's shard: the rule's moments (float32, or 8 bit), a float32 master where the weight has fewer bits, the
unit's own step count (for bias correction) and the step at which it last trained. `UnitStates` makes, reads and writes
them; `StateStore` keeps them on the device or on the host for the engine, `HostStates` does so for any optimizer of torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from slimfit_ds.optim import low_bit
from slimfit_ds.optim.config import OptimizerStatesConfig
from slimfit_ds.optim.rules import UpdateRule
from slimfit_ds.optim.transfer import host_buffer

__all__ = ["HostStates", "LayerState", "StateStore", "UnitStates"]


@dataclass
class LayerState:
    """The states of one unit's shard."""

    tensors: dict[str, Tensor]
    """Name -> flat tensor: moments, `master`; 8-bit moments as `<name>.codes` and `<name>.scale`."""
    step: int = 0
    """Updates that this layer has had: what bias correction counts."""
    last_step: int = -1
    """Global step of the last update; -1: none yet."""
    ready: torch.cuda.Event | None = field(default=None, repr=False)
    """Recorded when the copy to the device is under way; waited for before use."""

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors.values())


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
                self.set(state, name, moment)
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
                    self.set(state, name, value)

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

    @staticmethod
    def cut(state: LayerState, low: int, high: int) -> dict[str, Tensor]:
        """Elements `low ... high` as they are stored; of 8-bit moments the scales of all blocks that these stand in."""
        blocks = slice(low // low_bit.BLOCK, -(-high // low_bit.BLOCK))
        return {
            key: tensor[blocks] if key.endswith(".scale") else tensor[low:high]
            for key, tensor in state.tensors.items()
        }

    def _pack(self, name: str, values: Tensor) -> dict[str, Tensor]:
        # Below a few blocks the scales would cost what the codes save, and biases are sensitive.
        if self.config.precision == "fp32" or values.numel() < 16 * low_bit.BLOCK:
            return {name: values}
        codes, scale = low_bit.quantize(values, low_bit.is_signed(name))
        return {f"{name}.codes": codes, f"{name}.scale": scale}

    def _unpack(self, state: LayerState, name: str) -> Tensor:
        if name in state.tensors:
            return state.tensors[name]
        codes, scale = state.tensors[f"{name}.codes"], state.tensors[f"{name}.scale"]
        return low_bit.dequantize(codes, scale, codes.numel(), low_bit.is_signed(name))

    def set(self, state: LayerState, name: str, values: Tensor) -> None:
        """Replace a moment, or the master, in place."""
        if name in state.tensors:
            state.tensors[name].copy_(values)
            return
        codes, scale = low_bit.quantize(values, low_bit.is_signed(name))
        state.tensors[f"{name}.codes"].copy_(codes)
        state.tensors[f"{name}.scale"].copy_(scale)


class StateStore:
    """Keeps the states of each unit where they belong while their layer trains and while it is frozen.

    On the device states stay once made. Those that belong to the host come by `prefetch`, on a side stream as soon as it is
    known that they are needed, and go by `write_back`, which frees the device memory. On a CPU the same code copies
    without streams.

    Args:
        device: where updates are worked out.
        to_host: whether `write_back` moves states to the host; otherwise they stay.
        create: unit index -> its first state tensors, on the device.
    """

    def __init__(self, device: torch.device, to_host: bool, create: Callable[[int], dict[str, Tensor]]):
        self.device = device
        self.to_host = to_host
        self.copied = 0
        """Bytes that came from the host so far."""
        self._create = create
        self._on_device: dict[int, LayerState] = {}
        self._on_host: dict[int, LayerState] = {}
        self._stream = torch.cuda.Stream(device) if self.to_host and device.type == "cuda" else None

    def __contains__(self, unit: int) -> bool:
        return unit in self._on_device or unit in self._on_host

    @property
    def units(self) -> list[int]:
        """Units that have states, in order."""
        return sorted({*self._on_device, *self._on_host})

    def device_bytes(self) -> int:
        return sum(state.nbytes for state in self._on_device.values())

    def host_bytes(self) -> int:
        return sum(state.nbytes for state in self._on_host.values())

    def device_tensors(self) -> Iterator[Tensor]:
        """Every state tensor that is on the device now."""
        return (tensor for state in self._on_device.values() for tensor in state.tensors.values())

    def host_tensors(self) -> Iterator[Tensor]:
        """Every state tensor that is on the host now."""
        return (tensor for state in self._on_host.values() for tensor in state.tensors.values())

    def prefetch(self, units: Iterable[int]) -> None:
        """Start to copy the states of these units to the device."""
        for unit in units:
            host = self._on_host.get(unit)
            if host is None or unit in self._on_device:
                continue
            self.copied += host.nbytes
            if self._stream is None:
                tensors = {k: t.to(self.device, copy=True) for k, t in host.tensors.items()}
                self._on_device[unit] = LayerState(tensors, host.step, host.last_step)
                continue
            # The host copy may still be written by an earlier write_back on the same stream: in order.
            with torch.cuda.stream(self._stream):
                tensors = {k: t.to(self.device, non_blocking=True) for k, t in host.tensors.items()}
                event = torch.cuda.Event()
                event.record(self._stream)
            self._on_device[unit] = LayerState(tensors, host.step, host.last_step, event)

    def get(self, unit: int) -> LayerState:
        """The states of an active unit, on the device; made now if this is the first time."""
        if unit not in self._on_device:
            self.prefetch([unit])
        if unit not in self._on_device:
            self._on_device[unit] = LayerState(self._create(unit))
        state = self._on_device[unit]
        if state.ready is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(state.ready)
            for tensor in state.tensors.values():
                tensor.record_stream(current)
            state.ready = None
        return state

    def write_back(self, units: Iterable[int]) -> None:
        """Move the states of units that go to sleep to the host, if that is where they belong."""
        if not self.to_host:
            return
        for unit in units:
            if unit not in self._on_device:
                continue
            state = self._on_device.pop(unit)
            host = self._on_host.get(unit)
            if host is None and self.device.type == "cpu":
                # One memory: what leaves the device stays where it is.
                self._on_host[unit] = state
                continue
            if host is None:
                buffers = {k: host_buffer(t) for k, t in state.tensors.items()}
                host = self._on_host[unit] = LayerState(buffers)
            host.step, host.last_step = state.step, state.last_step
            if self._stream is None:
                for name, tensor in state.tensors.items():
                    host.tensors[name].copy_(tensor)
                continue
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._stream):
                for name, tensor in state.tensors.items():
                    host.tensors[name].copy_(tensor, non_blocking=True)
                    tensor.record_stream(self._stream)

    def peek(self, unit: int) -> LayerState:
        """The newest states of a unit wherever they are, for a checkpoint; waits for copies."""
        if self._stream is not None:
            self._stream.synchronize()
        return self._on_device.get(unit) or self._on_host[unit]

    def put(self, unit: int, state: LayerState) -> None:
        """Set the states of a unit (from a checkpoint); they stay on the device until written back."""
        self._on_host.pop(unit, None)
        state.tensors = {k: t.to(self.device) for k, t in state.tensors.items()}
        self._on_device[unit] = state

    def clear(self) -> None:
        """Forget every state."""
        if self._stream is not None:
            self._stream.synchronize()
        self._on_device.clear()
        self._on_host.clear()


_HOST = torch.device("cpu")


class HostStates:
    """Moves the states of parameters that do not train off the device, and back when they have a gradient.

    For any optimizer of torch in any loop: a state travels when its step begins, whoever has written it last (such as
    `load_state_dict`). The engine's `StateStore` fetches ahead of use.

    Args:
        parameters: those that are frozen and woken; states of others stay where they are.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]):
        self._parameters = list(parameters)
        self._buffers: dict[tuple[nn.Parameter, str], Tensor] = {}
        self._away: dict[nn.Parameter, list[str]] = {}

    def fetch(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Before a step: states of what has a gradient onto its device."""
        for parameter in [p for p in self._away if p.grad is not None]:
            state = optimizer.state[parameter]
            for key in self._away.pop(parameter):
                state[key] = state[key].to(parameter.device, non_blocking=True)

    @torch.no_grad()
    def store(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """After a step: states of what is frozen now to the host."""
        moved = False
        for parameter in self._parameters:
            if parameter.requires_grad or parameter in self._away or parameter not in optimizer.state:
                continue
            state = optimizer.state[parameter]
            # A step count is a number, which some optimizers want on the device and others on the host.
            keys = [
                k for k, t in state.items() if isinstance(t, Tensor) and t.numel() > 1 and t.device != _HOST
            ]
            for key in keys:
                if (parameter, key) not in self._buffers:
                    self._buffers[parameter, key] = host_buffer(state[key])
                state[key] = self._buffers[parameter, key].copy_(state[key], non_blocking=True)
            if keys:
                self._away[parameter] = keys
                moved = True
        if moved and torch.cuda.is_available():
            # The copies must have arrived before anybody reads them on the host, such as a checkpoint.
            torch.cuda.current_stream().synchronize()
