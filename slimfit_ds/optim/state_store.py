"""Optimizer states of layers that come and go: created late, kept on the device or on the host.

States of one layer shard: the rule's moments (float32, or 8 bit), a float32 master where the weight
has fewer bits, the layer's own step count (for bias correction) and the step at which it last trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["LayerState", "StateStore"]


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


class StateStore:
    """Keeps the states of each unit where they belong while their layer trains and while it is frozen.

    With `inactive="device"` states stay on the device once made. With `"host"` a unit's states are on
    the device only while its layer is active: `prefetch` copies them in on a side stream as soon as the
    next active set is known, `write_back` copies them out and frees the device memory. On a CPU the
    same code copies without streams.

    Args:
        device: where active states live.
        inactive: `device` or `host`.
        create: unit index -> its first state tensors, on the device.
    """

    def __init__(self, device: torch.device, inactive: str, create: Callable[[int], dict[str, Tensor]]):
        self.device = device
        self.to_host = inactive == "host"
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
                pin = self._stream is not None
                buffers = {
                    k: torch.empty(t.shape, dtype=t.dtype, pin_memory=pin) for k, t in state.tensors.items()
                }
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
