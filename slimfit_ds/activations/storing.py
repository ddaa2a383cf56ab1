"""How a function stores a tensor for its backward pass: as a codec's payload, shared where it was stored before.

The payload's tensors go through `ctx.save_for_backward`, so that they are freed with the graph, are seen by outer
`saved_tensors_hooks` (nested checkpoints drop them) and are counted by storage trackers. What stays on the context
is a `Stored` record without tensors. A tensor that several functions store (an encoder's output read by every decoder
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

from slimfit_ds.activations.codecs import Codec

__all__ = [
    "RECIPE",
    "SHARED",
    "Payload",
    "SavedTensors",
    "SharedPayloads",
    "Stored",
    "encode_shared",
    "tensor_key",
]


def tensor_key(tensor: Tensor) -> tuple:
    """What identifies the values of a tensor while its storage lives: storage, place in it, and version.

    Reshaped views of a contiguous tensor have one key: a linear layer saves `[batch * tokens, width]`.
    """
    layout = tensor.numel() if tensor.is_contiguous() else (tuple(tensor.shape), tuple(tensor.stride()))
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), layout, tensor.dtype, tensor._version


@dataclasses.dataclass(frozen=True)
class Payload:
    """What stands for a tensor: `codec.decode(encoded)`, viewed as `shape`."""

    codec: Any
    encoded: Any
    shape: torch.Size

    def decode(self) -> Tensor:
        """The tensor."""
        return self.codec.decode(self.encoded).view(self.shape)


class SharedPayloads:
    """Weak memory of payloads by source tensor; an entry dies with the source's storage or with its payload."""

    def __init__(self) -> None:
        self._entries: dict[tuple, tuple[StorageWeakRef, Any, Any, list[TensorWeakRef]]] = {}

    def find(self, tensor: Tensor, kind: Any) -> Payload | None:
        """The payload remembered for these values under `kind`, or `None`."""
        entry = self._entries.get((tensor_key(tensor), kind))
        if entry is None or entry[0].expired():
            return None
        tensors = tuple(reference() for reference in entry[3])
        if any(t is None for t in tensors):
            return None
        return Payload(entry[1], dataclasses.replace(entry[2], tensors=tensors), tensor.shape)

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


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where one tensor lies among a function's saved tensors: itself, or the tensors of its payload.

    Attributes:
        payload: the payload without its tensors; `None`: the tensor itself was saved.
        start: index of the first saved tensor.
        count: how many there are.
    """

    payload: Payload | None
    start: int
    count: int


class SavedTensors:
    """Collects what a function saves; `tensors` goes to `ctx.save_for_backward`, `records` to the context."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.records: list[Stored] = []

    def add(self, tensor: Tensor, codec: Any = None) -> None:
        """Save `tensor` as it is, or encoded by `codec`."""
        self.add_all([tensor], [codec])

    def add_all(self, tensors: Sequence[Tensor], codecs: Sequence[Any]) -> None:
        """Save tensors in this order, each as it is (`None`) or encoded; those of one codec are encoded together."""
        chosen = [i for i, codec in enumerate(codecs) if codec is not None]
        payloads = dict(zip(chosen, _encode_all([(tensors[i], codecs[i]) for i in chosen]), strict=True))
        for i, tensor in enumerate(tensors):
            if i in payloads:
                self.add_payload(payloads[i])
            else:
                self.records.append(Stored(None, len(self.tensors), 1))
                self.tensors.append(tensor)

    def add_payload(self, payload: Payload) -> None:
        """Save what stands for a tensor."""
        tensors = payload.encoded.tensors
        skeleton = dataclasses.replace(payload, encoded=dataclasses.replace(payload.encoded, tensors=()))
        self.records.append(Stored(skeleton, len(self.tensors), len(tensors)))
        self.tensors.extend(tensors)

    @staticmethod
    def restore(records: Sequence[Stored], tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors that `records` describe; those of one codec are decoded together."""
        found = [_kept(record, tensors) for record in records]
        by_codec: dict[Codec, list[int]] = {}
        for i, value in enumerate(found):
            if isinstance(value, Payload) and isinstance(value.codec, Codec):
                by_codec.setdefault(value.codec, []).append(i)
        for codec, places in by_codec.items():
            decoded = codec.decode_all([found[i].encoded for i in places])
            for i, tensor in zip(places, decoded, strict=True):
                found[i] = tensor.view(found[i].shape)
        return [value.decode() if isinstance(value, Payload) else value for value in found]


def encode_shared(tensor: Tensor, codec: Any) -> Payload:
    """What stands for `tensor`: its recipe, or the payload of an earlier function, or a new one."""
    return _encode_all([(tensor, codec)])[0]


def _encode_all(jobs: Sequence[tuple[Tensor, Any]]) -> list[Payload]:
    """`encode_shared` of each tensor with its codec."""
    with torch.no_grad():
        jobs = [(tensor.detach(), codec) for tensor, codec in jobs]
        found = [SHARED.find(tensor, RECIPE) or SHARED.find(tensor, codec) for tensor, codec in jobs]
        new: dict[Any, dict[tuple, Tensor]] = {}
        for (tensor, codec), payload in zip(jobs, found, strict=True):
            if payload is None:
                new.setdefault(codec, {})[tensor_key(tensor)] = tensor
        made = {}
        for codec, tensors in new.items():
            encoded = codec.encode_all(list(tensors.values()))
            for (key, tensor), one in zip(tensors.items(), encoded, strict=True):
                SHARED.remember(tensor, codec, codec, one)
                made[codec, key] = one
        return [
            payload or Payload(codec, made[codec, tensor_key(tensor)], tensor.shape)
            for (tensor, codec), payload in zip(jobs, found, strict=True)
        ]


def _kept(record: Stored, tensors: Sequence[Tensor]) -> Any:
    """The tensor itself, or its payload."""
    if record.payload is None:
        return tensors[record.start]
    kept = tuple(tensors[record.start : record.start + record.count])
    encoded = dataclasses.replace(record.payload.encoded, tensors=kept)
    return dataclasses.replace(record.payload, encoded=encoded)
