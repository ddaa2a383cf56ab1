"""Whole values of single parameters, out of the shards of all ranks: what `deepspeed.utils.safe_get_full_*` and
`safe_set_full_*` read and write, at every stage.

DeepSpeed's functions ask a parameter of stage 3 for its optimizer, and one of other stages for methods of its own; both are
led here. All ranks must call them, as in DeepSpeed. A unit that has never trained has moments of zero; reading makes none.
Those of a unit that waits are as its last step left them: `stale_moments` decays or resets them when it trains again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from deepspeed import comm as dist
from torch import Tensor, nn

from slimfit_ds.engine.shard_update import ShardUpdater
from slimfit_ds.engine.sharding import Unit

__all__ = ["FullValues"]


class FullValues:
    """Reads and writes parameters, moments and gradients; the names are those of DeepSpeed's ZeRO 3 optimizer."""

    updater: ShardUpdater
    _active: list[Any]
    _reduced: dict[int, Tensor]
    _group: Any
    _rows: int

    def _link(self, units: Sequence[Unit]) -> None:
        """Remember where each parameter is, and give those of stages 0 to 2 the methods that DeepSpeed looks for."""
        self._places = {
            id(parameter): (unit, start) for unit in units for parameter, start, _ in unit.spans()
        }
        for unit in units:
            for parameter, _, _ in unit.spans():
                if not hasattr(parameter, "ds_id"):
                    _add_methods(parameter, self)

    def _own(self, parameter: nn.Parameter) -> tuple[Unit, int, int, int]:
        """Return a parameter's unit, its own first and last element there, and its first element of all."""
        unit, start = self._places[id(parameter)]
        stop = start + getattr(parameter, "ds_numel", parameter.numel())
        low = min(max(start, unit.start), stop)
        return unit, low, max(low, min(stop, unit.stop)), start

    def _read(self, parameter: nn.Parameter, state: str | None) -> Tensor:
        unit, low, high, _ = self._own(parameter)
        return self.updater.read(unit, state)[low - unit.start : high - unit.start]

    def _write(self, parameter: nn.Parameter, state: str | None, stretch: Tensor) -> None:
        unit, low, high, _ = self._own(parameter)
        values = self.updater.read(unit, state).clone()
        values[low - unit.start : high - unit.start] = stretch.to(values.device, torch.float32)
        self.updater.write(unit, state, values, active=unit in self._active)

    def own_states(self, parameter: nn.Parameter, counts: bool = True) -> dict[str, Tensor]:
        """Return this rank's states of a parameter by name, whole ones in its shape; empty: it has none here.

        Args:
            counts: with its own number of steps, `step`.
        """
        if id(parameter) not in self._places:
            return {}
        unit, low, high, _ = self._own(parameter)
        if unit.index not in self.updater.states or low == high:
            return {}
        found = {name: self._read(parameter, name) for name in self.updater.state_names(unit)}
        if self._rows == 1 and not hasattr(parameter, "ds_id"):
            found = {name: value.view(parameter.shape) for name, value in found.items()}
        if counts:
            found["step"] = torch.tensor(float(self.updater.states.peek(unit.index).step))
        return found

    def parameters_with_states(self) -> Iterator[nn.Parameter]:
        """Yield the parameters that have states on this rank."""
        for unit in self.updater.units:
            yield from (parameter for parameter, _, _ in unit.spans() if self.own_states(parameter))

    def holds_all_in_float32(self) -> bool:
        """Whether this rank has all states, and weights are their own masters."""
        return self._rows == 1 and all(
            p.dtype == torch.float32 and not hasattr(p, "ds_id")
            for unit in self.updater.units
            for p, _, _ in unit.spans()
        )

    def replace_states(self, states: Mapping[nn.Parameter, Mapping[str, Any]]) -> None:
        """Set all states, of parameters that are whole here, to those of a torch optimizer; the others have none then."""
        self.updater.states.clear()
        for parameter, state in states.items():
            unit = self._own(parameter)[0]
            for name in self.updater.state_names(unit):
                self._write(parameter, name, state[name].reshape(-1))
            self.updater.states.peek(unit.index).step = int(state.get("step", 1))

    def _stretch(self, parameter: nn.Parameter, value: Tensor) -> Tensor:
        """This rank's stretch of a whole value."""
        _, low, high, start = self._own(parameter)
        numel = getattr(parameter, "ds_numel", parameter.numel())
        if value.numel() != numel:
            raise ValueError(f"the value must have the parameter's {numel} elements, got {value.numel()}")
        return value.detach().reshape(-1)[low - start : high - start]

    def _whole(self, parameter: nn.Parameter, stretch: Tensor) -> Tensor:
        _, low, high, start = self._own(parameter)
        shape = getattr(parameter, "ds_shape", parameter.shape)
        whole = torch.zeros(shape, dtype=torch.float32, device=parameter.device)
        whole.view(-1)[low - start : high - start] = stretch.to(parameter.device)
        if self._rows > 1:
            dist.all_reduce(whole, group=self._group)
        return whole

    def _padded(self, parameter: Any, stretch: Tensor) -> Tensor:
        """A stretch as long as DeepSpeed's stretch of the parameter."""
        padded = torch.zeros(parameter.ds_tensor.numel(), dtype=torch.float32, device=parameter.device)
        padded[: stretch.numel()] = stretch.to(parameter.device)
        return padded

    def _gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """This rank's stretch of the reduced gradient, float32 and writable; None: frozen in this step, or for good.

        Raises:
            ValueError: there is no reduced gradient now.
        """
        if id(parameter) not in self._places:
            return None
        unit, low, high, _ = self._own(parameter)
        if unit not in self._active:
            return None
        if unit.index not in self._reduced:
            raise ValueError(
                "gradients are there after the last backward of a step (at a boundary of gradient accumulation) "
                "and before engine.step"
            )
        self._reduced[unit.index] = self._reduced[unit.index].to(torch.float32)
        return self._reduced[unit.index][low - unit.start : high - unit.start]

    def _set_gradient(self, parameter: nn.Parameter, stretch: Tensor) -> None:
        own = self._gradient(parameter)
        if own is None:
            raise ValueError("the parameter is frozen in this step: its gradient would have no effect")
        own.copy_(stretch)
        self._gradient_was_set(self._places[id(parameter)][0])

    def _gradient_was_set(self, unit: Unit) -> None:
        """The norm of a unit's gradient has to be worked out again, and it counts as one that has a gradient."""
        raise NotImplementedError

    # By the names that DeepSpeed calls.

    def get_full_hp_param(self, param: nn.Parameter, optim_state_key: str | None = None) -> Tensor | None:
        """Return a parameter's weights, or one of its moments, whole and in float32; None: it never trains."""
        if id(param) not in self._places:
            return None
        return self._whole(param, self._read(param, optim_state_key))

    def set_full_hp_param(
        self, value: Tensor, param: nn.Parameter, optim_state_key: str | None = None
    ) -> None:
        """Set weights (master and model at once) or a moment."""
        self._check_trains(param)
        self._write(param, optim_state_key, self._stretch(param, value))
        if optim_state_key is None and not hasattr(param, "ds_id"):
            # Every rank holds all of the weights.
            with torch.no_grad():
                param.copy_(value.reshape(param.shape))

    def _check_trains(self, param: nn.Parameter) -> None:
        if id(param) not in self._places:
            raise ValueError("the parameter never trains, so there is no state of it to set; change its data")

    def get_fp32_grad_for_param(self, param: nn.Parameter) -> Tensor | None:
        """Return the reduced gradient, whole; None: the parameter is frozen."""
        own = self._gradient(param)
        return None if own is None else self._whole(param, own)

    def set_fp32_grad_for_param(self, value: Tensor, param: nn.Parameter) -> None:
        self._set_gradient(param, self._stretch(param, value))

    def get_local_fp32_grad_for_param(self, param: nn.Parameter) -> Tensor | None:
        own = self._gradient(param)
        return None if own is None else self._padded(param, own)

    def set_local_grad_for_param(self, value: Tensor, param: nn.Parameter) -> None:
        self._set_gradient(param, self._local(param, value))

    def _local(self, param: Any, value: Tensor) -> Tensor:
        if value.numel() != param.ds_tensor.numel():
            raise ValueError(
                f"the value must have the {param.ds_tensor.numel()} elements of this rank, got {value.numel()}"
            )
        _, low, high, _ = self._own(param)
        return value.detach().reshape(-1)[: high - low]

    def get_local_fp32_param(self, param: nn.Parameter, optim_state_key: str | None = None) -> Tensor | None:
        if id(param) not in self._places:
            return None
        return self._padded(param, self._read(param, optim_state_key))

    def set_local_hp_param(
        self, value: Tensor, param: nn.Parameter, optim_state_key: str | None = None
    ) -> None:
        self._check_trains(param)
        self._write(param, optim_state_key, self._local(param, value))

    def update_fp32_grad_for_param_vectorized(
        self, update_func: Callable[..., Tensor], param_list: Sequence[nn.Parameter]
    ) -> None:
        for param in param_list:
            gradient = self.get_fp32_grad_for_param(param)
            if gradient is not None:
                self.set_fp32_grad_for_param(update_func(gradient, param), param)

    def get_hp_param_device(
        self, param: nn.Parameter, optim_state_key: str | None = None
    ) -> torch.device | None:
        """Return where the states of a parameter are now."""
        return None if id(param) not in self._places else self._read(param, optim_state_key).device

    def refresh_fp32_params(self) -> None:
        """Take the masters from the model's weights, after somebody else has changed those."""
        self.updater.refresh_masters()


def _add_methods(parameter: Any, values: FullValues) -> None:
    parameter._hp_mapping = values
    parameter.get_full_hp_param = functools.partial(values.get_full_hp_param, parameter)
    parameter.get_full_hp_grad = functools.partial(values.get_fp32_grad_for_param, parameter)
    parameter.set_full_hp_param = lambda value, key=None: values.set_full_hp_param(value, parameter, key)
    parameter.set_full_hp_grad = lambda value: values.set_fp32_grad_for_param(value, parameter)
