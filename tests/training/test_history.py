"""The file of steps."""

from __future__ import annotations

import json

from slimfit_ds.training.history import History, read_history


def test_numbers_that_json_cannot_hold_become_null(tmp_path):
    history = History(tmp_path / "h.jsonl", 0, writes=True)
    history.add(
        {"step": 0, "loss": float("nan"), "statistics": {"a": float("inf"), "b": 1.5}, "x": [float("-inf")]}
    )
    history.close()
    line = json.loads((tmp_path / "h.jsonl").read_text())
    assert line == {"step": 0, "loss": None, "statistics": {"a": None, "b": 1.5}, "x": [None]}


def test_a_resumed_run_drops_the_steps_after_its_checkpoint_and_half_a_line(tmp_path):
    path = tmp_path / "h.jsonl"
    path.write_text(
        "".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(5)) + '{"step": 5, "lo'
    )
    history = History(path, 3, writes=True)
    history.add({"step": 3, "loss": 2.0})
    history.close()
    assert [(line["step"], line["loss"]) for line in read_history(path)] == [(0, 1), (1, 1), (2, 1), (3, 2)]


def test_other_ranks_write_nothing(tmp_path):
    history = History(tmp_path / "h.jsonl", 0, writes=False)
    history.add({"step": 0})
    history.close()
    assert not (tmp_path / "h.jsonl").exists()
