"""The autocast setting of a forward pass, entered again where that pass is repeated."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["AutocastState"]


@dataclass(frozen=True)
class AutocastState:
    """Device type, whether autocast is on, and its dtype, for each device type in use."""

    settings: tuple[tuple[str, bool, torch.dtype], ...]

    @classmethod
    def capture(cls, tensors: Iterable[Tensor]) -> AutocastState:
        """The settings in force for the devices of `tensors`."""
        kinds = sorted({t.device.type for t in tensors} - {"meta"} | {"cpu"})
        return cls(
            tuple((kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds)
        )

    @contextlib.contextmanager
    def entered(self):
        """Run under these settings, without autocast's cache of cast weights.

        The cache would hand a cast weight, with its place in a graph that is thrown away, to a later user of the
        same (tied) weight.
        """
        with contextlib.ExitStack() as stack:
            for kind, enabled, dtype in self.settings:
                if enabled or torch.is_autocast_enabled(kind):
                    stack.enter_context(
                        torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False)
                    )
            yield
