"""The fake world, in a process of its own: it must not leave a fake process group behind in the tests'."""

import subprocess
import sys

import torch

from slimfit_ds.memory.tracker import MemoryTracker
from slimfit_ds.optim import low_bit
from slimfit_ds.planner.fake_world import _nearest

SCRIPT = """
import os, torch, torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor
from slimfit_ds.planner.fake_world import FakeWorld
from slimfit_ds.planner.fake_world import CudaSemantics
import torch.nn.functional as F

before = torch.nn.Module._apply, os.environ.get("RANK"), F.dropout
with FakeWorld(8), CudaSemantics():
    assert dist.get_world_size() == 8
    x = torch.randn(1000, 1000, 1000)
    assert isinstance(x, FakeTensor)
    assert x.sum().item() == 1.0 and (x > 0).any().item() is False and torch.tensor(7).item() == 7
    t = torch.tensor(5); dist.broadcast(t, 0); assert t.item() == 5
    dist.all_reduce(x)
    q = torch.randn(2, 4, 16, 8, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda s: kept.append(s.numel()) or s, lambda s: s):
        out = F.scaled_dot_product_attention(q, q, q, dropout_p=0.1)
        y = F.dropout(out, 0.5)
    assert sorted(kept) == sorted([1024] * 4 + [128] + [1024]), kept
    y.sum().backward()
    assert q.grad.shape == q.shape
assert before == (torch.nn.Module._apply, os.environ.get("RANK"), F.dropout)
try:
    FakeWorld(4).__enter__()
except RuntimeError as error:
    assert "4 ranks" in str(error)
else:
    raise AssertionError("another world size must be refused")
print("fine")
os._exit(0)
"""


def test_values_groups_and_restoration():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_short_search_for_levels_takes_what_torchao_takes():
    """On real tensors, whose sizes are the same."""
    model, peaks = torch.nn.Linear(1, 1), []
    values, levels = torch.linspace(-1, 1, 4096), torch.linspace(-1, 1, 256)
    for nearest in (low_bit.nearest, _nearest):
        with MemoryTracker(model) as tracker:
            codes = nearest(values, levels)
        assert codes.dtype is torch.uint8
        peaks.append(tracker.report().peak)
    assert peaks[0] == peaks[1] > 9 * values.nbytes
