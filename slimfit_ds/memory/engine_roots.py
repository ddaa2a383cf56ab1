"""Which tensors of a training engine are optimizer states, host copies and communication buffers.

Read by attribute, without importing DeepSpeed: what an engine does not have is skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_iter

from slimfit_ds.memory.tracker import HOST, Roots, optimizer_tensors

__all__ = ["engine_roots", "is_offloaded", "shard_updater"]

# fp32 weights of DeepSpeed's optimizers of stages 0 (bf16, fp16), 1 and 2, 3.
_MASTERS = (
    "single_partition_of_fp32_groups",
    "fp32_groups",
    "fp32_groups_flat",
    "fp32_groups_flat_partition",
    "fp32_partitioned_groups_flat",
)
_HOST_BUFFERS = ("param_buffer_of_bit16_for_cpu_offload_groups", "temp_grad_buffer_for_cpu_offload")
_GRADIENTS = (
    "grad_partitions_flat_buffer",
    "averaged_gradients",
    "fp32_groups_gradients",
    "accumulated_grads",
)


def is_offloaded(optimizer: Any) -> bool:
    """Whether DeepSpeed keeps this optimizer's states on the host."""
    return bool(getattr(optimizer, "cpu_offload", False) or getattr(optimizer, "offload_optimizer", False))


def shard_updater(optimizer: Any) -> Any:
    """The `ShardUpdater` of SlimFit's optimizers, which holds their states; None for others."""
    return getattr(optimizer, "updater", None)


def engine_roots(engine: Any) -> Roots:
    """The `roots` of a `MemoryTracker` for a DeepSpeed or SlimFit engine."""
    optimizer = engine.optimizer
    updater = shard_updater(optimizer)
    store = None if updater is None else updater.states
    states = HOST if is_offloaded(optimizer) else "optimizer"

    def owned() -> Iterator[torch.Tensor]:
        if store is not None:
            yield from store.device_tensors()
        inner = getattr(optimizer, "optimizer", optimizer)
        if isinstance(getattr(inner, "state", None), dict):
            yield from optimizer_tensors(inner)
        yield from _attributes(optimizer, _MASTERS)

    def host() -> Iterator[torch.Tensor]:
        if store is not None:
            yield from store.host_tensors()
        if states == HOST:
            yield from owned()
            # Gradients are sent to the masters' own, which stay there from step to step.
            yield from (master.grad for master in _attributes(optimizer, _MASTERS) if master.grad is not None)
            yield from _attributes(optimizer, _HOST_BUFFERS)

    def buckets() -> Iterator[torch.Tensor]:
        for name in ("ipg_buckets", "_DeepSpeedZeroOptimizer_Stage3__ipg_buckets"):
            for bucket in (getattr(optimizer, name, None) or {}).values():
                yield from _tensors(getattr(bucket, "buffer", None))

    def gradients() -> Iterator[torch.Tensor]:
        yield from _attributes(optimizer, _GRADIENTS)
        if store is not None:
            yield from optimizer.held_gradients()

    roots = {"gradients": gradients, HOST: host, "communication": buckets}
    return roots if states == HOST else {"optimizer": owned, **roots}


def _attributes(owner: Any, names: tuple[str, ...]) -> Iterator[torch.Tensor]:
    for name in names:
        yield from _tensors(getattr(owner, name, None))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, dict):
        value = list(value.values())
    return (leaf for leaf in tree_iter(value) if isinstance(leaf, torch.Tensor))
