"""What goes wrong first: each mistake is told within seconds, in a line that says what, and how it is done right."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slimfit_ds import private_names
from slimfit_ds.cli import main

ROOT = Path(__file__).parents[1]
DIGITS = str(ROOT / "recipes" / "digits_vit.yaml")
BANKING = str(ROOT / "recipes" / "minilm_banking.yaml")


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """The mistakes happen in the repository, without a GPU and without a launcher."""
    import torch

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def a_gpu_that_is_not_there(place, monkeypatch):
    return ["plan", "--model", "gpt2", "--output", str(place)]


def too_little_memory(place, monkeypatch):
    return ["plan", "--model", "gpt2", "--gpu-memory", "500MB", "--output", str(place)]


def another_torch(place, monkeypatch):
    changed = private_names.Name("torch.nn:Module", "_gone_in_this_torch", rooms=(), breaks="")
    monkeypatch.setattr(private_names, "TABLE", (changed,))
    private_names._check.cache_clear()
    # Where training meets it: before the model is made.
    monkeypatch.setattr("slimfit_ds.integrations.ranks.set_rank_variables", lambda **_: private_names.check())
    monkeypatch.setattr("slimfit_ds.train.set_rank_variables", lambda **_: private_names.check())
    return ["train", "--config", DIGITS]


def no_padding_token(place, monkeypatch):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "card": 1}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(place / "tokenizer")
    return ["train", "--config", BANKING, f"tokenizer={place / 'tokenizer'}", f"output_dir={place / 'out'}"]


def a_gated_model(place, monkeypatch):
    import transformers

    def gated(*_, **__):
        raise OSError("You are trying to access a gated repo.\nMake sure to have access to it at the hub.")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", gated)
    return ["train", "--config", BANKING, "model=meta-llama/Meta-Llama-3-8B", f"output_dir={place / 'out'}"]


def a_column_that_is_not_there(place, monkeypatch):
    file = place / "train.jsonl"
    file.write_text(
        "\n".join(json.dumps({"review": "good", "label": "a" if i % 2 else "b"}) for i in range(20))
    )
    return ["train", "--config", BANKING, f"data_dir={file}", "holdout=0.5", f"output_dir={place / 'out'}"]


def other_ranks_than_the_launchers(place, monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    return ["train", "--config", DIGITS]


def an_old_key(place, monkeypatch):
    return ["train", "--config", DIGITS, "evaluation_strategy=epoch", f"output_dir={place / 'out'}"]


def a_folder_that_cannot_be_written(place, monkeypatch):
    return ["train", "--config", DIGITS, "output_dir=/proc/none"]


def an_extra_that_is_not_installed(place, monkeypatch):
    monkeypatch.setattr("slimfit_ds.optim.config.find_spec", lambda _: None)
    return [
        "train",
        "--config",
        DIGITS,
        "slimfit.optimizer_states.precision=8bit",
        f"output_dir={place / 'out'}",
    ]


def adapters_without_peft(place, monkeypatch):
    monkeypatch.setattr("slimfit_ds.tasks.recipe.find_spec", lambda _: None)
    return ["train", "--config", DIGITS, "slimfit=null", "lora={r: 4}", f"output_dir={place / 'out'}"]


MISTAKES = {
    an_extra_that_is_not_installed: ("8bit needs torchao", "pip install 'slimfit_ds[low-bit]'"),
    adapters_without_peft: ("adapters need peft", "pip install 'slimfit_ds[lora]'"),
    a_gpu_that_is_not_there: ("gpu: there is none here", "--gpu 4090"),
    too_little_memory: ("nothing fits: the GPU is smaller than", "--reserve"),
    another_torch: ("private names that slimfit_ds relies on have changed", "install torch>=2.11"),
    no_padding_token: ("has neither a padding nor an end token", "choose another"),
    a_gated_model: ("model: cannot load 'meta-llama/Meta-Llama-3-8B'", "hf auth login"),
    a_column_that_is_not_there: ("task.columns: no known text columns", "name one or two"),
    other_ranks_than_the_launchers: ("mpi4py is missing", "pip install 'slimfit_ds[mpi]'"),
    an_old_key: ("evaluation_strategy", "eval_strategy"),
    a_folder_that_cannot_be_written: ("output_dir: cannot write to '/proc/none'", "choose another place"),
}


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_a_mistake_is_a_line_that_says_what_and_how(mistake, place, monkeypatch, capsys):
    arguments = mistake(place, monkeypatch)
    start = time.process_time()
    code = main(arguments)
    seconds = time.process_time() - start
    text = capsys.readouterr().err
    what, how = MISTAKES[mistake]
    line = next((line for line in text.splitlines() if what in line), None)
    assert line is not None, text
    assert how in line
    assert code == 2
    assert "Traceback" not in text
    assert seconds < 10
    private_names._check.cache_clear()


@pytest.mark.slow
@pytest.mark.distributed
def test_a_port_in_use_is_a_line_too(tmp_path):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        ranks = {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        program = "from slimfit_ds.engine.processes import start_processes; start_processes()"
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=tmp_path,
            env={**os.environ, **ranks, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=200,
        )
    message = (
        f"ConfigError: MASTER_PORT: another process of this machine listens on {port}; choose a free port"
    )
    assert message in done.stderr, done.stderr[-2000:]
