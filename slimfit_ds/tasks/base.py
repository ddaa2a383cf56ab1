"""What a run asks of a task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PretrainedConfig, Trainer, TrainingArguments

__all__ = ["Splits", "Task", "TaskOptions"]


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

    @property
    def shared(self) -> list[str]:
        """The columns of both."""
        return [name for name in self.train.column_names if name in self.evaluation.column_names]

    def named(self) -> tuple[tuple[str, Dataset], tuple[str, Dataset]]:
        return ((self.train_name, self.train), (self.evaluation_name, self.evaluation))

    def missing(self, key: str, column: str) -> list[str]:
        """The problem line for a column that one or both splits lack; nothing if both have it."""
        lacking = [(name, split) for name, split in self.named() if column not in split.column_names]
        if not lacking:
            return []
        names = " and ".join(repr(name) for name, _ in lacking)
        return [
            f"{key}: no column {column!r} in split {names}; the columns are {', '.join(lacking[0][1].column_names)}"
        ]

    def empty_cells(self, key: str, columns: Sequence[str]) -> list[str]:
        """A problem line for each column with null values."""
        return [
            f"{key}: column {column!r} of split {name!r} has {count} empty (null) values; fill or remove these rows"
            for name, split in self.named()
            for column in columns
            if column in split.column_names
            and (count := split.select_columns([column]).with_format("arrow")[:].column(column).null_count)
        ]


Options = TypeVar("Options", bound=TaskOptions)


class Task(ABC, Generic[Options]):
    """From the columns of a data set to a Trainer.

    A run calls, in this order: `study`, `model_values` and `model_problems` before anything is built, then
    `load_preprocessing`, `trainer_parts` for what the Trainer takes beside the model and its arguments, and `check_trainer`.
    """

    name: ClassVar[str]
    auto_class: ClassVar[str]
    """Name of the transformers auto class whose head this task needs."""
    options_class: ClassVar[type[TaskOptions]] = TaskOptions
    metrics: ClassVar[tuple[str, ...]] = ("loss",)
    """Names of the evaluation's metrics, known before."""
    lower_is_better: ClassVar[frozenset[str]] = frozenset({"loss", "perplexity"})
    loss_counts_tokens: ClassVar[bool] = False
    """Whether the loss is a mean over the tokens of all ranks and micro-batches, not over examples."""

    def __init__(self, options: Options):
        self.options = options

    @classmethod
    def arguments_class(cls) -> type[TrainingArguments]:
        """The class of the Trainer's arguments; its fields are keys of the recipe."""
        from transformers import TrainingArguments

        return TrainingArguments

    @classmethod
    def trainer_class(cls) -> type[Trainer]:
        from transformers import Trainer

        return Trainer

    def default_arguments(self) -> dict[str, Any]:
        """Arguments of the Trainer that differ from its own defaults, unless the recipe gives them."""
        return {}

    def take_arguments(self, values: Mapping[str, Any]) -> None:
        """Look at the Trainer's arguments that the recipe gives; called first."""

    @abstractmethod
    def study(self, splits: Splits) -> Splits:
        """Find the columns and labels; the splits with columns as the task needs them.

        Raises:
            ConfigError: a column is not there or holds something else.
        """

    def model_values(self) -> dict[str, Any]:
        """Values of the model's configuration that the data decide, such as `num_labels`."""
        return {}

    def model_problems(self, config: PretrainedConfig) -> list[str]:
        """What of the model does not fit the data."""
        return []

    @abstractmethod
    def load_preprocessing(self, source: str | None, config: PretrainedConfig) -> None:
        """Load the tokenizer or the image statistics, and give the configuration what follows from them.

        Args:
            source: a folder or hub id; None where the model is initialised and the recipe names no tokenizer.
            config: of the model.

        Raises:
            ConfigError: there is none, or it does not fit the model.
        """

    @abstractmethod
    def trainer_parts(self, splits: Splits) -> dict[str, Any]:
        """Keyword arguments of the Trainer: data sets, collator, processing class, metrics."""

    def check_trainer(self, trainer: Trainer) -> None:
        """Look at what the Trainer has made of the data; called before training.

        Raises:
            ConfigError: nothing is left to train on.
        """

    def finish(self, metrics: dict[str, float]) -> dict[str, float]:
        """The final metrics, with what follows from them."""
        return metrics
