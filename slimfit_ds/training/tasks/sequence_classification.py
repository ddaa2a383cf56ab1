"""Classes of a text or of a pair of texts: all classification tasks of GLUE and data sets of the same columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from slimfit_ds.errors import ConfigError
from slimfit_ds.training.tasks.base import Rows, Splits
from slimfit_ds.training.tasks.labels import Labels
from slimfit_ds.training.tasks.metrics import classification_metrics
from slimfit_ds.training.tasks.text import PairTask, find_text_columns

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["SequenceClassification"]


class SequenceClassification(PairTask):
    """One class for each text or pair."""

    name = "sequence_classification"
    model_class = "AutoModelForSequenceClassification"
    best_metric = "accuracy"
    labels: Labels

    def study(self, splits: Splits) -> Splits:
        problems = []
        try:
            self.columns = find_text_columns(splits, self.options.columns)
        except ConfigError as error:
            problems += error.problems
        try:
            self.labels = Labels.of(splits, self.options.label_column)
        except ConfigError as error:
            problems += error.problems
        if problems:
            raise ConfigError(problems)
        return splits

    def metric_names(self) -> tuple[str, ...]:
        return ("accuracy", "f1", "matthews_correlation", "loss")

    def model_values(self) -> dict[str, Any]:
        return {**self.labels.model_values(), "problem_type": "single_label_classification"}

    def prepare(self, split: Dataset, *, training: bool) -> Dataset:
        def encode(batch: Mapping[str, list[Any]]) -> dict[str, Any]:
            return {**self._tokens(batch), "label": self.labels.encode(batch[self.options.label_column])}

        return self.tokenise(split, encode)

    def collate(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        batch = self.pad(examples, self.token_keys())
        batch["labels"] = torch.tensor([row["label"] for row in examples], dtype=torch.int64)
        return batch

    def predict(self, outputs: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"logits": outputs.logits.float()}

    def score(self, rows: Rows, prepared: Dataset, original: Dataset) -> dict[str, float]:
        return classification_metrics(rows["logits"], np.asarray(prepared[:]["label"]))
