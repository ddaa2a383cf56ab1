"""Which monitors are switched on, and what is said when they cannot be."""

import os
import socket

import pytest

from slimfit_ds.errors import ConfigError
from slimfit_ds.monitoring import backends
from slimfit_ds.monitoring.backends import monitor_blocks, settle_wandb


@pytest.fixture(autouse=True)
def everything_is_installed(monkeypatch):
    missing: set[str] = set()
    monkeypatch.setattr(backends, "find_spec", lambda name: None if name in missing else object())
    return missing


def test_recipe_switches_on_and_files_go_to_the_run(tmp_path):
    assert monitor_blocks(["tensorboard", "csv"], {}, tmp_path) == {
        "tensorboard": {"enabled": True, "output_path": str(tmp_path), "job_name": "tensorboard"},
        "csv_monitor": {"enabled": True, "output_path": str(tmp_path), "job_name": "csv"},
    }


def test_json_decides_where_the_recipe_is_silent(tmp_path):
    base = {
        "tensorboard": {"enabled": True, "output_path": "logs", "job_name": "mine"},
        "wandb": {"enabled": True, "team": "us"},
        "csv_monitor": {"enabled": False},
    }
    assert monitor_blocks(None, base, tmp_path) == {
        "tensorboard": {"enabled": True, "output_path": "logs", "job_name": "mine"},
        "wandb": {"enabled": True, "team": "us", "project": "slimfit_ds"},
    }
    assert set(monitor_blocks(["csv"], base, tmp_path)) == {"tensorboard", "wandb", "csv_monitor"}
    assert monitor_blocks([], base, tmp_path) == {}


def test_all_problems_at_once(tmp_path, everything_is_installed):
    everything_is_installed |= {"wandb", "comet_ml"}
    base = {"tensorboard": 3, "csv_monitor": {"enabled": "yes"}, "comet": {"enabled": True}}
    with pytest.raises(ConfigError) as caught:
        monitor_blocks(["wandb"], base, tmp_path)
    assert caught.value.problems == [
        "deepspeed.tensorboard must be a mapping with enabled: true or false, got 3",
        "report_to 'wandb' needs the package wandb, which is not installed: pip install wandb",
        "deepspeed.csv_monitor must be a mapping with enabled: true or false, got {'enabled': 'yes'}",
        "deepspeed.comet needs the package comet_ml, which is not installed: pip install comet_ml",
    ]


@pytest.fixture
def no_wandb_settings(monkeypatch):
    for name in ("WANDB_MODE", "WANDB_DIR", "WANDB_NAME", "WANDB_BASE_URL"):
        # Set first, so that what the code under test sets is taken back.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.usefixtures("no_wandb_settings")
def test_wandb_goes_offline_without_a_server(tmp_path, monkeypatch, capsys):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{probe.getsockname()[1]}")
    settle_wandb(tmp_path)
    assert os.environ["WANDB_MODE"] == "offline"
    assert os.environ["WANDB_DIR"] == str(tmp_path)
    assert "wandb sync" in capsys.readouterr().err


@pytest.mark.usefixtures("no_wandb_settings")
def test_wandb_stays_online_with_a_server(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        settle_wandb(tmp_path)
    assert "WANDB_MODE" not in os.environ


@pytest.mark.usefixtures("no_wandb_settings")
def test_what_the_environment_says_stands(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("WANDB_NAME", "mine")
    settle_wandb(tmp_path)
    assert (os.environ["WANDB_MODE"], os.environ["WANDB_NAME"]) == ("disabled", "mine")
