"""The classes of a label column, whatever way the data set writes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from slimfit_ds.errors import ConfigError
from slimfit_ds.training.tasks.base import Splits

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["Labels", "column_values", "missing_column"]


def column_values(split: Dataset, column: str) -> list[Any]:
    """A whole column as Python values, without decoding the other columns."""
    return split.select_columns([column])[:][column]


def missing_column(key: str, column: str, splits: Splits) -> list[str]:
    """The problem line for a column that one or both splits lack; nothing if both have it."""
    both = ((splits.train_name, splits.train), (splits.evaluation_name, splits.evaluation))
    lacking = [(name, split) for name, split in both if column not in split.column_names]
    if not lacking:
        return []
    names = " and ".join(repr(name) for name, _ in lacking)
    return [
        f"{key}: no column {column!r} in split {names}; the columns are {', '.join(lacking[0][1].column_names)}"
    ]


@dataclass(frozen=True)
class Labels:
    """The classes in a fixed order.

    Args:
        names: one name for each class.
        codes: class number of each value of the column.
    """

    names: tuple[str, ...]
    codes: dict[Any, int]

    @classmethod
    def of(cls, splits: Splits, column: str) -> Labels:
        """The classes of both splits.

        Raises:
            ConfigError: the column is missing, holds no classes, or a split is unlabelled.
        """
        from datasets import ClassLabel

        both = ((splits.train_name, splits.train), (splits.evaluation_name, splits.evaluation))
        problems = missing_column("task.label_column", column, splits)
        if problems:
            raise ConfigError(problems)
        values: set[Any] = set()
        for name, split in both:
            found = set(column_values(split, column)) if _is_scalar(split, column) else {None}
            if None in found or any(isinstance(value, float) for value in found):
                problems.append(
                    f"task.label_column: column {column!r} of split {name!r} must hold whole numbers or texts, "
                    "one class for each row"
                )
            elif -1 in found:
                problems.append(
                    f"eval_split: split {name!r} is unlabelled (label -1); choose a labelled split"
                )
            values |= found
        if problems:
            raise ConfigError(problems)
        feature = splits.train.features[column]
        if isinstance(feature, ClassLabel):
            names = tuple(feature.names)
            return cls(names, {number: number for number in range(len(names))})
        if (
            all(type(value) is int for value in values)
            and min(values) >= 0
            and max(values) < 10 * len(values)
        ):
            # Numbers are class numbers, even if a small sample misses one of them.
            count = max(values) + 1
            return cls(
                tuple(str(number) for number in range(count)), {number: number for number in range(count)}
            )
        ordered = sorted(values, key=lambda value: (isinstance(value, str), value))
        return cls(tuple(map(str, ordered)), {value: number for number, value in enumerate(ordered)})

    def encode(self, values: list[Any]) -> np.ndarray:
        """`[rows]` class numbers, int64."""
        return np.array([self.codes[value] for value in values], dtype=np.int64)

    def model_values(self) -> dict[str, Any]:
        """What a transformers configuration says about the classes."""
        return {
            "id2label": dict(enumerate(self.names)),
            "label2id": {name: number for number, name in enumerate(self.names)},
        }


def _is_scalar(split: Dataset, column: str) -> bool:
    from datasets import ClassLabel, Value

    return isinstance(split.features[column], ClassLabel | Value)
