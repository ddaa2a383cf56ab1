"""A number for a text or a pair of texts, such as STS-B."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from slimfit_ds.errors import ConfigError
from slimfit_ds.training.tasks.base import Rows, Splits
from slimfit_ds.training.tasks.labels import column_values, missing_column
from slimfit_ds.training.tasks.metrics import regression_metrics
from slimfit_ds.training.tasks.text import PairTask, find_text_columns

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["SequenceRegression"]


class SequenceRegression(PairTask):
    """One number for each text or pair, by the squared error."""

    name = "sequence_regression"
    model_class = "AutoModelForSequenceClassification"
    best_metric = "pearson_spearman"

    def study(self, splits: Splits) -> Splits:
        problems = []
        try:
            self.columns = find_text_columns(splits, self.options.columns)
        except ConfigError as error:
            problems += error.problems
        column = self.options.label_column
        problems += missing_column("task.label_column", column, splits)
        for name, split in ((splits.train_name, splits.train), (splits.evaluation_name, splits.evaluation)):
            if column in split.column_names and not all(
                isinstance(value, int | float) for value in column_values(split, column)
            ):
                problems.append(
                    f"task.label_column: column {column!r} of split {name!r} must hold numbers only"
                )
        if problems:
            raise ConfigError(problems)
        return splits

    def metric_names(self) -> tuple[str, ...]:
        return ("pearson", "spearman", "pearson_spearman", "loss")

    def model_values(self) -> dict[str, Any]:
        return {"num_labels": 1, "problem_type": "regression"}

    def prepare(self, split: Dataset, *, training: bool) -> Dataset:
        def encode(batch: Mapping[str, list[Any]]) -> dict[str, Any]:
            return {
                **self._tokens(batch),
                "label": [float(value) for value in batch[self.options.label_column]],
            }

        return self.tokenise(split, encode)

    def collate(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        batch = self.pad(examples, self.token_keys())
        batch["labels"] = torch.tensor([row["label"] for row in examples], dtype=torch.float32)
        return batch

    def predict(self, outputs: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"value": outputs.logits.float().squeeze(-1)}

    def score(self, rows: Rows, prepared: Dataset, original: Dataset) -> dict[str, float]:
        return regression_metrics(rows["value"], np.asarray(prepared[:]["label"]))
