"""Windows, gold spans and best spans of question answering."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertConfig

from slimfit_ds.errors import ConfigError
from slimfit_ds.tasks import Splits, make_task
from slimfit_ds.tasks.question_answering import AnsweringOptions, best_span

CONTEXT = "the small cat sat on the red mat in the big house , the dog was on a blue box in the small house ."


def rows(*answers):
    return Dataset.from_list(
        [
            {
                "id": str(number),
                "question": " who was where ?",
                "context": CONTEXT,
                "answers": {
                    "text": [text] if text else [],
                    "answer_start": [CONTEXT.index(text)] if text else [],
                },
            }
            for number, text in enumerate(answers)
        ]
    )


@pytest.fixture
def task(tokenizer_folder):
    data = rows("red mat", "blue box", "")
    task = make_task({"name": "question_answering", "max_length": 20, "stride": 6})
    task.study(Splits(data, data))
    task.load_preprocessing(str(tokenizer_folder), BertConfig())
    return task


def windows_of(task, data):
    return task.trainer_parts(Splits(data, data))["eval_dataset"]


def test_every_gold_span_decodes_to_the_answer(task):
    answers = ["red mat", "blue box", ""]
    windows = windows_of(task, rows(*answers))
    assert len(windows) > len(answers)  # the context does not fit one window
    found = set()
    for window in windows:
        span = window["input_ids"][window["start_positions"] : window["end_positions"] + 1]
        text = task.tokenizer.decode(span, skip_special_tokens=True)
        assert (text in answers) or (window["start_positions"] == 0)
        found.add(text)
    assert {"red mat", "blue box"} <= found


def test_perfect_logits_give_perfect_scores_over_all_windows(task):
    data = rows("red mat", "blue box", "", "the small house")
    windows = windows_of(task, data)
    width = task.options.max_length
    start = np.full((len(windows), width), -5.0)
    end = np.full((len(windows), width), -5.0)
    start[:, 0] = end[:, 0] = 0.0
    for number, window in enumerate(windows):
        answer = data[window["row"]]["answers"]
        if not answer["text"]:
            continue
        begin, finish = answer["answer_start"][0], answer["answer_start"][0] + len(answer["text"][0])
        firsts = [t for t, offset in enumerate(window["offsets"]) if offset[0] == begin]
        lasts = [t for t, offset in enumerate(window["offsets"]) if offset[1] == finish]
        if firsts and lasts:
            start[number, firsts[0]] = end[number, lasts[0]] = 9.0
            start[number, 0] = end[number, 0] = -9.0
    metrics = task.score(start, end, windows, data)
    assert metrics["exact_match"] == metrics["f1"] == metrics["no_answer_f1"] == 100.0


@given(st.integers(0, 10**6), st.integers(2, 14), st.integers(1, 5))
def test_best_span_is_the_best_of_all(seed, length, longest):
    chance = np.random.default_rng(seed)
    start, end = chance.normal(size=(2, length))
    offsets = [[n, n + 1] if chance.random() < 0.7 else [-1, -1] for n in range(length)]
    options = AnsweringOptions(max_answer_length=longest, candidates=length)
    every = [
        (start[i] + end[j], offsets[i][0], offsets[j][1])
        for i in range(length)
        for j in range(i, min(length, i + longest))
        if offsets[i][0] >= 0 and offsets[j][0] >= 0
    ]
    found = best_span(start, end, offsets, options)
    assert found == (pytest.approx(max(every)) if every else None)


def test_missing_columns_are_named():
    data = Dataset.from_list([{"question": "q", "text": "c"}])
    with pytest.raises(ConfigError) as caught:
        make_task({"name": "question_answering"}).study(Splits(data, data))
    assert len(caught.value.problems) == 2
    assert "no column 'context' in split 'train' and 'validation'" in caught.value.problems[0]
    assert "no column 'answers'" in caught.value.problems[1]
