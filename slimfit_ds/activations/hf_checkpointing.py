"""Blocks of transformers run through a function of ours: through the hook that it has for gradient checkpointing."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from torch import nn

from slimfit_ds.activations.patch import Bound, Patches, original_forward, run_as_it_is, run_block

__all__ = ["hold_checkpointing", "install_hook"]

_log = logging.getLogger(__name__)

_RUN = "_slimfit_run"


def install_hook(patches: Patches, model: nn.Module, block: nn.Module, function: Callable) -> None:
    """Let a block with transformers' checkpoint hook run through `function(forward, *args)` while it trains.

    In 5.17 that hook lies around the hooks of the block, which would run again with it: here they run around it, as in later versions.
    """
    run: Callable = functools.partial(run_block, function, block)
    if type(block).__call__ is not nn.Module.__call__:
        patches.set(block, _RUN, run)
        patches.replace_forward(block, _forward)
        run = run_as_it_is
    patches.set(block, "gradient_checkpointing", True)
    patches.set(block, "_gradient_checkpointing_func", run)
    # Some models look at their own flag before they hand a cache to a block.
    for module in model.modules():
        if "gradient_checkpointing" in module.__dict__ and any(child is block for child in module.modules()):
            patches.set(module, "gradient_checkpointing", True)


def _forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    forward = functools.partial(original_forward(self), **kwargs)
    return self.__dict__[_RUN](forward, *args) if self.training else forward(*args)


def hold_checkpointing(patches: Patches, model: nn.Module, asked: bool, recomputes: bool) -> None:
    """Keep what is installed as a model's gradient checkpointing when somebody switches that off and on.

    TRL does so around the pass of a reference model, and would leave torch's function in the place of ours.

    Args:
        patches: takes the change.
        model: of transformers; others are left alone.
        asked: whether it was on before.
        recomputes: whether blocks are recomputed; otherwise who asks for checkpointing hears that there is none.
    """
    hold = _hold if recomputes else _hold_and_say
    if asked and not recomputes:
        _say_unchecked()
    for module in model.modules():
        if hasattr(module, "_set_gradient_checkpointing"):
            patches.set(module, "_set_gradient_checkpointing", Bound(hold, module))


def _hold(self: nn.Module, enable: bool = True, **_: Any) -> None:
    """Take the place of `PreTrainedModel._set_gradient_checkpointing`."""


def _hold_and_say(self: nn.Module, enable: bool = True, **_: Any) -> None:
    if enable:
        _say_unchecked()


@functools.cache
def _say_unchecked() -> None:
    """Say once that gradient checkpointing was asked for and is not done."""
    _log.warning(
        "gradient checkpointing does not run beside slimfit's activations: choose the preset minimal, which recomputes "
        "every block, or set gradient_checkpointing to false"
    )
