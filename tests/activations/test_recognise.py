"""Modules are known by what they compute."""

from __future__ import annotations

import pytest
import torch
from tiny_models import build
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.activations import ACT2FN

from slimfit_ds.activations.ops.norm import NormKind
from slimfit_ds.activations.recognise import activation_name, is_dropout, norm_kind, weighted_input_width


class Gemma(nn.Module):
    """1 + weight, as in Gemma; the weight starts at zero, so only other weights tell it from a plain one."""

    def __init__(self, sign=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(16))
        self.eps = 1e-6
        self.sign = sign

    def forward(self, x):
        y = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return (y * (1.0 + self.sign * self.weight.float())).type_as(x)


class WrongEps(nn.Module):
    """Claims one eps and uses another."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))
        self.eps = 1e-6

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-2)


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.LayerNorm(16, eps=1e-3), NormKind(True, 1e-3)),
        (nn.LayerNorm(16, bias=False), NormKind(True, 1e-5)),
        (nn.LayerNorm(16, elementwise_affine=False), NormKind(True, 1e-5)),
        (nn.RMSNorm(16, eps=1e-5), NormKind(False, 1e-5)),
        (Gemma(), NormKind(False, 1e-6, offset=1.0)),
        (Gemma(sign=-1.0), None),
        (WrongEps(), None),
        (nn.LayerNorm((4, 4)), None),
        (nn.BatchNorm1d(16), None),
        (nn.GroupNorm(4, 16), None),
        (nn.Linear(16, 16), None),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_norms(module, expected):
    assert norm_kind(module) == expected


@pytest.mark.parametrize("name", ["llama", "t5", "qwen3"])
def test_norms_of_transformers(name):
    norms = [m for m in build(name).modules() if "Norm" in type(m).__name__]
    assert norms
    assert all(norm_kind(m) is not None and not norm_kind(m).centred for m in norms)


def test_norms_without_weights_at_hand():
    with FakeTensorMode():
        assert norm_kind(nn.LayerNorm(16)) == NormKind(True, 1e-5)
    assert norm_kind(nn.LayerNorm(16, device="meta")) == NormKind(True, 1e-5)


def test_the_model_is_not_touched():
    module = Gemma()
    before = torch.get_rng_state()
    norm_kind(module)
    activation_name(nn.GELU())
    assert torch.equal(torch.get_rng_state(), before)
    assert not module.weight.any()


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.GELU(), "gelu"),
        (ACT2FN["gelu"], "gelu"),
        (ACT2FN["gelu_new"], "gelu_tanh"),
        (ACT2FN["gelu_pytorch_tanh"], "gelu_tanh"),
        (ACT2FN["quick_gelu"], "quick_gelu"),
        (nn.SiLU(), "silu"),
        (nn.ReLU(), "relu"),
        (ACT2FN["relu2"], "relu2"),
        (nn.Tanh(), None),
        (nn.Identity(), None),
        (nn.Dropout(0.5), None),
        (nn.Softmax(-1), None),
        (nn.ELU(), None),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_activations(module, expected):
    assert activation_name(module) == expected


def test_dropout_and_weights():
    assert is_dropout(nn.Dropout(0.1))
    assert not is_dropout(nn.Dropout2d(0.1))
    assert weighted_input_width(nn.Linear(3, 5)) == (3, 5)
    assert weighted_input_width(nn.Conv2d(3, 8, 2)) == (3, 8)
    assert weighted_input_width(build("gpt2").transformer.h[0].mlp.c_fc) == (32, 128)
    assert weighted_input_width(nn.Embedding(4, 4)) is None
