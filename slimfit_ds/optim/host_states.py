"""States of frozen parameters in host memory, for any optimizer of torch in any loop.

The DeepSpeed engine has its own, which fetches ahead of use (`state_store`); here a state travels when its step begins.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["HostStates"]

_HOST = torch.device("cpu")


class HostStates:
    """Moves the states of parameters that do not train off the device, and back when they have a gradient.

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
                state[key] = self._buffer(parameter, key, state[key]).copy_(state[key], non_blocking=True)
            if keys:
                self._away[parameter] = keys
                moved = True
        if moved and torch.cuda.is_available():
            # The copies must have arrived before anybody reads them on the host, such as a checkpoint.
            torch.cuda.current_stream().synchronize()

    def _buffer(self, parameter: nn.Parameter, key: str, like: Tensor) -> Tensor:
        """Page-locked memory, made once for each state."""
        place = (parameter, key)
        if place not in self._buffers:
            self._buffers[place] = torch.empty_like(like, device=_HOST, pin_memory=torch.cuda.is_available())
        return self._buffers[place]
