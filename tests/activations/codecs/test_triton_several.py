"""Several tensors in one launch: bit for bit what the torch version makes of each, and fewer launches in attention."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from triton_cases import DEVICE, FLOATS, MARKS, same, sample

from slimfit_ds.activations.codecs import absmax, get_codec
from slimfit_ds.activations.codecs.packing import split_planes
from slimfit_ds.activations.ops.attention import recomputed_attention

pytest.importorskip("triton")

pytestmark = MARKS
SHAPES = {
    "two": ((33, 70), (33, 70)),
    "grouped heads": ((2, 4, 17, 16), (2, 2, 17, 16), (2, 2, 17, 16)),
    "uneven": ((5001,), (64,), (7,)),
    "four": ((3, 64), (5, 64), (1, 8), (40, 100)),
    "one is empty": ((3, 64), (0, 64), (2, 9)),
}


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels' launchers that were called."""
    from slimfit_ds.activations.codecs import triton_absmax, triton_several

    called = []
    for module in (triton_absmax, triton_several):
        for name in module.__all__:
            function = getattr(module, name)
            if name.startswith(("encode_", "decode_")) and not name.endswith("kernel"):

                def counted(*args, function=function, name=name, **kwargs):
                    called.append(name)
                    return function(*args, **kwargs)

                monkeypatch.setattr(module, name, counted)
    monkeypatch.setattr(absmax, "runs_in_triton", lambda t: True)
    return called


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize(
    ("name", "group"), [("int6", 128), ("int8", 64), ("int4", 32), ("int2", 32), ("int5", 64)]
)
@pytest.mark.parametrize("dtype", FLOATS)
def test_each_tensor_is_encoded_as_alone(name, group, dtype, shapes, monkeypatch):
    codec = get_codec(name, group=group, rounding="nearest")
    tensors = [sample(torch.Size(shape).numel(), dtype).view(shape) for shape in SHAPES[shapes]]
    if shapes == "grouped heads":
        tensors = [t.transpose(1, 2) for t in tensors]
    expected = [codec.encode(t) for t in tensors]
    decoded = [codec.decode(e) for e in expected]
    with monkeypatch.context() as patch:
        patch.setattr(absmax, "runs_in_triton", lambda t: True)
        found = codec.encode_all([t.to(DEVICE) for t in tensors])
        again = codec.decode_all(found)
    for ours, theirs, y, z, tensor in zip(found, expected, again, decoded, tensors, strict=True):
        assert (ours.shape, ours.dtype, ours.meta) == (theirs.shape, theirs.dtype, theirs.meta)
        assert same(ours.tensors[1].cpu(), theirs.tensors[1]), "steps"
        assert same(y.cpu(), z), "decoded values"
        assert y.stride() == z.stride()
        finite = theirs.tensors[1].isfinite()
        for (width, mine), (_, other) in zip(
            split_planes(ours.tensors[0].cpu(), tensor.numel(), codec.grid.bits),
            split_planes(theirs.tensors[0], tensor.numel(), codec.grid.bits),
            strict=True,
        ):
            defined = finite.repeat_interleave(group * width // 8)[: len(mine)]
            assert torch.equal(mine[defined], other[defined]), "codes"


def attention(query, key, value):
    return nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)


@pytest.mark.parametrize("values", ["same codec", "other codec", "as they are"])
def test_attention_packs_its_operands_in_one_launch(values, launches, monkeypatch):
    torch.manual_seed(0)
    shapes = (2, 4, 24, 16), (2, 2, 24, 16), (2, 2, 24, 16)
    # Heads of a projection: [batch, tokens, heads, width] in memory.
    operands = [
        torch.randn(b, s, h, w, device=DEVICE).transpose(1, 2).requires_grad_() for b, h, s, w in shapes
    ]
    value_codec = {"same codec": True, "other codec": get_codec("int8"), "as they are": False}[values]

    def gradients():
        y = recomputed_attention(attention, *operands, codec="int6", value_codec=value_codec)
        return torch.autograd.grad(y, operands, torch.ones_like(y))

    found = gradients()
    alone = {"other codec": ["encode_absmax"]}.get(values, [])
    assert sorted(launches) == sorted(
        ["encode_several", "decode_several", *alone, *(name.replace("en", "de", 1) for name in alone)]
    )
    monkeypatch.setattr(absmax, "runs_in_triton", lambda t: False)
    # The operands are the same bit for bit; a GPU's attention may add in another order.
    torch.testing.assert_close(found, gradients(), rtol=1e-5, atol=1e-6)


def test_a_tensor_that_comes_twice_is_packed_once(launches):
    x = torch.randn(2, 4, 24, 16, device=DEVICE, requires_grad=True)
    y = recomputed_attention(attention, x, x, x, codec="int6")
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert launches == ["encode_absmax", "decode_several"]
    assert dx.isfinite().all()
