"""The pruning kernels equal the torch version bit for bit; run as `test_triton_kernels.py` is."""

from __future__ import annotations

import pytest
import torch
from triton_cases import FLOATS, MARKS, SIZES, by_kernel, sample

from slimfit_ds.activations.codecs import pruning
from slimfit_ds.activations.codecs.pruning import TopK

pytest.importorskip("triton")

pytestmark = MARKS


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("numel", "share"), [(numel, share) for numel in SIZES for share in (0.15, 0.5, 1.0)]
)
def test_pruning(numel: int, dtype: torch.dtype, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    x = sample(numel, dtype)
    codec = TopK("t", share)
    kept, y = by_kernel(codec, x, monkeypatch, pruning)
    expected = codec.encode(x)
    for ours, theirs in zip(kept.tensors, expected.tensors, strict=True):
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
    assert torch.equal(y.view(torch.uint8), codec.decode(expected).view(torch.uint8))
