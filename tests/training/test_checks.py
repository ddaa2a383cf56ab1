"""Bad recipes: every problem at once, exit code 2, nothing written, nothing started."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slimfit_ds.errors import ConfigError
from slimfit_ds.training.checks import inspect
from slimfit_ds.training.cli import main
from slimfit_ds.training.distributed import Ranks
from slimfit_ds.training.recipe import Recipe, read_recipe

GOOD = {
    "task": {"name": "sequence_classification", "max_length": 32},
    "max_steps": 2,
    "train_batch_size": 8,
    "deepspeed": {"zero_optimization": {"stage": 1}},
    "slimfit": {"freeze": {"policy": "ils", "rate": 0.5}},
}


@pytest.fixture
def good(tmp_path, sentences, tokenizer_folder, tiny_bert, monkeypatch):
    """A sound recipe file in an empty working directory."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    recipe = {
        **GOOD,
        "model": {"config": tiny_bert},
        "tokenizer": str(tokenizer_folder),
        "data_dir": str(sentences),
        "output_dir": str(work / "out"),
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch):
    """Neither a process group nor a model may be made."""

    def refuse(*args, **kwargs):
        raise AssertionError("something was started before the recipe was checked")

    monkeypatch.setattr(torch.distributed, "init_process_group", refuse)
    monkeypatch.setattr("slimfit_ds.training.engine_of_recipe.build_model", refuse)
    monkeypatch.setattr("slimfit_ds.engine.processes.start_processes", refuse)


def problems_of(path, *overrides, ranks=Ranks()):  # noqa: B008
    with pytest.raises(ConfigError) as caught:
        inspect(read_recipe(path, overrides), ranks)
    return caught.value.problems


def test_plain_deepspeed_cannot_leave_steps_out(good):
    (problem,) = problems_of(good, "on_nonfinite=skip", "slimfit=null")
    assert problem.startswith("on_nonfinite 'skip' needs a slimfit block")
    assert inspect(read_recipe(good, ["on_nonfinite=stop", "slimfit=null"]), Ranks()).recipe.slimfit is None


def test_a_disk_that_is_too_small_is_among_the_problems(good, monkeypatch):
    monkeypatch.setattr("slimfit_ds.training.checks.space.free_bytes", lambda folder: 10000)
    problems = problems_of(good, "gradient_clipping=-1")
    assert len(problems) == 2
    assert "GiB free, and this run writes up to" in problems[1]


def test_the_sound_recipe_passes_and_knows_its_data(good):
    found = inspect(read_recipe(good), Ranks())
    assert (len(found.splits.train), len(found.splits.evaluation)) == (16, 7)
    assert found.model_config.num_labels == 2
    assert found.output.action == "start"


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("max_steps=null", ["max_steps", "epochs"]),
        ("train_batch_size=0", ["train_batch_size", "0"]),
        ("micro_batch_size=3", ["train_batch_size", "micro_batch_size 3", "got 8", "6 or 9"]),
        ("train_batch_size=64", ["train_batch_size", "16 training examples"]),
        ("warmup_steps=2", ["warmup_steps", "2"]),
        ("lr=-1", ["lr", "-1"]),
        ("on_nonfinite=retry", ["on_nonfinite", "stop", "skip", "retry"]),
        ("rank_timeout=0", ["rank_timeout", "0"]),
        ("slimfit.freeze.rate=1.5", ["slimfit.freeze.rate must be in [0, 1)", "1.5"]),
        ("slimfit.freeze.rate=1.0", ["slimfit.freeze.rate", "1.0"]),
        ("slimfit.freeze.polcy=ils", ["slimfit.freeze.polcy", "'policy'"]),
        ("slimfit.freeze.policy=best", ["slimfit.freeze.policy", "'best'", "ils", "random"]),
        ("slimfit=3", ["slimfit", "3"]),
        ("deepspeed=nowhere.json", ["deepspeed", "'nowhere.json'"]),
        ("deepspeed.zero_optimization.stage=4", ["zero_optimization.stage", "4"]),
        ("deepspeed.zero_optimization.offload_optimizer.device=cpu", ["offload_optimizer"]),
        ("deepspeed.zero_optimization.offload_param.device=cpu", ["offload_param", "stage 3"]),
        ("deepspeed.bf16.enabled=true", ["bf16", "dtype"]),
        ("dtype=fp16", ["dtype", "fp16", "GPU"]),
        ("dtype=float8", ["dtype", "float8", "'bf16'"]),
        ("data_dir=/no/where", ["data_dir", "/no/where"]),
        ("eval_split=tst", ["eval_split", "'tst'", "validation"]),
        ("task.columns=[question]", ["task.columns", "'question'", "sentence"]),
        ("task.label_column=target", ["task.label_column", "'target'", "label"]),
        ("task.name=parsing", ["task.name", "'parsing'"]),
        ("task.max_length=100", ["task.max_length", "64", "100"]),
        ("model={config: {model_type: vit}}", ["model", "'vit'", "sequence_classification"]),
        ("model.config.num_labels=7", ["model", "7", "2"]),
        ("model.config.vocab_size=5", ["tokenizer", "vocab_size 5"]),
        ("model=/no/model", ["model", "/no/model"]),
        ("tokenizer=null", ["tokenizer", "needs one"]),
        ("tokenizer=/no/tokenizer", ["tokenizer", "/no/tokenizer"]),
        ("best_metric=bleu", ["best_metric", "'bleu'", "accuracy"]),
        ("resume=/no/run", ["resume", "/no/run"]),
        ("lora.r=4", ["lora", "slimfit=null"]),
        ("seed=-1", ["seed", "-1"]),
        ("sede=1", ["sede", "'seed'"]),
        ("slimfit.activations=tiny", ["slimfit.activations", "'tiny'", "minimal"]),
    ],
)
def test_each_mistake_is_named_once_with_its_value(good, override, parts):
    problems = problems_of(good, override)
    assert len(problems) == 1, problems
    assert all(part in problems[0] for part in parts), problems


def test_mistakes_of_all_kinds_come_together(good):
    problems = problems_of(
        good,
        "sede=1",
        "dtype=int8",
        "slimfit.freeze.rate=2",
        "slimfit.freeze.policy=best",
        "data_dir=/no/where",
        "model=/no/model",
        "train_batch_size=7",
        "max_steps=null",
        "deepspeed=nowhere.json",
        ranks=Ranks(world_size=2),
    )
    for part in ("sede", "int8", "/no/where", "/no/model", "2 ranks", "max_steps", "nowhere.json"):
        assert sum(part in line for line in problems) == 1, (part, problems)


def test_data_and_model_that_are_both_away_are_both_named(good):
    lines = problems_of(good, "data_dir=null", "data=nobody/nothing", "model=nobody/nothing")
    assert [line.partition(":")[0] for line in lines] == ["model", "data"]


def test_a_task_that_neither_model_nor_data_serve(good):
    lines = problems_of(good, "task={name: image_classification}")
    assert len(lines) == 2
    assert "'bert' has no head" in lines[0]
    assert "no column img" in lines[1]
    assert "sentence" in lines[1]


def test_two_ways_of_keeping_less_do_not_mix(good):
    lines = problems_of(good, "gradient_checkpointing=true", "slimfit.activations=minimal")
    assert len(lines) == 1
    assert lines[0].startswith("gradient_checkpointing and slimfit.activations")


def test_a_batch_must_divide_by_ranks_and_micro_batch(good):
    lines = problems_of(good, "micro_batch_size=2", ranks=Ranks(world_size=3))
    assert lines == ["train_batch_size must divide by 3 ranks x micro_batch_size 2, got 8; 6 or 12 would do"]


def test_the_command_prints_all_and_writes_nothing(good, capsys, tmp_path):
    code = main(["--config", str(good), "lr=fast", "data_dir=/no/where", "x=1"])
    text = capsys.readouterr()
    assert code == 2
    assert text.out == ""
    assert text.err.startswith("3 problems in ")
    assert all(part in text.err for part in ("lr", "'fast'", "/no/where", "x is not a known key"))
    assert list((tmp_path / "work").iterdir()) == []


def test_only_the_first_rank_speaks(good, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["--config", str(good), "lr=fast"]) == 2
    assert capsys.readouterr().err == ""


def test_a_malformed_environment_is_a_problem_not_a_traceback(good, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "first")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["--config", str(good)]) == 2
    assert "RANK" in capsys.readouterr().err


KEYS = sorted(Recipe.model_fields)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**20), 10**20),
    st.floats(),
    st.text(max_size=8),
    st.just("a\0b"),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)


@given(
    recipe=st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=6), values, max_size=6),
    overrides=st.lists(st.text(max_size=12).filter(lambda text: not text.startswith("-")), max_size=2),
)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_no_malformed_recipe_brings_a_traceback(recipe, overrides, good, tmp_path, capsys):
    work = tmp_path / "work"
    # Nothing random is a sound recipe, but the one mistake that is always there must not be needed to stop it.
    sound = yaml.safe_load(good.read_text())
    path = tmp_path / "malformed.yaml"
    path.write_text(json.dumps({**sound, **recipe, "no_such_key": 0}))
    assert main(["--config", str(path), *overrides]) == 2
    text = capsys.readouterr()
    assert "no_such_key" in text.err or "not valid YAML" in text.err or "--config" in text.err
    assert "Traceback" not in text.err
    assert list(work.iterdir()) == []
