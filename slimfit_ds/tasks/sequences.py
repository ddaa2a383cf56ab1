"""Classes or a number for a text or a pair of texts: the tasks of GLUE and data sets of the same columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import Field

from slimfit_ds.errors import ConfigError
from slimfit_ds.tasks.base import Splits
from slimfit_ds.tasks.labels import Labels
from slimfit_ds.tasks.metrics import classification_metrics, regression_metrics
from slimfit_ds.tasks.text import TextOptions, TextTask, map_rows

__all__ = ["SequenceClassification", "SequenceOptions", "SequenceRegression"]

TEXT_COLUMNS: tuple[tuple[str, ...], ...] = (
    ("sentence1", "sentence2"),  # MRPC, RTE, STS-B, WNLI
    ("question1", "question2"),  # QQP
    ("question", "sentence"),  # QNLI
    ("premise", "hypothesis"),  # MNLI, AX
    ("sentence",),  # CoLA, SST-2
    ("text", "text_pair"),
    ("text",),
)
"""Names of the text columns, tried in this order."""


class SequenceOptions(TextOptions):
    """Options of the tasks that label a text or a pair of texts."""

    columns: list[str] | None = Field(
        None, min_length=1, max_length=2, description="the one or two text columns; null: recognised by name"
    )
    label_column: str = "label"


class _SequenceTask(TextTask[SequenceOptions]):
    """One label for a text or a pair."""

    auto_class = "AutoModelForSequenceClassification"
    options_class = SequenceOptions
    columns: tuple[str, ...] = ()

    @property
    def max_length(self) -> int:  # type: ignore[override]
        return self.options.max_length

    def study(self, splits: Splits) -> Splits:
        problems: list[str] = []
        for find in (self._find_columns, self._find_labels):
            try:
                find(splits)
            except ConfigError as error:
                problems += error.problems
        problems += splits.empty_cells("task.columns", self.columns)
        if problems:
            raise ConfigError(problems)
        return splits

    def _find_columns(self, splits: Splits) -> None:
        wanted = self.options.columns
        layouts = [tuple(wanted)] if wanted else TEXT_COLUMNS
        found = next((layout for layout in layouts if set(layout) <= set(splits.shared)), None)
        if found is None:
            looked_for = " and ".join(map(repr, wanted)) if wanted else "known text columns"
            raise ConfigError(
                [
                    f"task.columns: no {looked_for} in both splits, they share {', '.join(splits.shared)}; name one or two"
                ]
            )
        self.columns = found

    def _find_labels(self, splits: Splits) -> None:
        raise NotImplementedError

    def _encode(self, labels: Sequence[Any]) -> list[Any]:
        raise NotImplementedError

    def _tokenise(self, batch: Mapping[str, list[Any]]) -> dict[str, Any]:
        texts = [[str(text) for text in batch[column]] for column in self.columns]
        tokens = self.tokenizer(*texts, truncation=True, max_length=self.options.max_length)
        return {**tokens, "labels": self._encode(batch[self.options.label_column])}

    def compute_metrics(self, predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """The metrics over a whole split, from logits `[examples, outputs]` and labels `[examples]`."""
        raise NotImplementedError

    def trainer_parts(self, splits: Splits) -> dict[str, Any]:
        from transformers import DataCollatorWithPadding

        return {
            "train_dataset": map_rows(splits.train, self._tokenise),
            "eval_dataset": map_rows(splits.evaluation, self._tokenise),
            "data_collator": DataCollatorWithPadding(self.tokenizer),
            "processing_class": self.tokenizer,
            "compute_metrics": lambda result: self.compute_metrics(
                first(result.predictions), result.label_ids
            ),
        }


class SequenceClassification(_SequenceTask):
    """One class for each text or pair."""

    name = "sequence_classification"
    metrics = ("loss", "accuracy", "f1", "matthews_correlation")
    labels: Labels

    def _find_labels(self, splits: Splits) -> None:
        self.labels = Labels.of(splits, self.options.label_column)

    def model_values(self) -> dict[str, Any]:
        return {**self.labels.model_values(), "problem_type": "single_label_classification"}

    def _encode(self, labels: Sequence[Any]) -> list[Any]:
        return [self.labels.codes[label] for label in labels]

    def compute_metrics(self, predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        return classification_metrics(predicted, labels)


class SequenceRegression(_SequenceTask):
    """One number for each text or pair, by the squared error, such as STS-B."""

    name = "sequence_regression"
    metrics = ("loss", "pearson", "spearman", "pearson_spearman")

    def _find_labels(self, splits: Splits) -> None:
        column = self.options.label_column
        problems = splits.missing("task.label_column", column)
        for name, split in splits.named():
            values = split.select_columns([column])[:][column] if column in split.column_names else []
            if not all(map(_is_number, values)):
                problems.append(
                    f"task.label_column: column {column!r} of split {name!r} must hold numbers only"
                )
        if problems:
            raise ConfigError(problems)

    def model_values(self) -> dict[str, Any]:
        return {"num_labels": 1, "problem_type": "regression"}

    def _encode(self, labels: Sequence[Any]) -> list[Any]:
        return [float(label) for label in labels]

    def compute_metrics(self, predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        return regression_metrics(predicted.squeeze(-1), labels)


def _is_number(value: Any) -> bool:
    """Whether a label is a finite number, be it written as a text ("1.50")."""
    try:
        return bool(np.isfinite(float(value)))
    except (TypeError, ValueError):
        return False


def first(predictions: Any) -> np.ndarray:
    """The logits; some models return more beside them."""
    return predictions[0] if isinstance(predictions, tuple) else predictions
