"""Chunked linear + cross-entropy against PyTorch's, in float64 and with a bounded peak."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from slimfit_ds.activations.ops.cross_entropy import linear_cross_entropy

T, H, V = 37, 8, 50


def tensors(dtype=torch.float64):
    torch.manual_seed(0)
    hidden = torch.randn(T, H, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, H, dtype=dtype, requires_grad=True)
    bias = torch.randn(V, dtype=dtype, requires_grad=True)
    labels = torch.randint(V, (T,))
    labels[::5] = -100
    return hidden, weight, bias, labels


@pytest.mark.parametrize("chunk", [1, 10, 37, 1000])
@pytest.mark.parametrize("frozen", [(), (0,), (1, 2), (0, 1)])
@pytest.mark.parametrize("divisor", [None, 11.0])
def test_loss_and_gradients(chunk, frozen, divisor):
    hidden, weight, bias, labels = tensors()
    leaves = [hidden, weight, bias]
    for position in frozen:
        leaves[position].requires_grad_(False)
    loss = linear_cross_entropy(hidden, weight, labels, bias, chunk_tokens=chunk, divisor=divisor)
    (3 * loss).backward()
    found = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    total = F.cross_entropy(F.linear(hidden, weight, bias), labels, reduction="sum" if divisor else "mean")
    expected = total / divisor if divisor else total
    (3 * expected).backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    for leaf, gradient in zip(leaves, found, strict=True):
        # the softmax is taken in fp32
        torch.testing.assert_close(gradient, leaf.grad, rtol=1e-4, atol=1e-6)


def test_another_ignored_label():
    hidden, weight, bias, labels = tensors()
    labels = labels.masked_fill(labels < 0, 0)
    loss = linear_cross_entropy(hidden, weight, labels, bias, ignore_index=0, chunk_tokens=8)
    loss.backward()
    gradient = hidden.grad.clone()
    hidden.grad = None
    expected = F.cross_entropy(F.linear(hidden, weight, bias), labels, ignore_index=0)
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, hidden.grad, rtol=1e-4, atol=1e-6)


def test_no_tensor_of_all_logits_exists():
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for value in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(value, torch.Tensor):
                    self.elements = max(self.elements, value.numel())
            return out

    hidden, weight, bias, labels = tensors()
    with Largest() as mode:
        linear_cross_entropy(hidden, weight, labels, bias, chunk_tokens=5).backward()
    assert mode.elements <= max(5 * V, V * H, T * H)


def test_bfloat16_and_autocast_agree_with_float32():
    hidden, weight, bias, labels = tensors(torch.float32)
    expected = F.cross_entropy(F.linear(hidden, weight, bias), labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels, bias, chunk_tokens=10)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=2e-2)
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32


def test_wrong_shapes_are_named():
    hidden, weight, bias, labels = tensors()
    with pytest.raises(ValueError, match=r"hidden \(37, 8\), labels \(36,\)"):
        linear_cross_entropy(hidden, weight, labels[1:], bias)
