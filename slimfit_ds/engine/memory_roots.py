"""Which tensors of an engine are optimizer states, host copies, gradients and communication buffers.

DeepSpeed's optimizers are read by their private names. A name that is gone is an error: leaving it out would
undercount memory in silence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_iter

from slimfit_ds.memory.tracker import HOST, Roots, optimizer_tensors

__all__ = ["engine_roots", "is_offloaded", "shard_updater"]


@dataclass(frozen=True)
class _Layout:
    """Attributes of one of DeepSpeed's optimizers.

    Args:
        masters: fp32 weights.
        gradients: gradients, or what is kept of them.
        buckets: a mapping whose values have a `buffer`.
        offloaded: true if states are on the host.
        host: buffers in host memory, there only if it is.
    """

    masters: str
    gradients: tuple[str, ...] = ()
    buckets: str | None = None
    offloaded: str | None = None
    host: tuple[str, ...] = ()


# Read from DeepSpeed 0.19.8. By class name: importing the classes would import all of DeepSpeed.
_LAYOUTS = {
    "DeepSpeedZeroOptimizer_Stage3": _Layout(
        "fp32_partitioned_groups_flat",
        ("grad_partitions_flat_buffer", "averaged_gradients"),
        "ipg_buckets",
        "offload_optimizer",
    ),
    "DeepSpeedZeroOptimizer": _Layout(
        "single_partition_of_fp32_groups",
        ("averaged_gradients",),
        "ipg_buckets",
        "cpu_offload",
        (
            "param_buffer_of_bit16_for_cpu_offload_groups",
            "temp_grad_buffer_for_cpu_offload",
            "accumulated_grads_in_cpu",
        ),
    ),
    "BF16_Optimizer": _Layout("fp32_groups_flat_partition", ("fp32_groups_gradients",)),
    "FP16_Optimizer": _Layout("fp32_groups_flat"),
    "FP16_UnfusedOptimizer": _Layout("fp32_groups"),
}


def engine_roots(engine: Any) -> Roots:
    """Return the `roots` of a `MemoryTracker` for a DeepSpeed or SlimFit engine.

    Raises:
        RuntimeError: an optimizer whose memory is not known, or one that lacks a name which this module reads.
    """
    optimizer = engine.optimizer
    layout, updater = _layout(optimizer), shard_updater(optimizer)
    offloaded = is_offloaded(optimizer)
    if updater is not None and layout is not None:
        # Ours keeps of DeepSpeed's optimizer only the buckets.
        layout = _Layout(layout.masters, buckets=layout.buckets)

    def states() -> Iterator[torch.Tensor]:
        if updater is not None:
            yield from updater.states.device_tensors()
        inner = optimizer if layout is None and updater is None else optimizer.optimizer
        if isinstance(getattr(inner, "state", None), dict):
            yield from optimizer_tensors(inner)
        if layout is not None:
            yield from _tensors(_read(optimizer, layout.masters))

    def host() -> Iterator[torch.Tensor]:
        if updater is not None:
            yield from updater.states.host_tensors()
        if offloaded:
            yield from states()
        if offloaded and layout is not None:
            # Gradients are sent to the masters' own, which stay there from step to step.
            masters = _tensors(_read(optimizer, layout.masters))
            yield from (master.grad for master in masters if master.grad is not None)
            for name in layout.host:
                yield from _tensors(_read(optimizer, name))

    def buckets() -> Iterator[torch.Tensor]:
        if layout is not None and layout.buckets is not None:
            for bucket in _read(optimizer, layout.buckets).values():
                yield from _tensors(bucket.buffer)

    def gradients() -> Iterator[torch.Tensor]:
        if updater is not None:
            yield from optimizer.held_gradients()
        for name in layout.gradients if layout is not None else ():
            yield from _tensors(_read(optimizer, name))

    roots: Roots = {"gradients": gradients, HOST: host, "communication": buckets}
    roots = roots if offloaded else {"optimizer": states, **roots}
    for tensors in roots.values():
        list(tensors())  # a missing name is told now, not at the first phase of a long step
    return roots


def is_offloaded(optimizer: Any) -> bool:
    """Return whether DeepSpeed keeps this optimizer's states on the host."""
    layout = _layout(optimizer)
    return layout is not None and layout.offloaded is not None and bool(_read(optimizer, layout.offloaded))


def shard_updater(optimizer: Any) -> Any:
    """Return the `ShardUpdater` of SlimFit's optimizers, which holds their states; None for others."""
    return getattr(optimizer, "updater", None)


def _layout(optimizer: Any) -> _Layout | None:
    """Return the row of a DeepSpeed optimizer; None for torch's own and for SlimFit's without one."""
    names = [base.__name__ for base in type(optimizer).__mro__]
    layout = next((_LAYOUTS[name] for name in names if name in _LAYOUTS), None)
    ours = type(optimizer).__module__.startswith("slimfit_ds.")
    if ours and shard_updater(optimizer) is None:
        raise RuntimeError(f"the memory of {names[0]} is not known: it has no `updater`; {_REMEDY}")
    if layout is None and not ours and not isinstance(optimizer, torch.optim.Optimizer):
        raise RuntimeError(
            f"the memory of the optimizer {names[0]} is not known (known: {', '.join(_LAYOUTS)}); {_REMEDY}"
        )
    return layout


_REMEDY = "describe it in slimfit_ds/engine/memory_roots.py"


def _read(optimizer: Any, name: str) -> Any:
    if not hasattr(optimizer, name):
        raise RuntimeError(
            f"{type(optimizer).__name__} has no attribute {name!r}, which held memory in DeepSpeed 0.19.8; {_REMEDY}"
        )
    return getattr(optimizer, name)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    value = list(value.values()) if isinstance(value, dict) else value
    return (leaf for leaf in tree_iter(value) if isinstance(leaf, torch.Tensor))
