"""The C kernels of the CPU path against the torch versions, bit for bit."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from triton_cases import same, sample

from slimfit_ds.activations.codecs import Codec, Encoded, absmax, cpu_support, get_codec, magnitude_table

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")

CODECS = [
    *(("int8", {"group": g}) for g in (64, 24)),
    *(("int6", {"group": g}) for g in (64, 128)),
    *(("int5", {"group": g}) for g in (64, 8)),
    *(("int4", {"group": g}) for g in (32, 1024)),
    ("uint8", {}),
    ("lm4", {}),
    *((f"step{bits}", {"activation": activation}) for bits in (5, 4) for activation in ("gelu", "relu")),
]
DTYPES = (torch.float32, torch.bfloat16)


def in_torch(codec: Codec, x: Tensor) -> tuple[Encoded, Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        for module in (absmax, magnitude_table):
            patch.setattr(module, "runs_in_c", lambda *_: False)
        encoded = codec.encode(x)
        return encoded, codec.decode(encoded)


def in_c(codec: Codec, x: Tensor) -> tuple[Encoded, Tensor]:
    taken = []

    def spy(*arguments) -> bool:
        taken.append(cpu_support.runs_in_c(*arguments))
        return taken[-1]

    with pytest.MonkeyPatch.context() as patch:
        for module in (absmax, magnitude_table):
            patch.setattr(module, "runs_in_c", spy)
        encoded = codec.encode(x)
        decoded = codec.decode(encoded)
    assert taken == [True, True]
    return encoded, decoded


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "options"), CODECS)
def test_codes_scales_and_values_are_those_of_torch(name, options, dtype):
    codec = get_codec(name, **options)
    for numel in (1, 7, 8, 63, 64, 65, 513, 1024, 5001, 40003):
        x = sample(numel, dtype, finite=True)
        x = x.abs() if name == "uint8" else x
        (expected, values), (found, decoded) = in_torch(codec, x), in_c(codec, x)
        for mine, theirs in zip(found.tensors, expected.tensors, strict=True):
            assert torch.equal(mine, theirs), numel
        assert same(decoded, values), numel


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "options"), CODECS)
def test_values_that_are_not_finite(name, options, dtype):
    x = sample(5001, dtype)
    codec = get_codec(name, **options)
    (expected, values), (found, decoded) = in_torch(codec, x), in_c(codec, x)
    # The codes of a group without a finite step mean nothing.
    for mine, theirs in zip(found.tensors[1:], expected.tensors[1:], strict=True):
        assert same(mine, theirs)
    assert same(decoded, values)


@needs_compiler
def test_other_layouts_and_offsets():
    base = torch.randn(2, 9, 3, 16).bfloat16()
    for x in (base.transpose(1, 2), base[..., ::2], base.view(-1)[5:]):
        for name in ("int6", "lm4"):
            (_, values), (_, decoded) = in_torch(get_codec(name), x), in_c(get_codec(name), x)
            assert torch.equal(decoded, values)
            assert decoded.stride() == values.stride()


def test_what_the_kernels_do_not_take_runs_in_torch():
    assert not cpu_support.runs_in_c(torch.zeros(8, dtype=torch.float16), 8)
    assert not cpu_support.runs_in_c(torch.zeros(8), 2)
    assert not cpu_support.runs_in_c(torch.zeros(8), 8, 2048)
    assert not cpu_support.runs_in_c(torch.zeros(8, device="meta"), 8)


SCRIPT = """
import torch
from slimfit_ds.activations.codecs import cpu_support, get_codec
codec = get_codec("int8")
x = torch.linspace(-1, 1, 64)
print(cpu_support.runs_in_c(x, 8), float((codec.decode(codec.encode(x)) - x).abs().max()) < 0.005)
"""


@pytest.mark.parametrize(
    "setting",
    [
        {"SLIMFIT_CPU_KERNELS": "0"},
        {"CC": "no-such-compiler"},
        {"CC": "false"},
    ],
)
def test_without_a_working_compiler_torch_does_it(setting, tmp_path: Path):
    environment = {**os.environ, "SLIMFIT_CACHE": str(tmp_path), **setting}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "True"]
    # A compiler that fails is worth a line, its absence is not.
    assert ("cpu_kernels runs in torch" in done.stderr) == (setting.get("CC") == "false")
