from __future__ import annotations

import pytest

from slimfit_ds.activations.codecs import codec_names, get_codec, register_codec
from slimfit_ds.activations.codecs.exact import Exact


def test_the_same_name_and_options_give_the_same_codec() -> None:
    assert get_codec("int8", group=32) is get_codec("int8", group=32)
    assert get_codec("int8", group=32) is not get_codec("int8")


def test_an_unknown_name_lists_the_known_ones_and_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown codec 'int88'; did you mean 'int8'\?") as error:
        get_codec("int88")
    assert all(name in str(error.value) for name in codec_names())


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="'exact' is registered already"):
        register_codec("exact", Exact)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("int8", {"group": 12}, "multiple of 8, got 12"),
        ("int4", {"rounding": "up"}, "got 'up'"),
        ("step4", {"activation": "gelo"}, "did you mean 'gelu'"),
        ("step4", {"activation": "gelu", "scale": 0.0}, "got 0.0"),
    ],
)
def test_bad_options_say_what_would_be_right(name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_codec(name, **options)
