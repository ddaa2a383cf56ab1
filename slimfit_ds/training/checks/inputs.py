"""Checks of what goes in: task, model, data and preprocessing."""

from __future__ import annotations

from slimfit_ds.errors import ConfigError
from slimfit_ds.training.checks.registry import Inspection, needs
from slimfit_ds.training.recipe import ModelFromConfig
from slimfit_ds.training.tasks import Preprocessing, make_task


@needs("task")
def task(found: Inspection) -> None:
    found.task = make_task(found.recipe.task)


@needs("model")
def model_place(found: Inspection) -> None:
    from slimfit_ds.training.models import read_model_config, resolve_source

    model = found.recipe.model
    found.source = None if isinstance(model, ModelFromConfig) else resolve_source(model)
    found.model_config = read_model_config(found.recipe, found.source)


@needs(after=("model_place", "task"))
def model_head(found: Inspection) -> None:
    from slimfit_ds.training.models import head_problems

    if problems := head_problems(found.model_config, found.task):
        raise ConfigError(problems)


@needs(
    "data", "data_dir", "data_name", "train_split", "eval_split", "holdout", "seed", "max_train_examples",
    "max_eval_examples",
)  # fmt: skip
def data(found: Inspection) -> None:
    from slimfit_ds.training.data import open_splits

    found.splits = open_splits(found.recipe)


@needs(after=("task", "data"))
def columns(found: Inspection) -> None:
    found.splits = found.task.study(found.splits)


@needs("train_batch_size", after=("task", "data"))
def enough_examples(found: Inspection) -> None:
    examples = len(found.splits.train)
    if found.task.rows_are_examples and examples < found.recipe.train_batch_size:
        raise ConfigError(
            [
                f"train_batch_size must be at most the {examples} training examples, got {found.recipe.train_batch_size}"
            ]
        )


@needs("best_metric", after=("columns",))
def best_metric(found: Inspection) -> None:
    wanted, names = found.recipe.best_metric, found.task.metric_names()
    if wanted is not None and wanted not in names:
        raise ConfigError(
            [f"best_metric {wanted!r} is not a metric of this task; choose one of {', '.join(names)}"]
        )


@needs(after=("columns", "model_head"))
def model(found: Inspection) -> None:
    from slimfit_ds.training.models import fit_model_config

    fit_model_config(found.model_config, found.recipe, found.task)


@needs("gradient_checkpointing", after=("model",))
def checkpointing(found: Inspection) -> None:
    import transformers

    if not found.recipe.gradient_checkpointing:
        return
    model_class = getattr(transformers, found.task.model_class)._model_mapping[type(found.model_config)]
    if not getattr(model_class, "supports_gradient_checkpointing", False):
        raise ConfigError(
            [f"gradient_checkpointing: {model_class.__name__} does not support it; set it to false"]
        )


@needs("tokenizer", after=("model",))
def preprocessing(found: Inspection) -> None:
    from slimfit_ds.training.models import resolve_source

    named = found.recipe.tokenizer
    source = found.source if named is None else resolve_source(named, "tokenizer")
    found.task.load_preprocessing(Preprocessing(source), found.model_config)
