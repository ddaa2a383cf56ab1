from __future__ import annotations

import pytest
import torch

from slimfit_ds.activations.codecs import get_codec
from slimfit_ds.activations.codecs.pruning import TopK


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 30), (1000,), (9,)])
def test_the_largest_magnitudes_survive_and_the_rest_is_zero(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    codec = get_codec("topk10")
    y = codec.decode(codec.encode(x))
    kept = y != 0
    count = x.numel() // 10
    assert kept.sum() == count
    assert torch.equal(y[kept], x[kept])
    if count:
        assert x[kept].abs().min() >= x[~kept].abs().max()
    assert codec.nbytes(shape, dtype) == count * (4 + dtype.itemsize)


def test_of_equal_magnitudes_the_first_are_kept_in_order() -> None:
    x = torch.tensor([1.0, -2, 2, 3, -2, 2, 0, -1, 1, -3])
    values, indices = TopK("t", 0.5).encode(x).tensors
    # Both threes, then the first three of the four twos.
    assert indices.tolist() == [1, 2, 3, 4, 9]
    assert values.tolist() == [-2, 2, 3, -2, -3]


def test_nan_is_kept() -> None:
    x = torch.ones(20)
    x[7] = torch.nan
    codec = get_codec("topk10")
    assert codec.decode(codec.encode(x))[7].isnan()


@pytest.mark.parametrize("share", [0.0, -0.1, 1.5])
def test_share_is_checked(share: float) -> None:
    with pytest.raises(ValueError, match=rf"\(0, 1\], got {share}"):
        TopK("t", share)
