"""Random number generator states that a recomputation replays."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["RngState", "capture", "consumed_since", "replay", "restore", "take_counters"]


@dataclass(frozen=True)
class RngState:
    """States of the CPU generator and of the generators of some accelerator devices."""

    cpu: Tensor
    devices: tuple[tuple[torch.device, Tensor], ...] = ()


def capture(tensors: Iterable[Tensor]) -> RngState | None:
    """The states of every generator that an operation on `tensors` could draw from.

    Returns:
        The states, or `None` for fake and meta tensors, which draw nothing.
    """
    devices: dict[torch.device, None] = {}
    for tensor in tensors:
        if isinstance(tensor, torch._subclasses.FakeTensor) or tensor.device.type == "meta":
            return None
        if tensor.device.type != "cpu":
            devices.setdefault(tensor.device)
    states = tuple((device, _module_of(device).get_rng_state(device)) for device in devices)
    return RngState(torch.get_rng_state(), states)


def consumed_since(before: RngState | None, tensors: Iterable[Tensor]) -> bool:
    """Whether a generator has moved since `before` was captured."""
    after = capture(tensors) if before is not None else None
    if before is None or after is None:
        return False
    pairs = zip(before.devices, after.devices, strict=True)
    return not torch.equal(before.cpu, after.cpu) or any(not torch.equal(b[1], a[1]) for b, a in pairs)


def restore(state: RngState | None) -> None:
    """Set the generators back to `state`."""
    if state is not None:
        torch.set_rng_state(state.cpu)
        for device, value in state.devices:
            _module_of(device).set_rng_state(value, device)


@contextlib.contextmanager
def replay(state: RngState | None) -> Iterator[None]:
    """Draw the random numbers that followed `state`; the generators are left as they were found."""
    if state is None:
        yield
        return
    devices = tuple((device, _module_of(device).get_rng_state(device)) for device, _ in state.devices)
    found = RngState(torch.get_rng_state(), devices)
    restore(state)
    try:
        yield
    finally:
        restore(found)


def take_counters(device: torch.device, count: int) -> tuple[int, int]:
    """Seed and first of `count` counters of Philox that nothing else draws from, taken from the device's generator.

    The generator moves on, so that a recomputation which puts its state back takes the same ones. The host waits for
    nothing. Where the generator is no Philox (a CPU's), the seed is drawn from it and the first counter is 0.
    """
    if device.type != "cuda":
        return int(torch.randint(1 << 62, (), device=device)), 0
    index = torch.cuda.current_device() if device.index is None else device.index
    generator = torch.cuda.default_generators[index]
    # PyTorch counts numbers of 32 bits, of which a counter gives four.
    first = -(-generator.get_offset() // 4)
    generator.set_offset(4 * (first + count))
    return generator.initial_seed(), first


def _module_of(device: torch.device):
    """`torch.cuda` for a CUDA device, and likewise for the others."""
    return getattr(torch, device.type)
