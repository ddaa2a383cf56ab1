"""Reversible changes to single module instances.

A patched `forward` is a method bound to its module, so that `copy.deepcopy` of the model binds it to the copy.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

__all__ = ["Patches", "original_forward"]

_ABSENT = object()
_ORIGINAL = "_slimfit_original_forward"


class Patches:
    """Remembers what instance attributes were, and puts them back."""

    def __init__(self) -> None:
        self._changes: list[tuple[Any, str, Any]] = []

    def set(self, target: Any, name: str, value: Any) -> None:
        """Set an instance attribute past `nn.Module.__setattr__`."""
        self._changes.append((target, name, target.__dict__.get(name, _ABSENT)))
        target.__dict__[name] = value

    def replace_forward(self, module: nn.Module, forward: Callable) -> None:
        """Make `forward(module, ...)` the forward of this instance; it may call `original_forward(module)`."""
        self.set(module, _ORIGINAL, module.__dict__.get("forward"))
        self.set(module, "forward", MethodType(forward, module))

    def undo(self) -> None:
        """Restore everything, latest change first."""
        while self._changes:
            target, name, value = self._changes.pop()
            if value is _ABSENT:
                target.__dict__.pop(name, None)
            else:
                target.__dict__[name] = value


def original_forward(module: nn.Module) -> Callable:
    """The forward that the patched one replaces, bound to `module`."""
    return module.__dict__[_ORIGINAL] or MethodType(type(module).forward, module)
