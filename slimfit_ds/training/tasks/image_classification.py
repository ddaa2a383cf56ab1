"""Classes of images: CIFAR columns, an ImageNet-style folder, or any data set with an image and a label column."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from slimfit_ds.errors import ConfigError
from slimfit_ds.training.tasks.base import Preprocessing, Rows, Splits, Task, TaskOptions
from slimfit_ds.training.tasks.images import AUGMENTATIONS, pixels
from slimfit_ds.training.tasks.labels import Labels
from slimfit_ds.training.tasks.metrics import classification_metrics

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PretrainedConfig

__all__ = ["ImageClassification", "ImageOptions"]

IMAGE_COLUMNS = ("img", "image", "pixel_values")


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
    model_class = "AutoModelForImageClassification"
    best_metric = "accuracy"
    options_class = ImageOptions
    labels: Labels
    image_column = ""
    label_column = ""

    def study(self, splits: Splits) -> Splits:
        from datasets import Image

        problems: list[str] = []
        shared = [name for name in splits.train.column_names if name in splits.evaluation.column_names]
        self.image_column = self._find("image_column", IMAGE_COLUMNS, shared, problems)
        self.label_column = self._find("label_column", ("label", "labels", "fine_label"), shared, problems)
        if self.image_column:
            try:
                splits = replace(
                    splits,
                    train=splits.train.cast_column(self.image_column, Image()),
                    evaluation=splits.evaluation.cast_column(self.image_column, Image()),
                )
                for split in (splits.train, splits.evaluation):
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

    def _find(self, key: str, known: Sequence[str], shared: list[str], problems: list[str]) -> str:
        wanted = getattr(self.options, key)
        column = next((name for name in ([wanted] if wanted else known) if name in shared), None)
        if column is None:
            looked_for = repr(wanted) if wanted else " or ".join(known)
            problems.append(
                f"task.{key}: no column {looked_for} in both splits; they share {', '.join(shared)}"
            )
        return column or ""

    def metric_names(self) -> tuple[str, ...]:
        return ("accuracy", "f1", "matthews_correlation", "loss")

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

    def load_preprocessing(self, source: Preprocessing, config: PretrainedConfig) -> None:
        channels = getattr(config, "num_channels", 3)
        saved = _saved_statistics(source.source)
        size = getattr(config, "image_size", 224)
        self.size = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
        self.channels = channels
        self.mean = np.array(
            self.options.mean or saved.get("image_mean") or [0.5] * channels, dtype=np.float32
        )
        self.std = np.array(self.options.std or saved.get("image_std") or [0.5] * channels, dtype=np.float32)

    def save_preprocessing(self, folder: Path) -> None:
        content = {
            "image_processor_type": "ViTImageProcessor",
            "do_resize": True,
            "do_rescale": True,
            "do_normalize": True,
            "size": {"height": self.size[0], "width": self.size[1]},
            "image_mean": self.mean.tolist(),
            "image_std": self.std.tolist(),
        }
        (folder / "preprocessor_config.json").write_text(json.dumps(content, indent=2))

    def prepare(self, split: Dataset, *, training: bool) -> Dataset:
        return split.select_columns([self.image_column, self.label_column])

    def example(self, row: Mapping[str, Any], chance: np.random.Generator | None) -> Mapping[str, Any]:
        image = row[self.image_column].convert("L" if self.channels == 1 else "RGB")
        if chance is not None:
            image = AUGMENTATIONS[self.options.augmentation](image, self.size, chance)
        return {
            "pixel_values": pixels(image, self.size, self.mean, self.std),
            "label": self.labels.codes[row[self.label_column]],
        }

    def collate(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        return {
            "pixel_values": torch.from_numpy(np.stack([row["pixel_values"] for row in examples])),
            "labels": torch.tensor([row["label"] for row in examples], dtype=torch.int64),
        }

    def predict(self, outputs: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"logits": outputs.logits.float()}

    def score(self, rows: Rows, prepared: Dataset, original: Dataset) -> dict[str, float]:
        labels = self.labels.encode(prepared.select_columns([self.label_column])[:][self.label_column])
        return classification_metrics(rows["logits"], labels)


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
