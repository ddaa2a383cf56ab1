"""Copies between host and device that run beside the computation, and host memory for which they can."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

__all__ = ["Copies", "pin"]


class Copies:
    """Copies to a device and from it: on a stream of their own on CUDA, at once on a CPU.

    Args:
        device: of the buffers.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(self, target: Tensor, source: Tensor) -> Any:
        """Begin to copy; the target may be read by what was computed so far, and by nothing that comes later.

        Args:
            target: on the device or the host.
            source: as much on the other.

        Returns:
            What `wait` takes.
        """
        if self._stream is None:
            target.copy_(source)
            return None
        # Kernels that were launched may still read what the buffer held.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            return self._stream.record_event()

    def hold(self, source: Tensor) -> None:
        """Keep the memory of a device's tensor that may be freed from being used again before copies of it are made."""
        if self._stream is not None:
            source.record_stream(self._stream)

    def wait(self, started: Any) -> None:
        """Let what is computed from now on see the copy."""
        if started is not None:
            torch.cuda.current_stream(self._device).wait_event(started)

    def finish(self) -> None:
        """Wait for all copies, before their buffers are given up."""
        if self._stream is not None:
            self._stream.synchronize()


def pin(owner: Any, tensor: Tensor) -> bool:
    """Page-lock host memory as it is, without torch's allocator, which rounds sizes up to powers of two.

    Args:
        owner: when it goes, the memory is unlocked.
        tensor: flat, on the host.

    Returns:
        Whether it is locked; otherwise it is copied all the same, but not beside the computation.
    """
    if tensor.is_pinned():
        return True
    if int(torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)) != 0:
        return False
    # The tensor must outlive its registration.
    weakref.finalize(owner, _unpin, tensor)
    return True


def _unpin(tensor: Tensor) -> None:
    torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr())
