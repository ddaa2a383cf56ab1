"""Codecs for whatever autograd itself saves, through `saved_tensors_hooks`.

The hooks see a tensor only, not what it is for, so they touch only what is safe by its shape: floating-point rows
of tokens that belong to no parameter. Masks, statistics of softmax or norms and cast weights are left as they are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from slimfit_ds.activations.codecs import Codec
from slimfit_ds.activations.storing import Payload, encode_shared

__all__ = ["call_compressed", "compress_saved", "saved_as_they_are"]

# Below it scales and bookkeeping outweigh the gain.
_MIN_WIDTH = 8


class _Paused(threading.local):
    value = False


_paused = _Paused()


@contextlib.contextmanager
def saved_as_they_are() -> Iterator[None]:
    """Code within `compress_saved` whose saved tensors are left alone."""
    before, _paused.value = _paused.value, True
    try:
        yield
    finally:
        _paused.value = before


def compress_saved(
    codec: Codec, rows: int, parameters: Iterable[Tensor]
) -> torch.autograd.graph.saved_tensors_hooks:
    """Store token rows that autograd saves within this context by `codec`.

    Args:
        codec: encodes tensors `[..., width]` with `rows` rows in all.
        rows: number of tokens (or pixels of a convolution's input).
        parameters: weights in use, which are never compressed, nor are casts of them.
    """
    weights = list(parameters)
    storages = {w.untyped_storage()._cdata for w in weights}
    # Under autocast a linear layer saves a cast copy of its weight, which only its shape tells from an input.
    shapes = {s for w in weights if w.dim() == 2 for s in (tuple(w.shape), tuple(w.shape[::-1]))}
    outer = _Outer.capture()

    def pack(tensor: Tensor) -> Any:
        cast = tuple(tensor.shape) in shapes and torch.is_autocast_enabled(tensor.device.type)
        if _paused.value or cast or not _is_rows(tensor, rows) or tensor.untyped_storage()._cdata in storages:
            return outer.pack(tensor)
        payload = encode_shared(tensor, codec)
        kept = [outer.pack(t) for t in payload.encoded.tensors]
        return _Packed(
            dataclasses.replace(payload, encoded=dataclasses.replace(payload.encoded, tensors=())), kept
        )

    def unpack(packed: Any) -> Tensor:
        if not isinstance(packed, _Packed):
            return outer.unpack(packed)
        tensors = tuple(outer.unpack(t) for t in packed.kept)
        encoded = dataclasses.replace(packed.payload.encoded, tensors=tensors)
        return dataclasses.replace(packed.payload, encoded=encoded).decode()

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


@dataclasses.dataclass(frozen=True)
class _Packed:
    """A payload without its tensors, and what the enclosing hooks made of them."""

    payload: Payload
    kept: list[Any]


@dataclasses.dataclass(frozen=True)
class _Outer:
    """The hooks around ours, which autograd would bypass: checkpoints drop, trackers count what passes there."""

    pack: Callable[[Tensor], Any]
    unpack: Callable[[Any], Tensor]

    @classmethod
    def capture(cls) -> _Outer:
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
        return cls(*hooks) if hooks is not None else cls(_same, _same)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _is_rows(tensor: Tensor, rows: int) -> bool:
    if not tensor.is_floating_point() or tensor.dim() < 2 or isinstance(tensor, torch.nn.Parameter):
        return False
    return tensor.shape[-1] >= _MIN_WIDTH and tensor.numel() == rows * tensor.shape[-1]


def call_compressed(
    function: Callable, codec: Codec, hidden: Tensor, parameters: Iterable[Tensor], *args: Any, **kwargs: Any
) -> Any:
    """Call `function` within `compress_saved` for the tokens of `hidden` [..., width]."""
    with compress_saved(codec, hidden.numel() // hidden.shape[-1], parameters):
        return function(*args, **kwargs)
