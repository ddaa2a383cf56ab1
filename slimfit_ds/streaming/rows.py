"""A word embedding that lives on the host: the rows that a batch looks up are sent to the device, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from slimfit_ds.trainable.split import SplitModule

__all__ = ["Rows"]

_MESSAGE = 1 << 26
"""Bytes of a table that are sent to other ranks at a time."""


class _HasDevice(Protocol):
    device: torch.device


class Rows:
    """The weight of one or several embeddings, on the host.

    Embeddings of which some columns train look the rows up themselves; the others get them in place of their weight, and
    their numbers in place of the ids.
    """

    streaming: _HasDevice | None
    """None: of a copy of the model, which is not streamed."""

    def __init__(self, streaming: _HasDevice, weight: nn.Parameter, modules: Sequence[nn.Embedding]):
        self.streaming, self.parameters = streaming, [weight]
        self.modules = list(modules)
        self._before: list[tuple[nn.Embedding, Tensor, int | None]] = []
        weight.data = weight.data.to("cpu")

    @property
    def weight(self) -> nn.Parameter:
        """On the host, but while an embedding computes."""
        return self.parameters[0]

    def hook(self) -> list[Any]:
        """Stand before and behind the embeddings; returns what removes it."""
        plain = [module for module in self.modules if not isinstance(module, SplitModule)]
        handles: list[Any] = [m.register_forward_pre_hook(self._enter, with_kwargs=True) for m in plain]
        return handles + [m.register_forward_hook(self._leave, always_call=True) for m in plain]

    def _enter(self, module: nn.Embedding, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if self.streaming is None:
            return None
        ids, *others = (*args, *kwargs.values())
        self._before.append((module, self.weight.data, module.padding_idx))
        found = self.weight.data.index_select(0, ids.reshape(-1).to("cpu"))
        # Which row is padding says who gets a gradient: none does.
        module.padding_idx = None
        self.weight.data = found.to(self.streaming.device)
        numbers = torch.arange(len(found), device=self.streaming.device).view(ids.shape)
        return (numbers, *others), {}

    def _leave(self, *_: Any) -> None:
        if self._before:
            module, weight, padding = self._before.pop()
            self.weight.data, module.padding_idx = weight, padding

    def send(self, broadcast: Callable[[Tensor], Any]) -> None:
        """Give all ranks one rank's rows, piece by piece through the device; see `Streaming.send`."""
        assert self.streaming is not None
        for part in self.weight.data.view(-1).view(torch.uint8).split(_MESSAGE):
            memory = part.to(self.streaming.device, copy=True)
            broadcast(memory)
            part.copy_(memory)

    def __deepcopy__(self, memo: Any) -> Rows:
        return _detached()

    def __reduce__(self) -> tuple[Any, ...]:
        return _detached, ()


def _detached() -> Rows:
    rows = Rows.__new__(Rows)
    rows.streaming, rows.parameters, rows.modules, rows._before = None, [], [], []
    return rows
