"""The plan command: what it writes, and what it says to wrong input."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from slimfit_ds.config import SlimFitConfig
from slimfit_ds.planner.cli import main
from slimfit_ds.tasks.recipe import read_recipe

ROOT = Path(__file__).parents[2]
TINY = {
    "model_type": "bert",
    "num_hidden_layers": 2,
    "hidden_size": 128,
    "num_attention_heads": 2,
    "intermediate_size": 512,
    "vocab_size": 2000,
    "architectures": ["BertForSequenceClassification"],
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TINY))
    return str(path)


def test_all_problems_at_once(capsys, monkeypatch):
    arguments = [
        "--model",
        "./no/such/place",
        "--gpu-memory",
        "lots",
        "--batch",
        "0",
        "--gpus",
        "0",
        "--task",
        "x",
    ]
    assert main([*arguments, "--dtype", "int8", "--seq", "-3", "--stage", "5"]) == 2
    text = capsys.readouterr().err
    for word in (
        "'./no/such/place' does not exist",
        "gpu-memory",
        "batch must be at least 1, got 0",
        "gpus",
        "task",
        "int8",
        "seq",
        "stage",
    ):
        assert word in text, word


def test_misspelt_model(capsys, monkeypatch):
    import transformers

    def offline(name, **_):
        raise OSError("offline")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", offline)
    assert main(["--model", "meta-llama/Meta-Lama-3-8B", "--gpu-memory", "24GB"]) == 2
    assert "did you mean 'meta-llama/Meta-Llama-3-8B'" in capsys.readouterr().err


@pytest.fixture
def no_simulation(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("simulates")

    monkeypatch.setattr("slimfit_ds.planner.cli.Simulator", fail)


@pytest.mark.parametrize("place", ["/proc/none", "/proc", "config.json", "config.json/plan"])
def test_an_output_that_cannot_be_written_is_said_before_the_simulation(
    config, tmp_path, capsys, no_simulation, place
):
    output = place if place.startswith("/") else str(tmp_path / place)
    assert main(["--model", config, "--gpu-memory", "24GB", "--output", output]) == 2
    assert f"nothing can be written to {output}" in capsys.readouterr().err


def test_a_gpu_has_to_be_known(config, capsys, no_simulation, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--model", config]) == 2
    assert (
        "gpu: there is none here; name one, --gpu 4090, or its memory, --gpu-memory 24GB"
        in capsys.readouterr().err
    )
    assert main(["--model", config, "--gpu", "voodoo2"]) == 2
    assert "gpu must be one of 4090, 3090" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["recipe.yaml", "ds_config.json"])
def test_a_plan_that_is_there_is_not_replaced(config, tmp_path, capsys, no_simulation, name):
    (tmp_path / name).write_text("edited")
    arguments = ["--model", config, "--gpu-memory", "24GB", "--output", str(tmp_path)]
    assert main(arguments) == 2
    assert f"{tmp_path / name} exists: choose another --output, or add --overwrite" in capsys.readouterr().err
    with pytest.raises(AssertionError, match="simulates"):
        main([*arguments, "--overwrite"])
    assert (tmp_path / name).read_text() == "edited"


def test_a_folder_that_was_made_for_a_plan_goes_if_there_is_none(config, tmp_path, capsys):
    arguments = ["--model", config, "--gpu-memory", "600MB", "--output", str(tmp_path / "new" / "plan")]
    assert main(arguments) == 2
    assert "nothing fits" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_plan_writes_a_recipe_that_reads(config, tmp_path, capsys):
    out = tmp_path / "plan"
    arguments = [
        "--model",
        config,
        "--gpu-memory",
        "24GB",
        "--batch",
        "4",
        "--seq",
        "32",
        "--output",
        str(out),
    ]
    assert main(arguments) == 0
    text, said = capsys.readouterr()
    assert "s] LoRA rank 8, all linear layers: " in said
    assert "LoRA" in text
    assert "->" in text
    assert "expected gradient error" in text
    recipe, _ = read_recipe(["--config", str(out / "recipe.yaml"), "data_dir=x"])
    assert recipe.arguments["per_device_train_batch_size"] == 4
    block = json.loads((out / "ds_config.json").read_text())["slimfit"]
    SlimFitConfig.parse(block)
    assert recipe.deepspeed == str(out / "ds_config.json")
    plan = json.loads((out / "plan.json").read_text())
    (chosen,) = (row for row in plan["rows"] if row["chosen"])
    assert chosen["fits"]
    assert chosen["ours"]
    assert chosen["speed"]["tokens_per_second"] > 0
    assert 0 < chosen["needs"] <= plan["budget"] == 24_000_000_000 - 600_000_000
    html = (out / "plan.html").read_text()
    assert html.count("<tr ") == len(plan["rows"])
    assert "http" not in html.replace("http-equiv", "")
    (out / "recipe.yaml").write_text("edited")
    assert main([*arguments, "--slimfit-only", "--overwrite"]) == 0
    assert (out / "recipe.yaml").read_text() != "edited"


@pytest.mark.slow
def test_a_gpu_that_is_too_small(config, capsys):
    arguments = [
        "--model",
        config,
        "--gpu-memory",
        "601MB",
        "--batch",
        "4",
        "--seq",
        "256",
        "--slimfit-only",
    ]
    assert main(arguments) == 2
    text = capsys.readouterr().err
    assert "nothing fits" in text
    assert "missing" in text
    assert "it fits a GPU of" in text
    assert "with batch 1 and 128 tokens" in text


def test_script_shows_help():
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "plan.py"), "--help"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0
    assert "--gpu-memory" in done.stdout
