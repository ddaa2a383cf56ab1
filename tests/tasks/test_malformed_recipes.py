"""Malformed recipes and DeepSpeed JSONs: exit code 2 with a message, no traceback, nothing started or written."""

from __future__ import annotations

import copy
import json
import runpy
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]
RECIPE = {
    "task": "image_classification",
    "model": {
        "config": {
            "model_type": "vit",
            "image_size": 8,
            "patch_size": 4,
            "num_channels": 1,
            "hidden_size": 16,
        }
    },
    "data": "embedded:digits",
    "max_steps": 6,
    "per_device_train_batch_size": 4,
    "learning_rate": 3e-3,
    "slimfit": {"freeze": {"rate": 0.8}},
}
JSON = {"zero_optimization": {"stage": 1, "reduce_bucket_size": 500000}, "slimfit": {"freeze": {"rate": 0.5}}}

# What a field must not hold, by the type that it has in a sound recipe; each is wrong for certain.
WRONG = {
    int: [1.5, "many", True, [], {}, "1"],
    float: ["fast", [], {}, True],
    str: [7, 1.5, [], {}, True],
    dict: [7, "no/such/thing", [1], True],
}
FIELDS = {
    **dict.fromkeys(("max_steps", "per_device_train_batch_size", "max_nonfinite", "max_train_examples", "seed"), int),
    **dict.fromkeys(("learning_rate", "num_train_epochs", "holdout", "weight_decay"), float),
    **dict.fromkeys(("data", "output_dir", "on_nonfinite"), str),
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
            recipe.pop(draw(st.sampled_from(["task", "model"])), None)
        else:
            value = draw(st.sampled_from([1.5, -1, "half", [], {}]))
            recipe["slimfit"] = {"freeze": {draw(st.sampled_from(["rate", "width"])): value}}
    return recipe


@st.composite
def malformed_json(draw) -> str:
    """DeepSpeed's JSON cut off, of the wrong kind, or with values that cannot be."""
    text = json.dumps(JSON)
    how = draw(st.sampled_from(["cut", "kind", "slimfit", "garbage"]))
    if how == "cut":
        return text[: draw(st.integers(0, len(text) - 1))]
    if how == "kind":
        return json.dumps(draw(st.one_of(st.integers(), st.booleans(), st.text(max_size=5), st.just([JSON]))))
    if how == "garbage":
        return text[:-1] + draw(st.sampled_from([",}", "]", "}}", "\x00}", ", 1}"]))
    blocks = [7, "x", [1], {"freze": {}}, {"freeze": {"rate": 2}}, {"activations": {"a": 1}}]
    return json.dumps({**JSON, "slimfit": draw(st.sampled_from(blocks))})


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Run the script with a recipe in an empty folder; it must say what is wrong and start nothing."""
    main = runpy.run_path(str(ROOT / "launch" / "train.py"))["main"]
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for place in ("torch.distributed.init_process_group", "slimfit_ds.tasks.models.build_model"):
        monkeypatch.setattr(
            place, lambda *args, **kwargs: pytest.fail("started before the recipe was checked")
        )

    def check(recipe: dict) -> None:
        (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
        code = main(["--config", str(tmp_path / "recipe.yaml")])
        text = capsys.readouterr()
        assert code == 2, (code, text)
        assert "  - " in text.err
        assert "Traceback" not in text.err
        assert list(work.iterdir()) == []

    return check


few = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))


@given(recipe=malformed_recipe())
@few
def test_malformed_recipes(recipe, refused):
    refused(recipe)


@given(text=malformed_json())
@few
def test_malformed_deepspeed_jsons(text, refused, tmp_path):
    recipe = {key: value for key, value in RECIPE.items() if key != "slimfit"}
    (tmp_path / "ds.json").write_text(text)
    refused(recipe | {"deepspeed": str(tmp_path / "ds.json")})
