"""The Triton twins of fixed point and masks against the torch versions; run as `test_triton_kernels.py` is."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from triton_cases import FLOATS, MARKS, SIZES, by_kernel, sample

from slimfit_ds.activations import channels
from slimfit_ds.activations.codecs import exact, fixed_point, get_codec

pytest.importorskip("triton")

pytestmark = MARKS


@pytest.mark.parametrize("name", ["fixed8", "fixed4", "ufixed8"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_fixed_point(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = get_codec(name)
    for numel in (*SIZES, 4096):
        # Over both ends of every format, with ties of its grid.
        x = sample(numel, dtype)
        x[-5:] = torch.tensor([65504.0, -65504.0, 0.03125, 0.09375, 0.25], dtype=dtype)
        expected = codec.encode(x)
        kept, y = by_kernel(codec, x, monkeypatch, fixed_point)
        assert torch.equal(kept.tensors[0], expected.tensors[0])
        assert torch.equal(y, codec.decode(expected))


@pytest.mark.parametrize("shape", [(1,), (7,), (8,), (3, 5, 7), (8192,), (2, 8195)])
def test_masks(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    codec = get_codec("mask")
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.4
    kept, y = by_kernel(codec, x, monkeypatch, exact)
    assert torch.equal(kept.tensors[0], codec.encode(x).tensors[0])
    assert torch.equal(y, x)


@pytest.mark.parametrize("name", ["mask", "fixed4", "int8_channel", "lm2_channel"])
def test_nothing_is_launched_without_data(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (channels, exact, fixed_point):
        monkeypatch.setattr(module, "runs_in_triton", lambda x: True)
    codec = get_codec(name)
    with FakeTensorMode():
        x = torch.empty(2, 3, 11, 24, dtype=torch.bool if name == "mask" else torch.bfloat16)
        kept = codec.encode(x)
        assert codec.decode(kept).shape == x.shape
    statistics = 2 * (3 * 24) * 2 if "channel" in name else 0
    assert kept.nbytes == codec.nbytes(x.shape, x.dtype) + statistics
