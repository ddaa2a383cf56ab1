"""A run is called running only while it can be."""

import json
import os
import socket
import subprocess
import sys

import psutil
import pytest
from synthetic_run import write_run

from slimfit_ds.report.run_data import read_run
from slimfit_ds.report.run_status import human_age, run_status


def state(folder, facts=None, now_after=5.0, **options):
    write_run(folder, steps=10, **{"finished": False, **options})
    if facts is not None:
        (folder / "run.json").write_text(json.dumps(facts))
    run = read_run(folder)
    return run_status(run, run.last_sign + now_after)


def here(pid, started):
    return {"status": "running", "host": socket.gethostname(), "pid": pid, "process_started": started}


def test_finished(tmp_path):
    status = state(tmp_path / "run", finished=True, now_after=3700)
    assert (status.kind, status.live) == ("finished", False)
    assert status.text.startswith("finished 1 h 1 min ago")


def test_a_living_process_runs(tmp_path):
    status = state(tmp_path / "run", here(os.getpid(), psutil.Process().create_time()))
    assert (status.kind, status.text, status.live) == ("running", "running; last step 5 s ago", True)


def test_a_dead_process_failed(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert state(tmp_path / "run", here(child.pid, 1.0)).kind == "failed"


def test_a_number_that_was_given_away_is_not_the_run(tmp_path):
    assert state(tmp_path / "run", here(os.getpid(), 1.0)).kind == "failed"


def test_elsewhere_silence_tells(tmp_path):
    facts = {"status": "running", "host": "elsewhere", "pid": 1}
    assert state(tmp_path / "a", facts, now_after=100).kind == "running"
    assert state(tmp_path / "b", facts, now_after=1000).kind == "silent"
    # Steps of 600 s may well take 1000 s.
    assert state(tmp_path / "c", facts, now_after=1000, pace=10_000).kind == "running"


def test_stopped_and_failed_say_so(tmp_path):
    assert state(tmp_path / "a", {"status": "stopped"}).kind == "stopped"
    failed = state(tmp_path / "b", {"status": "failed", "error": "ValueError: 3 & 4"})
    assert failed.text == "failed 5 s ago: ValueError: 3 & 4"


@pytest.mark.parametrize(
    ("seconds", "text"), [(3.9, "3 s"), (60, "1 min"), (3661, "1 h 1 min"), (200_000, "2 d 7 h")]
)
def test_ages(seconds, text):
    assert human_age(seconds) == text


def test_a_card_that_says_finished_is_enough(tmp_path):
    assert state(tmp_path / "run", {"status": "finished"}).kind == "finished"
