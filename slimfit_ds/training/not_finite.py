"""What to do about a loss or a gradient that is NaN or infinite."""

from __future__ import annotations

import math

import torch
from torch import nn

from slimfit_ds.training.endings import NotFiniteError
from slimfit_ds.training.recipe import Recipe

__all__ = ["NotFinitePolicy", "check_weights"]


class NotFinitePolicy:
    """Lets a run go on, or ends it; fed with numbers that are equal on all ranks, so is what it says.

    Attributes:
        skipped: steps in a row that were not finite.

    Args:
        recipe: says `stop` or `skip`, and how many in a row.
    """

    def __init__(self, recipe: Recipe):
        self.skipped = 0
        self._recipe = recipe

    def judge(self, step: int, loss: float, gradient_norm: float | None) -> None:
        """Take in a step.

        Args:
            step: its number.
            loss: mean over all ranks.
            gradient_norm: of the whole gradient; None where the engine does not know it.

        Raises:
            NotFiniteError: the recipe says to stop, or too many steps in a row were skipped.
        """
        # In fp16 the loss scale is found by overflowing gradients; that is no defect of the run.
        norm_counts = self._recipe.dtype != "fp16" and gradient_norm is not None
        if math.isfinite(loss) and not (norm_counts and not math.isfinite(gradient_norm or 0.0)):
            self.skipped = 0
            return
        self.skipped += 1
        what = f"step {step}: the loss is {loss:g}, the norm of the gradient {gradient_norm}"
        if self._recipe.on_nonfinite == "stop":
            raise NotFiniteError(
                f"{what}. No checkpoint was made of it. Lower lr, clip gradients (gradient_clipping), or leave such "
                "steps out with on_nonfinite=skip"
            )
        if self.skipped > self._recipe.max_nonfinite:
            raise NotFiniteError(
                f"{what}, and so it was for more than max_nonfinite={self._recipe.max_nonfinite} steps in a row. "
                "None of them changed a weight. Lower lr, or look at the data of these steps"
            )


def check_weights(module: nn.Module, done: int, device: torch.device) -> None:
    """No broken weights in the place of good ones: stock DeepSpeed steps before a loss can be looked at.

    Args:
        module: the model; with ZeRO 3 each rank looks at its own stretches.
        done: optimizer steps done.
        device: of this rank.

    Raises:
        NotFiniteError: on every rank, if a weight of any is NaN or infinite.
    """
    weights = [getattr(weight, "ds_tensor", weight) for weight in module.parameters()]
    good = torch.stack([weight.isfinite().all().to(device) for weight in weights]).all().float()
    torch.distributed.all_reduce(good, torch.distributed.ReduceOp.MIN)
    if not good.item():
        raise NotFiniteError(f"step {done - 1}: a weight is NaN or infinite; no checkpoint was made of it")
