"""The Triton twins against the torch versions, bit for bit.

On a CUDA device the kernels run compiled. Without one this file runs in Triton's interpreter, which has to be
switched on before Triton is imported: `test_triton_interpreter.py` does so in a process of its own.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton_cases import DEVICE, FLOATS, MARKS, SIZES, by_kernel, same, sample

from slimfit_ds.activations.codecs import absmax, get_codec, magnitude_table
from slimfit_ds.activations.codecs.absmax import AbsmaxCodec
from slimfit_ds.activations.codecs.packing import split_planes
from slimfit_ds.activations.codecs.rounding import RandomBits

pytest.importorskip("triton")

pytestmark = MARKS
ABSMAX = [
    (name, group, rounding)
    for name, group in (
        ("int8", 64),
        ("int6", 64),
        ("int5", 64),
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


@pytest.mark.parametrize(("name", "group", "rounding"), ABSMAX)
@pytest.mark.parametrize("dtype", FLOATS)
def test_absmax(
    name: str, group: int, rounding: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec = get_codec(name, group=group, rounding=rounding)
    assert isinstance(codec, AbsmaxCodec)
    for numel in SIZES:
        x = sample(numel, dtype)
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
            kept, y = by_kernel(codec, x, patch, absmax)
        assert same(kept.tensors[1], expected.tensors[1]), "steps"
        assert same(y, codec.decode(expected)), "decoded values"
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
        x = sample(numel, dtype, finite=options.get("activation") == "relu2")
        expected = codec.encode(x)
        kept, y = by_kernel(codec, x, monkeypatch, magnitude_table)
        if len(kept.tensors) == 2:
            # A sum over the tensor depends on the order of its terms.
            torch.testing.assert_close(kept.tensors[1], expected.tensors[1])
            if DEVICE == "cuda":
                continue
        assert torch.equal(kept.tensors[0], expected.tensors[0])
        assert same(y, codec.decode(expected))
