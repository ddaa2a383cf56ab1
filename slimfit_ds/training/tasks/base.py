"""What the training loop asks of a task; every task is one small file and one line in the registry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PretrainedConfig

__all__ = ["Preprocessing", "Rows", "Splits", "Task", "TaskOptions"]

Rows = dict[str, np.ndarray]
"""Predictions by name, one row for each prepared evaluation example, in the order of that data set."""


class TaskOptions(BaseModel):
    """Options that every task has."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    new_head: bool = Field(
        False, description="replace a head whose size does not match the data instead of refusing the model"
    )


@dataclass(frozen=True)
class Splits:
    """The two splits that a run uses, and what they are called where they come from."""

    train: Dataset
    evaluation: Dataset
    train_name: str = "train"
    evaluation_name: str = "validation"


@dataclass(frozen=True)
class Preprocessing:
    """Where tokenizers and image statistics come from: a folder or hub id, None where there is no such place."""

    source: str | None


Options = TypeVar("Options", bound=TaskOptions)


class Task(ABC, Generic[Options]):
    """From the columns of a data set to batches, and from predictions to metrics.

    The loop calls, in this order: `study`, `model_values` and `model_problems` before anything is built, then
    `load_preprocessing`, `prepare`, and for each batch `example`, `collate`, and for evaluation `predict`, `score`.
    """

    name: ClassVar[str]
    model_class: ClassVar[str]
    """Name of the transformers auto class whose head this task needs."""
    best_metric: ClassVar[str]
    lower_is_better: ClassVar[frozenset[str]] = frozenset({"loss", "perplexity"})
    options_class: ClassVar[type[TaskOptions]] = TaskOptions
    rows_are_examples: ClassVar[bool] = True
    """Whether `prepare` keeps the rows; windows and blocks of text do not."""

    def __init__(self, options: Options):
        self.options = options

    @abstractmethod
    def study(self, splits: Splits) -> Splits:
        """Find the columns and labels; the splits with columns cast as the task needs them.

        Raises:
            ConfigError: a column is not there or holds something else.
        """

    @abstractmethod
    def metric_names(self) -> tuple[str, ...]:
        """The metrics that `score` returns, known after `study`."""

    def model_values(self) -> dict[str, Any]:
        """Values of the model's configuration that the data decide, such as `num_labels`."""
        return {}

    def model_problems(self, config: PretrainedConfig) -> list[str]:
        """What of the model does not fit the data."""
        return []

    @abstractmethod
    def load_preprocessing(self, source: Preprocessing, config: PretrainedConfig) -> None:
        """Load the tokenizer or the image statistics."""

    def save_preprocessing(self, folder: Path) -> None:
        """Write beside the model what is needed to use it on raw data."""

    @abstractmethod
    def prepare(self, split: Dataset, *, training: bool) -> Dataset:
        """The split as the loop indexes it (tokenised, cut into windows)."""

    def example(self, row: Mapping[str, Any], chance: np.random.Generator | None) -> Mapping[str, Any]:
        """One row as `collate` takes it.

        Args:
            row: a row of what `prepare` returned.
            chance: source of augmentation, the same for one example and epoch on any number of ranks; None in
                evaluation.
        """
        return row

    @abstractmethod
    def collate(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """The keyword arguments of the model's forward, batch first."""

    def loss_terms(self, prepared: Dataset) -> np.ndarray | None:
        """`[examples]` number of terms each example adds to a mean loss; None: one each."""
        return None

    @abstractmethod
    def predict(self, outputs: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What `score` needs of a batch, `[batch, ...]`, with trailing sizes that do not depend on the batch."""

    @abstractmethod
    def score(self, rows: Rows, prepared: Dataset, original: Dataset) -> dict[str, float]:
        """The metrics over a whole split.

        Args:
            rows: what `predict` returned, each array `[len(prepared), ...]`.
            prepared: the split as `prepare` returned it.
            original: the split before.
        """
