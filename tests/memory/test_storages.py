"""Storage arithmetic against element counts."""

import gc

import torch

from slimfit_ds.memory.storages import StorageLedger, tensor_bytes


def test_views_share_a_storage_and_expanded_tensors_hold_little():
    base = torch.zeros(4, 6)
    assert tensor_bytes([base, base[0], base.t(), base.view(-1)]) == 4 * 6 * 4
    assert tensor_bytes([base[0]]) == 4 * 6 * 4
    assert tensor_bytes([torch.zeros(1, 6).expand(100, 6)]) == 24
    assert tensor_bytes([]) == 0


def test_wrapper_subclasses_count_what_they_hold():
    import pytest

    torchao = pytest.importorskip("torchao.optim.subclass_8bit")
    state = torchao.OptimState8bit.zeros((4096,), signed=True, block_size=256)
    assert tensor_bytes([state]) == 4096 + 256 * 4 + 4096 // 256 * 4  # codes, code book, block scales


def test_ledger_follows_lives_and_moves():
    ledger = StorageLedger()
    a, b = torch.zeros(10), torch.zeros(20)
    ledger.put(a, "x")
    ledger.put(b, "x")
    ledger.put(a[2:], "x")
    assert (ledger.live["x"], ledger.total) == (120, 120)
    ledger.put(b, "y", only_from=frozenset({"z"}))
    assert ledger.kind(b) == "x"
    ledger.put(b, "y", only_from=frozenset({"x"}))
    assert (ledger.live["x"], ledger.live["y"], ledger.total) == (40, 80, 120)
    ledger.move_all("x", "z")
    assert (ledger.live["z"], ledger.total) == (40, 120)
    del a
    gc.collect()
    assert (ledger.live["z"], ledger.total) == (0, 80)


def test_ledger_sees_a_resized_storage():
    ledger = StorageLedger()
    a = torch.zeros(10)
    ledger.put(a, "x")
    a.untyped_storage().resize_(400)
    ledger.put(a, "x")
    assert ledger.total == 400
