"""Which examples make which batch: a function of the step and the global batch alone, never of the ranks.

Each rank takes its slice of the same global batch, so a run on one rank and a run on many see the same data in the
same order, and any step can be found again after a restart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler

from slimfit_ds.training.stop_signals import ignore_stop_signals
from slimfit_ds.training.tasks.base import Task

__all__ = ["BatchPlan", "evaluation_loader", "evaluation_positions", "training_loader"]


class BatchPlan:
    """The batches of one rank.

    Args:
        examples: number of training examples.
        global_batch: examples of an optimizer step over all ranks; divides by `micro_batch * world_size`.
        micro_batch: examples of one forward pass.
        rank, world_size: this rank among all.
        seed: of the order.
        terms: `[examples]` number of terms that each example adds to a mean loss; None: one each.
    """

    def __init__(
        self,
        examples: int,
        global_batch: int,
        micro_batch: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        terms: np.ndarray | None = None,
    ):
        self.steps_per_epoch = examples // global_batch
        self.accumulation = global_batch // (micro_batch * world_size)
        self._global_batch, self._micro_batch, self._world_size = global_batch, micro_batch, world_size
        self._first = rank * global_batch // world_size
        self._terms = terms
        self._order = lru_cache(maxsize=2)(
            lambda epoch: np.random.default_rng([seed, epoch]).permutation(examples)
        )

    def global_indices(self, step: int) -> np.ndarray:
        """`[global_batch]` examples of optimizer step `step`; the rest of an epoch that fills no batch is left out."""
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position * self._global_batch
        return self._order(epoch)[start : start + self._global_batch]

    def micro_batches(self, step: int) -> list[list[tuple[int, int]]]:
        """This rank's forward passes of a step: each a list of (example, epoch)."""
        epoch = step // self.steps_per_epoch
        return [[(int(index), epoch) for index in part] for part in self._parts(step)]

    def loss_weights(self, step: int) -> list[float]:
        """A factor for the mean loss of each micro batch that makes the mean over all of them the global mean.

        A mean over tokens is not the mean of the means of micro batches with different numbers of tokens.
        """
        if self._terms is None:
            return [1.0] * self.accumulation
        total = float(self._terms[self.global_indices(step)].sum())
        parts = self.accumulation * self._world_size
        return [parts * float(self._terms[part].sum()) / total for part in self._parts(step)]

    def _parts(self, step: int) -> list[np.ndarray]:
        indices = self.global_indices(step)
        starts = [self._first + number * self._micro_batch for number in range(self.accumulation)]
        return [indices[start : start + self._micro_batch] for start in starts]


class _Steps(Sampler[list[tuple[int, int]]]):
    """The micro batches from one step to another."""

    def __init__(self, plan: BatchPlan, start: int, stop: int):
        self._plan, self._start, self._stop = plan, start, stop

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self._start, self._stop):
            yield from self._plan.micro_batches(step)


class _Examples(Dataset[Mapping[str, Any]]):
    """Prepared rows, looked up by (example, epoch); the epoch is None in evaluation."""

    def __init__(self, prepared: Any, task: Task[Any], seed: int = 0):
        self._prepared, self._task, self._seed = prepared, task, seed

    def __getitem__(self, key: tuple[int, int | None]) -> Mapping[str, Any]:
        index, epoch = key
        chance = None if epoch is None else np.random.default_rng([self._seed, 1, epoch, index])
        return self._task.example(self._prepared[index], chance)


def training_loader(
    prepared: Any, task: Task[Any], plan: BatchPlan, *, start: int, stop: int, seed: int, workers: int
) -> DataLoader[Any]:
    """Collated micro batches of this rank from step `start` up to, not including, `stop`."""
    return DataLoader(
        _Examples(prepared, task, seed),
        batch_sampler=_Steps(plan, start, stop),
        collate_fn=task.collate,
        num_workers=workers,
        worker_init_fn=ignore_stop_signals,
    )


def evaluation_positions(examples: int, batch: int, rank: int, world_size: int) -> list[np.ndarray]:
    """The examples of each evaluation batch of this rank.

    Every rank gets the same number of full batches, because some engines communicate within a forward pass. Positions
    at or beyond `examples` are padding.
    """
    together = batch * world_size
    steps = -(-examples // together)
    return [step * together + rank * batch + np.arange(batch) for step in range(steps)]


def evaluation_loader(
    prepared: Any, task: Task[Any], positions: list[np.ndarray], *, workers: int
) -> DataLoader[Any]:
    """Collated evaluation batches; padding repeats the last example."""
    last = len(prepared) - 1
    return DataLoader(
        _Examples(prepared, task),
        batch_sampler=[[(min(int(position), last), None) for position in batch] for batch in positions],
        collate_fn=task.collate,
        num_workers=workers,
        worker_init_fn=ignore_stop_signals,
    )
