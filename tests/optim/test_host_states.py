"""Where the states of frozen layers are: devices on fake CUDA tensors, values on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import slimfit_ds
from slimfit_ds.optim import states
from slimfit_ds.optim.states import HostStates


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(5)))


@pytest.mark.parametrize("make", [torch.optim.AdamW, lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9)])
def test_only_states_of_what_trains_are_on_the_device(make):
    with FakeTensorMode():
        parameters = [torch.nn.Parameter(torch.empty(4, 4, device="cuda")) for _ in range(4)]
        optimizer = make(parameters, lr=0.1)
        away = HostStates(parameters)
        seen = set()
        for step in range(6):
            active = {step % 4, (step + 1) % 4}
            for i, parameter in enumerate(parameters):
                parameter.requires_grad_(i in active)
                parameter.grad = torch.empty_like(parameter) if i in active else None
            away.fetch(optimizer)
            assert all(where(optimizer, parameters[i]) <= {"cuda"} for i in active)
            optimizer.step()
            # The schedule has chosen the next set before states are stored.
            for i, parameter in enumerate(parameters):
                parameter.requires_grad_(i in {(step + 1) % 4, (step + 2) % 4})
            away.store(optimizer)
            seen |= active
            for i in seen:
                here = where(optimizer, parameters[i])
                if not parameters[i].requires_grad:
                    assert here == {"cpu"}, (step, i)
                elif i in active:
                    assert here == {"cuda"}, (step, i)


def where(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> set[str]:
    """Devices of the moments of a parameter; a step count may be anywhere."""
    state = optimizer.state.get(parameter, {})
    return {t.device.type for t in state.values() if torch.is_tensor(t) and t.numel() > 1}


def test_values_are_those_of_an_optimizer_that_moves_nothing(monkeypatch):
    """On the CPU nothing would move: another name for the host makes everything take the way through the buffers."""
    monkeypatch.setattr(states, "_HOST", torch.device("cpu", 0))

    def train(inactive):
        net = model()
        handle = slimfit_ds.slim(
            net, {"freeze": {"policy": "ils", "rate": 0.6}, "optimizer_states": {"inactive": inactive}}
        )
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
        handle.follow(optimizer)
        data = torch.Generator().manual_seed(1)
        for _ in range(12):
            net(torch.randn(8, 4, generator=data)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        handle.remove()
        # Everything trains again, with states from wherever they are.
        net(torch.randn(8, 4, generator=data)).square().sum().backward()
        optimizer.step()
        return list(net.parameters()), handle

    moved, handle = train("host")
    assert handle._host_states._buffers
    for a, b in zip(moved, train("device")[0], strict=True):
        assert torch.equal(a, b)
