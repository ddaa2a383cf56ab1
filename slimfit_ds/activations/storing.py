"""How a function stores a tensor for its backward pass: as a codec's payload, shared where it was stored before.

The payload goes through `ctx.save_for_backward`, so that it is freed with the graph, is seen by outer
`saved_tensors_hooks` (nested checkpoints drop it) and is counted by storage trackers. What stays on the context is
a `Stored` record without tensors. A tensor that several functions store (an encoder's output read by every decoder
layer, the output of a norm read by queries, keys and values) is encoded once: `SharedPayloads` remembers weakly
which payload belongs to which storage.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import TensorWeakRef

__all__ = ["SavedTensors", "SharedPayloads", "Stored", "tensor_key"]


def tensor_key(tensor: Tensor) -> tuple:
    """What identifies the values of a tensor while its storage lives: storage, place in it, and version."""
    return (
        tensor.untyped_storage()._cdata,
        tensor.storage_offset(),
        tuple(tensor.shape),
        tuple(tensor.stride()),
        tensor.dtype,
        tensor._version,
    )


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where one tensor lies among a function's saved tensors.

    Attributes:
        codec: decodes `encoded`; `None`: the tensor itself was saved.
        encoded: the codec's result without its tensors.
        start: index of the first payload tensor.
        count: number of payload tensors.
    """

    codec: Any
    encoded: Any
    start: int
    count: int


class SharedPayloads:
    """Weak memory of payloads by source tensor; an entry dies with the source's storage or with its payload."""

    def __init__(self) -> None:
        self._entries: dict[tuple, tuple[StorageWeakRef, Any, Any, list[TensorWeakRef]]] = {}

    def find(self, tensor: Tensor, kind: Any) -> tuple[Any, Any] | None:
        """The codec and payload remembered for these values under `kind`, or `None`."""
        entry = self._entries.get((tensor_key(tensor), kind))
        if entry is None or entry[0].expired():
            return None
        tensors = tuple(reference() for reference in entry[3])
        return (
            None
            if any(t is None for t in tensors)
            else (entry[1], dataclasses.replace(entry[2], tensors=tensors))
        )

    def remember(self, tensor: Tensor, kind: Any, codec: Any, encoded: Any) -> None:
        """Let later functions that store `tensor` under `kind` share `encoded`, which `codec` decodes."""
        if len(self._entries) >= 512:
            self._entries = {key: value for key, value in self._entries.items() if _alive(value)}
        self._entries[(tensor_key(tensor), kind)] = (
            StorageWeakRef(tensor.untyped_storage()),
            codec,
            dataclasses.replace(encoded, tensors=()),
            [TensorWeakRef(t) for t in encoded.tensors],
        )


def _alive(entry: tuple[StorageWeakRef, Any, Any, list[TensorWeakRef]]) -> bool:
    return not entry[0].expired() and all(reference() is not None for reference in entry[3])


SHARED = SharedPayloads()

RECIPE = "recipe"
"""The kind under which a function remembers how its output follows from what it stores anyway."""


class SavedTensors:
    """Collects what a function saves; `tensors` goes to `ctx.save_for_backward`, `records` to the context."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.records: list[Stored] = []

    def add(self, tensor: Tensor, codec: Any = None) -> None:
        """Save `tensor` as it is, or encoded by `codec`."""
        if codec is None:
            self.records.append(Stored(None, None, len(self.tensors), 1))
            self.tensors.append(tensor)
        else:
            self.add_encoded(*encode_shared(tensor, codec))

    def add_encoded(self, codec: Any, encoded: Any) -> None:
        """Save what `codec` made of a tensor."""
        skeleton = dataclasses.replace(encoded, tensors=())
        self.records.append(Stored(codec, skeleton, len(self.tensors), len(encoded.tensors)))
        self.tensors.extend(encoded.tensors)

    @staticmethod
    def restore(records: Sequence[Stored], tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors that `records` describe, decoded."""
        return [_restore(record, tensors) for record in records]


def encode_shared(tensor: Tensor, codec: Any) -> tuple[Any, Any]:
    """The codec and payload of `tensor`: its recipe, or the payload of an earlier function, or a new one."""
    with torch.no_grad():
        detached = tensor.detach()
        found = SHARED.find(detached, RECIPE) or SHARED.find(detached, codec)
        if found is None:
            found = codec, codec.encode(detached)
            SHARED.remember(detached, codec, *found)
    return found


def _restore(record: Stored, tensors: Sequence[Tensor]) -> Tensor:
    if record.codec is None:
        return tensors[record.start]
    payload = tuple(tensors[record.start : record.start + record.count])
    return record.codec.decode(dataclasses.replace(record.encoded, tensors=payload))
