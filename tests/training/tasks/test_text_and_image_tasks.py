"""Columns, labels and batches of the classification and regression tasks."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from PIL import Image
from transformers import BertConfig, ViTConfig

from slimfit_ds.errors import ConfigError
from slimfit_ds.training.tasks import Preprocessing, Splits, make_task
from slimfit_ds.training.tasks.images import AUGMENTATIONS, pixels

GLUE = {
    "cola": ("sentence",),
    "sst2": ("sentence",),
    "mrpc": ("sentence1", "sentence2"),
    "stsb": ("sentence1", "sentence2"),
    "rte": ("sentence1", "sentence2"),
    "wnli": ("sentence1", "sentence2"),
    "qqp": ("question1", "question2"),
    "qnli": ("question", "sentence"),
    "mnli": ("premise", "hypothesis"),
}


def study(name, rows, **options):
    data = rows if isinstance(rows, Dataset) else Dataset.from_list(rows)
    task = make_task({"name": name, **options})
    return task, task.study(Splits(data, data))


@pytest.mark.parametrize("columns", GLUE.values(), ids=GLUE)
def test_the_columns_of_every_glue_task(columns, tokenizer_folder):
    row = dict.fromkeys(columns, "the cat") | {"label": 1, "idx": 0}
    task, splits = study("sequence_classification", [row, row | {"label": 0}])
    assert task.columns == columns
    task.load_preprocessing(Preprocessing(str(tokenizer_folder)), BertConfig())
    batch = task.collate(list(task.prepare(splits.train, training=True)))
    reference = task.tokenizer(*[["the cat"]] * len(columns))
    assert batch["input_ids"].tolist() == reference["input_ids"] * 2
    assert batch["token_type_ids"].tolist() == reference["token_type_ids"] * 2
    assert batch["labels"].tolist() == [1, 0]


def test_padding_and_cutting(tokenizer_folder):
    task, splits = study(
        "sequence_classification",
        [{"text": "cat", "label": 0}, {"text": "dog " * 30, "label": 1}],
        max_length=10,
    )
    task.load_preprocessing(Preprocessing(str(tokenizer_folder)), BertConfig())
    batch = task.collate(list(task.prepare(splits.train, training=True)))
    assert batch["input_ids"].shape == (2, 10)
    assert batch["attention_mask"].sum(dim=1).tolist() == [3, 10]
    assert batch["input_ids"][0, 3:].eq(0).all()


@pytest.mark.parametrize(
    ("values", "names"),
    [
        (["spam", "ham", "spam"], ("ham", "spam")),
        ([2, 0, 2], ("0", "1", "2")),
        ([100, 7, 100], ("7", "100")),
        ([True, False, True], ("False", "True")),
    ],
)
def test_labels_however_written(values, names):
    task, _ = study("sequence_classification", [{"text": "x", "label": value} for value in values])
    assert task.labels.names == names
    assert [names[code] for code in task.labels.encode(values)] == [str(value) for value in values]
    assert task.model_values()["id2label"] == dict(enumerate(names))


def test_class_labels_keep_their_order():
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes", "maybe"])})
    data = Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    task, _ = study("sequence_classification", data)
    assert task.labels.names == ("no", "yes", "maybe")


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"body": "x", "label": 0}], {}, "no known text columns among body, label"),
        ([{"text": "x"}], {}, "no column 'label' in split 'train' and 'validation'; the columns are text"),
        ([{"text": "x", "label": -1}], {}, "unlabelled"),
        ([{"text": "x", "label": 0.5}], {}, "whole numbers or texts"),
        ([{"text": "x", "label": [1]}], {}, "whole numbers or texts"),
        ([{"text": "x", "label": 0}], {"columns": ["a", "b"]}, "no column 'a'"),
    ],
)
def test_wrong_columns_of_texts(rows, options, message):
    with pytest.raises(ConfigError, match=message):
        study("sequence_classification", rows, **options)


def test_regression_keeps_numbers_and_refuses_words(tokenizer_folder):
    task, splits = study("sequence_regression", [{"sentence1": "a", "sentence2": "b", "label": 2.5}])
    task.load_preprocessing(Preprocessing(str(tokenizer_folder)), BertConfig())
    batch = task.collate(list(task.prepare(splits.train, training=True)))
    assert batch["labels"].tolist() == [2.5]
    assert task.model_values() == {"num_labels": 1, "problem_type": "regression"}
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


@pytest.mark.parametrize("columns", [("img", "label"), ("image", "label"), ("img", "fine_label")])
def test_image_batches(columns):
    import io

    def encoded(seed):
        buffer = io.BytesIO()
        picture(seed).save(buffer, "PNG")
        return {"bytes": buffer.getvalue(), "path": None}

    rows = [{columns[0]: encoded(seed), columns[1]: seed} for seed in range(3)]
    task, splits = study("image_classification", rows)
    task.load_preprocessing(Preprocessing(None), ViTConfig(image_size=8))
    prepared = task.prepare(splits.train, training=False)
    batch = task.collate([task.example(prepared[n], None) for n in range(3)])
    assert batch["pixel_values"].shape == (3, 3, 8, 8)
    assert batch["labels"].tolist() == [0, 1, 2]
    logits = np.eye(3)
    assert task.score({"logits": logits}, prepared, splits.train)["accuracy"] == 1.0


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmentation_is_a_function_of_its_chance(name):
    image = picture(1, (32, 32))
    change = AUGMENTATIONS[name]
    results = [
        np.asarray(change(image, (32, 32), np.random.default_rng(seed))).tobytes() for seed in [*range(8), 0]
    ]
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
        ({"name": "sequence_clasification"}, "did you mean 'sequence_classification'"),
        ({}, "known tasks"),
        ({"name": "causal_lm", "max_length": "long"}, "task.max_length"),
        ({"name": "causal_lm", "max_lenght": 4}, "did you mean 'max_length'"),
    ],
)
def test_unknown_tasks_and_options(block, message):
    with pytest.raises(ConfigError, match=message):
        make_task(block)
