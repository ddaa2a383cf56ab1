"""Copies between host and device that run beside the computation, and host memory for which they can."""

from __future__ import annotations

import os
import socket
import warnings
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

__all__ = ["Copies", "node_memory", "pin"]


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


def node_memory(nbytes: int, rank: int, exchange: Callable[[Any], list[Any]]) -> tuple[Tensor, bool] | None:
    """Memory that all ranks of a host share. It never has a name, so it goes with the last of them, however that ends.

    Args:
        nbytes: the same on all ranks.
        rank: of this process, from 0.
        exchange: gives the values of all ranks, in their order; every rank calls it.

    Returns:
        Flat bytes, and whether this rank is to fill them. None: no two ranks are on one host, or a host has no such memory
        (a warning says so).
    """
    hosts = exchange((socket.gethostname(), os.stat("/proc/self/ns/pid").st_ino))
    if len({*hosts}) == len(hosts):
        return None
    first = hosts.index(hosts[rank])
    place, problem, memory, handle = ("", 0), "", None, None
    try:
        if first == rank:
            try:
                handle = os.memfd_create("slimfit")
                # Without it a write beyond what there is would kill the process.
                os.posix_fallocate(handle, 0, nbytes)
                place = f"/proc/{os.getpid()}/fd/{handle}", os.fstat(handle).st_ino
            except OSError as error:
                problem = str(error)
        path, number = exchange(place)[first]
        if not any(exchange(problem)):
            try:
                if os.stat(path).st_ino == number:
                    memory = torch.from_file(path, shared=True, size=nbytes, dtype=torch.uint8)
                else:
                    problem = f"{path} is another file on rank {rank}"
            except OSError as error:
                problem = str(error)
        problems = [each for each in exchange(problem) if each]
    finally:
        if handle is not None:
            os.close(handle)
    if not problems and memory is not None:
        return memory, first == rank
    warnings.warn(
        f"slimfit.frozen_weights: {nbytes / 2**30:.2f} GiB of host memory cannot be shared ({problems[0]}), so each rank of this "
        "host has its own copy",
        stacklevel=2,
    )
    return None


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
        # The next launch of a kernel would raise this error as its own.
        with suppress(RuntimeError):
            torch.ones(1, device="cuda")
        return False
    # The tensor must outlive its registration.
    weakref.finalize(owner, _unpin, tensor)
    return True


def _unpin(tensor: Tensor) -> None:
    torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr())
