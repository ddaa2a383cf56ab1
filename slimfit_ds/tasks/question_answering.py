"""Extractive question answering with the columns of SQuAD 1.1 and 2.0.

A context longer than the model's window is cut into overlapping windows; the answer is the best span over all
windows of a question. A question may have no answer (SQuAD 2.0): the span of the first token then stands for it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from slimfit_ds.errors import ConfigError
from slimfit_ds.tasks.base import Splits
from slimfit_ds.tasks.squad_metrics import squad_metrics
from slimfit_ds.tasks.text import TextOptions, TextTask, map_rows

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["AnsweringOptions", "QuestionAnswering", "best_span"]

COLUMNS = ("question", "context", "answers")


class AnsweringOptions(TextOptions):
    """Options of question answering."""

    max_length: int = Field(384, ge=16, description="tokens of question and context window together")
    stride: int = Field(128, ge=0, description="tokens that neighbouring windows share")
    max_answer_length: int = Field(30, ge=1, description="tokens of an answer at most")
    candidates: int = Field(20, ge=1, description="best starts and ends that are combined")
    null_threshold: float = Field(0.0, description="how much better no answer must score to be given")


class QuestionAnswering(TextTask[AnsweringOptions]):
    """The span of a context that answers a question."""

    name = "question_answering"
    auto_class = "AutoModelForQuestionAnswering"
    options_class = AnsweringOptions
    has_unanswerable = False

    @property
    def max_length(self) -> int:  # type: ignore[override]
        return self.options.max_length

    @property
    def metrics(self) -> tuple[str, ...]:  # type: ignore[override]
        names = ("loss", "exact_match", "f1")
        return (*names, "best_exact_match", "best_f1") if self.has_unanswerable else names

    def study(self, splits: Splits) -> Splits:
        problems = [line for column in COLUMNS for line in splits.missing("task", column)]
        problems += splits.empty_cells("task", COLUMNS)
        for name, split in splits.named():
            if "answers" in split.column_names and not _has_answer_fields(split):
                problems.append(
                    f"task: column 'answers' of split {name!r} must hold text and answer_start lists"
                )
        if self.options.stride >= self.options.max_length // 2:
            problems.append(
                f"task.stride must be below half of task.max_length ({self.options.max_length}), "
                f"got {self.options.stride}"
            )
        if problems:
            raise ConfigError(problems)
        self.has_unanswerable = any(
            not answers["text"] for _, split in splits.named() for answers in _column(split, "answers")
        )
        return splits

    def trainer_parts(self, splits: Splits) -> dict[str, Any]:
        from transformers import DataCollatorWithPadding

        windows = map_rows(splits.evaluation.select_columns(list(COLUMNS)), self._windows, with_indices=True)
        return {
            "train_dataset": map_rows(
                splits.train.select_columns(list(COLUMNS)), self._windows, with_indices=True
            ),
            "eval_dataset": windows,
            "data_collator": DataCollatorWithPadding(self.tokenizer),
            "processing_class": self.tokenizer,
            "compute_metrics": lambda result: self.score(
                result.predictions[0], result.predictions[1], windows, splits.evaluation
            ),
        }

    def _windows(self, batch: Mapping[str, list[Any]], rows: Sequence[int]) -> dict[str, Any]:
        """Tokens of each window, its answer, and for the metrics the characters of its tokens and its row.

        The Trainer hands the model those columns only that it takes.
        """
        windows = self.tokenizer(
            [question.lstrip() for question in batch["question"]],
            batch["context"],
            truncation="only_second",
            max_length=self.options.max_length,
            stride=self.options.stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        sources = windows["overflow_to_sample_mapping"]
        spans = [_token_span(windows, number, batch["answers"][row]) for number, row in enumerate(sources)]
        # (-1, -1) marks question and special tokens, which answer nothing.
        offsets = [
            [
                list(offset) if sequence == 1 else [-1, -1]
                for offset, sequence in zip(
                    windows["offset_mapping"][number], windows.sequence_ids(number), strict=True
                )
            ]
            for number in range(len(sources))
        ]
        return {
            **{name: windows[name] for name in self.tokenizer.model_input_names if name in windows},
            "start_positions": [start for start, _ in spans],
            "end_positions": [end for _, end in spans],
            "offsets": offsets,
            "row": [rows[source] for source in sources],
        }

    def score(
        self, starts: np.ndarray, ends: np.ndarray, windows: Dataset, original: Dataset
    ) -> dict[str, float]:
        """The metrics over a whole split.

        Args:
            starts, ends: `[windows, seq]` logits.
            windows: the split as the model saw it.
            original: the split before.
        """
        windows_of: dict[int, list[int]] = defaultdict(list)
        for window, row in enumerate(_column(windows, "row")):
            windows_of[row].append(window)
        offsets = windows.select_columns(["offsets"])
        texts, null_scores = [], []
        for row, context in enumerate(_column(original, "context")):
            text, span_score, null_score = "", -np.inf, np.inf
            for window in windows_of[row]:
                start, end = starts[window], ends[window]
                null_score = min(null_score, float(start[0] + end[0]))
                found = best_span(start, end, offsets[window]["offsets"], self.options)
                if found is not None and found[0] > span_score:
                    span_score, text = found[0], context[found[1] : found[2]]
            texts.append(text)
            null_scores.append(null_score - span_score)
        golds = [answers["text"] for answers in _column(original, "answers")]
        return squad_metrics(
            texts, golds, null_scores if self.has_unanswerable else None, self.options.null_threshold
        )


def best_span(
    start: np.ndarray, end: np.ndarray, offsets: Sequence[Sequence[int]], options: AnsweringOptions
) -> tuple[float, int, int] | None:
    """The best answer in one window: its score, first and last character.

    Args:
        start, end: `[seq]` logits.
        offsets: first and last character of each token, (-1, -1) for tokens that answer nothing.
        options: limits on candidates and length.
    """
    in_context = np.array([offset[0] >= 0 for offset in offsets])
    first = np.where(in_context, start[: len(offsets)], -np.inf)
    last = np.where(in_context, end[: len(offsets)], -np.inf)
    starts = np.argsort(-first, kind="stable")[: options.candidates]
    ends = np.argsort(-last, kind="stable")[: options.candidates]
    scores = first[starts][:, None] + last[ends][None, :]
    lengths = ends[None, :] - starts[:, None] + 1
    scores = np.where((lengths >= 1) & (lengths <= options.max_answer_length), scores, -np.inf)
    row, column = np.unravel_index(np.argmax(scores), scores.shape)
    if not np.isfinite(scores[row, column]):
        return None
    return float(scores[row, column]), offsets[starts[row]][0], offsets[ends[column]][1]


def _token_span(windows: Any, number: int, answers: Mapping[str, Any]) -> tuple[int, int]:
    """First and last token of the first gold answer, (0, 0) where this window does not hold all of it."""
    if not answers["text"]:
        return 0, 0
    begin = answers["answer_start"][0]
    finish = begin + len(answers["text"][0])
    inside = [
        (token, offset)
        for token, (offset, sequence) in enumerate(
            zip(windows["offset_mapping"][number], windows.sequence_ids(number), strict=True)
        )
        if sequence == 1
    ]
    if not inside or inside[0][1][0] > begin or inside[-1][1][1] < finish:
        return 0, 0
    start = max(token for token, offset in inside if offset[0] <= begin)
    end = min(token for token, offset in inside if offset[1] >= finish)
    return start, end


def _has_answer_fields(split: Dataset) -> bool:
    first = split[0]["answers"] if len(split) else {"text": [], "answer_start": []}
    return isinstance(first, Mapping) and {"text", "answer_start"} <= set(first)


def _column(split: Dataset, name: str) -> list[Any]:
    return split.select_columns([name])[:][name]
