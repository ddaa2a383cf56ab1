"""What the tests of the Triton kernels share: device, data, and a switch to the kernels.

On a CUDA device the kernels run compiled. Without one these tests run in Triton's interpreter, which has to be switched on
before Triton is imported: `test_triton.py` does so in a process of its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from slimfit_ds.activations.codecs import Codec, Encoded, backend

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
MARKS = [
    pytest.mark.skipif(
        not INTERPRETED and not torch.cuda.is_available(), reason="needs CUDA or Triton's interpreter"
    ),
    # The interpreter computes in numpy, which warns of the NaN and infinities that the kernels handle.
    pytest.mark.filterwarnings("ignore:.*(invalid value|overflow|divide by zero):RuntimeWarning"),
    *(() if INTERPRETED else (pytest.mark.gpu,)),
]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (7, 5001)


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


@contextmanager
def kernels(on: bool = True) -> Iterator[list[Tensor]]:
    """Let the kernels run, or not, whatever the device; yields the tensors that asked."""
    asked: list[Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "runs_in_triton", lambda x: (asked.append(x), on)[1])
        yield asked


def by_kernel(codec: Codec, x: Tensor) -> tuple[Encoded, Tensor]:
    """Encoded and decoded by the kernels, on the CPU."""
    with kernels() as asked:
        # A copy keeps the strides.
        kept = codec.encode(x.to(DEVICE))
        y = codec.decode(kept)
    assert len(asked) >= 2
    return Encoded(tuple(t.cpu() for t in kept.tensors), kept.shape, kept.dtype, kept.order), y.cpu()
