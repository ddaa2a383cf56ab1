"""What a Trainer pushes to the hub after a run, and in it; the hub is a folder."""

from __future__ import annotations

import fnmatch
import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers.trainer
from safetensors.torch import load_file
from test_delta_checkpoints import assert_same, trainer_of
from transformers import AutoModelForSequenceClassification

from slimfit_ds.cli import main


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """Stands for the hub: uploads go into `hub/REPOSITORY`."""
    root = tmp_path / "hub"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    class Api:
        def create_repo(self, repo_id, **_):
            return SimpleNamespace(repo_id=f"me/{repo_id}")

        def upload_folder(self, repo_id, folder_path, ignore_patterns=(), path_in_repo="", **_):
            for path in sorted(Path(folder_path).rglob("*")):
                name = path.relative_to(folder_path)
                if path.is_file() and not any(fnmatch.fnmatch(str(name), p) for p in ignore_patterns):
                    target = root / repo_id / path_in_repo / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, target)
            return SimpleNamespace(is_done=lambda: True, done=lambda: True)

    monkeypatch.setattr(transformers.trainer, "hf_api", Api)
    return root / "me" / "out"


@pytest.mark.parametrize("checkpoints", ["delta", "whole"])
def test_what_is_pushed_is_the_trained_model(tmp_path, hub, checkpoints):
    trainer = trainer_of(tmp_path, checkpoints=checkpoints, push_to_hub=True, eval_strategy="epoch")
    trainer.train()
    pushed_on_the_way = load_file(hub / "model.safetensors")
    assert any(name.endswith("weight_columns") for name in pushed_on_the_way) == (checkpoints == "delta")
    trainer.push_to_hub(dataset="GLUE", dataset_tags="glue")
    card = (hub / "README.md").read_text()
    assert '"rate": 0.7' in card
    assert str(tmp_path / "base") in card
    assert "datasets:\n- glue" in card
    assert "evaluation set" in card
    if checkpoints == "delta":
        assert "slimfit-ds merge BASE DELTA OUTPUT" in card
        with pytest.raises(ValueError, match="model type `slimfit_delta`"):
            AutoModelForSequenceClassification.from_pretrained(hub)
        assert main(["merge", str(tmp_path / "base"), str(hub), str(tmp_path / "merged")]) == 0
        assert '"rate": 0.7' in (tmp_path / "merged" / "README.md").read_text()
    else:
        assert "slimfit-ds merge" not in card
    folder = tmp_path / "merged" if checkpoints == "delta" else hub
    assert_same(AutoModelForSequenceClassification.from_pretrained(folder), trainer.model)
    # The model is as any other after that, and another Trainer's card its own.
    trainer.model.save_pretrained(tmp_path / "whole")
    assert_same(AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole"), trainer.model)
    assert not {"save_pretrained", "create_model_card"} & {*vars(trainer.model), *vars(trainer)}


def test_a_model_that_has_changed_since_is_pushed_whole(tmp_path, hub, caplog):
    trainer = trainer_of(tmp_path)
    trainer.train()
    torch.nn.init.zeros_(trainer.model.classifier.weight)
    with caplog.at_level(logging.WARNING):
        trainer.push_to_hub()
    assert "classifier.weight has changed since" in caplog.text
    assert_same(AutoModelForSequenceClassification.from_pretrained(hub), trainer.model)


def test_a_push_that_fails_leaves_nothing_for_the_next_save(tmp_path, hub, monkeypatch):
    trainer = trainer_of(tmp_path)
    trainer.train()
    monkeypatch.setattr(trainer, "init_hf_repo", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.push_to_hub()
    trainer.save_model(str(tmp_path / "whole"))
    assert_same(AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole"), trainer.model)
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["model_type"] == "bert"
