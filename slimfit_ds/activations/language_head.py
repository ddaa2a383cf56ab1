"""Opt-in: the loss of a transformers language model in chunks, so that its logits never exist as a whole.

The head computes the loss itself while the model trains with labels, and hands on empty logits `[batch, tokens, 0]`:
whoever needs them finds out at once. Parameters that DeepSpeed has partitioned are whole there, because it is the
head's own forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimfit_ds.activations.ops.cross_entropy import linear_cross_entropy
from slimfit_ds.activations.patch import Patches, original_forward

__all__ = ["ChunkedLoss", "chunk_language_model_loss"]

_STATE = "_slimfit_chunked_loss"


class ChunkedLoss:
    """Labels on their way into the head, and the loss on its way out; `remove()` restores the model."""

    def __init__(self, model: nn.Module, head: nn.Linear, chunk_tokens: int):
        self._patches, self._chunk_tokens = Patches(), chunk_tokens
        self._labels: Tensor | None = None
        self._divisor: Tensor | float | None = None
        self._loss: Tensor | None = None
        self._default: Callable[..., Tensor] = model.loss_function  # type: ignore[assignment]
        self._hook = model.register_forward_pre_hook(self._enter, with_kwargs=True)
        self._patches.set(head, _STATE, self)
        self._patches.replace_forward(head, _head_forward)
        self._patches.set(model, "_loss_function", self._take_loss)

    def remove(self) -> None:
        """Give the model its own head and loss back."""
        self._hook.remove()
        self._patches.undo()

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        plain = "shift_labels" not in kwargs and isinstance(kwargs.get("logits_to_keep", 0), int)
        active = module.training and torch.is_grad_enabled() and plain and not kwargs.get("logits_to_keep")
        self._labels = kwargs.get("labels") if active else None
        self._divisor = kwargs.get("num_items_in_batch")
        self._loss = None

    def compute(self, head: nn.Linear, hidden: Tensor) -> Tensor | None:
        """Keep the loss of these hidden states [batch, tokens, hidden] and return empty logits, if there are labels."""
        if self._labels is None:
            return None
        shifted = F.pad(self._labels, (0, 1), value=-100)[..., 1:]
        self._loss = linear_cross_entropy(
            hidden, head.weight, shifted, head.bias, chunk_tokens=self._chunk_tokens, divisor=self._divisor
        )
        self._labels = None
        return hidden[..., :0]

    def _take_loss(self, *args: Any, **kwargs: Any) -> Tensor:
        """Take the place of `loss_function(logits, labels, vocab_size, ...)`, called by position or by keyword."""
        if self._loss is None:
            return self._default(*args, **kwargs)
        loss, self._loss = self._loss, None
        return loss


def _head_forward(self: nn.Linear, hidden: Tensor) -> Tensor:
    empty = self.__dict__[_STATE].compute(self, hidden)
    return original_forward(self)(hidden) if empty is None else empty


def chunk_language_model_loss(model: nn.Module, chunk_tokens: int = 1024) -> ChunkedLoss:
    """Compute the training loss of a causal language model in chunks of tokens.

    The model is tried on random tokens first: one whose head does more than a product (soft caps, scales after it)
    is refused. What else a model adds to its loss (the load balance of experts) stays.

    Args:
        model: a transformers causal language model.
        chunk_tokens: tokens whose logits exist at a time.

    Raises:
        ValueError: the model has no linear head, or its loss is not the shifted cross-entropy of it.
    """
    find_head = getattr(model, "get_output_embeddings", None)
    head = find_head() if find_head is not None else None
    if not isinstance(head, nn.Linear) or not hasattr(type(model), "loss_function"):
        raise ValueError(f"{type(model).__name__} has no linear language-model head with a replaceable loss")
    state = ChunkedLoss(model, head, chunk_tokens)
    try:
        _verify(model, head)
    except BaseException:
        state.remove()
        raise
    return state


def _verify(model: nn.Module, head: nn.Linear) -> None:
    """Compare the loss with and without chunks on random tokens, unless the weights are not there to try it."""
    parameters = list(model.parameters())
    if any(
        p.is_meta or hasattr(p, "ds_id") or isinstance(p, torch._subclasses.FakeTensor) for p in parameters
    ):
        return
    random = torch.Generator().manual_seed(0)
    # The first parameter may be one whose data lives on the host; a model that streams says where it computes.
    device = getattr(model, "device", parameters[0].device)
    ids = torch.randint(head.out_features, (1, 8), generator=random).to(device)
    training = {m: m.training for m in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            expected = model(input_ids=ids, labels=ids).loss
            # Logits of a trained model are large, those of a new one are not: soft caps show at large ones only.
            loud = [_loss_of_logits(model, head, ids, size, random) for size in (0.0, 20.0)]
        model.__dict__["training"] = True  # the flag of the outermost module only: no dropout
        with torch.enable_grad():
            found = model(input_ids=ids, labels=ids).loss.detach()
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{type(model).__name__} does not compute its loss through `loss_function`: {error}"
        ) from error
    finally:
        for module, flag in training.items():
            module.training = flag
    rtol = 1e-5 if expected.dtype == torch.float32 == parameters[0].dtype else 1e-2
    # Differences: what is added to the loss, and does not come from the head, is in both.
    (quiet, quiet_own), (large, large_own) = loud
    pairs = [(found, expected), (large_own - quiet_own, large - quiet)]
    for mine, theirs in pairs:
        if not torch.allclose(mine.float(), theirs.float(), rtol=rtol):
            raise ValueError(
                f"the loss of {type(model).__name__} is not the shifted cross-entropy of its head: "
                f"{float(theirs):.6f} expected, {float(mine):.6f} in chunks"
            )


def _loss_of_logits(
    model: nn.Module, head: nn.Linear, ids: Tensor, size: float, random: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return the model's loss if its head gave random logits of this size, and their shifted cross-entropy."""
    drawn = size * torch.randn(*ids.shape, head.out_features, generator=random).to(ids.device)
    hook = head.register_forward_hook(lambda module, args, output: drawn.to(output.dtype))
    try:
        loss = model(input_ids=ids, labels=ids).loss
    finally:
        hook.remove()
    return loss, F.cross_entropy(drawn[0, :-1].to(head.weight.dtype).float(), ids[0, 1:])
