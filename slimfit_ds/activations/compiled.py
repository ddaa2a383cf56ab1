"""Blocks at rest run as a graph of `torch.compile`, whichever blocks these are.

A graph is made for one pattern of `requires_grad`, and there are as many patterns as sets of active weights: compiling
every block makes a graph per pattern until torch gives up (eight of them). But most blocks hold no active weight at any
step, and those are all alike: only they run compiled, all blocks of a class through one graph, so that a new active set
compiles nothing. Blocks with an active weight run as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from slimfit_ds.activations.patch import Bound, Patches

__all__ = ["at_rest", "compile_forward", "through_graph"]

_PLAIN = "_slimfit_plain_forward"
# What norms of torch and transformers call their weight; other vectors, biases above all, may train at every step.
_NORM_WEIGHTS = {"weight", "gamma", "scale"}


def at_rest(block: nn.Module) -> bool:
    """Return whether no weight of a block trains: no matrix and no weight of a norm."""
    return not any(
        parameter is not None and parameter.requires_grad and (parameter.dim() > 1 or name in _NORM_WEIGHTS)
        for module in block.modules()
        for name, parameter in module._parameters.items()
    )


def through_graph(run: Callable, block: nn.Module) -> Callable:
    """Return what to hand a block's checkpoint hook in place of `run`, so that the block runs compiled while it is at rest.

    Args:
        run: called as `run(function, *args)`, where the hook's function is a partial of the block's forward.
        block: a block with transformers' checkpoint hook.
    """
    return functools.partial(_run_through_graph, run, block)


def _run_through_graph(
    run: Callable, block: nn.Module, function: functools.partial, *args: Any, **kwargs: Any
) -> Any:
    if _compiles(block):
        inner, bound = function.func, function.args
        # Newer versions of transformers bind the plain forward, older ones the call with its hooks.
        if getattr(inner, "__self__", None) is block:
            inner, bound = _call, (block, *bound)
        function = functools.partial(_graph_of(inner), *bound, **function.keywords)
    return run(function, *args, **kwargs)


def _call(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return nn.Module.__call__(block, *args, **kwargs)


def compile_forward(patches: Patches, block: nn.Module) -> None:
    """Let the forward of a block without the hook run compiled while the block is at rest."""
    patches.set(block, _PLAIN, block.__dict__.get("forward"))
    patches.set(block, "forward", Bound(_forward, block))


def _forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    plain = self.__dict__[_PLAIN]
    if plain is None and self.training and _compiles(self):
        return _graph_of(type(self).forward)(self, *args, **kwargs)
    return (plain or MethodType(type(self).forward, self))(*args, **kwargs)


def _compiles(block: nn.Module) -> bool:
    """Give the same answer in the forward pass and in its repetition: both must draw the same random numbers.

    Under a dispatch mode (memory trackers, fake tensors) torch compiles nothing, and would not try the function again.
    """
    return torch.is_grad_enabled() and not is_in_torch_dispatch_mode() and at_rest(block)


@functools.cache
def _graph_of(forward: Callable) -> Callable:
    """Compile once for each function, so that blocks of a class share graphs."""
    return torch.compile(forward)
