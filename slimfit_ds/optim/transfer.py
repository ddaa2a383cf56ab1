"""Host memory that is copied from and to a device without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["host_buffer", "to_device"]


def host_buffer(like: Tensor) -> Tensor:
    """Return host memory for a copy, page-locked where there is a GPU: only that copies without waiting."""
    return torch.empty_like(like, device="cpu", pin_memory=torch.cuda.is_available())


def to_device(table: Tensor, device: torch.device) -> Tensor:
    """Return a small host tensor on a device; does not wait for it, as a copy of pageable memory would."""
    return table if device.type == "cpu" else table.pin_memory().to(device, non_blocking=True)
