"""Where compressed operations step aside: inside a part of the model that is recomputed as a whole."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import nn

__all__ = ["compresses", "recomputed_part"]


class _Depth(threading.local):
    value = 0


_depth = _Depth()


@contextlib.contextmanager
def recomputed_part() -> Iterator[None]:
    """Code whose saved tensors are dropped at once (forward) or used at once (recomputation): nothing to compress."""
    _depth.value += 1
    try:
        yield
    finally:
        _depth.value -= 1


def compresses(module: nn.Module) -> bool:
    """Whether a patched module stores compressed now: training, with gradients, and not inside a recomputed part."""
    return module.training and torch.is_grad_enabled() and not _depth.value
