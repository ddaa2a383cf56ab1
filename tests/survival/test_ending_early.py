"""Requests to stop, ranks that fall silent or fail, losses that are not finite: how two ranks end together."""

from __future__ import annotations

import json
import signal
import time

import pytest
from test_kill_points import contents

from slimfit_ds.training.checkpoints import last_checkpoint
from slimfit_ds.training.history import read_history

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(120)]


@pytest.mark.parametrize(("name", "rank"), [("SIGTERM", 1), ("SIGINT", 0), ("SIGUSR1", "all")])
def test_a_signal_on_any_rank_saves_and_exits_0_everywhere(server, whole, name, rank):
    arguments = ("--config", "recipe.yaml", f"output_dir={name}", "resume=none")
    fault = {"rank": rank, "kind": "backward", "number": 3, "how": "signal", "signal": signal.Signals[name]}
    done = server.launch(*arguments, fault=fault)
    assert done.codes == [0, 0], done.logs
    folder = server.folder / name
    # The third step is ended, step 3 is evaluated, and nothing more is done; no save was due.
    assert last_checkpoint(folder).name == "step_3"
    text = done.logs[0]
    assert "stopped on request" in text
    assert "after step 3 of 6" in text
    assert ("SIGUSR1" in text) == (rank == "all")
    assert "stopped on request" not in done.logs[1], "one rank speaks for all"
    command = text.split("to go on: ")[1].split("\n")[0]
    assert command.endswith(
        "launch/train.py --config recipe.yaml output_dir=" + name + " resume=none resume=auto"
    )
    resumed = server.launch(*command.split("train.py ")[1].split())
    assert resumed.codes == [0, 0], resumed.logs
    assert resumed.events[0].count("step") == 3
    now, expected = contents(folder), contents(server.folder / "whole")
    # The best evaluation was that of step 3, and this time there is a checkpoint of it: it stays beyond keep_last=1.
    assert expected["best_metric"]["step"] == 3
    assert now.pop("checkpoints") == ["latest", "step_3", "step_6"]
    assert expected.pop("checkpoints") == ["latest", "step_6"]
    assert now == expected


def test_a_second_signal_ends_at_once(server):
    fault = {"rank": 0, "kind": "step", "number": 2, "how": "signal_twice", "signal": signal.SIGTERM}
    started = time.monotonic()
    done = server.launch("--config", "recipe.yaml", "output_dir=twice", fault=fault)
    assert time.monotonic() - started < 45, "the step would have taken a minute"
    assert done.codes == [128 + signal.SIGTERM, 3], done.logs
    assert "second SIGTERM: ends at once, unsaved" in done.logs[0]
    assert "rank 1 ends: rank 0 was lost" in done.logs[1]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_falls_silent_is_named_in_time(server, rank):
    """A stopped process is there and answers nothing; rank 0 holds the store as well."""
    fault = {"rank": rank, "kind": "step", "number": 3, "how": "stop"}
    started = time.monotonic()
    done = server.launch("--config", "recipe.yaml", f"output_dir=silent{rank}", fault=fault)
    # rank_timeout 2 s, plus five beats, plus the grace of the main thread, plus what a launch takes.
    assert time.monotonic() - started < 40
    assert not done.hung
    other = 1 - rank
    assert done.codes[other] == 3, done.logs[other]
    assert f"rank {other} ends: rank {rank} was lost" in done.logs[other]
    assert "Traceback" not in done.logs[other]


def test_a_job_that_is_suspended_for_longer_than_the_limit_goes_on(server, whole):
    fault = {"rank": "all", "kind": "step", "number": 3, "how": "suspend"}
    done = server.launch("--config", "recipe.yaml", "output_dir=suspended", fault=fault)
    assert done.codes == [0, 0], done.logs
    assert contents(server.folder / "suspended") == contents(server.folder / "whole")


def test_a_rank_that_fails_is_named_with_its_reason(server):
    fault = {"rank": 1, "kind": "backward", "number": 2, "how": "fail"}
    done = server.launch("--config", "recipe.yaml", "output_dir=failed", fault=fault)
    assert done.codes == [3, 1], done.logs
    assert "ValueError: boom" in done.logs[1]
    assert "rank 0 ends: rank 1 failed: ValueError: boom" in done.logs[0]


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_loss_that_is_not_finite_stops_all_ranks(server, value):
    name = f"stop_{value}"
    fault = {"rank": 1, "kind": "step", "number": 4, "how": "not_finite", "value": float(value)}
    done = server.launch("--config", "recipe.yaml", f"output_dir={name}", fault=fault)
    assert done.codes == [4, 4], done.logs
    assert f"step 3: the loss is {value}" in done.logs[0]
    assert "step 3" not in done.logs[1], "one rank speaks for all"
    assert last_checkpoint(server.folder / name).name == "step_2"
    assert read_history(server.folder / name / "history.jsonl")[-1]["loss"] is None


def test_a_step_that_is_skipped_changes_nothing(server, whole):
    arguments = ("--config", "recipe.yaml", "output_dir=skip", "on_nonfinite=skip")
    fault = {"rank": 1, "kind": "step", "number": 2, "how": "not_finite"}
    done = server.launch(*arguments, fault=fault)
    assert done.codes == [0, 0], done.logs
    lines = read_history(server.folder / "skip" / "history.jsonl")
    usual = read_history(server.folder / "whole" / "history.jsonl")
    assert [line["loss"] is None for line in lines] == [False, True, False, False, False, False]
    # The layers and the rate of the skipped step are tried again with the next batch.
    for key in ("lr", "active_layers"):
        assert lines[1][key] == lines[2][key] == usual[1][key]
    metadata = json.loads((server.folder / "skip/checkpoints/step_6/slimfit.json").read_text())
    assert metadata["counters"]["skipped_steps"] == 1
    assert metadata["schedule"]["step"] == 5


def test_too_many_skipped_steps_in_a_row_stop_the_run(server):
    arguments = ("--config", "recipe.yaml", "output_dir=many", "on_nonfinite=skip", "max_nonfinite=2")
    fault = {"rank": 0, "kind": "step", "number": 3, "how": "not_finite", "lasts": True}
    done = server.launch(*arguments, fault=fault)
    assert done.codes == [4, 4], done.logs
    assert "step 4" in done.logs[0]
    assert "max_nonfinite=2" in done.logs[0]
    # What was saved in between holds the weights of the last good step.
    assert last_checkpoint(server.folder / "many").name == "step_4"
