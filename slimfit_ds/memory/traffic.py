"""Bytes communicated by one rank, counted at torch.distributed's collectives."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_iter

__all__ = ["TrafficCounter"]


def _output(args: tuple, kwargs: dict) -> Any:
    return args[0] if args else next(iter(kwargs.values()), None)


def _input(args: tuple, kwargs: dict) -> Any:
    return args[1] if len(args) > 1 else kwargs.get("input", kwargs.get("input_list"))


# The payload of a collective: its larger side, so that an all-gather of shards and an all-reduce of the whole
# compare. Objects (broadcast_object_list) travel through these same collectives.
_PAYLOAD: dict[str, Callable[[tuple, dict], Any]] = {
    "all_reduce": _output,
    "all_reduce_coalesced": _output,
    "broadcast": _output,
    "reduce": _output,
    "all_gather": _output,
    "all_gather_into_tensor": _output,
    "all_gather_coalesced": _output,
    "_all_gather_base": _output,
    "reduce_scatter": _input,
    "reduce_scatter_tensor": _input,
    "_reduce_scatter_base": _input,
    "all_to_all": _output,
    "all_to_all_single": _output,
    "send": _output,
    "isend": _output,
}


# DeepSpeed calls its coalesced gathers through the defining module.
_MODULES = (torch.distributed, torch.distributed.distributed_c10d)


class TrafficCounter:
    """Counts the payload bytes of every collective of this process by wrapping `torch.distributed`.

    The payload of a collective is the whole tensor it works on (all-gather: its output; reduce-scatter: its
    input), once, whatever algorithm moves it. DeepSpeed looks some of these functions up when it makes its
    backend, so install before `deepspeed.init_distributed`.
    """

    def __init__(self) -> None:
        self.bytes: dict[str, int] = {}
        self.calls: dict[str, int] = {}
        self._originals: dict[str, Any] = {}
        self._inside = False

    @property
    def total(self) -> int:
        """Payload bytes since the last reset."""
        return sum(self.bytes.values())

    def reset(self) -> None:
        """Count from zero again."""
        self.bytes.clear()
        self.calls.clear()

    def install(self) -> TrafficCounter:
        """Wrap the collectives; `remove` undoes it."""
        for name, payload in _PAYLOAD.items():
            original = getattr(torch.distributed, name, None)
            if original is None or name in self._originals:
                continue
            self._originals[name] = original
            counted = self._wrap(name, original, payload)
            for module in _MODULES:
                if getattr(module, name, None) is original:
                    setattr(module, name, counted)
        return self

    def remove(self) -> None:
        """Put the original functions back."""
        for name, original in self._originals.items():
            for module in _MODULES:
                if hasattr(module, name):
                    setattr(module, name, original)
        self._originals.clear()

    def __enter__(self) -> TrafficCounter:
        return self.install()

    def __exit__(self, *error: object) -> None:
        self.remove()

    def _wrap(self, name: str, original: Any, payload: Callable[[tuple, dict], Any]) -> Any:
        @functools.wraps(original)
        def counted(*args: Any, **kwargs: Any) -> Any:
            if self._inside:  # one collective may be built on another: count the outer one
                return original(*args, **kwargs)
            tensors = tree_iter(payload(args, kwargs))
            size = sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))
            self.bytes[name] = self.bytes.get(name, 0) + size
            self.calls[name] = self.calls.get(name, 0) + 1
            self._inside = True
            try:
                return original(*args, **kwargs)
            finally:
                self._inside = False

        return counted
