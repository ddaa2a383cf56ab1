"""Whether the loss of a language model may be computed in chunks, found out without values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["takes_loss_in_chunks"]

_VIEWS = {"alias", "detach", "slice", "view", "_unsafe_view"}


class _Between(TorchDispatchMode):
    """Names of the operations between the end of the head and the start of the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = False
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.inside:
            self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def takes_loss_in_chunks(model: nn.Module, inputs: Mapping[str, Tensor]) -> bool:
    """True if the logits are the product of the head alone, and the loss is taken of them.

    `chunk_language_model_loss` compares real values; a plan has none, and sees instead that nothing is done to the
    logits on their way (soft caps, scales).

    Args:
        model: may be fake or on `meta`.
        inputs: a small batch with labels.
    """
    find_head = getattr(model, "get_output_embeddings", None)
    head = find_head() if find_head is not None else None
    if not isinstance(head, nn.Linear) or not hasattr(type(model), "loss_function"):
        return False
    between, reached = _Between(), []
    plain: Any = model.loss_function

    def loss(*args: Any, **kwargs: Any) -> Any:
        reached.append(between.inside)
        between.inside = False
        return plain(*args, **kwargs)

    def leave(*_: Any) -> None:
        between.inside = True

    handle = head.register_forward_hook(leave)
    model.__dict__["_loss_function"], before = loss, model.__dict__.get("_loss_function")
    try:
        with torch.no_grad(), between:
            model(**inputs)
    finally:
        handle.remove()
        if before is None:
            del model.__dict__["_loss_function"]
        else:
            model.__dict__["_loss_function"] = before
    return reached == [True] and between.names <= _VIEWS
