"""What the client's own optimizer shows of its states, which the engine keeps: `optimizer.state`, and saving and loading it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from slimfit_ds.engine.full_values import FullValues
from slimfit_ds.errors import ConfigError

__all__ = ["ClientStates"]


class ClientStates(Mapping[nn.Parameter, dict[str, Tensor]]):
    """Parameter -> its states under the names of torch's optimizer, float32; to be read, not to be changed.

    Where a rank has all of them (ZeRO stage 0) in the shape of the parameter, else its stretch, flat. A parameter that has not trained has
    none.

    Args:
        values: reads and writes single parameters.
        optimizer: from now on it has these as its `state`; its `step` is refused.
    """

    def __init__(self, values: FullValues, optimizer: torch.optim.Optimizer):
        self._values = values
        self._counts = not isinstance(optimizer, torch.optim.SGD)
        optimizer.state = self  # type: ignore[assignment]
        optimizer.register_step_pre_hook(_refuse_step)
        optimizer.register_load_state_dict_pre_hook(self._check)
        optimizer.register_load_state_dict_post_hook(self._take)

    def __getitem__(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        return self._values.own_states(parameter, self._counts)

    def __contains__(self, parameter: object) -> bool:
        return bool(self._values.own_states(parameter, self._counts))  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[nn.Parameter]:
        return self._values.parameters_with_states()

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _check(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        if not self._values.holds_all_in_float32():
            raise ConfigError(
                [
                    "optimizer.load_state_dict takes whole states of float32 weights, as a rank has them at ZeRO stage 0: "
                    "use engine.load_checkpoint"
                ]
            )

    def _take(self, optimizer: torch.optim.Optimizer) -> None:
        """Take over what `load_state_dict` has put in place of these states."""
        loaded, optimizer.state = optimizer.state, self  # type: ignore[assignment]
        self._values.replace_states(loaded)  # type: ignore[arg-type]


def _refuse_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    raise RuntimeError(
        "this optimizer carries hyperparameters for the engine, which has the gradients: call engine.step()"
    )
