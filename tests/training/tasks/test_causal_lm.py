"""Blocks of text, and loss on the assistant's words only."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import GPT2Config

from slimfit_ds.errors import ConfigError
from slimfit_ds.training.tasks import Preprocessing, Splits, make_task


def task_for(data, folder, **options):
    task = make_task({"name": "causal_lm", "max_length": 64, **options})
    task.study(Splits(data, data))
    task.load_preprocessing(Preprocessing(str(folder)), GPT2Config())
    return task


def learned(task, row):
    return task.tokenizer.decode([label for label in row["labels"] if label != -100])


CHAT = [
    {"role": "system", "content": "big cat"},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "bye dog"},
    {"role": "user", "content": "where"},
    {"role": "assistant", "content": "on mat"},
]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": CHAT},
        {
            "conversations": [
                {
                    "from": {"user": "human", "assistant": "gpt"}.get(m["role"], m["role"]),
                    "value": m["content"],
                }
                for m in CHAT
            ]
        },
    ],
    ids=["messages", "conversations"],
)
def test_only_the_assistants_words_are_learned(row, tokenizer_folder):
    data = Dataset.from_list([row])
    task = task_for(data, tokenizer_folder)
    prepared = task.prepare(data, training=True)[0]
    assert learned(task, prepared) == "bye dog </s> on mat </s>"
    assert "hello" in task.tokenizer.decode(prepared["input_ids"])
    kept = [
        (t, label)
        for t, label in zip(prepared["input_ids"], prepared["labels"], strict=True)
        if label != -100
    ]
    assert all(token == label for token, label in kept)


@pytest.mark.parametrize(
    ("row", "question"),
    [
        ({"instruction": "where is cat", "input": "", "output": "on mat"}, "where is cat"),
        ({"instruction": "where is cat", "input": "the house", "output": "on mat"}, "where is cat the house"),
        ({"prompt": "where is cat", "completion": "on mat"}, "where is cat"),
    ],
)
def test_instruction_columns(row, question, tokenizer_folder):
    data = Dataset.from_list([row])
    task = task_for(data, tokenizer_folder)
    prepared = task.prepare(data, training=True)[0]
    assert learned(task, prepared) == "on mat </s>"
    assert question in task.tokenizer.decode(prepared["input_ids"])


def test_the_tokenizers_own_template_is_used(tokenizer_folder):
    data = Dataset.from_list([{"prompt": "hello", "completion": "bye"}])
    task = task_for(data, tokenizer_folder)
    task.tokenizer.chat_template = (
        "{% for m in messages %}{{ ('1 ' if m['role'] == 'user' else '2 ') + m['content'] + ' 3 ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '2 ' }}{% endif %}"
    )
    prepared = task.prepare(data, training=True)[0]
    assert task.tokenizer.decode(prepared["input_ids"]) == "1 hello 3 2 bye 3"
    assert learned(task, prepared) == "bye 3"


def test_rows_whose_answer_is_cut_off_are_dropped(tokenizer_folder):
    data = Dataset.from_list(
        [{"prompt": "cat " * 40, "completion": "dog"}, {"prompt": "cat", "completion": "dog"}]
    )
    task = task_for(data, tokenizer_folder, max_length=24)
    assert len(task.prepare(data, training=True)) == 1
    with pytest.raises(ConfigError, match="max_length"):
        task.prepare(data.select([0]), training=True)


def test_plain_text_is_one_stream_in_blocks(tokenizer_folder):
    data = Dataset.from_list([{"text": "cat dog " * 6}, {"text": "mat"}])
    task = task_for(data, tokenizer_folder, max_length=8)
    prepared = task.prepare(data, training=True)
    assert [len(row["input_ids"]) for row in prepared] == [8, 8]
    end = [task.tokenizer.eos_token_id]
    one = task.tokenizer("cat dog " * 6)["input_ids"] + end + task.tokenizer("mat")["input_ids"] + end
    assert [token for row in prepared for token in row["input_ids"]] == one[:16]
    assert task.loss_terms(prepared).tolist() == [7, 7]


def test_loss_and_accuracy_by_hand(tokenizer_folder):
    data = Dataset.from_list([{"text": "cat"}])
    task = task_for(data, tokenizer_folder)
    chance = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 5, generator=chance)
    labels = torch.tensor([[1, 2, -100, 3], [-100, -100, 4, -100]])

    class Outputs:
        pass

    outputs = Outputs()
    outputs.logits = logits
    made = task.predict(outputs, {"labels": labels})
    assert made["terms"].tolist() == [2, 1]
    metrics = task.score({name: values.numpy() for name, values in made.items()}, data, data)
    picked = [(0, 0, 2), (0, 2, 3), (1, 1, 4)]  # the logits at a position predict the next label
    log_p = torch.log_softmax(logits.double(), dim=-1)
    expected = -np.mean([log_p[index].item() for index in picked])
    assert metrics["loss"] == pytest.approx(expected, rel=1e-6)
    assert metrics["perplexity"] == pytest.approx(math.exp(expected), rel=1e-6)
    assert metrics["token_accuracy"] == pytest.approx(
        np.mean([logits[b, t].argmax() == y for b, t, y in picked])
    )


def test_padding_is_neither_seen_nor_learned(tokenizer_folder):
    data = Dataset.from_list([{"text": "cat"}])
    task = task_for(data, tokenizer_folder)
    batch = task.collate([{"input_ids": [6, 7], "labels": [6, 7]}, {"input_ids": [8], "labels": [8]}])
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert batch["labels"].tolist() == [[6, 7], [8, -100]]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"body": "x"}], {}, "they share body"),
        ([{"messages": "hello"}], {}, "list of turns"),
        ([{"messages": [{"who": "me"}]}], {}, "role and a content"),
        ([{"text": "x"}], {"columns": ["words"]}, "no words"),
    ],
)
def test_wrong_columns(rows, options, message):
    data = Dataset.from_list(rows)
    with pytest.raises(ConfigError, match=message):
        make_task({"name": "causal_lm", **options}).study(Splits(data, data))
