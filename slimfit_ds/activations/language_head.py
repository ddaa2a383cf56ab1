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

from slimfit_ds.activations.ops.cross_entropy import behind_head, linear_cross_entropy
from slimfit_ds.activations.patch import Patches, original_forward

__all__ = ["ChunkedLoss", "chunk_language_model_loss", "named_changes"]

_STATE = "_slimfit_chunked_loss"


class ChunkedLoss:
    """Labels on their way into the head, and the loss on its way out; `remove()` restores the model."""

    def __init__(self, model: nn.Module, head: nn.Linear, chunk_tokens: int):
        self._patches, self._chunk_tokens = Patches(), chunk_tokens
        self._labels: Tensor | None = None
        self._divisor: Tensor | float | None = None
        self._loss: Tensor | None = None
        self.scale, self.cap = named_changes(model)[0]
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
            hidden,
            head.weight,
            shifted,
            head.bias,
            chunk_tokens=self._chunk_tokens,
            divisor=self._divisor,
            scale=self.scale,
            cap=self.cap,
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

    The model is tried on random tokens first: one that does more with its logits than to scale and to cap them by numbers of its
    configuration is refused. What else a model adds to its loss (the load balance of experts) stays.

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
        _verify(model, head, state)
    except BaseException:
        state.remove()
        raise
    return state


def named_changes(model: nn.Module) -> list[tuple[float, float | None]]:
    """Return scales and soft caps of logits that a configuration has names for: all that it names together, then fewer."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config

    def number(name: str) -> float | None:
        value = getattr(config, name, None)
        return (
            float(value) if isinstance(value, int | float) and not isinstance(value, bool) and value else None
        )

    scales = [number(name) for name in ("logit_scale", "output_multiplier", "lm_head_multiplier")]
    if (divided := number("logits_scaling")) is not None:
        scales += [1 / divided, divided]
    caps = [cap for cap in (number("final_logit_softcapping"), None) if cap is not None]
    found = [(scale, cap) for cap in (*caps, None) for scale in (*(s for s in scales if s is not None), 1.0)]
    return list(dict.fromkeys(found))


def _verify(model: nn.Module, head: nn.Linear, state: ChunkedLoss) -> None:
    """Find out what happens to the logits, and compare the loss with and without chunks on random tokens, unless the weights are not
    there to try it."""
    parameters = list(model.parameters())
    if any(
        p.is_meta or hasattr(p, "ds_id") or isinstance(p, torch._subclasses.FakeTensor) for p in parameters
    ):
        if any(hasattr(p, "ds_id") for p in parameters) and len(named_changes(model)) > 1:
            raise ValueError(
                f"what {type(model).__name__} does with its logits (scales, soft caps) cannot be tried on weights that ZeRO 3 has "
                "partitioned: use stage 2"
            )
        return
    # The first parameter may be one whose data lives on the host; a model that streams says where it computes.
    device = getattr(model, "device", parameters[0].device)
    ids = torch.randint(head.out_features, (1, 8), generator=torch.Generator().manual_seed(0)).to(device)
    training = {m: m.training for m in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            expected = model(input_ids=ids, labels=ids).loss
            # Logits of a trained model are large, those of a new one are not: soft caps show at large ones only.
            sizes = (0.0, 20.0)
            loud = [_loss_of_logits(model, head, ids, size) for size in sizes]
        for state.scale, state.cap in named_changes(model):
            own = [_own_loss(head, ids, size, state) for size in sizes]
            # Differences: what is added to the loss, and does not come from the head, is in both.
            if _same(own[1] - own[0], loud[1] - loud[0], model):
                break
        else:
            raise _Refused(model, own[1] - own[0], loud[1] - loud[0])
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
    if not _same(found, expected, model):
        raise _Refused(model, found, expected)


class _Refused(ValueError):
    def __init__(self, model: nn.Module, found: Tensor, expected: Tensor):
        super().__init__(
            f"the loss of {type(model).__name__} is not the shifted cross-entropy of its head: "
            f"{float(expected):.6f} expected, {float(found):.6f} in chunks"
        )


def _same(found: Tensor, expected: Tensor, model: nn.Module) -> bool:
    exact = expected.dtype == torch.float32 == next(model.parameters()).dtype
    return torch.allclose(found.float(), expected.float(), rtol=1e-5 if exact else 1e-2)


def _drawn(head: nn.Linear, ids: Tensor, size: float) -> Tensor:
    random = torch.Generator().manual_seed(1)
    drawn = size * torch.randn(*ids.shape, head.out_features, generator=random)
    return drawn.to(ids.device, head.weight.dtype)


def _loss_of_logits(model: nn.Module, head: nn.Linear, ids: Tensor, size: float) -> Tensor:
    """Return the model's loss if its head gave random logits of this size."""
    drawn = _drawn(head, ids, size)
    hook = head.register_forward_hook(lambda module, args, output: drawn.to(output.dtype))
    try:
        return model(input_ids=ids, labels=ids).loss
    finally:
        hook.remove()


def _own_loss(head: nn.Linear, ids: Tensor, size: float, state: ChunkedLoss) -> Tensor:
    """Return their shifted cross-entropy."""
    logits, _ = behind_head(_drawn(head, ids, size)[0, :-1].float(), state.scale, state.cap)
    return F.cross_entropy(logits, ids[0, 1:])
