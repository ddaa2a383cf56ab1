"""Codecs by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Hashable
from functools import cache

from slimfit_ds.activations.codecs.base import Codec

__all__ = ["codec_names", "get_codec", "register_codec"]

_FACTORIES: dict[str, Callable[..., Codec]] = {}


def register_codec(name: str, factory: Callable[..., Codec]) -> None:
    """Make `get_codec(name, **options)` return `factory(**options)`.

    Raises:
        ValueError: the name is taken.
    """
    if name in _FACTORIES:
        raise ValueError(f"codec {name!r} is registered already")
    _FACTORIES[name] = factory


def codec_names() -> tuple[str, ...]:
    """Every registered name, sorted."""
    return tuple(sorted(_FACTORIES))


def get_codec(name: str, **options: Hashable) -> Codec:
    """The codec of that name; the same name and options give the same object.

    Args:
        name: one of `codec_names()`.
        options: keyword arguments of the codec's factory, such as `group=128` or `rounding="stochastic"`.

    Raises:
        ValueError: the name is unknown, or an option has a value the codec refuses.
        TypeError: the codec has no such option.
    """
    if name not in _FACTORIES:
        near = difflib.get_close_matches(name, _FACTORIES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown codec {name!r}{hint} Known codecs: {', '.join(codec_names())}")
    return _build(name, tuple(sorted(options.items())))


@cache
def _build(name: str, options: tuple[tuple[str, Hashable], ...]) -> Codec:
    return _FACTORIES[name](**dict(options))
