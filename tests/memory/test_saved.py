"""The saved-activation counter against byte counts worked out by hand."""

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from slimfit_ds.memory.saved import SavedActivations, StorageLedger, plain_tensors

B, S, H = 2, 8, 16
FLOATS = B * S * H * 4  # bytes of one fp32 tensor [batch, seq, hidden]


def count(module: nn.Module, x: torch.Tensor) -> tuple[int, int]:
    with SavedActivations(module) as saved:
        out = module(x)
    assert out.requires_grad
    return saved.dynamic, saved.static


def test_frozen_linear_saves_nothing_and_active_saves_its_input():
    linear = nn.Linear(H, 4 * H)
    x = torch.randn(B, S, H, requires_grad=True)
    assert count(linear, x) == (FLOATS, 0)
    linear.weight.requires_grad_(False)
    assert count(linear, x) == (0, 0)


def test_frozen_embedding_saves_nothing_and_active_saves_its_indices():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.offset = nn.Embedding(32, H), nn.Parameter(torch.zeros(H))

        def forward(self, ids):
            return self.table(ids) + self.offset

    words, ids = Words(), torch.zeros(B, S, dtype=torch.long)
    assert count(words, ids) == (B * S * 8, 0)
    words.table.weight.requires_grad_(False)
    assert count(words, ids) == (0, 0)


def test_layer_norm_saves_input_and_two_statistics_even_when_frozen():
    norm = nn.LayerNorm(H).requires_grad_(False)
    x = torch.randn(B, S, H, requires_grad=True)
    assert count(norm, x) == (0, FLOATS + 2 * B * S * 4)


def test_one_storage_under_several_layers_counts_once():
    class QKV(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(H, H, bias=False) for _ in range(3))

        def forward(self, x):
            return self.q(x) + self.k(x) + self.v(x.view(B * S, H)).view(B, S, H)

    assert count(QKV(), torch.randn(B, S, H, requires_grad=True)) == (FLOATS, 0)


def test_storage_needed_by_both_is_static():
    """The GELU keeps its input anyway: freezing the linear beside it would free nothing."""

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(H, H)

        def forward(self, x):
            return F.gelu(x) + self.linear(x)

    assert count(Both(), torch.randn(B, S, H, requires_grad=True)) == (0, FLOATS)


def test_an_expanded_tensor_counts_its_storage():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return x * torch.ones(1, 1, H).expand(B, S, H)

    assert count(Scale(), torch.randn(B, S, H, requires_grad=True)) == (0, H * 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fake_tensors_count_like_real_ones(dtype):
    def build():
        return nn.TransformerEncoderLayer(H, 2, 32, batch_first=True, dropout=0.0, dtype=dtype).train()

    model = build()
    real = count(model, torch.randn(B, S, H, dtype=dtype, requires_grad=True))
    with FakeTensorMode():
        fake = count(build(), torch.randn(B, S, H, dtype=dtype, requires_grad=True))
    assert fake == real
    assert real[0] > 0
    assert real[1] > 0


def test_hooks_change_neither_values_nor_gradients_and_are_removed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(H, H), nn.GELU(), nn.Linear(H, 1))
    x = torch.randn(4, H)
    plain = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    with SavedActivations(model):
        loss = model(x).sum()
    counted = torch.autograd.grad(loss, list(model.parameters()))
    for a, b in zip(plain, counted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    with SavedActivations(model) as saved:
        pass
    model(x)
    assert saved.total == 0


def test_live_falls_to_zero_after_backward_and_the_count_stays():
    model = nn.Sequential(nn.Linear(H, H), nn.GELU(), nn.Linear(H, 1))
    with SavedActivations(model) as saved:
        model(torch.randn(4, H)).sum().backward()
    assert saved.total > 0
    assert sum(saved.live().values()) == 0


def test_an_exception_inside_a_module_leaves_the_counter_usable():
    class Broken(nn.Module):
        def forward(self, x):
            raise RuntimeError("no")

    model = nn.ModuleDict({"good": nn.Linear(H, H), "bad": Broken()})
    with SavedActivations(model) as saved:
        with pytest.raises(RuntimeError, match="no"):
            model["bad"](torch.randn(1, H))
        model["good"](torch.randn(B, H, requires_grad=True))
    assert saved.dynamic == B * H * 4


def test_wrapper_subclasses_hold_their_inner_tensors():
    torchao = pytest.importorskip("torchao.optim.subclass_8bit")
    state = torchao.OptimState8bit.zeros((4096,), signed=True, block_size=256)
    held = sum(plain.untyped_storage().nbytes() for plain in plain_tensors(state))
    assert held == 4096 + 256 * 4 + 4096 // 256 * 4  # codes, code book, block scales


def test_ledger_follows_lives_and_moves():
    ledger = StorageLedger()
    a, b = torch.zeros(10), torch.zeros(20)
    ledger.put(a, "x")
    ledger.put(b, "x")
    ledger.put(a[2:], "x")
    assert (ledger.live["x"], ledger.total) == (120, 120)
    ledger.put(b, "y", only_from=frozenset({"z"}))
    assert (ledger.live["x"], ledger.live.get("y", 0)) == (120, 0)
    ledger.put(b, "y", only_from=frozenset({"x"}))
    assert (ledger.live["x"], ledger.live["y"], ledger.total) == (40, 80, 120)
    ledger.move_all("x", "z")
    assert (ledger.live["z"], ledger.total) == (40, 120)
    a.untyped_storage().resize_(400)
    ledger.put(a, "z")
    assert (ledger.live["z"], ledger.total) == (400, 480)
    del a
    gc.collect()
    assert (ledger.live["z"], ledger.total) == (0, 80)
