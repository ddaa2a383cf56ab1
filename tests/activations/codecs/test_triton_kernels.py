"""The Triton twins against the torch versions, bit for bit.

On a CUDA device the kernels run compiled. Without one this file runs in Triton's interpreter, which has to be
switched on before Triton is imported: `test_triton_interpreter.py` does so in a process of its own.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from slimfit_ds.activations.codecs import Codec, Encoded, absmax, get_codec, magnitude_table
from slimfit_ds.activations.codecs.absmax import AbsmaxCodec
from slimfit_ds.activations.codecs.packing import split_planes
from slimfit_ds.activations.codecs.rounding import RandomBits

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [
    pytest.mark.skipif(
        not INTERPRETED and not torch.cuda.is_available(), reason="needs CUDA or Triton's interpreter"
    ),
    # The interpreter computes in numpy, which warns of the NaN and infinities that the kernels handle.
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]
if not INTERPRETED:
    pytestmark.append(pytest.mark.gpu)

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (7, 1024, 5001)
ABSMAX = [
    (name, group, rounding)
    for name, group in (
        ("int8", 64),
        ("int6", 64),
        ("int4", 32),
        ("int2", 32),
        ("uint8", 64),
        ("int8", 8),
        ("int4", 128),
    )
    for rounding in ("nearest", "stochastic")
]
TABLES = [("lm4", {}), ("lm2", {}), ("lm1", {})] + [
    (f"step{bits}", {"activation": activation})
    for bits in (5, 4, 2, 1)
    for activation in ("gelu", "silu", "relu", "relu2")
]


def _data(numel: int, dtype: torch.dtype, finite: bool = False) -> Tensor:
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


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(nan=1.0), b.nan_to_num(nan=1.0))


def _by_kernel(codec: Codec, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> tuple[Encoded, Tensor]:
    """Encoded and decoded by the kernels, on the CPU."""
    launched = []

    def in_triton(t: Tensor) -> bool:
        launched.append(t)
        return True

    for module in (absmax, magnitude_table):
        monkeypatch.setattr(module, "runs_in_triton", in_triton)
    kept = codec.encode(x.to(DEVICE))
    y = codec.decode(kept)
    monkeypatch.undo()
    assert len(launched) == 2
    return Encoded(tuple(t.cpu() for t in kept.tensors), kept.shape, kept.dtype), y.cpu()


@pytest.mark.parametrize(("name", "group", "rounding"), ABSMAX)
@pytest.mark.parametrize("dtype", FLOATS)
def test_absmax(
    name: str, group: int, rounding: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec = get_codec(name, group=group, rounding=rounding)
    assert isinstance(codec, AbsmaxCodec)
    for numel in SIZES:
        x = _data(numel, dtype)
        x = x.abs() if name == "uint8" else x
        bits = RandomBits(seed=numel).draw(numel, x.device, None)

        def draw(
            self: RandomBits, n: int, device: torch.device, generator: object, bits: Tensor = bits
        ) -> Tensor:
            return bits[:n].to(device)

        with monkeypatch.context() as patch:
            patch.setattr(RandomBits, "draw", draw)
            expected = codec.encode(x)
        with monkeypatch.context() as patch:
            patch.setattr(RandomBits, "draw", draw)
            kept, y = _by_kernel(codec, x, patch)
        assert _same(kept.tensors[1], expected.tensors[1]), "steps"
        assert _same(y, codec.decode(expected)), "decoded values"
        # The codes of a non-finite group are unspecified.
        finite = kept.tensors[1].isfinite()
        for (width, ours), (_, theirs) in zip(
            split_planes(kept.tensors[0], numel, codec.grid.bits),
            split_planes(expected.tensors[0], numel, codec.grid.bits),
            strict=True,
        ):
            defined = finite.repeat_interleave(group * width // 8)[: len(ours)]
            assert torch.equal(ours[defined], theirs[defined]), "codes"


@pytest.mark.parametrize(
    ("name", "options"), TABLES, ids=lambda v: v if isinstance(v, str) else "-".join(v.values())
)
@pytest.mark.parametrize("dtype", FLOATS)
def test_tables(
    name: str, options: dict[str, str], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec = get_codec(name, **options)
    for numel in SIZES:
        x = _data(numel, dtype, finite=options.get("activation") == "relu2")
        expected = codec.encode(x)
        kept, y = _by_kernel(codec, x, monkeypatch)
        if len(kept.tensors) == 2:
            # A sum over the tensor depends on the order of its terms.
            torch.testing.assert_close(kept.tensors[1], expected.tensors[1])
            if DEVICE == "cuda":
                continue
        assert torch.equal(kept.tensors[0], expected.tensors[0])
        assert _same(y, codec.decode(expected))
