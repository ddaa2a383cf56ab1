"""Shards of optimizer states in safetensors files, readable in any other cut."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["Shard", "ShardReader", "write_shards"]


@dataclass(frozen=True)
class Shard:
    """A rank's stretch of the states of one parameter."""

    name: str
    """Name of the parameter."""
    start: int
    """Position of the stretch in the flat parameter."""
    tensors: dict[str, Tensor]
    """State name -> flat float32 values of the stretch."""


def write_shards(shards: Iterable[Shard], path: Path) -> None:
    """Write a rank's shards: tensors as `<parameter>::<state>`, positions in the file's metadata."""
    tensors: dict[str, Tensor] = {}
    starts: dict[str, int] = {}
    for shard in shards:
        starts[shard.name] = shard.start
        for state, values in shard.tensors.items():
            # A view into a larger storage would be refused, and the host copy is needed anyway.
            tensors[f"{shard.name}::{state}"] = values.detach().cpu().clone()
    save_file(tensors, path, metadata={"starts": json.dumps(starts)})


class ShardReader:
    """Reads any stretch of any state from the files of all ranks of the run that wrote them.

    Args:
        paths: the files of one checkpoint.
    """

    def __init__(self, paths: Sequence[Path]):
        self._paths = paths
        self._stack = ExitStack()
        self._index: dict[str, list[tuple[int, Any]]] = {}

    def __enter__(self) -> ShardReader:
        for path in self._paths:
            file = self._stack.enter_context(safe_open(path, framework="pt"))
            starts = json.loads(file.metadata()["starts"])
            for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
                self._index.setdefault(key, []).append((starts[key.rpartition("::")[0]], file))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def has(self, name: str, state: str) -> bool:
        return f"{name}::{state}" in self._index

    def read_into(self, target: Tensor, name: str, state: str, start: int) -> None:
        """Fill a flat tensor with positions `start ...` of a state; what was not saved stays as it is."""
        key = f"{name}::{state}"
        stop = start + target.numel()
        for first, file in self._index.get(key, []):
            saved = file.get_slice(key)
            last = first + saved.get_shape()[0]
            low, high = max(start, first), min(stop, last)
            if low < high:
                target[low - start : high - start] = saved[low - first : high - first].to(target.device)
