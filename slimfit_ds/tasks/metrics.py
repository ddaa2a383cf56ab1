"""Metrics of classification and regression as GLUE counts them, by scikit-learn and scipy."""

from __future__ import annotations

import numpy as np

__all__ = ["classification_metrics", "regression_metrics"]


def classification_metrics(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy, F1 (of class 1 for two classes, else the mean over classes), Matthews correlation.

    Args:
        logits: `[examples, classes]`.
        labels: `[examples]` class numbers.
    """
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    predicted = logits.argmax(axis=-1)
    average = "binary" if logits.shape[-1] == 2 else "macro"
    return {
        "accuracy": float(accuracy_score(labels, predicted)),
        "f1": float(f1_score(labels, predicted, average=average, zero_division=0.0)),
        "matthews_correlation": float(matthews_corrcoef(labels, predicted)),
    }


def regression_metrics(predicted: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Pearson and Spearman correlation (0 where one side is constant).

    Args:
        predicted, targets: `[examples]`.
    """
    from scipy.stats import pearsonr, spearmanr

    predicted, targets = predicted.astype(np.float64), targets.astype(np.float64)
    constant = np.ptp(predicted) == 0 or np.ptp(targets) == 0
    pearson = 0.0 if constant else float(pearsonr(predicted, targets).statistic)
    spearman = 0.0 if constant else float(spearmanr(predicted, targets).statistic)
    return {
        "pearson": pearson,
        "spearman": spearman,
        "pearson_spearman": (pearson + spearman) / 2,
    }
