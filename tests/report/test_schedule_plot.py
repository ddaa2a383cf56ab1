"""The picture of the schedule."""

from __future__ import annotations

import json

import numpy as np
from PIL import Image

from slimfit_ds.report.cli import main
from slimfit_ds.report.schedule_plot import MOST_COLUMNS, plot_schedule, schedule_matrix

LAYERS = ("a", "b", "c")


def line(**statistics):
    return {"active_layers": list(statistics), "statistics": statistics}


def test_rows_are_layers_and_columns_steps():
    matrix = schedule_matrix(
        [line(a=0.5, c=2.0), line(b=1e-3), {"active_layers": None}, line(b=None)], LAYERS
    )
    nan = np.nan
    np.testing.assert_array_equal(matrix, [[0.5, nan, nan, nan], [nan, 1e-3, nan, 0.0], [2.0, nan, nan, nan]])


def test_a_trained_layer_stands_out_from_frozen_ones(tmp_path):
    plot_schedule([line(b=1e-2)] * 10, LAYERS, tmp_path / "s.png")
    pixels = np.asarray(Image.open(tmp_path / "s.png").convert("RGB")).astype(int)
    middle = pixels[:, pixels.shape[1] // 2]
    coloured = (middle.max(axis=1) - middle.min(axis=1)) > 30
    # One of three rows is coloured, in the middle of the axes.
    assert 0.1 < coloured.mean() < 0.45
    assert abs(np.flatnonzero(coloured).mean() / len(middle) - 0.5) < 0.15


def test_long_runs_and_runs_without_statistics_can_be_drawn(tmp_path):
    history = [line(a=1.0) if step % 7 == 0 else line(b=0.1) for step in range(3 * MOST_COLUMNS + 5)]
    for name, lines in (
        ("long", history),
        ("none", [{"active_layers": None}]),
        ("zero", [line(a=None)]),
        ("no", []),
    ):
        plot_schedule(lines, LAYERS, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 0


def test_the_command_draws_a_run_that_goes_on(tmp_path, capsys):
    lines = [{"active_layers": ["block.10.w", "embed.w"], "statistics": {}}, {"active_layers": ["block.2.w"]}]
    (tmp_path / "history.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"active_la')
    assert main([str(tmp_path)]) == 0
    assert "2 steps" in capsys.readouterr().out
    assert Image.open(tmp_path / "schedule.png").size[0] > 500


def test_a_folder_without_a_run_is_named(tmp_path, capsys):
    assert main([str(tmp_path / "nothing")]) == 2
    assert "nothing/history.jsonl" in capsys.readouterr().err
