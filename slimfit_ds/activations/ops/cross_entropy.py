"""Cross-entropy of a language-model head without the logits of all tokens at once.

The logits of a chunk of tokens are made, turned into their gradient, contracted with weight and input, and dropped:
peak memory is `chunk_tokens * vocabulary` instead of `tokens * vocabulary`. Gradients are those of the plain
computation; they are made in the forward pass (Wijmans et al. 2024, arXiv 2411.09009, and Liger-Kernel,
arXiv 2410.10989, describe the idea), so that no logits are computed twice.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["behind_head", "linear_cross_entropy"]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    chunk_tokens: int = 1024,
    divisor: Tensor | float | None = None,
    scale: float = 1.0,
    cap: float | None = None,
) -> Tensor:
    """The mean of `cross_entropy(logits, labels)` over the labels that count, with `logits = scale * (hidden @ weight.T + bias)`.

    Args:
        hidden: [..., hidden], rows already aligned with their labels.
        weight: [vocabulary, hidden].
        labels: [...], `ignore_index` where a token does not count.
        bias: [vocabulary] or `None`.
        ignore_index: label of tokens that do not count.
        chunk_tokens: tokens whose logits exist at a time.
        divisor: divide the sum by this instead of by the number of labels that count (gradient accumulation).
        scale: of the logits (Cohere, Granite).
        cap: soft cap of them, `cap * tanh(logits / cap)` (Gemma 2); `None`: none.

    Returns:
        The loss, a scalar in fp32.

    Raises:
        ValueError: the shapes do not fit, or `chunk_tokens` is not positive.
    """
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be positive, got {chunk_tokens}")
    if hidden.shape[:-1] != labels.shape or hidden.shape[-1] != weight.shape[-1]:
        shapes = f"hidden {tuple(hidden.shape)}, labels {tuple(labels.shape)}, weight {tuple(weight.shape)}"
        raise ValueError(f"hidden must be [..., h], labels [...] and weight [vocabulary, h], got {shapes}")
    rows, targets = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    if divisor is None:
        divisor = (targets != ignore_index).sum()
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        rows, weight, bias = rows.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    with torch.autocast(kind, enabled=False):
        return _LinearCrossEntropy.apply(
            rows, weight, bias, targets, ignore_index, chunk_tokens, divisor, scale, cap
        )


def behind_head(logits: Tensor, scale: float, cap: float | None) -> tuple[Tensor, Tensor | float | None]:
    """Return scaled and capped logits, and what their gradient is multiplied by; `None`: by nothing. Changes its argument."""
    if scale != 1.0:
        logits = logits.mul_(scale)
    if cap is None:
        return logits, None if scale == 1.0 else scale
    bent = logits.div_(cap).tanh_()
    return bent * cap, bent.square_().neg_().add_(1).mul_(scale)


def _starts(tokens: int, chunk_tokens: int) -> Iterable[int]:
    """Return the first token of each chunk."""
    return range(0, tokens, chunk_tokens)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, weight, bias, targets, ignore_index, chunk_tokens, divisor, scale, cap):
        total = rows.new_zeros((), dtype=torch.float32)
        want_rows, want_weight, want_bias = ctx.needs_input_grad[:3]
        drows = torch.empty_like(rows) if want_rows else None
        dweight = torch.zeros_like(weight, dtype=torch.float32) if want_weight else None
        dbias = torch.zeros_like(bias, dtype=torch.float32) if want_bias else None
        for start in _starts(rows.shape[0], chunk_tokens):
            x, target = rows[start : start + chunk_tokens], targets[start : start + chunk_tokens]
            logits, slope = behind_head(F.linear(x, weight, bias).float(), scale, cap)
            log_p = logits.log_softmax(-1)
            del logits
            total += F.nll_loss(log_p, target, ignore_index=ignore_index, reduction="sum")
            if not (want_rows or want_weight or want_bias):
                continue
            # d loss / d logits = (softmax - one-hot) / divisor, where the label counts
            counts = (target != ignore_index).unsqueeze(-1)
            gradient = log_p.exp_()
            gradient.scatter_add_(1, target.clamp_min(0).unsqueeze(-1), -counts.to(gradient.dtype))
            gradient.mul_(counts / divisor)
            if slope is not None:
                gradient.mul_(slope)
            if dbias is not None:
                dbias += gradient.sum(0)
            gradient = gradient.to(weight.dtype)
            if drows is not None:
                torch.mm(gradient, weight, out=drows[start : start + chunk_tokens])
            if dweight is not None:
                dweight += gradient.t() @ x
        ctx.save_for_backward(*(g for g in (drows, dweight, dbias) if g is not None))
        ctx.wanted = want_rows, want_weight, want_bias
        ctx.dtypes = rows.dtype, weight.dtype, None if bias is None else bias.dtype
        return total / divisor

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        kept = iter(ctx.saved_tensors)
        gradients = [
            (next(kept) * upstream).to(dtype) if wanted else None
            for wanted, dtype in zip(ctx.wanted, ctx.dtypes, strict=True)
        ]
        return (*gradients, None, None, None, None, None, None)
