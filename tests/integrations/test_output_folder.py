"""The output folder of a run: started in, gone on in, or left alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slimfit_ds.errors import ConfigError
from slimfit_ds.integrations.output_folder import claim_output, is_finished, write_recipe
from slimfit_ds.integrations.survival import MARK


@pytest.fixture
def values(tmp_path):
    return {"output_dir": str(tmp_path / "run"), "learning_rate": 1e-3, "per_device_train_batch_size": 4}


def checkpoint(values, step: int) -> str:
    path = Path(values["output_dir"], f"checkpoint-{step}")
    path.mkdir(parents=True)
    (path / "trainer_state.json").write_text("{}")
    (path / MARK).write_text(json.dumps({"trainer_state.json": 2}))
    return str(path)


def test_a_new_or_empty_folder_is_started_in(values, tmp_path):
    assert claim_output(values, 2) is None
    (tmp_path / "run").mkdir()
    assert claim_output(values, 2) is None
    assert list((tmp_path / "run").iterdir()) == []


def test_the_same_recipe_goes_on_and_may_change_what_is_not_learned(values):
    write_recipe(values, 2)
    assert claim_output(values, 2) is None, "killed before its first checkpoint"
    last = checkpoint(values, 20)
    checkpoint(values, 3)
    assert claim_output(values, 2) == last
    assert claim_output(values | {"save_steps": 7, "report_to": "wandb"}, 2) == last
    # One rank with batches twice as large, and another stage.
    assert claim_output(values | {"per_device_train_batch_size": 8, "deepspeed": "zero3.json"}, 1) == last
    assert not is_finished(values["output_dir"])


@pytest.mark.parametrize(
    ("change", "world", "reason"),
    [
        ({"learning_rate": 2e-3, "max_steps": 9}, 2, "other values of learning_rate, max_steps"),
        ({}, 1, "other values of examples_per_step"),
        ({"resume_from_checkpoint": False}, 2, "resume_from_checkpoint is False"),
    ],
)
def test_another_run_is_refused(values, change, world, reason):
    write_recipe(values, 2)
    checkpoint(values, 2)
    with pytest.raises(ConfigError, match=reason):
        claim_output(values | change, world)


def test_a_folder_of_something_else_is_refused(values, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match="holds no run of this program"):
        claim_output(values, 1)
    with pytest.raises(ConfigError, match="is no writable folder"):
        claim_output(values | {"output_dir": str(tmp_path / "run" / "thesis.tex" / "x")}, 1)


def test_a_named_checkpoint(values, tmp_path):
    earlier = checkpoint(values, 2)
    checkpoint(values, 4)
    write_recipe(values, 1)
    assert claim_output(values | {"resume_from_checkpoint": earlier, "learning_rate": 1.0}, 1) == earlier
    other = values | {"output_dir": str(tmp_path / "other"), "resume_from_checkpoint": earlier}
    assert claim_output(other, 1) == earlier
    with pytest.raises(ConfigError, match="is no checkpoint"):
        claim_output(other | {"resume_from_checkpoint": str(tmp_path)}, 1)
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        claim_output(other | {"resume_from_checkpoint": True}, 1)
