"""Runs the tests of the Triton kernels in Triton's interpreter, and compiles every kernel for a GPU that is not there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from triton_cases import kernels

from slimfit_ds.activations.codecs import get_codec
from slimfit_ds.activations.ops.activation import compressed_activation
from slimfit_ds.activations.ops.dropout import philox_dropout
from slimfit_ds.activations.ops.norm import NormKind, compressed_norm

triton = pytest.importorskip("triton")

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("files", ["test_triton_codecs.py", "test_triton_ops.py"])
def test_kernels_in_the_interpreter(files: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", files],
        cwd=Path(__file__).parent,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
    assert re.search(r"\d+ passed", result.stdout)
    assert "skipped" not in result.stdout


def _run_everything() -> None:
    """Each codec and each operation forward and backward, as a training step in bf16 does."""
    x = torch.randn(4, 12, 96).bfloat16()
    for name in ("int8", "int6", "int4", "int8_channel", "fixed8", "fixed4", "topk10"):
        get_codec(name).decode(get_codec(name).encode(x))
    get_codec("int8_channel").encode(torch.randn(2, 3, 8, 16))
    for activation in ("gelu", "relu2"):
        codec = get_codec("step5", activation=activation)
        codec.decode(codec.encode(x))
    x.requires_grad_()
    for kind in (NormKind(True, 1e-5), NormKind(False, 1e-5)):
        for trains in (True, False):
            layer = (nn.LayerNorm if kind.centred else nn.RMSNorm)(96, eps=1e-5).bfloat16()
            layer.requires_grad_(trains)
            bias = getattr(layer, "bias", None)
            compressed_norm(layer, x, layer.weight, bias, kind, get_codec("int6", group=32)).sum().backward()
    for function, module in (("gelu", nn.GELU()), ("gelu_tanh", nn.GELU("tanh")), ("silu", nn.SiLU())):
        for codec in (get_codec("step5", activation=function), get_codec("int4")):
            compressed_activation(module, x, codec, function).sum().backward()
    philox_dropout(nn.Dropout(0.1), x, 0.1).sum().backward()


def test_kernels_compile_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the arguments that the launchers give them."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("nothing is compiled in the interpreter")
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import ASTSource, make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    from slimfit_ds.activations.ops import activation, triton_activation

    launches = {}

    def record(self, *args, grid, warmup, **kwargs):
        shapes = [a.dtype if isinstance(a, torch.Tensor) else type(a) for a in args]
        launches[self.fn.__module__, self.fn.__name__, str(shapes), str(kwargs)] = self, args, kwargs

    monkeypatch.setattr(JITFunction, "run", record)
    # Nothing is computed here, so no form of a function can be found by its values.
    monkeypatch.setattr(activation, "_form_of", lambda _, name, x: triton_activation.FORMS[name][0])
    with kernels():
        _run_everything()
    modules = {module.rpartition(".")[2] for module, *_ in launches}
    assert modules == {
        f"triton_{n}" for n in ("absmax", "channels", "table", "paper", "norm", "activation", "dropout")
    }
    target = GPUTarget("cuda", 90, 32)
    backend = make_backend(target)
    for function, args, kwargs in launches.values():
        kwargs = {**kwargs, "debug": False}
        binder = create_function_from_signature(function.signature, function.params, backend)
        bound, specialisation, options = binder(*args, **kwargs)
        options, signature, constants, attributes = function._pack_args(
            backend, kwargs, bound, specialisation, options
        )
        source = ASTSource(function, signature, constants, attributes)
        assert triton.compile(source, target=target, options=options.__dict__).asm["cubin"]
