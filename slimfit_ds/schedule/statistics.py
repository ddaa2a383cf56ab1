"""How much a layer learns in a step is measured by its update or its gradient, as sums over the elements of a shard.

A statistic is split so that ranks which hold shards of a layer can work it out together: `partial`
gives a few sums over the elements at hand, the sums are added over the ranks (by whoever owns a
process group), and `finish` turns the totals into one number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slimfit_ds.schedule.change_sums import change_sums, runs_in_c

__all__ = ["STATISTICS", "Statistic", "of_layers"]


@dataclass(frozen=True)
class Statistic:
    """A measure of an update or of a gradient that adds up over shards."""

    columns: int
    """How many sums `partial` gives."""
    partial: Callable[[Tensor, Tensor], Tensor]
    """(update or gradient `[n]`, weight before the update `[n]`), both float32 -> sums `[columns]`, float32."""
    finish: Callable[[Sequence[float], int], float]
    """(totals of the sums, elements of the whole layer) -> the statistic."""
    of_gradient: bool = False
    """Whether `partial` takes the gradient (after loss scale and clipping) instead of the update."""
    sums: tuple[int, ...] = ()
    """Which of the sums |dW| / max(|W|, |dW|), dW^2 and W^2 `partial` gives, where it gives these: an optimizer
    step that leaves all three behind measures for free."""

    def of_update(self, update: Tensor, weight: Tensor) -> Tensor:
        """`partial`, a cache's worth of elements at a time: the intermediates never reach main memory.

        Args:
            update: dW `[n]`, or the gradient for a statistic of gradients, float32.
            weight: W before it `[n]`, float32.
        """
        if self.sums and runs_in_c(weight, update):
            return change_sums(weight, update, moved=False)[list(self.sums)]
        pairs = zip(_pieces(update), _pieces(weight), strict=True)
        return torch.stack([self.partial(dw, w) for dw, w in pairs]).sum(0)

    def of_move(self, before: Tensor, after: Tensor) -> Tensor:
        """The same sums from a weight before and after an update, of any shape and floating dtype."""
        if self.sums and runs_in_c(before, after):
            return change_sums(before, after, moved=True)[list(self.sums)]
        pairs = zip(_pieces(before.flatten()), _pieces(after.flatten()), strict=True)
        sums = []
        for old, new in pairs:
            weight = old.float()
            sums.append(self.partial(new.float() - weight, weight))
        return torch.stack(sums).sum(0)


def of_layers(
    statistic: Statistic, totals: Mapping[int, Sequence[float]], sizes: Mapping[int, int]
) -> dict[int, float]:
    """Return the statistic of each active layer after a step.

    Args:
        statistic: the measure.
        totals: layer -> sums over all of its elements. A layer without them took no part in the forward pass of any
            rank: it did not move, its statistic is 0.
        sizes: layer -> elements, of every active layer whose learning rate is not 0. A rate of 0 (the first step of a
            warm-up) says nothing about how much a layer has to learn.
    """
    return {
        layer: statistic.finish(totals[layer], numel) if layer in totals else 0.0
        for layer, numel in sizes.items()
    }


# Elements at a time: on a CPU what the second-level cache holds, elsewhere a bound of the temporary memory.
_CPU_PIECE = 1 << 16
_DEVICE_PIECE = 1 << 25


def _pieces(flat: Tensor) -> Sequence[Tensor]:
    return flat.split(_CPU_PIECE if flat.device.type == "cpu" else _DEVICE_PIECE)


def _relative_update(update: Tensor, weight: Tensor) -> Tensor:
    magnitude, whole = update.abs(), weight.abs()
    # The floor only matters where weight and update are both zero: there the share is 0 / tiny = 0.
    floor = torch.finfo(update.dtype).tiny
    torch.maximum(whole, magnitude, out=whole)
    return magnitude.div_(whole.clamp_min_(floor)).sum()[None]


STATISTICS: dict[str, Statistic] = {
    # The paper's mean(|dW / W|) divides by zero where a weight is zero, and a single weight near zero
    # outweighs a million others. Here each element counts |dW| / max(|W|, |dW|): the same number
    # wherever the update is smaller than the weight, at most 1 elsewhere, and no epsilon to tune.
    "relative_update": Statistic(1, _relative_update, lambda sums, numel: sums[0] / max(numel, 1), sums=(0,)),
}
