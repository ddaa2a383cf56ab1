"""The classes of a label column, whatever way the data set writes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from slimfit_ds.errors import ConfigError
from slimfit_ds.tasks.base import Splits

__all__ = ["Labels"]


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
            ConfigError: the column is missing, holds no classes, or a split is unlabelled or, with more than one
                row, of one class.
        """
        from datasets import ClassLabel, Value

        if problems := splits.missing("task.label_column", column):
            raise ConfigError(problems)
        values: set[Any] = set()
        for name, split in splits.named():
            is_scalar = isinstance(split.features[column], ClassLabel | Value)
            found = set(split.select_columns([column])[:][column]) if is_scalar else {None}
            if found & {None, ""} or any(isinstance(value, float) for value in found):
                problems.append(
                    f"task.label_column: column {column!r} of split {name!r} must hold whole numbers or texts, "
                    "one class for each row"
                )
            elif found == {-1}:
                problems.append(
                    f"eval_split: split {name!r} is unlabelled (label -1); choose a labelled split"
                )
            elif len(found) == 1 and len(split) > 1:
                problems.append(
                    f"task.label_column: all {len(split)} rows of split {name!r} have the class {next(iter(found))!r}, so there is "
                    "nothing to tell apart; shuffle a file that is sorted by class (max_train_examples and "
                    "max_eval_examples take the first rows)"
                )
            values |= found
        if problems:
            raise ConfigError(problems)
        feature = splits.train.features[column]
        if isinstance(feature, ClassLabel):
            if -1 in values:
                raise ConfigError(
                    [f"task.label_column: column {column!r} has unlabelled rows (-1); remove them"]
                )
            return cls(tuple(feature.names), {number: number for number in range(len(feature.names))})
        if (
            all(type(value) is int for value in values)
            and min(values) >= 0
            and max(values) < 10 * len(values)
        ):
            # Numbers are class numbers, even if a small sample misses one of them.
            count = max(values) + 1
            return cls(tuple(map(str, range(count))), {number: number for number in range(count)})
        ordered = sorted(values, key=lambda value: (isinstance(value, str), value))
        return cls(tuple(map(str, ordered)), {value: number for number, value in enumerate(ordered)})

    def model_values(self) -> dict[str, Any]:
        """What a transformers configuration says about the classes."""
        return {
            "id2label": dict(enumerate(self.names)),
            "label2id": {name: number for number, name in enumerate(self.names)},
        }
