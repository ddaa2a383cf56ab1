"""From a PIL image to normalised pixels, and the random changes of training images."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from PIL import Image

__all__ = ["AUGMENTATIONS", "pixels"]


def pixels(image: Image.Image, size: tuple[int, int], mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """`[channels, height, width]` float32: resized, scaled to 0..1, normalised by channel.

    Args:
        image: grey (`L`) or colour (`RGB`).
        size: height and width in pixels.
        mean, std: `[channels]`.
    """
    height, width = size
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    values = np.asarray(image, dtype=np.float32) / 255.0
    values = values[..., None] if values.ndim == 2 else values
    return np.ascontiguousarray(((values - mean) / std).transpose(2, 0, 1))


def _same(image: Image.Image, size: tuple[int, int], chance: np.random.Generator) -> Image.Image:
    return image


def _flip(image: Image.Image, size: tuple[int, int], chance: np.random.Generator) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if chance.random() < 0.5 else image


def _crop_flip(image: Image.Image, size: tuple[int, int], chance: np.random.Generator) -> Image.Image:
    """Shift by up to an eighth of each side over a black border, as is usual on CIFAR."""
    width, height = image.size
    right = int(chance.integers(-(width // 8), width // 8 + 1))
    down = int(chance.integers(-(height // 8), height // 8 + 1))
    return _flip(image.crop((right, down, right + width, down + height)), size, chance)


def _resized_crop_flip(image: Image.Image, size: tuple[int, int], chance: np.random.Generator) -> Image.Image:
    """A window of 8 to 100 % of the area with a side ratio of 3/4 to 4/3, as is usual on ImageNet."""
    width, height = image.size
    area = width * height * chance.uniform(0.08, 1.0)
    ratio = math.exp(chance.uniform(math.log(3 / 4), math.log(4 / 3)))
    wide = min(width, max(1, round(math.sqrt(area * ratio))))
    high = min(height, max(1, round(math.sqrt(area / ratio))))
    left = int(chance.integers(0, width - wide + 1))
    top = int(chance.integers(0, height - high + 1))
    return _flip(image.crop((left, top, left + wide, top + high)), size, chance)


AUGMENTATIONS: dict[str, Callable[[Image.Image, tuple[int, int], np.random.Generator], Image.Image]] = {
    "none": _same,
    "flip": _flip,
    "crop_flip": _crop_flip,
    "resized_crop_flip": _resized_crop_flip,
}
