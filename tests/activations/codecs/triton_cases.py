"""What the tests of the Triton twins share: device, data, and a way to run a codec by its kernels."""

from __future__ import annotations

import os
from types import ModuleType

import pytest
import torch
from torch import Tensor

from slimfit_ds.activations.codecs import Codec, Encoded

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
MARKS = [
    pytest.mark.skipif(
        not INTERPRETED and not torch.cuda.is_available(), reason="needs CUDA or Triton's interpreter"
    ),
    # The interpreter computes in numpy, which warns of the NaN and infinities that the kernels handle.
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    *(() if INTERPRETED else (pytest.mark.gpu,)),
]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (7, 1024, 5001)


def sample(numel: int, dtype: torch.dtype, finite: bool = False) -> Tensor:
    """Values over many orders of magnitude, with zeros, ties, tiny and (unless `finite`) non-finite ones."""
    g = torch.Generator().manual_seed(numel)
    x = torch.randn(numel, generator=g) * torch.exp(2 * torch.randn(numel, generator=g))
    if numel >= 1000:
        x[100:300] = 0
        x[300:400] = torch.arange(-50, 50) / 4
        x[3] = -0.0
        x[500:600] *= 1e-33
        if not finite:
            x[640], x[700], x[800] = torch.nan, torch.inf, -torch.inf
    return x.to(dtype)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, but for the sign of zeros and the payload of NaN."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(nan=1.0), b.nan_to_num(nan=1.0))


def by_kernel(
    codec: Codec, x: Tensor, monkeypatch: pytest.MonkeyPatch, *modules: ModuleType
) -> tuple[Encoded, Tensor]:
    """Encoded and decoded by the kernels, on the CPU; `modules` are those that choose between torch and Triton."""
    launched = []

    def in_triton(t: Tensor) -> bool:
        launched.append(t)
        return True

    with monkeypatch.context() as patch:
        for module in modules:
            patch.setattr(module, "runs_in_triton", in_triton)
        # A copy keeps the strides.
        kept = codec.encode(x.to(DEVICE))
        y = codec.decode(kept)
    assert len(launched) >= 2
    return Encoded(tuple(t.cpu() for t in kept.tensors), kept.shape, kept.dtype, kept.meta), y.cpu()
