"""Codecs for whatever autograd itself saves, through `saved_tensors_hooks`.

The hooks see a tensor only, not what it is for, so they touch only what is safe by its shape: floating-point rows
of tokens that belong to no parameter. Masks, statistics of softmax or norms and cast weights are left as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from slimfit_ds.activations.codecs import Codec
from slimfit_ds.activations.storing import encode_shared

__all__ = ["call_compressed", "compress_saved"]

# Below it scales and bookkeeping outweigh the gain.
_MIN_WIDTH = 8


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

    def pack(tensor: Tensor) -> Any:
        if not _is_rows(tensor, rows) or tensor.untyped_storage()._cdata in storages:
            return tensor
        if tuple(tensor.shape) in shapes and torch.is_autocast_enabled(tensor.device.type):
            return tensor
        return encode_shared(tensor, codec)

    return torch.autograd.graph.saved_tensors_hooks(pack, _unpack)


def _is_rows(tensor: Tensor, rows: int) -> bool:
    if not tensor.is_floating_point() or tensor.dim() < 2 or isinstance(tensor, torch.nn.Parameter):
        return False
    return tensor.shape[-1] >= _MIN_WIDTH and tensor.numel() == rows * tensor.shape[-1]


def _unpack(packed: Any) -> Tensor:
    return packed if isinstance(packed, Tensor) else packed.decode()


def call_compressed(
    function: Callable, codec: Codec, hidden: Tensor, parameters: Iterable[Tensor], *args: Any, **kwargs: Any
) -> Any:
    """Call `function` within `compress_saved` for the tokens of `hidden` [..., width]."""
    with compress_saved(codec, hidden.numel() // hidden.shape[-1], parameters):
        return function(*args, **kwargs)
