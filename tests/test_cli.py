"""The console script finds its sub-commands."""

from __future__ import annotations

from importlib import import_module

import pytest

from slimfit_ds.cli import COMMANDS, main


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_there(name):
    module, _, function = COMMANDS[name][0].partition(":")
    assert callable(getattr(import_module(module), function))


def test_help_lists_them(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)


@pytest.mark.parametrize("arguments", [[], ["trian"]])
def test_no_or_an_unknown_command_is_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "COMMAND" in capsys.readouterr().err


def test_train_is_the_program_of_the_launch_script(capsys, tmp_path):
    assert main(["train", "--config", str(tmp_path / "missing.yaml")]) == 2
    assert "missing.yaml" in capsys.readouterr().err
