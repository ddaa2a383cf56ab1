"""Every command in the documentation is checked: the table says how, and a command without a row fails.

Arguments are handed to the program's own parser, which stops there, or options are compared with its --help. That the
programs work is tested in their own rooms.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
from doc_commands import ROOT, Command, commands

BIN = Path(sys.executable).parent
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LAUNCHERS = {"python", "deepspeed", "torchrun", "accelerate", "mpirun", "srun"}


class Parsed(Exception):
    """A parser took its arguments."""


def launched(words: Sequence[str]) -> None:
    """A launcher with its own options, a script, and the script's arguments."""
    if words[0] == "accelerate":
        words = (" ".join(words[:2]), *words[2:])
    place = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
    assert place is not None, "no script"
    # A word with spaces is the value of one, such as --launcher_args.
    options = [word for word in words[1:place] if word.startswith("-") and " " not in word]
    # srun is not here, mpirun's package has no help text, and python has no options in the documentation.
    if words[0] in {"srun", "mpirun", "python", "python3"}:
        assert words[0] in {"srun", "mpirun"} or not options
    else:
        # torchrun takes both spellings.
        known = usage(words[0]).replace("_", "-")
        unknown = [o for o in options if o.partition("=")[0].replace("_", "-") not in known]
        assert not unknown, f"not options of {words[0]}: {unknown}"
    if words[0] == "mpirun" and words[place - 1] != "python":
        pytest.fail("mpirun starts python, not a script")
    script(words[place:])


def script(words: Sequence[str]) -> None:
    """A Python file of this repository takes these arguments."""
    path = ROOT / words[0]
    assert path.is_file(), f"no such file: {words[0]}"
    if path == ROOT / "launch" / "train.py":
        return recipe(words[1:])
    if "ArgumentParser" not in path.read_text() and path.parent.name != "launch":
        assert len(words) == 1, f"{words[0]} takes no arguments"
        compile(path.read_text(), str(path), "exec")
        return None
    return parsed(lambda: runpy.run_path(str(path), run_name="__main__"), words)


def recipe(words: Sequence[str]) -> None:
    """The recipe is sound with these fields replaced."""
    from slimfit_ds.tasks.recipe import read_recipe

    shown = {"RECIPE": "recipes/digits_vit.yaml", "recipe.yaml": "recipes/digits_vit.yaml"}
    words = [shown.get(word, word) for word in words]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        read_recipe(words)


def parsed(call: Callable[[], object], words: Sequence[str]) -> None:
    """The first parser that `call` makes accepts the words."""
    from transformers import HfArgumentParser

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", list(words))
        patch.chdir(ROOT)
        # Its own folder on the path, as when it is started.
        patch.syspath_prepend(str((ROOT / words[0]).parent))
        for name in ("parse_args", "parse_intermixed_args"):
            patch.setattr(argparse.ArgumentParser, name, _stop_after(getattr(argparse.ArgumentParser, name)))
        # Not on to the arguments of transformers, which look for a GPU.
        patch.setattr(HfArgumentParser, "parse_args_into_dataclasses", lambda self: self.parse_args())
        with pytest.raises((Parsed, SystemExit)) as ended:
            call()
    assert ended.type is Parsed or ended.value.code == 0, "the parser refuses them"  # 0: --help


def _stop_after(method: Callable) -> Callable:
    def stopped(*args, **kwargs):
        method(*args, **kwargs)
        raise Parsed

    return stopped


def subcommand(words: Sequence[str]) -> None:
    """A command of `slimfit-ds` takes these arguments."""
    from slimfit_ds.cli import COMMANDS

    assert words[1] in COMMANDS, f"slimfit-ds has no command {words[1]!r}"
    if len(words) == 2:  # only named in a sentence
        return None
    if words[1] == "train":
        return recipe(words[2:])
    module, _, function = COMMANDS[words[1]][0].partition(":")
    main = getattr(import_module(module), function)
    return parsed(lambda: main(list(words[2:])), words[1:])


def pip(words: Sequence[str]) -> None:
    """Named files, extras and folders are there."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    files = [words[i + 1] for i, word in enumerate(words) if word in {"-c", "-r"}]
    assert all((ROOT / name).is_file() for name in files)
    for word in words:
        if match := re.fullmatch(r"(?:\.|slimfit_ds)\[(.*)\]", word):
            assert set(match[1].split(",")) <= project["optional-dependencies"].keys(), word


def make(words: Sequence[str]) -> None:
    """There is such a target."""
    run(["make", "-n", *words[1:]])


def pytest_files(words: Sequence[str]) -> None:
    """The tests named are there."""
    for word in words[1:]:
        if word.startswith("tests"):
            assert (ROOT / word.partition("::")[0]).exists(), word


def python_module(words: Sequence[str]) -> None:
    """`python -m NAME`."""
    if words[2] == "pytest":
        pytest_files(words[2:])
    else:
        assert import_module(words[2].partition(".")[0])


def python_module_of_launcher(words: Sequence[str]) -> None:
    """`torchrun OPTIONS -m NAME`."""
    assert import_module(words[words.index("-m") + 1])


def shell_script(words: Sequence[str]) -> None:
    """A script for a machine with a GPU: it is there, can be started, and the shell can read it."""
    path = ROOT / words[0]
    assert os.access(path, os.X_OK), f"{words[0]} is not there or not executable"
    run(["bash", "-n", str(path)])


def of_transformers(words: Sequence[str]) -> None:
    """A subcommand of transformers has these options."""
    known = usage(" ".join(words[:2]))
    assert [word for word in words[2:] if word.startswith("-") and word not in known] == []


def exists(words: Sequence[str]) -> None:
    """Shell commands whose program cannot be here: the files of this repository that they name are."""
    for word in words[1:]:
        part = word.rpartition("=")[2]
        if re.fullmatch(r"(docker|ds_configs|recipes|launch|examples|benchmarks|docs)/[\w./-]+", part):
            assert (ROOT / part).exists(), word


TABLE: dict[str, Callable[[Sequence[str]], None]] = {
    # the first pattern that fits decides
    "slimfit-ds *": subcommand,
    "python -m *": python_module,
    "torchrun * -m slimfit_ds.doctor": python_module_of_launcher,
    "srun slimfit-ds *": lambda words: subcommand(words[1:]),
    "python *.py*": launched,
    "torchrun *.py*": launched,
    "deepspeed *.py*": launched,
    "accelerate launch *.py*": launched,
    "mpirun *.py*": launched,
    "srun *.py*": launched,
    "pytest *": pytest_files,
    ".venv/bin/python -m *": python_module,
    "make *": make,
    "benchmarks/*.sh*": shell_script,
    "sbatch *": exists,
    "kubectl *": exists,
    "docker *": exists,
    "transformers *": of_transformers,
    "lm_eval *": exists,
    "pip install *": pip,
    "python3 -m venv .venv": python_module,
    ". .venv/bin/activate": exists,
}


def row(command: Command) -> Callable[[Sequence[str]], None] | None:
    return next(
        (check for pattern, check in TABLE.items() if fnmatch.fnmatchcase(command.text, pattern)), None
    )


@cache
def usage(program: str) -> str:
    return run([*program.split(), "--help"])


def run(command: list[str]) -> str:
    path = f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}"
    program = shutil.which(command[0], path=path)
    if program is None:
        pytest.skip(f"no {command[0]} here")
    # Without the place in a process group that an earlier test left in this process: its port is still listened on.
    inherited = {key: value for key, value in os.environ.items() if key not in LAUNCHED}
    environment = {**inherited, "PATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [program, *command[1:]], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, f"{command}: {done.stdout[-1000:]}{done.stderr[-3000:]}"
    return done.stdout + done.stderr


@pytest.mark.parametrize("command", commands(), ids=lambda command: f"{command.page}: {command.text}"[:110])
def test_a_command_is_in_the_table_and_its_arguments_are_right(command):
    check = row(command)
    assert check is not None, f"{command.page}: no row of TABLE fits {command.text!r}"
    check(command.words)


def test_commands_are_found():
    texts = {command.text for command in commands()}
    assert "make demo" in texts
    assert "python launch/train.py --config recipes/digits_vit.yaml --max_steps 60" in texts
    assert ". .venv/bin/activate" in texts
    assert len(texts) > 30


@pytest.mark.parametrize(
    "text",
    [
        "python launch/train.py --config recipes/digits_vit.yaml learning_rate=fast",
        "slimfit-ds plan --model bert-base-uncased --gpu-memory 8GB --no-such-option 1",
        "torchrun --no_such_option 2 launch/train.py --config recipes/digits_vit.yaml",
        "python examples/run_glue_slimfit.py --model_name_or_path M --data_dir D --output_dir o --max_stepz 3",
        "python benchmarks/no_such_file.py",
        "make no-such-target",
        "pip install -e '.[no_such_extra]'",
    ],
)
def test_a_wrong_command_is_noticed(text):
    from doc_commands import _simple

    (command,) = _simple(text, "a page")
    with pytest.raises((AssertionError, SystemExit, pytest.fail.Exception, ValueError)):
        row(command)(command.words)
