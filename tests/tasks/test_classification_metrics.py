"""The GLUE metrics against their formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest

from slimfit_ds.tasks.metrics import classification_metrics, regression_metrics


def test_two_classes_from_the_table_of_confusions():
    labels = np.array([1] * 6 + [0] * 4)
    predicted = np.array([1, 1, 1, 1, 0, 0, 1, 0, 0, 0])
    tp, fn, fp, tn = 4, 2, 1, 3
    logits = np.stack([1.0 - predicted, predicted.astype(float)], axis=1)
    metrics = classification_metrics(logits, labels)
    assert metrics["accuracy"] == pytest.approx((tp + tn) / 10)
    assert metrics["f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
    root = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert metrics["matthews_correlation"] == pytest.approx((tp * tn - fp * fn) / root)


def test_f1_of_many_classes_is_the_mean_over_classes():
    logits = np.eye(3)[[0, 1, 1]]
    assert classification_metrics(logits, np.array([0, 1, 2]))["f1"] == pytest.approx((1 + 2 / 3 + 0) / 3)


def test_regression():
    predicted, targets = np.array([1.0, 2.0, 4.0, 3.0]), np.array([1.0, 2.0, 3.0, 5.0])
    x, y = predicted - predicted.mean(), targets - targets.mean()
    metrics = regression_metrics(predicted, targets)
    assert metrics["pearson"] == pytest.approx((x * y).sum() / math.sqrt((x**2).sum() * (y**2).sum()))
    # Ranks 1 2 4 3 and 1 2 3 4: 1 - 6 * sum(d^2) / (n (n^2 - 1))
    assert metrics["spearman"] == pytest.approx(1 - 6 * 2 / (4 * 15))


def test_a_constant_prediction_has_no_correlation():
    metrics = regression_metrics(np.ones(3), np.array([1.0, 2.0, 3.0]))
    assert (metrics["pearson"], metrics["spearman"]) == (0.0, 0.0)
