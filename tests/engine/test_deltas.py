"""What trained, out of an engine."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForMaskedLM

import slimfit_ds
from slimfit_ds.cli import main
from slimfit_ds.deltas.base import DeltaError
from slimfit_ds.deltas.delta import read_delta
from slimfit_ds.deltas.load import load_merged
from slimfit_ds.engine import checkpoint, checkpoint_files
from slimfit_ds.engine.checkpoint import CheckpointError, latest_tag
from slimfit_ds.engine.export import load_states_of
from slimfit_ds.errors import ConfigError


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def engine_of(folder, stage: int = 1, policy: str = "static", bf16: bool = False, checkpoints: str = "delta"):
    """An engine of a tiny BERT whose base lies in a folder."""
    base = folder / "base"
    if not base.exists():
        torch.manual_seed(1)
        config = BertConfig(
            vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
        )
        BertForMaskedLM(config).save_pretrained(base)
    model = BertForMaskedLM.from_pretrained(base)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "bf16": {"enabled": bf16},
        "zero_optimization": {"stage": stage},
        "slimfit": {"freeze": {"policy": policy, "rate": 0.7}, "checkpoints": checkpoints},
    }
    return slimfit_ds.initialize(model=model, config=config)[0]


def train(engine, steps: int) -> list[float]:
    losses = []
    for step in range(engine.global_steps, engine.global_steps + steps):
        ids = torch.arange(24).view(2, 12).add(step) % 31
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(
    ("stage", "policy", "bf16"), [(1, "static", False), (3, "static", True), (2, "ils", False)]
)
def test_base_and_delta_are_the_engines_model(tmp_path, stage, policy, bf16):
    engine = engine_of(tmp_path, stage, policy, bf16=bf16)
    train(engine, 3)
    engine.save_delta(tmp_path / "delta.safetensors")
    engine.save_pretrained(tmp_path / "whole")
    merged = load_merged(tmp_path / "base", read_delta(tmp_path))
    whole = BertForMaskedLM.from_pretrained(tmp_path / "whole").state_dict()
    assert merged.state_dict().keys() == whole.keys()
    for name, tensor in merged.state_dict().items():
        assert torch.equal(tensor, whole[name]), name
        assert tensor.dtype == whole[name].dtype == (torch.bfloat16 if bf16 else torch.float32)


@pytest.mark.usefixtures("one_rank")
def test_what_cannot_be_written_is_said_on_every_rank(tmp_path):
    engine = engine_of(tmp_path)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match=r"rank 0: .*nothing can be written to"):
        engine.save_delta(tmp_path / "file" / "delta.safetensors")
    with pytest.raises(CheckpointError, match=r"could not be saved to .*: rank 0: "):
        engine.save_pretrained(tmp_path / "file" / "folder")


def weights_of(engine) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in engine.module.state_dict().items()}


def assert_equal(mine, theirs) -> None:
    assert mine.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(mine[name], theirs[name])] == []


@pytest.mark.usefixtures("one_rank")
class TestCheckpoints:
    @pytest.mark.parametrize(
        ("stages", "policy", "bf16"), [((1, 2), "static", True), ((0, 1), "ils", False)], ids=str
    )
    def test_a_run_goes_on_as_if_nothing_had_happened(self, tmp_path, stages, policy, bf16):
        engine = engine_of(tmp_path, stages[0], policy, bf16)
        train(engine, 3)
        engine.save_checkpoint(tmp_path / "run")
        expected = train(engine, 3)
        other = engine_of(tmp_path, stages[1], policy, bf16)
        other.load_checkpoint(tmp_path / "run")
        assert train(other, 3) == expected
        assert_equal(weights_of(other), weights_of(engine))

    def test_it_holds_what_trained_only(self, tmp_path):
        engine = engine_of(tmp_path)
        train(engine, 2)
        engine.save_checkpoint(tmp_path / "run")
        folder = tmp_path / "run" / "global_step2"
        assert sorted(path.name for path in folder.iterdir()) == [
            "delta.safetensors",
            "optimizer-00000-of-00001.safetensors",
            "random-00000-of-00001.safetensors",
            "slimfit.json",
        ]
        assert set(load_file(folder / "delta.safetensors")) == set(engine.trained_names)

    def test_every_layer_that_ever_trained_is_in_it(self, tmp_path):
        engine = engine_of(tmp_path, policy="ils")
        seen = set()
        for _ in range(4):
            seen |= engine.active_layers
            train(engine, 1)
        engine.save_checkpoint(tmp_path / "run", tag="x")
        saved = set(load_file(tmp_path / "run" / "x" / "delta.safetensors"))
        assert saved == seen | set(engine.roles.small)
        assert seen > engine.active_layers

    def test_what_trained_after_the_checkpoint_becomes_the_bases_again(self, tmp_path):
        engine = engine_of(tmp_path, policy="ils")
        train(engine, 1)
        engine.save_checkpoint(tmp_path / "run")
        at_one = weights_of(engine)
        expected = train(engine, 4)
        engine.load_checkpoint(tmp_path / "run")
        assert_equal(weights_of(engine), at_one)
        assert train(engine, 4) == expected

    def test_whole_and_delta_lead_to_each_other(self, tmp_path):
        engine = engine_of(tmp_path, checkpoints="whole")
        train(engine, 2)
        engine.save_checkpoint(tmp_path / "whole")
        other = engine_of(tmp_path)
        other.load_checkpoint(tmp_path / "whole")
        other.save_checkpoint(tmp_path / "delta")
        third = engine_of(tmp_path, checkpoints="whole")
        third.load_checkpoint(tmp_path / "delta")
        assert train(third, 2) == train(engine, 2)

    def test_export_gives_masters_and_merge_takes_a_checkpoint(self, tmp_path):
        whole = engine_of(tmp_path, bf16=True, checkpoints="whole")
        delta = engine_of(tmp_path, bf16=True)
        for engine, name in ((whole, "whole"), (delta, "delta")):
            train(engine, 2)
            engine.save_checkpoint(tmp_path / name)
        mine, theirs = load_states_of(tmp_path / "delta"), load_states_of(tmp_path / "whole")
        assert_equal(mine, theirs)
        assert all(t.dtype == torch.float32 for t in mine.values())
        merged = load_merged(tmp_path / "base", read_delta(tmp_path / "delta" / "global_step2"))
        assert_equal(dict(merged.state_dict()), weights_of(delta))

    def test_commands_find_it_by_latest_and_its_base_where_it_has_moved_to(self, tmp_path, capsys):
        engine = engine_of(tmp_path)
        train(engine, 2)
        engine.save_checkpoint(tmp_path / "run")
        exported = load_states_of(tmp_path / "run")
        base, run, out = tmp_path / "moved", str(tmp_path / "run"), tmp_path / "out.safetensors"
        (tmp_path / "base").rename(base)
        assert main(["export", run, str(out)]) == 2
        assert "say where it is by --base" in capsys.readouterr().err
        assert main(["export", run, str(out), "--base", str(base)]) == 0
        assert_equal(load_file(out), exported)
        assert main(["merge", str(base), run, str(tmp_path / "merged")]) == 0
        merged = BertForMaskedLM.from_pretrained(tmp_path / "merged")
        assert_equal(dict(merged.state_dict()), weights_of(engine))

    def test_a_delta_replaces_no_other_file(self, tmp_path):
        engine = engine_of(tmp_path)
        with pytest.raises(DeltaError, match="weights of the base"):
            engine.save_delta(tmp_path / "base" / "model.safetensors")
        BertForMaskedLM.from_pretrained(tmp_path / "base")

    def test_another_base_is_refused_with_both_hashes_before_anything_changes(self, tmp_path):
        engine = engine_of(tmp_path)
        train(engine, 2)
        engine.save_checkpoint(tmp_path / "run")
        file = tmp_path / "base" / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        os.utime(file, ns=(1, 1))
        other = engine_of(tmp_path)
        before = weights_of(other)
        with pytest.raises(DeltaError, match=r"sha256 [0-9a-f]{64}, and .* has sha256 [0-9a-f]{64}"):
            other.load_checkpoint(tmp_path / "run")
        assert_equal(weights_of(other), before)

    def test_a_model_without_a_base_is_refused_before_any_work(self):
        model = BertForMaskedLM(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
        config = {"train_micro_batch_size_per_gpu": 2, "slimfit": {"checkpoints": "delta"}}
        with pytest.raises(ConfigError, match=r"slimfit\.checkpoints is delta, but the model has no base"):
            slimfit_ds.initialize(model=model, config=config)

    def test_a_truncated_delta_is_refused(self, tmp_path):
        engine = engine_of(tmp_path)
        engine.save_checkpoint(tmp_path / "run", tag="x")
        file = tmp_path / "run" / "x" / "delta.safetensors"
        file.write_bytes(file.read_bytes()[:-5])
        with pytest.raises(DeltaError, match="is no whole delta"):
            engine.load_checkpoint(tmp_path / "run")

    def test_a_failed_write_leaves_the_last_checkpoint(self, tmp_path, monkeypatch):
        engine = engine_of(tmp_path)
        engine.save_checkpoint(tmp_path / "run", tag="good")

        def full(*args):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(checkpoint, "write_into", full)
        with pytest.raises(CheckpointError, match="No space left on device"):
            engine.save_checkpoint(tmp_path / "run", tag="bad")
        assert latest_tag(tmp_path / "run") == "good"
        assert (
            json.loads((tmp_path / "run" / "good" / "slimfit.json").read_text())["format"]
            == checkpoint_files.FORMAT
        )
