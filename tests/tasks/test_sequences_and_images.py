"""Columns, labels and batches of the classification and regression tasks."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    GPT2ForSequenceClassification,
    ViTConfig,
)

from slimfit_ds.errors import ConfigError
from slimfit_ds.tasks import Splits, make_task
from slimfit_ds.tasks.images import AUGMENTATIONS, colours, pixels

GLUE = {
    "cola": ("sentence",),
    "mrpc": ("sentence1", "sentence2"),
    "qqp": ("question1", "question2"),
    "qnli": ("question", "sentence"),
    "mnli": ("premise", "hypothesis"),
}


def study(name, rows, **options):
    data = rows if isinstance(rows, Dataset) else Dataset.from_list(rows)
    task = make_task({"name": name, **options})
    return task, task.study(Splits(data, data))


def batch_of(task, splits, source, config):
    """All rows as the Trainer hands them to the model, but for columns that it does not take."""
    task.load_preprocessing(source and str(source), config)
    parts = task.trainer_parts(splits)
    return parts["data_collator"](list(parts["eval_dataset"])), parts


@pytest.mark.parametrize("columns", GLUE.values(), ids=GLUE)
def test_the_columns_of_glue_tasks(columns, tokenizer_folder):
    row = dict.fromkeys(columns, "the cat") | {"label": 1, "idx": 0}
    task, splits = study("sequence_classification", [row, row | {"label": 0}])
    assert task.columns == columns
    batch, _ = batch_of(task, splits, tokenizer_folder, BertConfig())
    reference = task.tokenizer(*[["the cat"]] * len(columns))
    assert batch["input_ids"].tolist() == reference["input_ids"] * 2
    assert batch["token_type_ids"].tolist() == reference["token_type_ids"] * 2
    assert batch["labels"].tolist() == [1, 0]


def test_padding_and_cutting(tokenizer_folder):
    rows = [{"text": "cat", "label": 0}, {"text": "dog " * 30, "label": 1}]
    task, splits = study("sequence_classification", rows, max_length=10)
    batch, _ = batch_of(task, splits, tokenizer_folder, BertConfig())
    assert batch["input_ids"].shape == (2, 10)
    assert batch["attention_mask"].sum(dim=1).tolist() == [3, 10]
    assert batch["input_ids"][0, 3:].eq(0).all()


@pytest.mark.parametrize("padding", [None, 5])
def test_a_decoder_classifies_a_padded_batch_like_each_row(tokenizer_folder, padding):
    """Its head reads the last token that is no padding, by the id that its configuration names."""
    rows = [{"text": "cat", "label": 0}, {"text": "dog on the mat", "label": 1}]
    task, splits = study("sequence_classification", rows)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 128}
    config = GPT2Config(vocab_size=43, num_labels=2, pad_token_id=padding, **sizes)
    batch, _ = batch_of(task, splits, tokenizer_folder, config)
    model = GPT2ForSequenceClassification(config).eval()
    with torch.no_grad():
        together = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        alone = model(input_ids=batch["input_ids"][:1, : int(batch["attention_mask"][0].sum())]).logits
    torch.testing.assert_close(together[:1], alone)


@pytest.mark.parametrize("kind", ["roberta", "camembert", "mpnet", "bert", "gpt2"])
@pytest.mark.parametrize("length", [32, 33, 34])
def test_as_many_tokens_as_a_model_has_positions_for(kind, length):
    """Some count positions from behind the padding's place: what is not refused must run."""
    config = AutoConfig.for_model(
        kind, vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, pad_token_id=1,
        **({} if kind == "gpt2" else {"intermediate_size": 64}), max_position_embeddings=34,
    )  # fmt: skip
    task = make_task({"name": "sequence_classification", "max_length": length})
    model = AutoModelForSequenceClassification.from_config(config).eval()
    try:
        model(input_ids=torch.full((1, length), 5))
        works = True
    except (IndexError, RuntimeError):
        works = False
    assert bool(task.model_problems(config)) != works


@pytest.mark.parametrize(
    ("values", "names"),
    [
        (["spam", "ham", "spam"], ("ham", "spam")),
        ([2, 0, 2], ("0", "1", "2")),
        ([-1, 0, 1], ("-1", "0", "1")),
        ([100, 7, 100], ("7", "100")),
        ([True, False, True], ("False", "True")),
    ],
)
def test_labels_however_written(values, names):
    task, _ = study("sequence_classification", [{"text": "x", "label": value} for value in values])
    assert task.labels.names == names
    assert [names[task.labels.codes[value]] for value in values] == [str(value) for value in values]
    assert task.model_values()["id2label"] == dict(enumerate(names))


def test_class_labels_keep_their_order():
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes", "maybe"])})
    data = Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    task, _ = study("sequence_classification", data)
    assert task.labels.names == ("no", "yes", "maybe")


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"body": "x", "label": 0}], {}, "no known text columns in both splits, they share body, label"),
        ([{"text": "x"}], {}, "no column 'label' in split 'train' and 'validation'; the columns are text"),
        ([{"text": "x", "label": -1}], {}, "unlabelled"),
        ([{"text": "x", "label": 0.5}], {}, "whole numbers or texts"),
        ([{"text": "x", "label": [1]}], {}, "whole numbers or texts"),
        ([{"text": "x", "label": 0}], {"columns": ["a", "b"]}, "no 'a' and 'b'"),
        ([{"text": "x", "label": 0}, {"text": None, "label": 1}], {}, "has 1 empty"),
        ([{"text": "x", "label": "a"}, {"text": "y", "label": ""}], {}, "one class for each row"),
        (
            [{"text": "x", "label": "a"}] * 3,
            {},
            "all 3 rows of split 'train' have the class 'a'.*max_train_examples",
        ),
    ],
)
def test_wrong_columns_of_texts(rows, options, message):
    with pytest.raises(ConfigError, match=message):
        study("sequence_classification", rows, **options)


def test_regression_keeps_numbers_and_refuses_words(tokenizer_folder):
    task, splits = study("sequence_regression", [{"sentence1": "a", "sentence2": "b", "label": 2.5}])
    batch, _ = batch_of(task, splits, tokenizer_folder, BertConfig())
    assert batch["labels"].tolist() == [2.5]
    assert task.model_values() == {"num_labels": 1, "problem_type": "regression"}
    written, _ = study("sequence_regression", [{"text": "a", "label": "1.50"}])
    assert written._encode(["1.50"]) == [1.5]
    with pytest.raises(ConfigError, match="must hold numbers only"):
        study("sequence_regression", [{"text": "a", "label": "high"}])


def picture(seed, size=(6, 4)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8))


def test_pixels_by_the_formula():
    image = picture(0)
    mean, std = np.array([0.1, 0.2, 0.3], np.float32), np.array([0.5, 0.25, 1.0], np.float32)
    made = pixels(image, (6, 4), mean, std)
    assert made.shape == (3, 6, 4)
    values = np.asarray(image).astype(np.float64) / 255
    np.testing.assert_allclose(made, ((values - mean) / std).transpose(2, 0, 1), atol=1e-6)
    assert pixels(image.convert("L"), (8, 8), mean[:1], std[:1]).shape == (1, 8, 8)


def test_sixteen_bits_and_palettes_keep_their_brightness():
    eight = np.arange(0, 256, dtype=np.uint8).reshape(16, 16)
    deep = Image.fromarray(eight.astype(np.uint16) * 257)
    assert np.array_equal(np.asarray(colours(deep, 1)), eight)
    palette = picture(2).quantize(16)
    assert np.array_equal(np.asarray(colours(palette, 3)), np.asarray(palette.convert("RGB")))
    with pytest.raises(ValueError, match="float pixels"):
        colours(Image.new("F", (2, 2)), 1)


@pytest.mark.parametrize("columns", [("img", "label"), ("image", "label"), ("img", "fine_label")])
def test_image_batches(columns):
    def encoded(seed):
        buffer = io.BytesIO()
        picture(seed).save(buffer, "PNG")
        return {"bytes": buffer.getvalue(), "path": None}

    rows = [{columns[0]: encoded(seed), columns[1]: seed} for seed in range(3)]
    task, splits = study("image_classification", rows)
    batch, parts = batch_of(task, splits, None, ViTConfig(image_size=8))
    assert batch["pixel_values"].shape == (3, 3, 8, 8)
    assert batch["labels"].tolist() == [0, 1, 2]
    # What is saved beside the model prepares an image as training did.
    processed = parts["processing_class"](picture(1), return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(processed, batch["pixel_values"][1], atol=0.02, rtol=0)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmentation_is_a_function_of_its_chance(name):
    image, change = picture(1, (32, 32)), AUGMENTATIONS[name]
    results = [np.asarray(change(image, (32, 32), random.Random(seed))).tobytes() for seed in [*range(8), 0]]
    assert results[0] == results[-1]
    assert (len(set(results)) == 1) == (name == "none")


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"photo": 1, "label": 0}], {}, "no column img or image"),
        ([{"img": "text", "label": 0}], {"label_column": "class"}, "no column 'class'"),
        ([{"img": 3, "label": 0}], {}, "must hold images"),
    ],
)
def test_wrong_columns_of_images(rows, options, message):
    with pytest.raises(ConfigError, match=message):
        study("image_classification", rows, **options)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("sequence_clasification", "did you mean 'sequence_classification'"),
        ({}, "known tasks"),
        ({"name": "question_answering", "max_length": "long"}, "task.max_length"),
        ({"name": "question_answering", "max_lenght": 4}, "did you mean 'max_length'"),
        ({"name": "causal_lm", "max_length": 4}, "task.max_length is now max_length"),
    ],
)
def test_unknown_tasks_and_options(block, message):
    with pytest.raises(ConfigError, match=message):
        make_task(block)
