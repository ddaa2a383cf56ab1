"""Which folder a run writes to, and whose results it must not touch."""

from __future__ import annotations

import pytest

from slimfit_ds.errors import ConfigError
from slimfit_ds.training.output import plan_output, resolved_yaml
from slimfit_ds.training.recipe import read_recipe


def draft(*overrides):
    return read_recipe(None, ["task=causal_lm", "model=gpt2", "max_steps=5", *overrides])


def leave_run(folder, recipe, *, checkpoint=False, finished=False):
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(resolved_yaml(recipe))
    if checkpoint:
        (folder / "checkpoints" / "step_3").mkdir(parents=True)
        (folder / "checkpoints" / "step_3" / "mp_rank_00_model_states.pt").touch()
        (folder / "checkpoints" / "latest").write_text("step_3")
    if finished:
        (folder / "metrics.json").write_text("{}")


def test_without_a_folder_the_next_free_one_is_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert plan_output(draft()).folder.as_posix() == "outputs/run"
    leave_run(tmp_path / "outputs/run", draft().recipe, finished=True)
    assert plan_output(draft()).folder.as_posix() == "outputs/run-2"
    assert not (tmp_path / "outputs/run-2").exists()


def test_an_empty_or_missing_folder_starts(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new/deep"):
        plan = plan_output(draft(f"output_dir={tmp_path / name}"))
        assert (plan.action, plan.resume_from) == ("start", None)
    assert not (tmp_path / "new").exists()


def test_a_stopped_run_of_the_same_recipe_goes_on(tmp_path):
    asked = draft(f"output_dir={tmp_path / 'a'}")
    leave_run(tmp_path / "a", asked.recipe, checkpoint=True)
    plan = plan_output(asked)
    assert (plan.action, plan.resume_from) == ("resume", tmp_path / "a")


def test_values_that_do_not_touch_the_learning_may_change(tmp_path):
    leave_run(tmp_path / "a", draft(f"output_dir={tmp_path / 'a'}").recipe, checkpoint=True)
    assert (
        plan_output(draft(f"output_dir={tmp_path / 'a'}", "num_workers=2", "save_steps=1")).action == "resume"
    )


def test_a_finished_run_of_the_same_recipe_is_left_alone(tmp_path):
    asked = draft(f"output_dir={tmp_path / 'a'}")
    leave_run(tmp_path / "a", asked.recipe, checkpoint=True, finished=True)
    assert plan_output(asked).action == "finished"


def test_another_recipe_is_refused_and_the_differences_named(tmp_path):
    leave_run(tmp_path / "a", draft("lr=1e-3").recipe, finished=True)
    with pytest.raises(ConfigError, match=r"other values of .*lr") as caught:
        plan_output(draft(f"output_dir={tmp_path / 'a'}"))
    assert "max_steps" not in str(caught.value)


def test_an_absent_slimfit_block_is_not_a_null_one(tmp_path):
    leave_run(tmp_path / "a", draft().recipe, finished=True)
    with pytest.raises(ConfigError, match="slimfit"):
        plan_output(draft(f"output_dir={tmp_path / 'a'}", "slimfit=null"))


def test_somebody_elses_folder_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="no run of this program"):
        plan_output(draft(f"output_dir={tmp_path}"))


def test_resume_none_refuses_a_used_folder(tmp_path):
    asked = draft(f"output_dir={tmp_path / 'a'}", "resume=none")
    leave_run(tmp_path / "a", asked.recipe, checkpoint=True)
    with pytest.raises(ConfigError, match="resume is 'none'"):
        plan_output(asked)


def test_resume_from_another_run(tmp_path):
    leave_run(tmp_path / "a", draft().recipe, checkpoint=True)
    plan = plan_output(draft(f"output_dir={tmp_path / 'b'}", f"resume={tmp_path / 'a'}"))
    assert (plan.action, plan.folder, plan.resume_from) == ("resume", tmp_path / "b", tmp_path / "a")


def test_resume_from_nothing_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="holds no checkpoints"):
        plan_output(draft(f"resume={tmp_path}"))


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("file", "file/inner"):
        with pytest.raises(ConfigError, match="output_dir"):
            plan_output(draft(f"output_dir={tmp_path / name}"))
