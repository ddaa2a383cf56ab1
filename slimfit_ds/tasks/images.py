"""From a PIL image to normalised pixels, and the random changes of training images."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

__all__ = ["AUGMENTATIONS", "colours", "pixels", "processor"]


def colours(image: Image.Image, channels: int) -> Image.Image:
    """The image in grey (1 channel) or colour (3), 8 bits each."""
    if image.mode.startswith("I"):
        # 16 bits: converting would cut everything above 255 to white.
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("images of float pixels have no known range: convert them to 8 bits")
    return image.convert("L" if channels == 1 else "RGB")


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


def _same(image: Image.Image, size: tuple[int, int], chance: Any) -> Image.Image:
    return image


def _flip(image: Image.Image, size: tuple[int, int], chance: Any) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if chance.random() < 0.5 else image


def _crop_flip(image: Image.Image, size: tuple[int, int], chance: Any) -> Image.Image:
    """Shift by up to an eighth of each side over a black border, as is usual on CIFAR."""
    width, height = image.size
    right = chance.randint(-(width // 8), width // 8)
    down = chance.randint(-(height // 8), height // 8)
    return _flip(image.crop((right, down, right + width, down + height)), size, chance)


def _resized_crop_flip(image: Image.Image, size: tuple[int, int], chance: Any) -> Image.Image:
    """A window of 8 to 100 % of the area with a side ratio of 3/4 to 4/3, as is usual on ImageNet."""
    width, height = image.size
    area = width * height * chance.uniform(0.08, 1.0)
    ratio = math.exp(chance.uniform(math.log(3 / 4), math.log(4 / 3)))
    wide = min(width, max(1, round(math.sqrt(area * ratio))))
    high = min(height, max(1, round(math.sqrt(area / ratio))))
    left = chance.randint(0, width - wide)
    top = chance.randint(0, height - high)
    return _flip(image.crop((left, top, left + wide, top + high)), size, chance)


AUGMENTATIONS: dict[str, Callable[[Image.Image, tuple[int, int], Any], Image.Image]] = {
    "none": _same,
    "flip": _flip,
    "crop_flip": _crop_flip,
    "resized_crop_flip": _resized_crop_flip,
}


def processor(size: tuple[int, int], mean: np.ndarray, std: np.ndarray) -> Any:
    """What is saved beside the model, so that transformers prepares images in the same way."""
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    return ViTImageProcessorPil(
        size={"height": size[0], "width": size[1]},
        resample=Image.Resampling.BICUBIC,
        image_mean=mean.tolist(),
        image_std=std.tolist(),
    )
