"""Exact match and F1 as the official SQuAD 1.1 and 2.0 scripts count them.

Source: Rajpurkar et al., "SQuAD: 100,000+ Questions" (2016) and "Know What You Don't Know" (2018), the metric
described in their appendix and evaluation protocol.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

__all__ = ["exact_match", "normalise", "squad_metrics", "token_f1"]


def normalise(text: str) -> str:
    """Lower case without punctuation, articles and superfluous blanks."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(predicted: str, gold: str) -> float:
    """1.0 if the two answers are the same after `normalise`, else 0.0."""
    return float(normalise(predicted) == normalise(gold))


def token_f1(predicted: str, gold: str) -> float:
    """Harmonic mean of precision and recall over words; with an empty side, 1.0 only if both are empty."""
    words, gold_words = normalise(predicted).split(), normalise(gold).split()
    if not words or not gold_words:
        return float(words == gold_words)
    common = sum((Counter(words) & Counter(gold_words)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(words), common / len(gold_words)
    return 2 * precision * recall / (precision + recall)


def squad_metrics(
    predicted: Sequence[str],
    golds: Sequence[Sequence[str]],
    no_answer_scores: Sequence[float] | None = None,
    threshold: float = 0.0,
) -> dict[str, float]:
    """Metrics over a split, in per cent.

    Args:
        predicted: the best non-empty answer to each question.
        golds: the accepted answers to each question; none at all for an unanswerable one.
        no_answer_scores: how much better "no answer" scores than the best answer; None where each question has an
            answer (SQuAD 1.1).
        threshold: a question with a score above it is answered by nothing.

    Returns:
        `exact_match` and `f1`; for SQuAD 2.0 also `has_answer_*`, `no_answer_*`, and `best_*` at the thresholds
        that would have been best.
    """
    # Answers of nothing but articles and punctuation do not count as gold answers.
    accepted = [[gold for gold in answers if normalise(gold)] or [""] for answers in golds]
    pairs = list(zip(predicted, accepted, strict=True))
    exact = np.array([max(exact_match(text, gold) for gold in answers) for text, answers in pairs])
    f1 = np.array([max(token_f1(text, gold) for gold in answers) for text, answers in pairs])
    if no_answer_scores is None:
        return {"exact_match": 100 * float(exact.mean()), "f1": 100 * float(f1.mean())}
    answerable = np.array([answers != [""] for answers in accepted])
    silent = np.asarray(no_answer_scores, dtype=np.float64) > threshold
    if_silent = (~answerable).astype(float)
    best_exact, best_exact_threshold = _best_threshold(exact, if_silent, no_answer_scores)
    best_f1, best_f1_threshold = _best_threshold(f1, if_silent, no_answer_scores)
    exact, f1 = np.where(silent, if_silent, exact), np.where(silent, if_silent, f1)
    metrics: Mapping[str, float] = {
        "exact_match": exact.mean(),
        "f1": f1.mean(),
        **_part("has_answer", exact, f1, answerable),
        **_part("no_answer", exact, f1, ~answerable),
        "best_exact_match": best_exact,
        "best_f1": best_f1,
    }
    return {
        **{name: 100 * float(value) for name, value in metrics.items()},
        "best_exact_match_threshold": best_exact_threshold,
        "best_f1_threshold": best_f1_threshold,
    }


def _part(name: str, exact: np.ndarray, f1: np.ndarray, members: np.ndarray) -> dict[str, float]:
    if not members.any():
        return {}
    return {f"{name}_exact_match": exact[members].mean(), f"{name}_f1": f1[members].mean()}


def _best_threshold(
    if_answered: np.ndarray, if_silent: np.ndarray, no_answer_scores: Sequence[float]
) -> tuple[float, float]:
    """The best mean over all thresholds, and the smallest threshold that reaches it.

    Answering the questions in the order of their score: after the first k of them, the sum is that of the k answered
    and of the silence on the rest.
    """
    scores = np.asarray(no_answer_scores, dtype=np.float64)
    order = np.argsort(scores, kind="stable")
    gains = np.concatenate([[0.0], np.cumsum((if_answered - if_silent)[order])])
    sums = if_silent.sum() + gains
    # Questions of equal score are answered together: only the last of them is a threshold.
    ends = np.append(np.flatnonzero(np.diff(scores[order])) + 1, len(order))
    candidates = np.concatenate([[0], ends])
    best = int(candidates[np.argmax(sums[candidates])])
    threshold = float(scores[order][best - 1]) if best else float(scores.min() - 1)
    return float(sums[best] / len(scores)), threshold
