"""The result of a tracked step: bytes by kind and where the peak stood."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["KINDS", "MemoryReport"]

KINDS = (
    "parameters",
    "gradients",
    "optimizer",
    "saved_activations_dynamic",
    "saved_activations_static",
    "communication",
    "working",
)
"""Kinds of bytes on the training device; `optimizer_host` is counted beside them."""


@dataclass(frozen=True)
class MemoryReport:
    """Bytes of one training step on one rank.

    `parameters` to `optimizer_host` are what was held at most at any time, each by itself; `at_peak` is what was
    held, by kind, at the moment when the sum over the device was largest.
    """

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    optimizer_host: int = 0
    saved_activations_dynamic: int = 0
    saved_activations_static: int = 0
    communication: int = 0
    working: int = 0
    peak: int = 0
    peak_phase: str = ""
    peak_module: str = ""
    at_peak: dict[str, int] = field(default_factory=dict)
    host_rss: int = 0
    cuda_peak_allocated: int | None = None
    cuda_peak_reserved: int | None = None

    @property
    def saved_activations(self) -> int:
        """Bytes kept for backward, dynamic and static."""
        return self.saved_activations_dynamic + self.saved_activations_static

    @property
    def model_states(self) -> int:
        """Bytes of weights, gradients and optimizer states on the device."""
        return self.parameters + self.gradients + self.optimizer

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)
