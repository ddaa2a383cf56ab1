"""200 malformed recipes and DeepSpeed JSONs: exit code 2 with a message, no traceback, nothing written."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from survival_runs import RECIPE

from slimfit_ds.training.cli import main

ROOT = Path(__file__).resolve().parents[2]
JSON = {
    "zero_optimization": {"stage": 1, "reduce_bucket_size": 500000},
    "bf16": {"enabled": False},
    "slimfit": {"freeze": {"policy": "ils", "rate": 0.5}},
}

# What a field must not hold, by the type that it has in a sound recipe; each is wrong for certain.
WRONG = {
    int: [-1, 0, 10**30, 1.5, "many", True, [], {}, "1"],
    float: [-1.0, float("nan"), float("inf"), "fast", [], {}, True],
    str: [7, 1.5, [], {}, True],
    dict: [7, "no/such/thing", [1], True],
}
FIELDS = {
    **dict.fromkeys(("max_steps", "save_steps", "eval_steps", "train_batch_size", "keep_last", "max_nonfinite", "eval_batch_size", "micro_batch_size", "max_train_examples"), int),
    **dict.fromkeys(("lr", "epochs", "eps", "gradient_clipping", "rank_timeout", "holdout", "warmup_ratio"), float),
    **dict.fromkeys(("data", "dtype", "scheduler", "resume", "output_dir", "on_nonfinite", "best_metric"), str),
    **dict.fromkeys(("task", "model", "slimfit", "lora"), dict),
}  # fmt: skip


@st.composite
def malformed_recipe(draw) -> dict:
    """The sound recipe with one to three fields wrong, missing, misspelt or of another kind."""
    recipe = copy.deepcopy(RECIPE)
    for _ in range(draw(st.integers(1, 3))):
        how = draw(st.sampled_from(["wrong", "unknown", "missing", "inner"]))
        if how == "wrong":
            name = draw(st.sampled_from(sorted(FIELDS)))
            recipe[name] = draw(st.sampled_from(WRONG[FIELDS[name]]))
        elif how == "unknown":
            recipe["x_" + draw(st.text("abcdefgh_", min_size=1, max_size=8))] = draw(st.integers())
        elif how == "missing":
            recipe.pop(draw(st.sampled_from(["task", "model", "max_steps"])), None)
        else:
            recipe["slimfit"] = {"freeze": {draw(st.sampled_from(["rate", "interval"])): draw(
                st.sampled_from([1.5, -1, "half", None, [], {}])
            )}}  # fmt: skip
    return recipe


@st.composite
def malformed_json(draw) -> str:
    """DeepSpeed's JSON cut off, of the wrong kind, or with values that cannot be."""
    text = json.dumps(JSON)
    how = draw(st.sampled_from(["cut", "kind", "stage", "slimfit", "garbage"]))
    if how == "cut":
        return text[: draw(st.integers(0, len(text) - 1))]
    if how == "kind":
        return json.dumps(draw(st.one_of(st.integers(), st.booleans(), st.text(max_size=5), st.just([JSON]))))
    if how == "garbage":
        return text[:-1] + draw(st.sampled_from([",}", "]", "}}", "\x00}", ", 1}"]))
    if how == "stage":
        stage = draw(st.sampled_from([-1, 4, "two", True, None, 1.5, [], {}]))
        return json.dumps({**JSON, "zero_optimization": {"stage": stage}})
    block = draw(
        st.sampled_from([7, "x", [1], {"freze": {}}, {"freeze": {"rate": 2}}, {"activations": {"a": 1}}])
    )
    return json.dumps({**JSON, "slimfit": block})


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty working folder; a process group or a model may not be made."""

    def refuse(*args, **kwargs):
        raise AssertionError("something was started before the recipe was checked")

    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setattr(torch.distributed, "init_process_group", refuse)
    monkeypatch.setattr("slimfit_ds.training.engine_of_recipe.build_model", refuse)
    monkeypatch.setattr("slimfit_ds.engine.processes.start_processes", refuse)
    return work


def assert_refused(arguments: list[str], work: Path, capsys) -> None:
    try:
        code = main(arguments)
    except SystemExit as left:
        code = left.code
    text = capsys.readouterr()
    assert code == 2, (code, text)
    assert "  - " in text.err
    assert text.out == ""
    assert "Traceback" not in text.err
    assert list(work.iterdir()) == []


few = settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.mark.slow
@given(recipe=malformed_recipe())
@few
def test_a_hundred_malformed_recipes(recipe, place, capsys):
    path = place.parent / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    assert_refused(["--config", str(path)], place, capsys)


@pytest.mark.slow
@given(text=malformed_json())
@few
def test_a_hundred_malformed_deepspeed_jsons(text, place, capsys):
    recipe = {key: value for key, value in RECIPE.items() if key != "slimfit"}
    path = place.parent / "recipe.yaml"
    path.write_text(json.dumps({**recipe, "deepspeed": str(place.parent / "ds.json")}))
    (place.parent / "ds.json").write_text(text)
    assert_refused(["--config", str(path)], place, capsys)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_malformed_recipe_under_a_real_launcher(tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        json.dumps({**RECIPE, "lr": "fast", "seed": -1, "output_dir": "out"})
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(ROOT / "launch" / "train.py"), "--config", "recipe.yaml"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode != 0
    assert done.stderr.count("lr must be a valid number, got 'fast'") == 1
    assert "exitcode  : 2" in done.stderr
    assert not any("train.py" in line and "line" in line for line in done.stderr.splitlines()), "a traceback"
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]
