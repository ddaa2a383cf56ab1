"""The outcome of one strategy, and what it means for other GPU counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Outcome", "gpus_needed"]

_MAX_GPUS = 1024


@dataclass(frozen=True)
class Outcome:
    """One row of a comparison. Bytes are those of the rank with the highest peak; states and saved activations are the
    most held at any time."""

    name: str
    label: str
    status: str = "ok"
    error: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    loss: float | None = None
    steps: int = 0
    seconds_per_step: float | None = None
    bytes_per_step: float | None = None
    parameters: int = 0
    peak: int = 0
    at_peak: dict[str, int] = field(default_factory=dict)
    peak_phase: str = ""
    peak_module: str = ""
    states: int = 0
    states_host: int = 0
    saved_dynamic: int = 0
    saved_static: int = 0
    gpus: dict[str, int | None] = field(default_factory=dict)
    surroundings: dict[str, Any] = field(default_factory=dict)
    output_dir: str = ""

    @property
    def ok(self) -> bool:
        """Whether it ran to its end."""
        return self.status == "ok"

    @property
    def saved(self) -> int:
        """Bytes kept for the backward pass."""
        return self.saved_dynamic + self.saved_static

    @property
    def states_per_parameter(self) -> float:
        """Bytes of weights, gradients and optimizer states on the device for each parameter of the model."""
        return self.states / self.parameters if self.parameters else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return {**asdict(self), "states_per_parameter": self.states_per_parameter}


def gpus_needed(at_peak: Mapping[str, int], ranks: int, stage: int, memory: int) -> int | None:
    """Return the fewest GPUs of `memory` bytes that hold the same global batch, by arithmetic from a measured peak.

    Activations and the working set shrink with the batch of a rank; gradients (stage 2), optimizer states (stage 1)
    and weights (stage 3) shrink with the number of ranks; the rest does not.

    Args:
        at_peak: bytes by kind at the peak of one of `ranks` ranks.
        ranks: ranks of the measurement.
        stage: ZeRO stage.
        memory: bytes of a GPU.

    Returns:
        The number; None if even 1024 do not do.
    """
    divided = {"saved_activations_dynamic", "saved_activations_static", "working"}
    divided |= {
        kind for kind, least in (("optimizer", 1), ("gradients", 2), ("parameters", 3)) if stage >= least
    }
    fixed = sum(size for kind, size in at_peak.items() if kind not in divided)
    moving = sum(size for kind, size in at_peak.items() if kind in divided)
    if fixed + moving * ranks / _MAX_GPUS > memory:
        return None
    return next(count for count in range(1, _MAX_GPUS + 1) if fixed + moving * ranks / count <= memory)
