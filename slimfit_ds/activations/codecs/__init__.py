"""Codecs: pure functions from a tensor to fewer bytes and back, found by name.

    codec = get_codec("int8", group=64)
    kept = codec.encode(x)          # kept.nbytes == codec.nbytes(x.shape, x.dtype)
    y = codec.decode(kept)          # shape and dtype of x

docs/codecs.md lists each codec's bytes and measured error.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Hashable, Mapping
from functools import cache, partial
from typing import Any

from slimfit_ds.activations.codecs.absmax import AbsmaxCodec
from slimfit_ds.activations.codecs.backend import real_tensors
from slimfit_ds.activations.codecs.base import Codec, Encoded, Exact
from slimfit_ds.activations.codecs.channels import StandardisedChannels
from slimfit_ds.activations.codecs.crs import ColumnRowSampling
from slimfit_ds.activations.codecs.paper import FixedPoint, TopK
from slimfit_ds.activations.codecs.step_derivative import StepDerivative

__all__ = [
    "Codec",
    "Encoded",
    "StepDerivative",
    "codec_names",
    "get_codec",
    "register_codec",
    "resolve_codec",
]

_CODECS: dict[str, Callable[..., Codec]] = {
    "exact": Exact,
    "int8": partial(AbsmaxCodec, "int8", 8, group=64),
    "int6": partial(AbsmaxCodec, "int6", 6, group=64),
    "int4": partial(AbsmaxCodec, "int4", 4, group=32),
    "int8_channel": lambda group=32: StandardisedChannels(AbsmaxCodec("int8", 8, group)),
    "step5": partial(StepDerivative, bits=5),
    "step4": partial(StepDerivative, bits=4),
    "step1": partial(StepDerivative, bits=1),
    "crs": lambda rows="exact", **options: ColumnRowSampling(get_codec(rows), **options),
    "fixed8": partial(FixedPoint, "fixed8", 3, 4),
    "fixed4": partial(FixedPoint, "fixed4", 2, 1),
    "ufixed8": partial(FixedPoint, "ufixed8", 0, 8, signed=False),
    "topk10": partial(TopK, "topk10", 0.1),
}

_REMOVED = {
    **dict.fromkeys(("int5", "int2", "lm4", "lm2", "lm1"), "int4 or int6"),
    **{f"{name}_channel": "int8_channel" for name in ("int6", "int5", "int4", "lm4", "lm2")},
    "uint8": "ufixed8",
    "step2": "step4",
    "mask": "replay or philox for the operation dropout",
}


def register_codec(name: str, factory: Callable[..., Codec]) -> None:
    """Make `get_codec(name, **options)` return `factory(**options)`.

    Raises:
        ValueError: the name is taken.
    """
    if name in _CODECS:
        raise ValueError(f"codec {name!r} is registered already")
    _CODECS[name] = factory


def codec_names() -> tuple[str, ...]:
    """Return every registered name, sorted."""
    return tuple(sorted(_CODECS))


def get_codec(name: str, **options: Hashable) -> Codec:
    """Return the codec of that name; the same name and options give the same object.

    Args:
        name: one of `codec_names()`.
        options: keyword arguments of the codec's factory, such as `group=128`.

    Raises:
        ValueError: the name is unknown, or an option has a value the codec refuses.
        TypeError: the codec has no such option.
    """
    if name in _REMOVED:
        raise ValueError(f"codec {name!r} is gone; use {_REMOVED[name]}")
    if "rounding" in options:
        raise ValueError(
            f"codec option 'rounding' is gone (of {name!r}): codecs round to nearest; leave it out"
        )
    if name not in _CODECS:
        near = difflib.get_close_matches(name, _CODECS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown codec {name!r}{hint} Known codecs: {', '.join(codec_names())}")
    return _build(name, tuple(sorted(options.items())))


@cache
def _build(name: str, options: tuple[tuple[str, Hashable], ...]) -> Codec:
    # Tables are fitted with real numbers, also while a memory estimate runs on fake tensors.
    with real_tensors():
        return _CODECS[name](**dict(options))


def resolve_codec(spec: Any) -> Codec | None:
    """Return the codec that a name, a mapping `{"name": ..., option: ...}` or a codec stands for; `None` for exact.

    Equal specifications give the same object, so that what is kept can be shared between operations.
    """
    if isinstance(spec, Mapping):
        spec = get_codec(spec["name"], **{key: value for key, value in spec.items() if key != "name"})
    elif isinstance(spec, str):
        spec = get_codec(spec)
    return None if spec is None or spec.name == "exact" else spec
