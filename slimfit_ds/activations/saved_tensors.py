"""How operations keep tensors for the backward pass: as a codec's output, once for all that keep the same tensor.

An operation of this package collects what it keeps in `SavedTensors`: the encoded data goes through
`ctx.save_for_backward`, so that it is freed with the graph, is seen by outer `saved_tensors_hooks` (nested checkpoints
drop it) and is counted by storage trackers; records without tensors stay on the context. For PyTorch's own operations
`compress_saved` does the same by `saved_tensors_hooks`.

A tensor that several operations keep (the output of a norm read by queries, keys and values) is encoded once: `SHARED`
remembers weakly what stands for which storage.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import TensorWeakRef

from slimfit_ds.activations.offload import HostInputs, OnHost

__all__ = [
    "SHARED",
    "Payload",
    "Rebuilt",
    "SavedTensors",
    "Stored",
    "compress_saved",
    "encode_shared",
    "saved_as_they_are",
]


def tensor_key(tensor: Tensor) -> tuple:
    """Return what identifies the values of a tensor while its storage lives: storage, place in it, and version.

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

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The data that is kept."""
        return self.encoded.tensors

    def with_tensors(self, tensors: Iterable[Tensor]) -> Payload:
        """Return the same with other tensors in place of its own; without any it only describes."""
        return dataclasses.replace(self, encoded=dataclasses.replace(self.encoded, tensors=tuple(tensors)))

    def decode(self) -> Tensor:
        """Return the tensor."""
        return self.codec.decode(self.encoded).view(self.shape)


@dataclasses.dataclass(frozen=True)
class Rebuilt:
    """A tensor that is computed again from others that are kept anyway, in place of an encoded one.

    Attributes:
        tensors: what it is computed from.
        build: computes it from these; must hold no tensor itself.
    """

    tensors: tuple[Tensor, ...]
    build: Callable[..., Tensor]


class _Builder:
    """Takes the place of a codec beside a `Rebuilt`."""

    @staticmethod
    def decode(rebuilt: Rebuilt) -> Tensor:
        return rebuilt.build(*rebuilt.tensors)


_BUILDER = _Builder()


@dataclasses.dataclass(frozen=True)
class _Entry:
    storage: StorageWeakRef
    payload: Payload
    tensors: list[TensorWeakRef]

    def find(self) -> Payload | None:
        """Return the payload while its source and its data live."""
        tensors = [reference() for reference in self.tensors]
        if self.storage.expired() or any(t is None for t in tensors):
            return None
        return self.payload.with_tensors(tensors)


class SharedPayloads:
    """Weak memory of payloads by source tensor; an entry dies with the source's storage or with its data."""

    def __init__(self) -> None:
        self._entries: dict[tuple, _Entry] = {}

    def find(self, tensor: Tensor, codec: Any) -> Payload | None:
        """Return what was remembered for these values: how to compute them again, or what `codec` made of them."""
        for kind in (_BUILDER, codec):
            entry = self._entries.get((tensor_key(tensor), kind))
            if entry is not None and (payload := entry.find()) is not None:
                return dataclasses.replace(payload, shape=tensor.shape)
        return None

    def remember(self, tensor: Tensor, codec: Any, encoded: Any) -> None:
        """Let later operations that keep `tensor` share what `codec` made of it."""
        if len(self._entries) >= 512:
            self._entries = {k: entry for k, entry in self._entries.items() if entry.find() is not None}
        self._entries[(tensor_key(tensor), codec)] = _Entry(
            StorageWeakRef(tensor.untyped_storage()),
            Payload(codec, encoded, tensor.shape).with_tensors(()),
            [TensorWeakRef(t) for t in encoded.tensors],
        )

    def remember_rebuilt(self, tensor: Tensor, rebuilt: Rebuilt) -> None:
        """Let later operations that keep `tensor` compute it again instead of encoding it."""
        self.remember(tensor.detach(), _BUILDER, rebuilt)

    def find_rebuilt(self, tensor: Tensor) -> Payload | None:
        """Return how `tensor` can be computed again, if anything was remembered."""
        return self.find(tensor.detach(), _BUILDER)


SHARED = SharedPayloads()


def encode_shared(tensor: Tensor, codec: Any) -> Payload:
    """Return what stands for `tensor`: what an earlier operation keeps of it, or a new encoding."""
    tensor = tensor.detach()
    payload = SHARED.find(tensor, codec)
    if payload is None:
        payload = Payload(codec, codec.encode(tensor), tensor.shape)
        SHARED.remember(tensor, codec, payload.encoded)
    return payload


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where one tensor lies among an operation's saved tensors: itself, or the data of its payload.

    Attributes:
        payload: the payload without its tensors; `None`: the tensor itself was saved.
        start: index of the first saved tensor.
        stop: index behind the last one.
        away: it is on the host; no saved tensor is its.
    """

    payload: Payload | None
    start: int
    stop: int
    away: OnHost | None = None

    def payload_of(self, tensors: Sequence[Tensor]) -> Payload:
        """Return the payload with its data."""
        assert self.payload is not None
        return self.payload.with_tensors(tensors[self.start : self.stop])

    def restore(self, tensors: Sequence[Tensor]) -> Any:
        """Return the tensor from the saved ones, or its `HostRows`."""
        if self.away is not None:
            return self.away.all_rows()
        return tensors[self.start] if self.payload is None else self.payload_of(tensors).decode()


class SavedTensors:
    """Collects what an operation saves; `tensors` goes to `ctx.save_for_backward`, `records` to the context."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.records: list[Stored] = []

    @torch.no_grad()
    def add(
        self,
        tensor: Tensor,
        codec: Any = None,
        host: HostInputs | None = None,
        first: tuple[int, int] = (0, 0),
    ) -> None:
        """Save `tensor` as it is, or encoded by `codec`.

        Args:
            tensor: anything.
            codec: `None`: as it is.
            host: where to keep it instead; what cannot be taken apart by rows stays.
            first: rows that come back first.
        """
        payload = None if codec is None else encode_shared(tensor, codec)
        if host is not None and (away := _away(tensor, payload, host, first)) is not None:
            self.records.append(Stored(None, len(self.tensors), len(self.tensors), away))
        elif payload is not None:
            self.add_payload(payload)
        else:
            self.records.append(Stored(None, len(self.tensors), len(self.tensors) + 1))
            self.tensors.append(tensor)

    def add_payload(self, payload: Payload) -> None:
        """Save what stands for a tensor."""
        start = len(self.tensors)
        self.tensors.extend(payload.tensors)
        self.records.append(Stored(payload.with_tensors(()), start, len(self.tensors)))

    @staticmethod
    def restore(records: Sequence[Stored], tensors: Sequence[Tensor]) -> list[Any]:
        """Return the tensors that `records` describe."""
        return [record.restore(tensors) for record in records]


def _away(tensor: Tensor, payload: Payload | None, host: HostInputs, first: tuple[int, int]) -> OnHost | None:
    """Return what is on the host in place of a tensor [..., width], or `None` where that would not save anything."""
    width = tensor.shape[-1] if tensor.dim() > 1 else 0
    if not tensor.numel() or not width:
        return None
    if payload is None:
        return host.keep([tensor.contiguous().view(-1, width)], None, tensor.shape, first)
    encoded = payload.encoded
    if isinstance(encoded, Rebuilt) or encoded.order or len(payload.codec.row_parts(1 << 23, width)) < 2:
        return None
    described = dataclasses.replace(encoded, tensors=())
    return host.keep(encoded.tensors, (payload.codec, described), tensor.shape, first)


# Rows narrower than this are left alone: scales and bookkeeping would outweigh the gain.
_MIN_WIDTH = 8


class _Paused(threading.local):
    value = False


_paused = _Paused()


@contextlib.contextmanager
def saved_as_they_are() -> Iterator[None]:
    """Leave saved tensors alone inside `compress_saved`."""
    before, _paused.value = _paused.value, True
    try:
        yield
    finally:
        _paused.value = before


def compress_saved(
    codec: Any, hidden: Tensor, parameters: Iterable[Tensor]
) -> torch.autograd.graph.saved_tensors_hooks:
    """Keep the token rows that PyTorch's operations save within this context by `codec`.

    The hooks see a tensor only, not what it is for, so they touch only what is safe by its shape: floating-point rows
    of tokens that belong to no parameter. Masks, statistics of softmax or norms and cast weights are left as they are.

    Args:
        codec: encodes tensors `[..., width]` with as many rows in all as `hidden` has.
        hidden: tokens (or pixels of a convolution's input) [..., width].
        parameters: weights in use, which are never compressed, nor are casts of them.
    """
    rows, weights = hidden.numel() // hidden.shape[-1], list(parameters)
    storages = {w.untyped_storage()._cdata for w in weights}
    # Under autocast a linear layer saves a cast copy of its weight, which only its shape tells from an input.
    shapes = {s for w in weights if w.dim() == 2 for s in (tuple(w.shape), tuple(w.shape[::-1]))}
    # The hooks around ours, which autograd would bypass: checkpoints drop, trackers count what passes there.
    outer = torch._C._autograd._top_saved_tensors_default_hooks(False)
    outer_pack, outer_unpack = outer if outer is not None else (_same, _same)

    def pack(tensor: Tensor) -> Any:
        cast = tuple(tensor.shape) in shapes and torch.is_autocast_enabled(tensor.device.type)
        if _paused.value or cast or not _is_rows(tensor, rows) or tensor.untyped_storage()._cdata in storages:
            return outer_pack(tensor)
        with torch.no_grad():
            payload = encode_shared(tensor, codec)
        return payload.with_tensors(()), [outer_pack(t) for t in payload.tensors]

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, tuple) and isinstance(packed[0], Payload):
            payload, kept = packed
            return payload.with_tensors(outer_unpack(t) for t in kept).decode()
        return outer_unpack(packed)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _is_rows(tensor: Tensor, rows: int) -> bool:
    if not tensor.is_floating_point() or tensor.dim() < 2 or isinstance(tensor, torch.nn.Parameter):
        return False
    return tensor.shape[-1] >= _MIN_WIDTH and tensor.numel() == rows * tensor.shape[-1]
