"""The formula of attention's gradient against autograd of PyTorch's attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from slimfit_ds.activations.codecs import get_codec
from slimfit_ds.activations.functions import plain_attention as module
from slimfit_ds.activations.functions.plain_attention import plain_attention

B, HEADS, S, D = 3, 4, 9, 8
EXACT = get_codec("exact")


def operands(groups: int, dtype=torch.float64, seen: int = S) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = (B, S, HEADS, D), (B, seen, groups, D), (B, seen, groups, D)
    return [torch.randn(shape, dtype=dtype).transpose(1, 2).requires_grad_() for shape in shapes]


def sdpa(query, key, value, mask=None, causal=False):
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, enable_gqa=True, scale=0.3
    )
    return out.transpose(1, 2)


def ours(query, key, value, mask=None, causal=False, codec=EXACT):
    def run():
        return sdpa(query, key, value, mask, causal)

    return plain_attention(run, query, key, value, mask, 0.3, causal, codec, codec)


def gradients(function, tensors, *extra):
    y = function(*tensors, *extra)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return y.detach(), torch.autograd.grad((y * weights).sum(), tensors)


def mask_of(kind: str | None, seen: int = S) -> torch.Tensor | None:
    if kind == "boolean":
        mask = torch.ones(B, 1, 1, seen, dtype=torch.bool)
        mask[0, ..., 5:] = False
        return mask
    return torch.randn(1, HEADS, S, seen, dtype=torch.float64) if kind == "additive" else None


@pytest.mark.parametrize("scores", [1, 2 * S * S, HEADS * S * S, 2 * HEADS * S * S, 1 << 18])
@pytest.mark.parametrize("mask", [None, "boolean", "additive"])
@pytest.mark.parametrize("groups", [1, 2, HEADS])
def test_gradients_are_those_of_autograd_in_pieces_of_any_size(monkeypatch, scores, mask, groups):
    monkeypatch.setattr(module, "_SCORES", scores)
    extra = mask_of(mask)
    expected = gradients(sdpa, operands(groups), extra)
    found = gradients(ours, operands(groups), extra)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])


@pytest.mark.parametrize("seen", [S, 4, 13])
def test_causal_and_other_lengths(seen):
    tensors = operands(2, seen=seen)
    expected = gradients(sdpa, tensors, None, True)
    found = gradients(ours, operands(2, seen=seen), None, True)
    torch.testing.assert_close(found[1], expected[1])


def test_bf16_is_no_further_from_the_truth_than_pytorch():
    truth = gradients(sdpa, operands(2))[1]
    low = [t.detach().bfloat16().requires_grad_() for t in operands(2)]
    found = gradients(ours, low)[1]
    pytorch = gradients(sdpa, low)[1]
    for mine, theirs, exact in zip(found, pytorch, truth, strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine.double() - exact).norm() <= 1.5 * (theirs.double() - exact).norm()


def test_int8_operands_cost_little():
    expected = gradients(sdpa, operands(HEADS))
    found = gradients(lambda q, k, v: ours(q, k, v, codec=get_codec("int8")), operands(HEADS))
    for gradient, exact in zip(found[1], expected[1], strict=True):
        assert (gradient - exact).norm() < 0.03 * exact.norm()
