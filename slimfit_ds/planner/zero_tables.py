"""Model states by arithmetic: what ZeRO's stages keep for every parameter, and what SlimFit keeps.

Source of the ZeRO rows: Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models",
arXiv 1910.02054, figure 1, and DeepSpeed's memory documentation. Activations, buckets and working memory are not in
here; the estimator counts them.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ModelStates", "slimfit_states", "zero_states"]

# Bytes per parameter of weights, gradients and (fp32 master, m, v).
_BYTES = {"fp32": (4, 4, 8), "bf16": (2, 2, 12), "fp16": (2, 2, 12)}


@dataclass(frozen=True)
class ModelStates:
    """Bytes of one rank."""

    weights: float
    gradients: float
    optimizer: float
    host: float = 0.0

    @property
    def device(self) -> float:
        """Bytes on the device."""
        return self.weights + self.gradients + self.optimizer


def _sizes(dtype: str) -> tuple[int, int, int]:
    if dtype not in _BYTES:
        raise ValueError(f"dtype must be one of {', '.join(_BYTES)}, got {dtype!r}")
    return _BYTES[dtype]


def _check(stage: int, ranks: int) -> None:
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"stage must be 0, 1, 2 or 3, got {stage!r}")
    if ranks < 1:
        raise ValueError(f"ranks must be at least 1, got {ranks!r}")


def zero_states(
    parameters: int, stage: int, ranks: int, dtype: str = "bf16", offload: bool = False
) -> ModelStates:
    """Model states of full fine-tuning with Adam under a ZeRO stage.

    Args:
        parameters: number of parameters (count `numel`: DeepSpeed's own counter is wrong on meta tensors).
        stage: 0 to 3; 1 divides the optimizer states, 2 also the gradients, 3 also the weights.
        ranks: data-parallel ranks.
        dtype: `fp32`, or `bf16` / `fp16` with fp32 master weights.
        offload: optimizer states (and the gradients they need) on the host.

    Returns:
        Bytes of one rank.
    """
    _check(stage, ranks)
    weight, gradient, state = _sizes(dtype)
    optimizer = state * parameters / (ranks if stage >= 1 else 1)
    gradients = gradient * parameters / (ranks if stage >= 2 else 1)
    weights = weight * parameters / (ranks if stage >= 3 else 1)
    if offload:
        # The host keeps a fp32 copy of its share of the gradients for the host's Adam.
        return ModelStates(weights, gradients, 0.0, optimizer + 4 * parameters / ranks)
    return ModelStates(weights, gradients, optimizer)


def slimfit_states(
    parameters: int,
    active: int,
    stage: int,
    ranks: int,
    dtype: str = "bf16",
    residency: str = "host",
    seen: int | None = None,
) -> ModelStates:
    """Model states of SlimFit: gradients of active layers only, states of those that trained.

    Args:
        parameters: number of parameters.
        active: parameters that train in a step, biases included.
        stage: ZeRO stage.
        ranks: data-parallel ranks.
        dtype: `fp32`, `bf16` or `fp16`.
        residency: `host`: states of frozen layers are on the host; `device`: they stay.
        seen: parameters that have trained at least once; default all.

    Returns:
        Bytes of one rank.

    Raises:
        ValueError: more active than there are, or an unknown residency.
    """
    _check(stage, ranks)
    seen = parameters if seen is None else seen
    if not 0 <= active <= seen <= parameters:
        raise ValueError(f"0 <= active <= seen <= parameters must hold, got {active}, {seen}, {parameters}")
    if residency not in ("host", "device"):
        raise ValueError(f"residency must be host or device, got {residency!r}")
    weight, gradient, state = _sizes(dtype)
    share = ranks if stage >= 1 else 1
    on_device = active if residency == "host" else seen
    return ModelStates(
        weight * parameters / (ranks if stage >= 3 else 1),
        gradient * active / (ranks if stage >= 2 else 1),
        state * on_device / share,
        state * seen / share if residency == "host" else 0.0,
    )
