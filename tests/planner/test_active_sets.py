"""Assumed active sets."""

import pytest

from slimfit_ds.planner.active_sets import choose_active
from slimfit_ds.schedule.schedule import room_at
from slimfit_ds.trainable.units import ParameterRoles, Unit

LAYERS = [Unit(f"l{i}", "linear", size) for i, size in enumerate([100, 1, 50, 50, 2, 10, 3, 4, 5, 6])]
SIZES = {layer.name: layer.numel for layer in LAYERS}


def choose(rate: float, kind: str, currency: str = "layers") -> list[str]:
    return choose_active(
        LAYERS, range(len(LAYERS)), room_at(ParameterRoles(tuple(LAYERS)), currency, rate), kind
    )


def test_worst_takes_the_largest_and_of_equals_the_later():
    assert choose(0.8, "worst") == ["l0", "l3"]


def test_expected_is_between_and_repeatable():
    chosen = choose(0.7, "expected")
    assert len(set(chosen)) == 3
    assert chosen == choose(0.7, "expected")
    assert sum(SIZES[name] for name in chosen) < sum(SIZES[name] for name in choose(0.7, "worst"))


def test_no_more_than_there_are():
    assert len(choose(0.0, "worst")) == len(LAYERS)
    assert len(choose(0.0, "expected")) == len(LAYERS)


def test_layers_that_may_not_train_are_left_out():
    free = [i for i in range(len(LAYERS)) if i != 0]
    assert "l0" not in choose_active(
        LAYERS, free, room_at(ParameterRoles(tuple(LAYERS)), "layers", 0.8), "worst"
    )


@pytest.mark.parametrize("kind", ["expected", "worst"])
def test_a_budget_of_parameters_is_kept_and_used(kind):
    # 231 parameters; 40 % of them leave room for one of the 50s and most of the small ones.
    spent = sum(SIZES[name] for name in choose(0.6, kind, "parameters"))
    assert 0.8 * 0.4 * 231 < spent <= 0.4 * 231


def test_unknown_kind():
    with pytest.raises(ValueError, match="typical"):
        choose(0.9, "typical")
