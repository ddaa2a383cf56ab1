"""Requests to stop, ranks that fall silent or fail, broken steps, a full disk: how two ranks end together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from test_kill_points import contents, history

from slimfit_ds.integrations.survival import last_checkpoint

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.mark.parametrize(("name", "rank"), [("SIGTERM", 1), ("SIGUSR1", "all")])
def test_a_signal_on_any_rank_saves_and_exits_0_everywhere(runs, whole, name, rank):
    arguments = (f"output_dir={name}",)
    fault = {"rank": rank, "kind": "backward", "number": 3, "how": "signal", "signal": signal.Signals[name]}
    done = runs.launch(*arguments, fault=fault)
    assert done.codes == [0, 0], done.logs
    folder = runs.folder / name
    # No save was due after step 3.
    assert last_checkpoint(folder).name == "checkpoint-3"
    assert "after step 3 of 6" in done.logs[0]
    assert ("SIGUSR1" in done.logs[0]) == (rank == "all")
    assert f"{name}/checkpoint-3; the same command goes on from there" in done.logs[0]
    assert "stopped on request" not in done.logs[1], "one rank speaks for all"
    assert not (folder / "metrics.json").exists()
    resumed = runs.launch(*arguments)
    assert resumed.codes == [0, 0], resumed.logs
    assert resumed.events[0].count("step") == 3
    assert contents(folder) == contents(whole)


def test_a_second_signal_ends_at_once(runs):
    fault = {"rank": 0, "kind": "step", "number": 2, "how": "signal_twice", "signal": signal.SIGTERM}
    started = time.monotonic()
    done = runs.launch("output_dir=twice", fault=fault)
    assert time.monotonic() - started < 55, "the step would have taken a minute"
    assert done.codes == [128 + signal.SIGTERM, 1], done.logs
    assert "second SIGTERM: ends at once, unsaved" in done.logs[0]
    assert "rank 1 ends: " in done.logs[1]


def test_a_rank_that_falls_silent_ends_the_run_within_ddp_timeout(runs):
    """A stopped process is there and answers nothing; rank 0 holds the store as well."""
    fault = {"rank": 0, "kind": "step", "number": 3, "how": "stop"}
    done = runs.launch("output_dir=silent", "ddp_timeout=5", fault=fault)
    assert not done.hung, done.logs
    assert done.codes == [-9, 1], done.logs
    assert "rank 1 ends: " in done.logs[1]
    assert "silent/checkpoint-2; the same command goes on" in done.logs[1]


def test_a_rank_that_fails_says_so_and_the_other_one_ends(runs):
    fault = {"rank": 1, "kind": "backward", "number": 2, "how": "fail"}
    done = runs.launch("output_dir=failed", fault=fault)
    assert done.codes == [1, 1], done.logs
    assert "rank 1 ends: ValueError: boom" in done.logs[1]
    assert "rank 0 ends: " in done.logs[0]
    assert "there is no checkpoint yet" in done.logs[0]


def test_a_step_that_is_not_finite_stops_all_ranks(runs):
    fault = {"rank": 1, "kind": "step", "number": 4, "how": "not_finite"}
    done = runs.launch("output_dir=nan", fault=fault)
    assert done.codes == [4, 4], done.logs
    assert "step 4: the loss or a gradient is NaN or infinite" in done.logs[0]
    assert "step 4" not in done.logs[1], "one rank speaks for all"
    assert last_checkpoint(runs.folder / "nan").name == "checkpoint-2"


def test_a_step_that_is_skipped_changes_nothing(runs, whole):
    arguments = ("output_dir=skip", "on_nonfinite=skip")
    done = runs.launch(*arguments, fault={"rank": 1, "kind": "step", "number": 2, "how": "not_finite"})
    assert done.codes == [0, 0], done.logs
    lines, usual = history(runs.folder / "skip"), history(whole)
    assert "step 2: the loss or a gradient is NaN or infinite; left out" in done.logs[0]
    assert all(line["loss"] is not None for line in lines[2:])
    # The layers and the rate of the skipped step are tried again with the next batch.
    for key in ("lr", "active_layers"):
        assert lines[1][key] == lines[2][key] == usual[1][key]
    (metadata,) = (runs.folder / "skip" / "checkpoint-6").rglob("slimfit.json")
    saved = json.loads(metadata.read_text())
    assert saved["counters"]["skipped_steps"] == 1
    assert saved["schedule"]["step"] == 5


def test_too_many_skipped_steps_in_a_row_stop_the_run(runs):
    arguments = ("output_dir=many", "on_nonfinite=skip", "max_nonfinite=2")
    fault = {"rank": 0, "kind": "step", "number": 3, "how": "not_finite", "lasts": True}
    done = runs.launch(*arguments, fault=fault)
    assert done.codes == [4, 4], done.logs
    assert "step 5" in done.logs[0]
    assert "max_nonfinite: 2" in done.logs[0]
    # What was saved in between holds the weights of the last good step.
    assert last_checkpoint(runs.folder / "many").name == "checkpoint-4"


def test_a_run_goes_on_with_another_number_of_ranks_and_zero_stage(runs, whole):
    """Two ranks at stage 1, then one at stage 3: the same batches, layers and numbers."""
    arguments = ("output_dir=moved",)
    fault = {"rank": 0, "kind": "step", "number": 4, "how": "signal", "signal": signal.SIGTERM}
    assert runs.launch(*arguments, "model.config.hidden_dropout_prob=0", fault=fault).codes == [0, 0]
    moved = ("per_device_train_batch_size=8", "deepspeed={zero_optimization: {stage: 3}}")
    done = runs.launch(*arguments, "model.config.hidden_dropout_prob=0", *moved, ranks=1)
    assert done.codes == [0], done.logs
    assert done.events[0].count("step") == 2
    still = runs.launch("output_dir=still", "model.config.hidden_dropout_prob=0")
    assert still.codes == [0, 0], still.logs
    for one, two in zip(history(runs.folder / "moved"), history(runs.folder / "still"), strict=True):
        assert one["active_layers"] == two["active_layers"]
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)
        assert one["gradient_norm"] == pytest.approx(two["gradient_norm"], rel=1e-3)


def test_nothing_of_anybodys_results_is_overwritten(runs, whole):
    finished = (whole / "metrics.json").read_bytes()
    again = runs.launch("output_dir=whole")
    assert again.codes == [0, 0]
    assert "step" not in again.events[0]
    assert (whole / "metrics.json").read_bytes() == finished
    other = runs.launch("output_dir=whole", "learning_rate=1e-4", "seed=3")
    assert other.codes == [2, 2]
    assert "holds a run with other values of learning_rate, seed; choose another folder" in other.logs[0]
    (runs.folder / "letters").mkdir()
    (runs.folder / "letters" / "dear.txt").write_text("Dear")
    foreign = runs.launch("output_dir=letters")
    assert foreign.codes == [2, 2]
    assert "is not empty and holds no run" in foreign.logs[0]
    assert [path.name for path in (runs.folder / "letters").iterdir()] == ["dear.txt"]


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of 4 MiB; a skip where it cannot be mounted."""
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4096k", "tmpfs", str(tmp_path)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    yield tmp_path
    if os.path.ismount(tmp_path):
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_disk_that_fills_up_inside_a_save_leaves_the_last_checkpoint(runs, whole, small_disk):
    arguments = (f"output_dir={small_disk}/run",)
    other = small_disk / "other"
    fault = {"rank": 0, "kind": "write_shards", "number": 2, "how": "fill_disk", "file": str(other)}
    done = runs.launch(*arguments, fault=fault)
    assert done.codes == [1, 1], done.logs
    assert "No space left on device" in done.logs[0]
    assert f"the last checkpoint is {small_disk}/run/checkpoint-2" in done.logs[0]
    other.unlink()
    assert runs.launch(*arguments).codes == [0, 0]
    assert contents(small_disk / "run") == contents(whole)
