"""Exact match and F1 against worked examples and brute force."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimfit_ds.tasks.squad_metrics import exact_match, normalise, squad_metrics, token_f1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Cat!", "cat"),
        ("an apple, a day", "apple day"),
        ("theatre", "theatre"),
        ("U.S.A.", "usa"),
        ("the", ""),
        ("A-10", "a10"),  # punctuation goes before articles, as in the official script
    ],
)
def test_normalise(text, expected):
    assert normalise(text) == expected


@pytest.mark.parametrize(
    ("predicted", "gold", "expected"),
    [
        ("the big cat", "big cat", 1.0),
        ("big red cat", "cat", 2 * (1 / 3 * 1) / (1 / 3 + 1)),
        ("cat cat", "cat dog", 0.5),
        ("dog", "cat", 0.0),
        ("", "", 1.0),
        ("", "cat", 0.0),
        ("the", "", 1.0),
    ],
)
def test_token_f1(predicted, gold, expected):
    assert token_f1(predicted, gold) == pytest.approx(expected)


def test_squad_1_takes_the_best_of_the_accepted_answers():
    metrics = squad_metrics(["red cat", "dog"], [["cat", "red cat"], ["a cat", "big dog"]])
    assert metrics == pytest.approx({"exact_match": 50.0, "f1": 100 * (1 + 2 / 3) / 2})


def test_squad_2_by_hand():
    # Answered rightly, wrongly silent, rightly silent, wrongly answered.
    metrics = squad_metrics(
        ["cat", "dog", "x", "y"],
        [["cat"], ["dog"], [], []],
        no_answer_scores=[-1.0, 0.5, 2.0, -0.5],
        threshold=0.0,
    )
    assert metrics["exact_match"] == metrics["f1"] == 50.0
    assert metrics["has_answer_exact_match"] == 50.0
    assert metrics["no_answer_f1"] == 50.0
    # Scores in order: cat -1, y -0.5, dog 0.5, x 2. Best is to answer only cat, or all up to dog: 3 of 4.
    assert metrics["best_exact_match"] == 75.0
    assert metrics["best_exact_match_threshold"] == -1.0


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["cat", "red cat", "dog"]),
            st.sampled_from([[], ["cat"], ["dog"]]),
            st.integers(-3, 3),
        ),
        min_size=1,
        max_size=12,
    )
)
def test_the_best_threshold_is_the_best_of_all(rows):
    predicted, golds, scores = zip(*rows, strict=True)
    metrics = squad_metrics(predicted, golds, [float(score) for score in scores])

    def mean_at(threshold, measure):
        values = []
        for text, answers, score in rows:
            given_text = "" if score > threshold else text
            values.append(max(measure(given_text, answer) for answer in (answers or [""])))
        return 100 * np.mean(values)

    for name, measure in (("best_exact_match", exact_match), ("best_f1", token_f1)):
        assert metrics[name] == pytest.approx(
            max(mean_at(limit, measure) for limit in np.arange(-4.5, 4.5, 1))
        )
        assert metrics[name] == pytest.approx(mean_at(metrics[f"{name}_threshold"], measure))
    assert metrics["exact_match"] == pytest.approx(mean_at(0, exact_match))
    assert metrics["f1"] == pytest.approx(mean_at(0, token_f1))
