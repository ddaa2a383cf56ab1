"""Blocks run as a graph of `torch.compile`: all that train some of their columns, else those at rest, whichever these are.

A graph is made for one pattern of `requires_grad`. Where columns train that is the same at every step. Where whole layers
do in turn, there are as many patterns as active sets, and torch gives up after eight: but blocks without an active weight
are all alike, and only they run compiled. All blocks of a class go through one graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from slimfit_ds.activations.patch import Bound, Patches
from slimfit_ds.trainable.graph_product import columns_filled
from slimfit_ds.trainable.split import SplitModule

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
    """Return what to hand a block's checkpoint hook in place of `run`, so that the block runs compiled where it can.

    Args:
        run: called as `run(function, *args)`, where the hook's function is a partial of the block's forward.
        block: a block with transformers' checkpoint hook.
    """
    return functools.partial(_run_through_graph, run, block)


@torch.compiler.disable
def _run_through_graph(
    run: Callable, block: nn.Module, function: functools.partial, *args: Any, **kwargs: Any
) -> Any:
    if _compiles(block):
        inner, bound = function.func, function.args
        if getattr(inner, "__self__", None) is block:
            inner, bound = getattr(inner, "__func__", inner), (block, *bound)
        function = functools.partial(_in_graph, block, inner, *bound, **function.keywords)
    return run(function, *args, **kwargs)


def compile_forward(patches: Patches, block: nn.Module) -> None:
    """Let the forward of a block without the hook run compiled where it can."""
    patches.set(block, _PLAIN, block.__dict__.get("forward"))
    patches.set(block, "forward", Bound(_forward, block))


@torch.compiler.disable
def _forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    plain = self.__dict__[_PLAIN]
    if plain is None and self.training and _compiles(self):
        return _in_graph(self, type(self).forward, self, *args, **kwargs)
    return (plain or MethodType(type(self).forward, self))(*args, **kwargs)


def _compiles(block: nn.Module) -> bool:
    """Give the same answer in the forward pass and in its repetition: both must draw the same random numbers.

    Under a dispatch mode (memory trackers, fake tensors) torch compiles nothing, and would not try the function again. Under
    a global hook (the proof on the first batch) it compiles, and once more without.
    """
    if not torch.is_grad_enabled() or is_in_torch_dispatch_mode() or _has_any_global_hook():
        return False
    return at_rest(block) or any(isinstance(module, SplitModule) for module in block.modules())


def _in_graph(block: nn.Module, forward: Callable, *args: Any, **kwargs: Any) -> Any:
    with columns_filled(module for module in block.modules() if isinstance(module, SplitModule)):
        return _graph_of(forward)(*args, **kwargs)


@functools.cache
def _graph_of(forward: Callable) -> Callable:
    """Compile once for each function, so that blocks of a class share graphs."""
    return torch.compile(forward)
