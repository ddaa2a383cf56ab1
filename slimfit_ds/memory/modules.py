"""Which module runs now, in the forward and in the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_iter

__all__ = ["ModulePath"]


class ModulePath:
    """Follows the modules of a model while the context is open.

    In the backward pass the current module is the one whose output gradient arrived last.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._handles: list[Any] = []
        self._stack: list[str] = []
        self._backward = ""

    @property
    def in_forward(self) -> bool:
        """Whether a module's forward is running (also one that is recomputed in backward)."""
        return bool(self._stack)

    @property
    def current(self) -> str:
        """The dotted path of the innermost running module; empty outside and for the model itself."""
        return self._stack[-1] if self._stack else self._backward

    def __enter__(self) -> ModulePath:
        for name, module in self._model.named_modules():
            self._handles.append(module.register_forward_pre_hook(self._enter(name), prepend=True))
            self._handles.append(module.register_forward_hook(self._leave(name), always_call=True))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._stack, self._backward = [], [], ""

    def _enter(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: Any) -> None:
            if not self._stack and torch._C._current_graph_task_id() == -1:
                self._backward = ""
            self._stack.append(name)

        return hook

    def _leave(self, name: str) -> Any:
        def arrived(gradient: torch.Tensor) -> None:
            self._backward = name

        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            while self._stack and self._stack.pop() != name:
                pass
            for leaf in tree_iter(output):
                if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                    leaf.register_hook(arrived)

        return hook
