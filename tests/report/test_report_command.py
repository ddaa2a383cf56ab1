"""`slimfit-ds report` at the command line."""

import pytest
from html_reader import read_html
from synthetic_run import write_run

from slimfit_ds.cli import main


def test_writes_beside_the_run(tmp_path, capsys):
    write_run(tmp_path / "run", steps=6)
    assert main(["report", str(tmp_path / "run")]) == 0
    page = tmp_path / "run" / "report.html"
    assert str(page) in capsys.readouterr().out
    assert read_html(page.read_text(encoding="utf-8")).all("h1")[0].text == "run"


def test_output_and_baseline(tmp_path):
    write_run(tmp_path / "a", steps=6)
    write_run(tmp_path / "b", steps=6)
    output = tmp_path / "new" / "page.html"
    arguments = ["report", str(tmp_path / "a"), "--baseline", str(tmp_path / "b"), "--output", str(output)]
    assert main(arguments) == 0
    assert "Against the baseline" in output.read_text(encoding="utf-8")
    assert not (tmp_path / "a" / "report.html").exists()


def test_wrong_folders_are_all_named_with_a_remedy(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert (
        main(["report", str(tmp_path / "empty"), "--baseline", str(tmp_path / "none"), "--watch", "0"]) == 2
    )
    said = capsys.readouterr().err
    assert "RUN_DIR" in said
    assert "--baseline" in said
    assert "name the output_dir of a training run" in said
    assert "--watch must be at least 1 second, got 0" in said
    assert list((tmp_path / "empty").iterdir()) == []


def test_a_folder_of_runs_lists_them(tmp_path, capsys):
    write_run(tmp_path / "all" / "zero1", steps=3)
    assert main(["report", str(tmp_path / "all")]) == 2
    assert "runs inside it: zero1" in capsys.readouterr().err


def test_an_unwritable_output_is_an_error(tmp_path, capsys):
    write_run(tmp_path / "run", steps=3)
    (tmp_path / "file").write_text("")
    assert main(["report", str(tmp_path / "run"), "--output", str(tmp_path / "file" / "page.html")]) == 2
    assert "name another --output" in capsys.readouterr().err


def test_watching_ends_with_the_run(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "run", steps=3, finished=False)
    rounds = []

    def sleep(seconds):
        rounds.append((seconds, 'http-equiv="refresh"' in (tmp_path / "run/report.html").read_text("utf-8")))
        if len(rounds) == 2:
            (tmp_path / "run" / "metrics.json").write_text('{"steps": 3}')

    monkeypatch.setattr("slimfit_ds.report.cli.time.sleep", sleep)
    assert main(["report", str(tmp_path / "run"), "--watch", "7"]) == 0
    assert rounds == [(7, True), (7, True)]
    assert capsys.readouterr().out.count("written") == 3
    assert 'http-equiv="refresh"' not in (tmp_path / "run/report.html").read_text("utf-8")


@pytest.mark.parametrize("argument", ["--help"])
def test_help_has_examples(argument, capsys):
    with pytest.raises(SystemExit):
        main(["report", argument])
    assert "--watch 10" in capsys.readouterr().out
