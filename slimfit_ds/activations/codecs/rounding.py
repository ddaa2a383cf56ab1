"""Random bits for stochastic rounding and sampling."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["RandomBits"]

_ODD = 0x0001_0001_0001_0001


class RandomBits:
    """Noise from a generator of its own for each device, so that the global one is left alone.

    Args:
        seed: seed of each device's generator.
    """

    def __init__(self, seed: int):
        self.seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def draw(self, n: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
        """Odd int16 [n], uniform in -32767 .. 32767.

        Times 2^-16 that is noise of mean zero in (-1/2, 1/2): `round(y + noise)` is `floor(y)` or `ceil(y)`
        with probabilities that make its mean `y` up to 2^-16. One 64-bit draw gives four of them.
        """
        if generator is None:
            generator = self.generator(device)
        words = torch.empty(-(-n // 4), dtype=torch.int64, device=device)
        words.random_(-(1 << 63), None, generator=generator)
        return words.bitwise_or_(_ODD).view(torch.int16)[:n]

    def generator(self, device: torch.device) -> torch.Generator:
        """Its generator on a device."""
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self.seed)
        return self._generators[device]
