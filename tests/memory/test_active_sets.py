"""Assumed active sets."""

import pytest

from slimfit_ds.freezing.layers import Layer
from slimfit_ds.memory.active_sets import choose_active

LAYERS = [Layer(f"l{i}", "linear", size) for i, size in enumerate([100, 1, 50, 50, 2, 10, 3, 4, 5, 6])]


def test_worst_takes_the_largest_and_of_equals_the_later():
    assert choose_active(LAYERS, 2, "worst") == ["l0", "l3"]


def test_expected_is_between_and_repeatable():
    chosen = choose_active(LAYERS, 3, "expected")
    assert len(set(chosen)) == 3
    assert chosen == choose_active(LAYERS, 3, "expected")
    sizes = {layer.name: layer.numel for layer in LAYERS}
    assert sum(sizes[name] for name in chosen) < sum(sizes[n] for n in choose_active(LAYERS, 3, "worst"))


def test_no_more_than_there_are():
    assert len(choose_active(LAYERS, 99, "worst")) == len(LAYERS)
    assert len(choose_active(LAYERS, 99, "expected")) == len(LAYERS)


def test_unknown_kind():
    with pytest.raises(ValueError, match="typical"):
        choose_active(LAYERS, 1, "typical")
