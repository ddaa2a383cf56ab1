"""`slimfit_ds.initialize` under the name `deepspeed.initialize`, for libraries that look that name up when they need it."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["stand_in_for_deepspeed"]


def stand_in_for_deepspeed() -> Callable[[], None]:
    """Replace `deepspeed.initialize`; without a `"slimfit"` block ours does what the stock one does.

    Returns:
        what puts the stock function back.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    from slimfit_ds.engine.initialize import initialize

    # Serves inference only, takes half a minute to build, and a killed build blocks the next run for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    stock = deepspeed.initialize

    @functools.wraps(stock)
    def with_slimfit(*args: Any, **kwargs: Any) -> Any:
        # Ours ends in a call of the stock one, under the same name.
        deepspeed.initialize = stock
        try:
            return initialize(*args, **kwargs)
        finally:
            deepspeed.initialize = with_slimfit

    deepspeed.initialize = with_slimfit
    return lambda: setattr(deepspeed, "initialize", stock)
