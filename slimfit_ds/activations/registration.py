"""Make frameworks that call a checkpoint function of their own call ours."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from slimfit_ds.activations.checkpoint import make_checkpoint

__all__ = ["deepspeed_checkpointing", "enable_gradient_checkpointing"]


def enable_gradient_checkpointing(
    model: nn.Module, codec: Any = "int8", chunk_tokens: int | None = 8192, every_n_layers: int = 1
) -> None:
    """transformers' `gradient_checkpointing_enable` with compressed inputs; `gradient_checkpointing_disable` undoes it.

    It goes past the public method, which makes the embeddings' output require grad and so forces the backward pass
    through frozen layers down to the embeddings.

    Args:
        model: a `PreTrainedModel`.
        codec: how block inputs are stored, as in `checkpoint`.
        chunk_tokens: as in `checkpoint`.
        every_n_layers: checkpoint every n-th block only.

    Raises:
        TypeError: the model has no checkpoint seam.
    """
    if not hasattr(model, "_set_gradient_checkpointing"):
        raise TypeError(
            f"{type(model).__name__} is no transformers model; use compress() or checkpoint() instead"
        )
    function = make_checkpoint(codec, chunk_tokens)
    model._set_gradient_checkpointing(True, function, every_n_layers=every_n_layers)  # type: ignore[operator]


@contextmanager
def deepspeed_checkpointing(codec: Any = "int8", chunk_tokens: int | None = 8192) -> Iterator[Callable]:
    """Within this context `deepspeed.checkpointing.checkpoint` is ours, for models that call it.

    DeepSpeed's own is reentrant, and loses gradients without a word when no input requires grad (frozen
    embeddings). Partitioned and host-stored checkpoints of DeepSpeed do not apply.

    Args:
        codec: how the inputs are stored, as in `checkpoint`.
        chunk_tokens: as in `checkpoint`.

    Yields:
        The function that was put in place.
    """
    from deepspeed.runtime.activation_checkpointing import checkpointing as module

    names = ("checkpoint", "non_reentrant_checkpoint")
    found = {name: getattr(module, name) for name in names}
    function = functools.wraps(found["checkpoint"])(make_checkpoint(codec, chunk_tokens))
    for name in names:
        setattr(module, name, function)
    try:
        yield function
    finally:
        for name, original in found.items():
            setattr(module, name, original)
