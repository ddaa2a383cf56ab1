"""Splits from local files, image folders, and the embedded data set."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from slimfit_ds.errors import ConfigError
from slimfit_ds.tasks.data import open_splits
from slimfit_ds.tasks.recipe import read_recipe

ROWS = {
    "train": [{"text": f"row {n}", "label": n % 2} for n in range(6)],
    "dev": [{"text": 'x, "y"', "label": 1}],
}


@pytest.fixture(autouse=True)
def _recipe(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "r.yaml").write_text("task: causal_lm\nmodel: m\n")
    monkeypatch.chdir(folder)


def splits_of(*overrides):
    return open_splits(read_recipe(["--config", "r.yaml", *overrides])[0])


def write_rows(path, rows):
    import pandas

    frame = pandas.DataFrame(rows)
    if path.suffix == ".parquet":
        frame.to_parquet(path)
    elif path.suffix == ".csv":
        frame.to_csv(path, index=False)
    elif path.suffix == ".tsv":
        path.write_text("text\tlabel\n" + "".join(f"{row['text']}\t{row['label']}\n" for row in rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("suffix", ["parquet", "csv", "tsv", "jsonl", "json"])
def test_each_file_format_gives_the_same_rows(tmp_path, suffix):
    for name, rows in ROWS.items():
        write_rows(tmp_path / f"{name}.{suffix}", rows)
    splits = splits_of(f"data_dir={tmp_path}")
    assert (splits.train_name, splits.evaluation_name) == ("train", "dev")
    assert splits.train.to_list() == ROWS["train"]
    assert splits.evaluation.to_list() == ROWS["dev"]


def test_numbered_parts_and_split_folders_are_joined(tmp_path):
    write_rows(tmp_path / "train-00000-of-00002.jsonl", ROWS["train"][:4])
    write_rows(tmp_path / "train-00001-of-00002.jsonl", ROWS["train"][4:])
    (tmp_path / "validation").mkdir()
    write_rows(tmp_path / "validation" / "part.jsonl", ROWS["dev"])
    splits = splits_of(f"data_dir={tmp_path}")
    assert splits.train.to_list() == ROWS["train"]
    assert splits.evaluation.to_list() == ROWS["dev"]


def test_mnli_evaluates_on_the_matched_split_unless_asked(tmp_path):
    write_rows(tmp_path / "train.jsonl", ROWS["train"])
    write_rows(tmp_path / "validation_matched.jsonl", ROWS["dev"])
    write_rows(tmp_path / "validation_mismatched.jsonl", ROWS["dev"] * 2)
    assert splits_of(f"data_dir={tmp_path}").evaluation_name == "validation_matched"
    assert len(splits_of(f"data_dir={tmp_path}", "eval_split=validation_mismatched").evaluation) == 2


def test_one_file_with_a_holdout(tmp_path):
    write_rows(tmp_path / "all.jsonl", ROWS["train"])
    splits = splits_of(f"data_dir={tmp_path / 'all.jsonl'}", "holdout=0.34", "seed=1")
    texts = [row["text"] for part in (splits.train, splits.evaluation) for row in part.to_list()]
    assert sorted(texts) == sorted(row["text"] for row in ROWS["train"])
    assert (len(splits.train), len(splits.evaluation)) == (3, 3)


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
def test_words_that_read_like_nothing_are_text(tmp_path, suffix):
    words = ["null", "NA", "None", "nan", ""]
    rows = [{"text": word, "label": 0} for word in words]
    for name in ("train", "dev"):
        write_rows(tmp_path / f"{name}.{suffix}", rows)
    assert splits_of(f"data_dir={tmp_path}").train[:]["text"] == words


def test_a_column_of_a_csv_is_numbers_only_if_it_is_written_as_numbers_are(tmp_path):
    for name in ("train", "dev"):
        (tmp_path / f"{name}.csv").write_text("text,label,score,price\n007,0,0.5,1.50\n1.50,1,2.25,2\n")
    train = splits_of(f"data_dir={tmp_path}").train
    assert train[:] == {
        "text": ["007", "1.50"],
        "label": [0, 1],
        "score": [0.5, 2.25],
        "price": ["1.50", "2"],
    }


@pytest.mark.parametrize("suffix", [".tif", ".gif", ".PNG"])
def test_an_image_folder_of_any_format(tmp_path, suffix):
    for split in ("train", "validation"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("L", (3, 2), 200).save(tmp_path / split / name / f"a{suffix}")
    train = splits_of(f"data_dir={tmp_path}").train
    assert train[:]["label"] == [0, 1]
    assert np.asarray(train[0]["image"].convert("L")).tolist() == [[200] * 3] * 2


def test_the_nested_squad_file(tmp_path):
    qas = [
        {"id": "1", "question": "who?", "answers": [{"text": "cat", "answer_start": 4}]},
        {"id": "2", "question": "why?", "answers": [], "is_impossible": True},
    ]
    content = {
        "version": "v2.0",
        "data": [{"title": "t", "paragraphs": [{"context": "the cat sat", "qas": qas}]}],
    }
    (tmp_path / "train-v2.0.json").write_text(json.dumps(content))
    (tmp_path / "dev-v2.0.json").write_text(json.dumps(content))
    rows = splits_of(f"data_dir={tmp_path}").train.to_list()
    assert rows[0] == {
        "id": "1",
        "question": "who?",
        "context": "the cat sat",
        "answers": {"text": ["cat"], "answer_start": [4]},
    }
    assert rows[1]["answers"] == {"text": [], "answer_start": []}


def test_an_image_folder_numbers_classes_by_name(tmp_path):
    from PIL import Image

    for split, count in (("train", 2), ("val", 1)):
        for name in ("zebra", "ant"):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (4, 4)).save(tmp_path / split / name / f"{number}.JPEG")
    splits = splits_of(f"data_dir={tmp_path}")
    assert splits.train.features["label"].names == ["ant", "zebra"]
    assert splits.train.select_columns(["label"]).to_dict() == {"label": [0, 0, 1, 1]}
    assert splits.train[0]["image"].size == (4, 4)
    assert splits.evaluation_name == "val"


def test_digits_are_all_there_and_split_by_class():
    import numpy as np

    splits = splits_of("data=embedded:digits")
    labels = [np.array(part[:]["label"]) for part in (splits.train, splits.evaluation)]
    assert [len(part) for part in labels] == [1437, 360]
    assert np.bincount(labels[1]).min() >= 34
    assert splits.train[0]["img"].size == (8, 8)


def test_a_limit_takes_the_first_rows(tmp_path):
    for name, rows in ROWS.items():
        write_rows(tmp_path / f"{name}.jsonl", rows)
    splits = splits_of(f"data_dir={tmp_path}", "max_train_examples=2", "max_eval_examples=99")
    assert splits.train.to_list() == ROWS["train"][:2]
    assert len(splits.evaluation) == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "data: name a hub data set"),
        (["data=embedded:letters"], "there is digits"),
        (["data_dir=/no/such/folder"], "no such folder or file: '/no/such/folder'"),
        (["data_dir={empty}"], "neither train and validation files"),
        (["data_dir={text}"], "must be a .parquet"),
        (["data_dir={broken}"], "cannot read"),
        (["data_dir={only_train}"], "set holdout=0.1"),
        (["data_dir={only_train}", "train_split=x", "eval_split=y"], "no split 'x'"),
        (["data=nobody/nothing"], "cannot load 'nobody/nothing' from the hub"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, overrides, message):
    places = {name: tmp_path / name for name in ("empty", "broken", "only_train")}
    for place in places.values():
        place.mkdir()
    places["text"] = tmp_path / "notes.txt"
    places["text"].write_text("hello")
    (places["broken"] / "train.parquet").write_text("not parquet")
    write_rows(places["only_train"] / "train.jsonl", ROWS["train"])
    with pytest.raises(ConfigError, match=r"data|split") as caught:
        splits_of(*(text.format(**places) for text in overrides))
    assert message in str(caught.value)
