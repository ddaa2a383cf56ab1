"""Attention from stored queries, keys and values against autograd of the formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from slimfit_ds.activations.codecs import get_codec
from slimfit_ds.activations.ops.attention import recomputed_attention, stored_probabilities

B, HEADS, GROUPS, S, D = 2, 4, 2, 7, 8


def operands(groups=GROUPS):
    torch.manual_seed(0)
    make = [torch.randn(B, heads, S, D, dtype=torch.float64) for heads in (HEADS, groups, groups)]
    return [t.requires_grad_() for t in make]


def mask_of(kind):
    if kind == "boolean":
        mask = torch.ones(B, 1, S, S, dtype=torch.bool)
        mask[0, :, :, 5:] = False
        return mask
    return torch.randn(1, 1, S, S, dtype=torch.float64) if kind == "additive" else None


def sdpa(query, key, value, mask=None, *, causal=False, dropout=0.0):
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, dropout_p=dropout, enable_gqa=True
    )
    return out.transpose(1, 2)


def gradients(function, tensors):
    torch.manual_seed(1)
    y = function(*tensors)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return y.detach(), torch.autograd.grad((y * weights).sum(), tensors)


@pytest.mark.parametrize("mask", [None, "boolean", "additive"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_recomputed_attention_is_exact_with_an_exact_codec(mask, causal, dropout):
    if mask and causal:
        pytest.skip("PyTorch takes one or the other")
    options = {"causal": causal, "dropout": dropout}
    extra = mask_of(mask)
    expected = gradients(lambda q, k, v: sdpa(q, k, v, extra, **options), operands())
    found = gradients(
        lambda q, k, v: recomputed_attention(
            sdpa, q, k, v, extra, codec="exact", chunk_tokens=None, **options
        ),
        operands(),
    )
    torch.testing.assert_close(found, expected)


def test_chunks_count_tokens_not_heads():
    calls = []

    def spy(query, key, value):
        calls.append(query.shape[0])
        return sdpa(query, key, value)

    q, k, v = operands()
    recomputed_attention(spy, q, k, v, codec="exact", chunk_tokens=B * S).sum().backward()
    assert calls == [B, B]
    calls.clear()
    recomputed_attention(spy, q, k, v, codec="exact", chunk_tokens=S).sum().backward()
    assert calls == [B, 1, 1]


def test_int8_operands_are_renormalised():
    expected = gradients(sdpa, operands())
    found = gradients(lambda q, k, v: recomputed_attention(sdpa, q, k, v, codec="int8"), operands())
    assert torch.equal(found[0], expected[0])
    for gradient, exact in zip(found[1], expected[1], strict=True):
        assert (gradient - exact).norm() < 0.03 * exact.norm()


def test_values_may_have_a_codec_of_their_own():
    """The gradient of the values does not depend on the values; the others do, by dO V^T."""
    expected = gradients(sdpa, operands())
    for codec, values, wrong in (("exact", get_codec("fixed4"), {0, 1}), ("fixed4", False, {0, 1, 2})):
        found = gradients(
            lambda q, k, v, c=codec, w=values: recomputed_attention(sdpa, q, k, v, codec=c, value_codec=w),
            operands(),
        )
        different = {
            i for i, (a, b) in enumerate(zip(found[1], expected[1], strict=True)) if not torch.allclose(a, b)
        }
        assert different == wrong
    saved: list[tuple[torch.dtype, int]] = []
    q, k, v = operands()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append((t.dtype, t.numel())) or t, lambda t: t
    ):
        recomputed_attention(sdpa, q, k, v, codec="int8", value_codec=get_codec("int4"))
    codes = [n for dtype, n in saved if dtype in (torch.int8, torch.uint8)]
    assert codes == [q.numel(), k.numel(), v.numel() // 2]


@pytest.mark.parametrize("mask", [None, "boolean", "additive"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("groups", [HEADS, GROUPS])
def test_stored_probabilities_are_exact_with_an_exact_codec(mask, causal, groups):
    if mask and causal:
        pytest.skip("PyTorch takes one or the other")
    extra, exact = mask_of(mask), get_codec("exact")

    def stored(q, k, v):
        return stored_probabilities(
            lambda: sdpa(q, k, v, extra, causal=causal), q, k, v, extra, D**-0.5, causal, exact, exact, exact
        )

    expected = gradients(lambda q, k, v: sdpa(q, k, v, extra, causal=causal), operands(groups))
    found = gradients(stored, operands(groups))
    assert torch.equal(found[0], expected[0])
    # the softmax is stored in fp32
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-5)
