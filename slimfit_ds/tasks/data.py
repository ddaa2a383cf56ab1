"""The two splits of a run: from the hub, from local files, from an image folder, or carried by a package."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimfit_ds.errors import ConfigError
from slimfit_ds.tasks.base import Splits

if TYPE_CHECKING:
    from datasets import Dataset

    from slimfit_ds.tasks.recipe import Recipe

__all__ = ["EMBEDDED", "open_splits"]

TRAIN_NAMES = ("train", "training")
EVALUATION_NAMES = ("validation", "validation_matched", "dev", "val", "valid", "eval", "test")
READERS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json"}


def open_splits(recipe: Recipe) -> Splits:
    """The training and the evaluation split of a recipe.

    Raises:
        ConfigError: the data are not there or cannot be read, or have no such split.
    """
    import datasets

    datasets.disable_progress_bars()
    if recipe.data_dir is not None:
        available = _local(recipe.data_dir, recipe)
    elif recipe.data is None:
        raise ConfigError(
            ["data: name a hub data set or embedded:digits, or a local folder or file in data_dir"]
        )
    elif recipe.data.startswith("embedded:"):
        available = _embedded(recipe.data.removeprefix("embedded:"))
    else:
        available = _hub(recipe.data, recipe.data_name)
    splits = _choose(available, recipe)
    for key, name, split in (
        ("train_split", splits.train_name, splits.train),
        ("eval_split", splits.evaluation_name, splits.evaluation),
    ):
        if len(split) == 0:
            raise ConfigError([f"{key}: split {name!r} is empty"])
    return Splits(
        train=_first(splits.train, recipe.max_train_examples),
        evaluation=_first(splits.evaluation, recipe.max_eval_examples),
        train_name=splits.train_name,
        evaluation_name=splits.evaluation_name,
    )


def _first(split: Dataset, count: int | None) -> Dataset:
    return split if count is None else split.select(range(min(count, len(split))))


def _choose(available: dict[str, Dataset], recipe: Recipe) -> Splits:
    """Training and evaluation split by the recipe's names or the usual ones."""
    names = ", ".join(available)
    problems = [
        f"{key}: there is no split {wanted!r}; the splits are {names}"
        for key, wanted in (("train_split", recipe.train_split), ("eval_split", recipe.eval_split))
        if wanted is not None and wanted not in available
    ]
    if problems:
        raise ConfigError(problems)
    train_name = recipe.train_split or next((name for name in TRAIN_NAMES if name in available), None)
    evaluation_name = recipe.eval_split or next(
        (name for name in EVALUATION_NAMES if name in available), None
    )
    if train_name is None:
        raise ConfigError([f"train_split: no split is called train; choose one of {names}"])
    if evaluation_name is not None:
        return Splits(available[train_name], available[evaluation_name], train_name, evaluation_name)
    if recipe.holdout is None:
        raise ConfigError(
            [
                f"eval_split: no split to evaluate on among {names}; name one, or set holdout=0.1 to split {train_name!r}"
            ]
        )
    parts = available[train_name].train_test_split(test_size=recipe.holdout, seed=0)
    return Splits(parts["train"], parts["test"], train_name, f"holdout of {train_name}")


def _local(place: str, recipe: Recipe) -> dict[str, Dataset]:
    """Splits of a folder or file on this machine."""
    path = Path(place).expanduser()
    try:
        is_file, is_folder = path.is_file(), path.is_dir()
    except (OSError, ValueError):
        is_file = is_folder = False
    if is_file:
        if path.suffix.lower() not in READERS:
            raise ConfigError([f"data_dir: {place!r} must be a {', '.join(READERS)} file"])
        return {"train": _read([path])}
    if not is_folder:
        raise ConfigError([f"data_dir: no such folder or file: {place!r}"])
    found: dict[str, list[Path]] = {}
    wanted = [name for name in (recipe.train_split, recipe.eval_split) if name]
    # Longer names first: validation_matched.parquet is not a part of validation.
    names = sorted({*TRAIN_NAMES, *EVALUATION_NAMES, *wanted}, key=len, reverse=True)
    for file in sorted(file for file in path.rglob("*") if file.suffix.lower() in READERS and file.is_file()):
        name = next(
            (name for name in names if file.stem == name or file.stem.startswith((f"{name}-", f"{name}."))),
            None,
        )
        name = name or next(
            (name for name in names if file.parent.name == name and file.parent != path), None
        )
        if name is not None:
            found.setdefault(name, []).append(file)
    if found:
        return {name: _read(files) for name, files in found.items()}
    folders = {name: path / name for name in names if (path / name).is_dir() and _has_images(path / name)}
    if folders:
        return {name: _image_folder(folder) for name, folder in folders.items()}
    if any(_has_images(folder) for folder in path.iterdir() if folder.is_dir()):
        return {"train": _image_folder(path)}
    raise ConfigError(
        [
            f"data_dir: {place!r} holds neither train and validation files ({', '.join(READERS)}) "
            "nor folders of images"
        ]
    )


def _read(files: list[Path]) -> Dataset:
    """One split from files of one kind."""
    from datasets import load_dataset

    suffix = files[0].suffix.lower()
    if any(file.suffix.lower() != suffix for file in files):
        raise ConfigError([f"data_dir: {files[0].parent} mixes file types in one split: {_names(files)}"])
    if suffix == ".json" and len(files) == 1:
        rows = _nested_squad(files[0])
        if rows is not None:
            return rows
    options: dict[str, Any] = {"delimiter": "\t", "quoting": 3} if suffix == ".tsv" else {}
    try:
        if READERS[suffix] == "csv":
            # Words such as "null", "NA" and "None" are text; what is really empty stays an empty text.
            options |= {
                "converters": dict.fromkeys(_header(files[0], options), str),
                "keep_default_na": False,
            }
        rows = load_dataset(
            READERS[suffix], data_files={"train": [str(file) for file in files]}, split="train", **options
        )
        return _with_numbers(rows) if READERS[suffix] == "csv" else rows
    except Exception as error:  # each reader fails in its own way
        cause = error.__cause__ or error
        raise ConfigError(
            [f"data_dir: cannot read {_names(files)} as {suffix[1:]} ({_one_line(cause)})"]
        ) from None


def _header(file: Path, options: Mapping[str, Any]) -> list[str]:
    import pandas

    return list(pandas.read_csv(file, nrows=0, **options).columns)


def _with_numbers(rows: Dataset) -> Dataset:
    """Make numbers of the columns in which every text is written as its number is: "7", not "007" or "1.50"."""
    from datasets import Value

    table = rows.with_format("arrow")[:]
    for name in rows.column_names:
        texts = table.column(name)
        for kind in ("int64", "float64"):
            try:
                exact = texts.cast(kind).cast(texts.type).equals(texts)
            except ValueError:
                continue
            if exact:
                rows = rows.cast_column(name, Value(kind))
                break
    return rows


def _nested_squad(file: Path) -> Dataset | None:
    """The rows of a file in the official nested SQuAD format; None if it is another JSON file."""
    from datasets import Dataset

    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return None  # JSON lines under the name .json
    if not (isinstance(content, dict) and isinstance(content.get("data"), list)):
        return None
    try:
        return Dataset.from_list(
            [
                {
                    "id": str(qa["id"]),
                    "question": qa["question"],
                    "context": paragraph["context"],
                    "answers": {
                        "text": [answer["text"] for answer in qa["answers"]],
                        "answer_start": [answer["answer_start"] for answer in qa["answers"]],
                    },
                }
                for article in content["data"]
                for paragraph in article["paragraphs"]
                for qa in paragraph["qas"]
            ]
        )
    except (KeyError, TypeError) as error:
        raise ConfigError([f"data_dir: {file} is not in the SQuAD format (missing {error})"]) from None


@functools.cache
def _image_suffixes() -> frozenset[str]:
    """Of every format that Pillow reads, `.tif` and `.gif` among them."""
    from PIL import Image

    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN)


def _has_images(folder: Path) -> bool:
    """Whether the folder holds one sub-folder of images for each class."""
    return any(
        file.suffix.lower() in _image_suffixes()
        for inner in folder.iterdir()
        if inner.is_dir()
        for file in inner.iterdir()
    )


def _image_folder(folder: Path) -> Dataset:
    """`image` and `label` of a folder with one sub-folder for each class, classes in alphabetical order."""
    from datasets import ClassLabel, Dataset, Features, Image

    classes = sorted(inner.name for inner in folder.iterdir() if inner.is_dir())
    files = [
        (str(file), number)
        for number, name in enumerate(classes)
        for file in sorted((folder / name).rglob("*"))
        if file.suffix.lower() in _image_suffixes()
    ]
    return Dataset.from_dict(
        {"image": [file for file, _ in files], "label": [number for _, number in files]},
        features=Features({"image": Image(), "label": ClassLabel(names=classes)}),
    )


def _hub(name: str, configuration: str | None) -> dict[str, Dataset]:
    from datasets import load_dataset

    try:
        return dict(load_dataset(name, configuration))
    except Exception as error:  # network, authorisation, unknown names: the library has no common error
        raise ConfigError(
            [
                f"data: cannot load {name!r}{f' ({configuration})' if configuration else ''} from the hub "
                f"({_one_line(error)}); check the name, or put files into a folder and set data_dir"
            ]
        ) from None


def _embedded(name: str) -> dict[str, Dataset]:
    if name not in EMBEDDED:
        raise ConfigError([f"data: no embedded data set {name!r}; there is {', '.join(EMBEDDED)}"])
    return EMBEDDED[name]()


def _digits() -> dict[str, Dataset]:
    """1,797 handwritten digits of 8 x 8 pixels (scikit-learn, from UCI), four fifths to train on."""
    import numpy as np
    from datasets import ClassLabel, Dataset, Features, Image
    from PIL import Image as Picture
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    train, test = train_test_split(
        np.arange(len(digits.target)), test_size=0.2, random_state=0, stratify=digits.target
    )

    def split(rows: Any) -> Dataset:
        pictures = [Picture.fromarray((digits.images[row] * (255 / 16)).astype(np.uint8)) for row in rows]
        return Dataset.from_dict(
            {"img": pictures, "label": digits.target[rows].tolist()},
            features=Features({"img": Image(), "label": ClassLabel(names=[str(n) for n in range(10)])}),
        )

    return {"train": split(train), "test": split(test)}


EMBEDDED: dict[str, Callable[[], dict[str, Dataset]]] = {"digits": _digits}
"""Data sets that need no network and no files."""


def _names(files: list[Path]) -> str:
    return ", ".join(str(file) for file in files[:3]) + (" ..." if len(files) > 3 else "")


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split()):.200}"
