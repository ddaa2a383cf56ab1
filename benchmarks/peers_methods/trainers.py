"""One training step, whatever the method: forward and backward, then the update, so that both can be measured."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from slimfit_ds.engine.memory_roots import engine_roots, is_offloaded
from slimfit_ds.memory.tracker import Roots, optimizer_tensors

__all__ = ["EngineTrainer", "PlainTrainer", "Trainer"]

Batch = dict[str, Tensor]


class Trainer:
    """A model and what trains it.

    Attributes:
        model: the module whose parameters are counted.
        autocast: whether the forward pass runs under bf16 autocast.
        uncounted_phases: phases that work in host memory, which a CPU run cannot tell from the device's, or that run
            in a compiled kernel without temporaries, which a tracker cannot enter.
        facts: anything worth a note in the result.
    """

    model: nn.Module
    autocast = False
    uncounted_phases: tuple[str, ...] = ()

    def __init__(self, model: nn.Module):
        self.model = model
        self.facts: dict[str, Any] = {}

    def forward_backward(self, batch: Batch) -> Tensor:
        """Gradients of a batch; returns the loss, detached."""
        raise NotImplementedError

    def update(self) -> None:
        """The optimizer's step; gradients are gone afterwards."""
        raise NotImplementedError

    def roots(self) -> Roots:
        """For the memory tracker: where optimizer states are."""
        raise NotImplementedError

    def recover(self) -> None:
        """Drop what a step left that ran out of memory."""
        self.model.zero_grad(set_to_none=True)

    def step(self, batch: Batch, phase: Callable[[str], AbstractContextManager] | None = None) -> Tensor:
        """A whole step; `phase` names the update for a tracker."""
        loss = self.forward_backward(batch)
        with phase("step") if phase else nullcontext():
            self.update()
        return loss


class PlainTrainer(Trainer):
    """The ordinary PyTorch loop.

    Args:
        model: on its device.
        optimizer: any optimizer.
        autocast: run the forward pass under bf16 autocast.
        micro_batch: samples per forward pass; None: the whole batch.
        states: tensors of the optimizer; default: everything in `optimizer.state`.
        host_states: those of them that stand in host memory.
        after_step: called after each update.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        autocast: bool,
        micro_batch: int | None = None,
        states: Callable[[], Any] | None = None,
        host_states: Callable[[], Any] | None = None,
        after_step: Callable[[], None] | None = None,
    ):
        super().__init__(model)
        self.optimizer = optimizer
        self.autocast = autocast
        self._micro_batch = micro_batch
        self._states = states or (lambda: optimizer_tensors(self.optimizer))
        self._host_states = host_states
        self._after_step = after_step
        self._device = next(model.parameters()).device.type

    def forward_backward(self, batch: Batch) -> Tensor:
        samples = len(next(iter(batch.values())))
        size = min(self._micro_batch or samples, samples)
        total = torch.zeros((), device=self._device)
        for start in range(0, samples, size):
            micro = {key: value[start : start + size] for key, value in batch.items()}
            with torch.autocast(self._device, torch.bfloat16, enabled=self.autocast):
                loss = self.model(**micro).loss
            weight = len(next(iter(micro.values()))) / samples
            (loss if weight == 1 else loss * weight).backward()
            total += weight * loss.detach()
            del loss
        return total

    def update(self) -> None:
        self.optimizer.step()
        self.model.zero_grad(set_to_none=True)
        if self._after_step is not None:
            self._after_step()

    def roots(self) -> Roots:
        roots: dict[str, Any] = {"optimizer": lambda: self._states()}
        if self._host_states is not None:
            roots["optimizer_host"] = self._host_states
        return roots


class EngineTrainer(Trainer):
    """A DeepSpeed engine, stock or SlimFit's; it brings its own dtype.

    Args:
        engine: what `slimfit_ds.initialize` returned.
    """

    def __init__(self, engine: Any):
        super().__init__(engine.module)
        self.engine = engine
        self._dtype = next(engine.module.parameters()).dtype
        if is_offloaded(engine.optimizer):
            self.uncounted_phases = ("step",)

    def forward_backward(self, batch: Batch) -> Tensor:
        inputs = {
            key: value.to(self._dtype) if value.is_floating_point() else value for key, value in batch.items()
        }
        loss = self.engine(**inputs).loss
        self.engine.backward(loss)
        return loss.detach()

    def update(self) -> None:
        self.engine.step()

    def roots(self) -> Roots:
        return engine_roots(self.engine)

    def recover(self) -> None:
        self.engine.zero_grad()
