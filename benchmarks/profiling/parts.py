"""Sorts the operations of a profile into the parts of a step."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from profiling.ranges import PREFIX

__all__ = ["PARTS", "sort_events"]

# Enclosing ranges and autograd nodes: the innermost decides, whatever operation runs inside.
_RANGES = (
    (re.compile(r"Optimizer\.step#"), "optimizer"),
    (re.compile(r"c10d|gloo|nccl"), "communication"),
    (re.compile(r"_Norm(Backward)?$"), "norm"),
    (re.compile(r"_Activation(Backward)?$"), "activation function"),
    (re.compile(r"_(Replayed|Packed|Philox)(Backward)?$"), "dropout"),
    (re.compile(r"_(StoredProbabilities|PlainAttention)(Backward)?$"), "attention"),
)
# Names of operations, from the innermost out.
_OPERATIONS = (
    (re.compile(r"scaled_dot_product|softmax"), "attention"),
    (
        re.compile(r"aten::(mm|addmm|bmm|baddbmm|linear|matmul|convolution.*|_convolution|mkldnn.*)$|mkldnn"),
        "matrix products",
    ),
    (re.compile(r"layer_norm|rms_norm"), "norm"),
    (re.compile(r"gelu|silu|relu|tanh"), "activation function"),
    (re.compile(r"dropout|bernoulli"), "dropout"),
    (re.compile(r"embedding|index_select|nll_loss|cross_entropy"), "embedding and loss"),
    (re.compile(r"aten::(to|_to_copy|copy_|contiguous|clone)$"), "casts and copies"),
    (re.compile(r"aten::"), "other elementwise operations"),
)
PARTS = (
    "matrix products, forward",
    "matrix products, recomputed",
    "matrix products, backward",
    "attention",
    "attention, recomputed",
    "norm",
    "activation function",
    "dropout",
    "embedding and loss",
    "codec pack",
    "codec unpack",
    "casts and copies",
    "other elementwise operations",
    "other operations, recomputed",
    "optimizer",
    "statistic",
    "schedule",
    "states to and from the host",
    "communication",
    "Python between operations",
)
_NODE = "autograd::engine::evaluate_function"
_RECOMPUTATION = "_CheckpointFunctionBackward"
_FORWARD_ONLY = "forward"


def sort_events(events: Iterable[Any], seconds: float) -> dict[str, float]:
    """Seconds by part.

    Args:
        events: `FunctionEvent`s of one or more steps, with parents.
        seconds: wall time of these steps under the profiler; what no operation accounts for is Python.

    Returns:
        part -> seconds of the operations' own time (children excluded).
    """
    totals: dict[str, float] = defaultdict(float)
    for event in events:
        own = event.self_cpu_time_total / 1e6
        if own > 0:
            part = _part(event)
            if part is not None:
                totals[part] += own
    totals["Python between operations"] = max(0.0, seconds - sum(totals.values()))
    return {part: totals.get(part, 0.0) for part in PARTS}


def _chain(event: Any) -> list[str]:
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    return names


def _part(event: Any) -> str | None:
    names = _chain(event)
    # The own time of an enclosing range or node is Python.
    if names[0].startswith(PREFIX) and names[0] != PREFIX + "schedule":
        return names[0].removeprefix(PREFIX)
    for name in names:
        if name.startswith(PREFIX):
            return name.removeprefix(PREFIX)
        for pattern, part in _RANGES:
            if pattern.search(name) and not name.startswith(_NODE):
                return part
    kind = _operation(names)
    return None if kind is None else _with_direction(kind, names)


def _operation(names: list[str]) -> str | None:
    """The part of the innermost operation; copies inside of a matrix product belong to it."""
    for name in names:
        for pattern, part in _OPERATIONS[:-2]:
            if pattern.search(name) and not name.startswith(_NODE):
                return part
    for pattern, part in _OPERATIONS[-2:]:
        if pattern.search(names[0]):
            return part
    # Autograd nodes: the engine's own work, and Python functions' bodies.
    return None


def _with_direction(kind: str, names: list[str]) -> str:
    backward = any(name.startswith(_NODE) or name.endswith(("Backward", "Backward0")) for name in names)
    recomputed = False
    for name in names:
        if name.startswith(_NODE) and _RECOMPUTATION not in name:
            break
        if name == _RECOMPUTATION:
            recomputed = True
            break
    if recomputed:
        known = f"{kind}, recomputed"
        return known if known in PARTS else "other operations, recomputed"
    if kind == "matrix products":
        return f"{kind}, backward" if backward else f"{kind}, forward"
    return kind
