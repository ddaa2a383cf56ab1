"""The contract that every codec keeps, whatever it stores."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from cases import CASES, FLOATS, Case
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from slimfit_ds.activations.codecs import base, codec_names, get_codec, register_codec

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)


def _sample(case: Case, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def _stored_bytes(tensors: tuple[Tensor, ...]) -> int:
    return sum(t.untyped_storage().nbytes() for t in tensors)


def every_empty_shape(test: Callable[..., None]) -> Callable[..., None]:
    """Try each shape of up to four dimensions in which one is empty, besides those drawn by chance."""
    for dims in range(1, 5):
        for shape in itertools.product((0, 3), repeat=dims):
            if 0 in shape:
                test = example(shape=shape, dtype=torch.bfloat16, seed=0)(test)
    return test


@every_case
@every_empty_shape
@settings(max_examples=12, deadline=None)
@given(
    shape=st.lists(st.integers(0, 9), max_size=4).map(tuple) | st.integers(1, 400).map(lambda n: (3, n)),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 99),
)
def test_shape_dtype_and_bytes(case: Case, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> None:
    x = _sample(case, shape, dtype, seed)
    before = x.clone()
    kept = case.codec.encode(x)
    y = case.codec.decode(kept)
    assert (y.shape, y.dtype, y.device) == (x.shape, x.dtype, x.device)
    assert (kept.shape, kept.dtype) == (x.shape, x.dtype)
    assert torch.equal(x, before), "encode changed its input"
    assert kept.nbytes == case.codec.nbytes(shape, x.dtype)
    if case.name != "exact":
        assert kept.nbytes == _stored_bytes(kept.tensors), "a stored tensor keeps a larger storage alive"
    if case.codec.lossless:
        assert torch.equal(x, y)


@every_case
@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_of_zeros_of_denormals_and_of_a_huge_entry_leave_the_others_alone(
    case: Case, dtype: torch.dtype
) -> None:
    plain = _sample(case, (48, 192), dtype)
    x = plain.clone()
    x[3] = 0
    x[5, 7] = 6e4 if dtype == torch.float16 else 1e18
    x[7] *= torch.finfo(dtype).tiny / 8
    y, usual = (case.fresh().decode(case.fresh().encode(t)) for t in (x, plain))
    assert y.isfinite().all()
    if not case.name.startswith("step"):  # the derivative at 0 is none
        assert y[[3, 7]].abs().max() <= 2 * torch.finfo(dtype).tiny
    if case.name == "crs" or "relu2" in case.label:
        return  # drawn by chance; one scale for the whole tensor
    others = [row for row in range(48) if row not in (3, 5, 7)]
    error, expected = ((b - a).double()[others].norm() for a, b in ((x, y), (plain, usual)))
    assert error <= 1.05 * expected


@every_case
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_stays_visible_or_saturates(case: Case, bad: float) -> None:
    x = _sample(case, (48, 192), torch.float32)
    x[9, 11] = bad
    y = case.codec.decode(case.codec.encode(x))
    if case.name == "crs":
        assert y.isnan().any()
    elif "fixed" in case.name or (case.name.startswith("step") and "relu2" not in case.label):
        assert y.isfinite().all()
    else:
        assert not y[9, 11].isfinite()


@every_case
@pytest.mark.parametrize("shape", [(4, 6, 40), (130, 67)])
def test_dense_layouts_keep_their_strides_and_values(case: Case, shape: tuple[int, ...]) -> None:
    if case.codec.linear_only:
        pytest.skip("rows are those of the shape, not of the memory")
    x = _sample(case, shape, torch.float32)
    if case.name == "int8_channel":
        pytest.skip("channels are those of the shape, not of the memory")
    expected = case.codec.decode(case.codec.encode(x))
    y = case.codec.decode(case.codec.encode(x.transpose(0, -1)))
    assert y.stride() == x.transpose(0, -1).stride()
    # The same memory gives the same groups, so the values agree exactly.
    assert torch.equal(y.transpose(0, -1), expected)


@every_case
def test_strided_and_expanded_inputs(case: Case) -> None:
    x = _sample(case, (8, 20, 16), torch.float32)
    for view in (x[:, ::3, 1:9], x[:1].expand(5, 20, 16)):
        y, expected = (case.fresh().decode(case.fresh().encode(t)) for t in (view, view.contiguous()))
        assert torch.equal(y, expected)


@every_case
def test_chunks_change_nothing(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    if case.name == "int8_channel":
        pytest.skip("statistics of channels are sums, which chunks round in another order (test_channels.py)")
    x = _sample(case, (50, 77), torch.float32)

    def encode() -> tuple[Tensor, ...]:
        return case.fresh().encode(x).tensors

    whole = encode()
    monkeypatch.setattr(base, "_CPU_CHUNK", 192)
    pieces = encode()
    assert all(torch.equal(a, b) for a, b in zip(whole, pieces, strict=True))


@every_case
def test_global_random_state_is_left_alone(case: Case) -> None:
    x = _sample(case, (64, 64), torch.float32)
    state = torch.get_rng_state()
    case.codec.decode(case.codec.encode(x))
    assert torch.equal(torch.get_rng_state(), state)


@every_case
def test_no_graph_is_kept(case: Case) -> None:
    x = _sample(case, (8, 64), torch.float32).requires_grad_()
    kept = case.codec.encode(x * 1)
    assert not any(t.requires_grad for t in kept.tensors)
    assert not case.codec.decode(kept).requires_grad


class _LargestOutput(TorchDispatchMode):
    """Bytes of the largest new storage that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        for t in result if isinstance(result, tuple) else (result,):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in known:
                self.nbytes = max(self.nbytes, t.untyped_storage().nbytes())
        return result


@every_case
def test_temporaries_are_bounded_by_the_chunk(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    if case.name == "topk10":
        pytest.skip("selecting the largest of all elements takes a copy of their magnitudes")
    if case.codec.linear_only or case.name == "int8_channel":
        pytest.skip("rows are gathered, or standardised, before they are stored")
    chunk = 4096
    monkeypatch.setattr(base, "_CPU_CHUNK", chunk)
    x = _sample(case, (256, 1024), torch.bfloat16)
    case.codec.decode(case.codec.encode(x))  # builds the tables
    with _LargestOutput() as largest:
        kept = case.codec.encode(x)
    assert largest.nbytes <= max(8 * chunk, *(t.untyped_storage().nbytes() for t in kept.tensors), 0)
    with _LargestOutput() as largest:
        y = case.codec.decode(kept)
    assert largest.nbytes <= max(16 * chunk, y.untyped_storage().nbytes())


@every_case
def test_fake_tensors_have_the_real_bytes(case: Case) -> None:
    """A memory estimate under FakeTensorMode sees what a real run stores, and leaves no fake table behind."""
    shape = (3, 5, 96)
    with FakeTensorMode():
        x = torch.empty(shape, dtype=torch.bfloat16)
        kept = case.codec.encode(x)
        y = case.codec.decode(kept)
    assert kept.nbytes == case.codec.nbytes(shape, x.dtype)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    real = _sample(case, shape, torch.bfloat16)
    assert case.codec.decode(case.codec.encode(real)).shape == shape


@every_case
def test_bits_per_element_is_the_limit_of_nbytes(case: Case) -> None:
    shape = (1 << 14, 1 << 16)
    dtype = torch.bfloat16
    measured = 8 * case.codec.nbytes(shape, dtype) / math.prod(shape)
    assert case.codec.bits_per_element(dtype) == pytest.approx(measured, rel=1e-3)


@every_case
def test_wrong_dtype_is_refused(case: Case) -> None:
    if case.name == "exact":
        assert torch.equal(case.codec.decode(case.codec.encode(torch.arange(5))), torch.arange(5))
        return
    wrong = torch.arange(4)
    with pytest.raises(TypeError, match=str(wrong.dtype)):
        case.codec.encode(wrong)


@every_case
def test_copies_and_pickles_decode_what_the_original_encoded(case: Case) -> None:
    x = _sample(case, (6, 70), torch.float32)
    kept = case.codec.encode(x)
    for twin in (copy.deepcopy(case.codec), pickle.loads(pickle.dumps(case.codec))):
        assert torch.equal(twin.decode(kept), case.codec.decode(kept))


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.label in {"int6-64", "step5-gelu"}], ids=lambda case: case.label
)
def test_compiled_regions_may_encode_and_decode(case: Case) -> None:
    x = _sample(case, (6, 64), torch.float32)
    codec = case.codec
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: codec.decode(codec.encode(x)), backend="eager")
    expected = codec.decode(codec.encode(x))
    assert torch.equal(compiled(x), expected)


def test_the_same_name_and_options_give_the_same_codec() -> None:
    assert get_codec("int8", group=32) is get_codec("int8", group=32)
    assert get_codec("int8", group=32) is not get_codec("int8")


def test_an_unknown_name_lists_the_known_ones_and_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown codec 'int88'; did you mean 'int8'\?") as error:
        get_codec("int88")
    assert all(name in str(error.value) for name in codec_names())


def test_a_name_that_is_gone_says_what_to_use() -> None:
    with pytest.raises(ValueError, match="'uint8' is gone; use ufixed8"):
        get_codec("uint8")
    with pytest.raises(ValueError, match="'rounding' is gone"):
        get_codec("int4", rounding="stochastic")


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="'exact' is registered already"):
        register_codec("exact", base.Exact)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("int8", {"group": 12}, "multiple of 8 from 8 to 1024, got 12"),
        ("int8", {"group": 2048}, "got 2048"),
        ("step4", {"activation": "gelo"}, "did you mean 'gelu'"),
        ("step4", {"activation": "gelu", "scale": 0.0}, "got 0.0"),
        ("crs", {"keep": 1.5}, r"keep must be in \(0, 1\], got 1.5"),
    ],
)
def test_bad_options_say_what_would_be_right(name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_codec(name, **options)
