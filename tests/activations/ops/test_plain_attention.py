"""The formula of attention's gradient against autograd of PyTorch's attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from slimfit_ds.activations.codecs import get_codec
from slimfit_ds.activations.ops import attention_heads as module
from slimfit_ds.activations.ops.attention_dropout import mask_drawing
from slimfit_ds.activations.ops.plain_attention import plain_attention

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


def test_a_token_that_sees_nothing_has_no_gradient():
    """As in PyTorch, whose result for it is zero."""
    for mask in (torch.ones(B, 1, S, S, dtype=torch.bool), torch.randn(B, 1, S, S, dtype=torch.float64)):
        mask[1, :, 4] = False if mask.dtype == torch.bool else float("-inf")
        for dropout in (0.0, 0.3):
            y, found = gradients(lambda *t, d=dropout: with_dropout(*t, p=d), operands(2), mask)
            assert (y[1, 4] == 0).all()
            assert (found[0][1, :, 4] == 0).all()
        expected = gradients(sdpa, operands(2), mask)[1]
        torch.testing.assert_close(gradients(ours, operands(2), mask)[1], expected)


DRAWS = ["replay", "philox"]


def with_dropout(query, key, value, mask=None, causal=False, p=0.3, draw="philox", codec=EXACT):
    def never():
        raise AssertionError("the mask of PyTorch's attention is not known")

    run = never if p else lambda: sdpa(query, key, value, mask, causal)
    return plain_attention(run, query, key, value, mask, 0.3, causal, codec, codec, p, mask_drawing(draw))


def next_mask(shape, p, draw):
    """The factors that attention drops with: its result for equal scores and the identity as values."""
    batch, heads, tokens, seen = shape
    none = torch.zeros(batch, heads, tokens, 1, dtype=torch.float64)
    identity = torch.eye(seen, dtype=torch.float64).expand(batch, heads, seen, seen)
    dropped = with_dropout(none, none.new_zeros(batch, heads, seen, 1), identity, p=p, draw=draw)
    return dropped.transpose(1, 2) * seen


def drawn_mask(shape, p, draw):
    """The same, for the next attention to drop with too."""
    state = torch.get_rng_state()
    factors = next_mask(shape, p, draw)
    torch.set_rng_state(state)
    return factors


def formula(query, key, value, mask, causal, factors):
    """Attention in single operations of PyTorch, with a given dropout mask."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(repeats, 1) for t in (key, value))
    scores = 0.3 * query @ key.transpose(-1, -2)
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), float("-inf"))
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, float("-inf"))
    elif mask is not None:
        scores = scores + mask
    return ((scores.softmax(-1) * factors) @ value).transpose(1, 2)


@pytest.mark.parametrize("scores", [1, 2 * S * S, HEADS * S * S, 2 * HEADS * S * S, 1 << 18])
@pytest.mark.parametrize(
    ("kind", "causal"), [(None, False), ("boolean", False), ("additive", False), (None, True)]
)
@pytest.mark.parametrize("groups", [1, 2, HEADS])
@pytest.mark.parametrize("draw", DRAWS)
def test_dropout_is_differentiated_with_the_mask_of_the_forward_pass(
    monkeypatch, scores, kind, causal, groups, draw
):
    monkeypatch.setattr(module, "_SCORES", scores)
    torch.manual_seed(7)
    factors = drawn_mask((B, HEADS, S, S), 0.3, draw)
    state, mask = torch.get_rng_state(), mask_of(kind)
    assert 0.5 < float((factors != 0).double().mean()) < 0.9
    expected = gradients(lambda *t: formula(*t, mask, causal, factors), operands(groups))
    tensors = operands(groups)
    torch.set_rng_state(state)
    y = with_dropout(*tensors, mask, causal, draw=draw)
    torch.rand(11)  # the generator moves on before the backward pass
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    torch.testing.assert_close((y.detach(), torch.autograd.grad((y * weights).sum(), tensors)), expected)


@pytest.mark.parametrize("kind", [None, "boolean", "additive"])
def test_a_replayed_mask_is_that_of_pytorchs_attention(kind):
    mask, results = mask_of(kind), []
    for function in (
        lambda *t: F.scaled_dot_product_attention(
            *t, attn_mask=mask, dropout_p=0.3, enable_gqa=True, scale=0.3
        ).transpose(1, 2),
        lambda *t: with_dropout(*t, mask, draw="replay"),
    ):
        torch.manual_seed(7)
        results.append((gradients(function, operands(2)), torch.get_rng_state()))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("draw", DRAWS)
def test_steps_and_layers_have_masks_of_their_own(draw):
    torch.manual_seed(0)
    masks = [(next_mask((4, 4, 32, 32), 0.5, draw) != 0).double() * 2 - 1 for _ in range(4)]
    for i, one in enumerate(masks):
        assert all(abs(float((one * other).mean())) < 5 / one.numel() ** 0.5 for other in masks[:i])
        # Heads and rows of the batch too.
        flat = one.flatten(0, 1).flatten(1)
        product = flat @ flat.T / flat.shape[1] - torch.eye(len(flat))
        assert product.abs().max() < 5.5 / flat.shape[1] ** 0.5


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_repeats_the_mask(draw, reentrant):
    results = []
    for part in (
        lambda *t: with_dropout(*t, draw=draw),
        lambda *t: checkpoint(with_dropout, *t, None, False, 0.3, draw, use_reentrant=reentrant),
    ):
        torch.manual_seed(3)
        tensors = operands(2)
        y = part(*tensors)
        torch.rand(11)
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
        results.append((y.detach(), [t.grad for t in tensors]))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("draw", DRAWS)
def test_dropout_under_autocast(draw, dtype):
    """Rotary embeddings leave queries and keys in fp32 there; the result has autocast's dtype."""
    wide = [t.detach().float() for t in operands(2)]
    wide[2] = wide[2].to(dtype)
    for t in wide:
        t.requires_grad_()
    torch.manual_seed(7)
    factors = drawn_mask((B, HEADS, S, S), 0.3, draw)
    exact = [t.detach().double().requires_grad_() for t in wide]
    expected = gradients(lambda *t: formula(*t, None, False, factors), exact)
    with torch.autocast("cpu", dtype=dtype):
        y = with_dropout(*wide, draw=draw)
    assert y.dtype == dtype
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)
    found = torch.autograd.grad((y * weights).sum(), wide)
    assert (y.double() - expected[0]).norm() < 0.01 * expected[0].norm()
    for mine, t, exact_gradient in zip(found, wide, expected[1], strict=True):
        assert mine.dtype == t.dtype
        assert (mine.double() - exact_gradient).norm() < 0.01 * exact_gradient.norm()


@pytest.mark.parametrize("draw", DRAWS)
def test_no_mask_is_kept(draw):
    tensors, kept = operands(2), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        with_dropout(*tensors, draw=draw)
    assert sum(t.numel() for t in kept) == sum(t.numel() for t in tensors)
