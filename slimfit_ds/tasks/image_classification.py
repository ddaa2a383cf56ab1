"""Classes of images: CIFAR columns, an ImageNet-style folder, or any data set with an image and a label column."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from slimfit_ds.errors import ConfigError
from slimfit_ds.tasks.base import Splits, Task, TaskOptions
from slimfit_ds.tasks.images import AUGMENTATIONS, colours, pixels
from slimfit_ds.tasks.labels import Labels
from slimfit_ds.tasks.metrics import classification_metrics
from slimfit_ds.tasks.sequences import first

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["ImageClassification", "ImageOptions"]


class ImageOptions(TaskOptions):
    """Options of image classification."""

    image_column: str | None = Field(None, description="null: img or image")
    label_column: str | None = Field(None, description="null: label, labels or fine_label")
    augmentation: Literal["none", "flip", "crop_flip", "resized_crop_flip"] = Field(
        "none", description="random changes of the training images"
    )
    mean: list[float] | None = Field(
        None, description="of each channel, for pixels in 0..1; null: the model's, or 0.5"
    )
    std: list[float] | None = Field(None, description="of each channel; null: the model's, or 0.5")


class ImageClassification(Task[ImageOptions]):
    """One class for each image."""

    name = "image_classification"
    auto_class = "AutoModelForImageClassification"
    options_class = ImageOptions
    metrics = ("loss", "accuracy", "f1", "matthews_correlation")
    labels: Labels

    def default_arguments(self) -> dict[str, Any]:
        # Images are decoded when a batch is made: until then no column is an argument of the model.
        return {"remove_unused_columns": False}

    def study(self, splits: Splits) -> Splits:
        from datasets import Image

        problems: list[str] = []
        self.image_column = self._find("image_column", ("img", "image", "pixel_values"), splits, problems)
        self.label_column = self._find("label_column", ("label", "labels", "fine_label"), splits, problems)
        if self.image_column:
            try:
                splits = replace(
                    splits,
                    train=splits.train.cast_column(self.image_column, Image()),
                    evaluation=splits.evaluation.cast_column(self.image_column, Image()),
                )
                for _, split in splits.named():
                    split[0]  # texts pass as names of files until they are opened
            except (OSError, TypeError, ValueError, NotImplementedError):
                feature = splits.train.features[self.image_column]
                problems.append(
                    f"task.image_column: column {self.image_column!r} must hold images, got {feature}"
                )
        if self.label_column:
            try:
                self.labels = Labels.of(splits, self.label_column)
            except ConfigError as error:
                problems += error.problems
        if problems:
            raise ConfigError(problems)
        return splits

    def _find(self, key: str, known: Sequence[str], splits: Splits, problems: list[str]) -> str:
        wanted = getattr(self.options, key)
        column = next((name for name in ([wanted] if wanted else known) if name in splits.shared), None)
        if column is None:
            looked_for = repr(wanted) if wanted else " or ".join(known)
            problems.append(
                f"task.{key}: no column {looked_for} in both splits; they share {', '.join(splits.shared)}"
            )
        return column or ""

    def model_values(self) -> dict[str, Any]:
        return self.labels.model_values()

    def model_problems(self, config: PretrainedConfig) -> list[str]:
        channels = getattr(config, "num_channels", 3)
        problems = [
            f"task.{key} must have one number for each of the model's {channels} channels, got {values}"
            for key, values in (("mean", self.options.mean), ("std", self.options.std))
            if values is not None and len(values) != channels
        ]
        if channels not in (1, 3):
            problems.append(f"model.num_channels must be 1 (grey) or 3 (colour) for images, got {channels}")
        if self.options.std is not None and min(self.options.std, default=1) <= 0:
            problems.append(f"task.std must be positive, got {self.options.std}")
        return problems

    def load_preprocessing(self, source: str | None, config: PretrainedConfig) -> None:
        self.channels = getattr(config, "num_channels", 3)
        saved = _saved_statistics(source)
        size = getattr(config, "image_size", 224)
        self.size = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
        half = [0.5] * self.channels
        self.mean = np.array(self.options.mean or saved.get("image_mean") or half, dtype=np.float32)
        self.std = np.array(self.options.std or saved.get("image_std") or half, dtype=np.float32)

    def trainer_parts(self, splits: Splits) -> dict[str, Any]:
        from transformers import default_data_collator

        from slimfit_ds.tasks.images import processor

        return {
            "train_dataset": splits.train.with_transform(self._training_batch),
            "eval_dataset": splits.evaluation.with_transform(self._batch),
            "data_collator": default_data_collator,
            "processing_class": processor(self.size, self.mean, self.std),
            "compute_metrics": lambda result: classification_metrics(
                first(result.predictions), result.label_ids
            ),
        }

    def _batch(self, rows: Mapping[str, list[Any]], augmentation: str = "none") -> dict[str, Any]:
        change = AUGMENTATIONS[augmentation]
        images = [
            change(colours(image, self.channels), self.size, random) for image in rows[self.image_column]
        ]
        return {
            "pixel_values": [pixels(image, self.size, self.mean, self.std) for image in images],
            "labels": [self.labels.codes[label] for label in rows[self.label_column]],
        }

    def _training_batch(self, rows: Mapping[str, list[Any]]) -> dict[str, Any]:
        return self._batch(rows, self.options.augmentation)


def _saved_statistics(source: str | None) -> dict[str, Any]:
    """The image statistics that a model was trained with, where its folder or hub page tells them."""
    if source is None:
        return {}
    from transformers.utils import cached_file

    try:
        path = cached_file(source, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
    except OSError:
        return {}
    return json.loads(Path(path).read_text()) if path else {}
