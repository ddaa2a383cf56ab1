"""The checkpoint function against plain autograd."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from slimfit_ds.activations.checkpoint import checkpoint

B, S, H = 6, 5, 16


class Block(nn.Module):
    """A residual feed-forward block with a mask, and dropout."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.norm = nn.LayerNorm(H)
        self.inner = nn.Linear(H, 4 * H)
        self.outer = nn.Linear(4 * H, H)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, mask=None, scale=None):
        y = self.dropout(self.outer(torch.tanh(self.inner(self.norm(x)))))
        if mask is not None:
            y = y * mask
        return x + y * (1.0 if scale is None else scale)


def model_and_input(dropout: float = 0.0, seed: int = 0):
    torch.manual_seed(seed)
    return Block(dropout).double(), torch.randn(B, S, H, dtype=torch.float64)


def run(function, module, x, *args, seed=1):
    module.zero_grad()
    torch.manual_seed(seed)
    y = function(x, *args)
    (y**2).sum().backward()
    return y.detach(), x.grad, {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


def assert_same(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0)
    torch.testing.assert_close(found[1], expected[1])
    assert found[2].keys() == expected[2].keys()
    for name, gradient in expected[2].items():
        torch.testing.assert_close(found[2][name], gradient)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("chunk_tokens", [None, 10, 1])
@pytest.mark.parametrize("input_requires_grad", [True, False])
def test_exact_codec_gives_the_gradients_of_plain_autograd(dropout, chunk_tokens, input_requires_grad):
    if dropout and chunk_tokens:
        pytest.skip("other random numbers: see test_chunked_dropout_is_differentiated_as_drawn")
    module, x = model_and_input(dropout)
    module.inner.weight.requires_grad_(False)
    expected = run(module, module, x.clone().requires_grad_(input_requires_grad))
    wrapped = functools.partial(checkpoint, module, codec="exact", chunk_tokens=chunk_tokens)
    assert_same(run(wrapped, module, x.clone().requires_grad_(input_requires_grad)), expected)


def test_chunked_dropout_is_differentiated_as_drawn():
    """With dropout and chunks the output is one fixed function of the input: compare with finite differences."""
    module, x = model_and_input(dropout=0.4)
    direction = torch.randn_like(x)

    def loss(at):
        torch.manual_seed(5)
        return (checkpoint(module, at, codec="exact", chunk_tokens=10) ** 2).sum()

    x.requires_grad_()
    loss(x).backward()
    with torch.no_grad():
        x0 = x.detach()
    step = 1e-6
    difference = (loss(x0 + step * direction) - loss(x0 - step * direction)) / (2 * step)
    torch.testing.assert_close((x.grad * direction).sum(), difference.detach(), rtol=1e-6, atol=1e-6)


def test_only_the_backward_pass_sees_the_codec():
    module, x = model_and_input(dropout=0.3)
    exact = run(module, module, x.clone().requires_grad_())
    found = run(functools.partial(checkpoint, module, codec="int8"), module, x.clone().requires_grad_())
    torch.testing.assert_close(found[0], exact[0], rtol=0, atol=0)
    error = (found[2]["inner.weight"] - exact[2]["inner.weight"]).norm() / exact[2]["inner.weight"].norm()
    assert 1e-5 < error < 2e-2


def test_chunks_do_not_change_the_gradients_of_a_codec():
    module, x = model_and_input()
    whole = run(functools.partial(checkpoint, module, codec="int4"), module, x.clone().requires_grad_())
    chunked = run(
        functools.partial(checkpoint, module, codec="int4", chunk_tokens=7),
        module,
        x.clone().requires_grad_(),
    )
    assert_same(chunked, whole)


def test_agrees_with_torch_checkpoint_on_masks_keywords_and_several_outputs():
    module, x = model_and_input(dropout=0.2)
    mask = (torch.rand(B, S, 1) > 0.3).double()
    scale = torch.rand(1, S, H, dtype=torch.float64, requires_grad=True)

    def function(x, *, mask, scale):
        return module(x, mask, scale=scale), {"sum": x.sum(), "scale": scale, "name": "n"}

    results = []
    for method in (functools.partial(torch_checkpoint, use_reentrant=False), checkpoint):
        module.zero_grad()
        scale.grad = None
        torch.manual_seed(4)
        leaf = x.clone().requires_grad_()
        options = {"codec": "exact"} if method is checkpoint else {}
        y, others = method(functools.partial(function, mask=mask, scale=scale), leaf, **options)
        assert others["name"] == "n"
        ((y**2).sum() + 2 * others["sum"] + (others["scale"] ** 3).sum()).backward()
        results.append([leaf.grad, scale.grad, *(p.grad for p in module.parameters())])
    torch.testing.assert_close(results[1], results[0])


def test_a_closure_finds_its_parameters():
    module, x = model_and_input()
    weight = nn.Parameter(torch.ones(H, dtype=torch.float64))
    checkpoint(lambda t: module(t) * weight, x, codec="exact").sum().backward()
    expected = module(x).sum((0, 1))
    torch.testing.assert_close(weight.grad, expected.detach())


def test_a_captured_tensor_with_a_graph_is_an_error():
    module, x = model_and_input()
    other = module.inner.bias * 2
    with pytest.raises(ValueError, match="pass it as an argument"):
        checkpoint(lambda t: module(t) + other.sum(), x)


def test_each_parameter_receives_one_gradient_however_many_chunks_and_uses():
    module, x = model_and_input()
    calls = []
    module.inner.weight.register_hook(lambda g: calls.append(g.clone()))
    module.inner.weight.register_post_accumulate_grad_hook(lambda p: calls.append("accumulated"))
    y = checkpoint(
        module, checkpoint(module, x, codec="exact", chunk_tokens=5), codec="exact", chunk_tokens=5
    )
    (y**2).sum().backward()
    assert len(calls) == 2
    expected = run(lambda t: module(module(t)), module, x.clone().requires_grad_())
    torch.testing.assert_close(calls[0], expected[2]["inner.weight"])


def test_nested_checkpoints():
    module, x = model_and_input(dropout=0.3)

    def two(t):
        return module(module(t))

    def nested(t):
        return checkpoint(module, checkpoint(module, t, codec="exact"), codec="exact")

    expected = run(two, module, x.clone().requires_grad_())
    assert_same(
        run(functools.partial(checkpoint, nested, codec="exact"), module, x.clone().requires_grad_()),
        expected,
    )
    outer = functools.partial(torch_checkpoint, nested, use_reentrant=False)
    assert_same(run(outer, module, x.clone().requires_grad_()), expected)


def test_nothing_is_saved_when_nothing_needs_a_gradient():
    module, x = model_and_input()
    module.requires_grad_(False)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t), lambda t: t):
        y = checkpoint(module, x)
    assert not packed
    assert not y.requires_grad


def test_no_grad_is_a_plain_call():
    module, x = model_and_input()
    calls = []
    with torch.no_grad():
        checkpoint(lambda t: calls.append(torch.is_grad_enabled()) or module(t), x)
    assert calls == [False]


def test_bytes_saved_are_those_of_the_codec():
    module, _ = model_and_input()
    x = torch.randn(4, 64, H, dtype=torch.bfloat16)
    module = module.to(torch.bfloat16)
    packed = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: packed.setdefault(t.untyped_storage()._cdata, t) if t.numel() else t, lambda t: t
    ):
        y = checkpoint(module, x, codec="int8")
    assert y.requires_grad
    # int8, and a bf16 scale for every 64 elements
    assert sum(t.untyped_storage().nbytes() for t in packed.values()) == x.numel() + 2 * x.numel() // 64


@pytest.mark.parametrize("backward_inside", [False, True])
def test_autocast(backward_inside):
    module, x = model_and_input()
    module, x = module.float(), x.float()

    def step(function):
        module.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=function is not module):
            # a second, plain use of the weights: autocast's cache must not hand it a lost graph
            y = function(x)
            loss = (y.float() ** 2).sum() + module(x).float().sum()
            if backward_inside:
                loss.backward()
        if not backward_inside:
            loss.backward()
        return [p.grad for p in module.parameters()]

    expected = step(module)
    torch.testing.assert_close(step(functools.partial(checkpoint, module, codec="exact")), expected)


def test_backward_twice_and_autograd_grad():
    module, x = model_and_input()
    x.requires_grad_()
    y = (checkpoint(module, x, codec="exact") ** 2).sum()
    first = torch.autograd.grad(y, [x, module.outer.weight], retain_graph=True)
    second = torch.autograd.grad(y, [x, module.outer.weight])
    torch.testing.assert_close(first, second)
    assert module.outer.weight.grad is None


def test_a_result_without_batch_dimension_is_not_split():
    """The mean over the batch depends on all rows: its gradient needs the whole batch."""
    module, x = model_and_input()

    def function(t):
        y = module(t)
        return y, (y**2).mean()

    leaf = x.clone().requires_grad_()
    _, mean = checkpoint(function, leaf, codec="exact", chunk_tokens=5)
    mean.backward()
    expected = x.clone().requires_grad_()
    (module(expected) ** 2).mean().backward()
    torch.testing.assert_close(leaf.grad, expected.grad)


def test_encodings_are_shared_between_functions_with_one_input():
    module, x = model_and_input()
    packed = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: packed.setdefault(t.untyped_storage()._cdata, t) if t.numel() else t, lambda t: t
    ):
        outputs = [checkpoint(module, x.float().double() if i < 0 else x, codec="int8") for i in range(3)]
    assert len(outputs) == 3
    assert len(packed) == 2  # codes and scales, once


def test_changed_values_are_encoded_again():
    module, x = model_and_input()
    first = checkpoint(module, x, codec="int8").sum()
    with torch.no_grad():
        x.mul_(3)
    second = checkpoint(module, x, codec="int8").sum()
    first.backward()
    gradient = module.inner.weight.grad.clone()
    module.zero_grad()
    second.backward()
    assert not torch.allclose(gradient, module.inner.weight.grad)


def test_chunk_tokens_must_be_positive():
    module, x = model_and_input()
    with pytest.raises(ValueError, match="chunk_tokens must be a positive"):
        checkpoint(module, x, chunk_tokens=0)


def test_a_function_known_to_draw_runs_once_in_the_forward_pass():
    module, x = model_and_input(dropout=0.2)
    rows = []
    module.norm.register_forward_hook(lambda _, inputs, output: rows.append(inputs[0].shape[0]))
    for _ in range(2):
        rows.clear()
        checkpoint(module, x, codec="exact", chunk_tokens=2 * S)
    assert rows == [2, 2, 2]
    module.dropout.p = 0.0
    checkpoint(module, x, codec="exact", chunk_tokens=2 * S)
    rows.clear()
    checkpoint(module, x, codec="exact", chunk_tokens=2 * S)
    assert rows == [B]


def test_chunks_bound_the_working_set():
    """No tensor of the recomputation is larger than a chunk's widest, except inputs and gradients of the whole."""

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for value in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(value, torch.Tensor):
                    self.elements = max(self.elements, value.numel())
            return out

    module, _ = model_and_input()
    x = torch.randn(64, S, H, dtype=torch.float64, requires_grad=True)
    sizes = []
    for chunk_tokens in (None, 4 * S):
        loss = checkpoint(module, x, codec="int8", chunk_tokens=chunk_tokens).sum()
        with Largest() as mode:
            loss.backward()
        sizes.append(mode.elements)
    assert sizes[0] == 64 * S * 4 * H
    assert sizes[1] == 64 * S * H


def test_a_forward_pass_in_chunks_gives_the_same_and_never_holds_the_inside_of_the_whole_batch():
    module, x = model_and_input()
    expected = run(module, module, x.clone().requires_grad_())
    widest = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.shape[-1:] == (4 * H,):
                widest.append(result.numel() // (4 * H))
            return result

    wrapped = functools.partial(checkpoint, module, codec="exact", chunk_tokens=10, chunk_forward=True)
    with Watch():
        found = run(wrapped, module, x.clone().requires_grad_())
    torch.testing.assert_close(found[0], expected[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[1:], expected[1:])
    tokens = [n for n in widest if n != 1]
    assert tokens
    assert max(tokens) <= max(10, H)  # the weights are [4 H, H] and [H, 4 H]


def test_a_result_of_all_samples_is_never_that_of_a_chunk():
    """A mixture of experts returns the load of all tokens: a forward pass in chunks must not give that of some."""
    module, x = model_and_input()

    def block(t):
        return module(t), module.inner(t).square().mean()

    def total(function, at):
        module.zero_grad()
        y, load = function(at)
        (y.sum() + load).backward()
        return load.detach(), at.grad, module.inner.weight.grad

    for _ in range(2):  # the second time the function is known
        wrapped = functools.partial(checkpoint, block, codec="exact", chunk_tokens=10, chunk_forward=True)
        expected = total(block, x.clone().requires_grad_())
        found = total(wrapped, x.clone().requires_grad_())
        torch.testing.assert_close(found, expected)
