"""`run.json` says who runs, and how it ended."""

import json
import os
import socket

import psutil

from slimfit_ds.monitoring.run_card import RunCard


def test_start_and_end(tmp_path):
    path = tmp_path / "run.json"
    card = RunCard(path, {"steps": 7, "layers": {"a": 3}}, writes=True)
    content = json.loads(path.read_text())
    assert (content["status"], content["steps"], content["layers"]) == ("running", 7, {"a": 3})
    assert (content["host"], content["pid"]) == (socket.gethostname(), os.getpid())
    assert content["process_started"] == psutil.Process().create_time()
    card.end("failed", "ValueError: 3")
    after = json.loads(path.read_text())
    assert (after["status"], after["error"], after["steps"]) == ("failed", "ValueError: 3", 7)
    assert after["ended"] >= after["started"]
    assert [place.name for place in tmp_path.iterdir()] == ["run.json"]


def test_other_ranks_write_nothing(tmp_path):
    RunCard(tmp_path / "run.json", {}, writes=False).end("finished")
    assert list(tmp_path.iterdir()) == []


def test_a_lost_folder_does_not_hide_the_reason_of_the_end(tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    card = RunCard(folder / "run.json", {}, writes=True)
    (folder / "run.json").unlink()
    folder.rmdir()
    card.end("failed", "the real reason")
    assert "could not be written" in capsys.readouterr().err
