"""Checkpoints: resume on other world sizes, stages and residencies; whole or not there at all."""

from __future__ import annotations

import json
import random
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from safetensors.torch import load_file
from torch import nn
from transformers import BertConfig, BertForMaskedLM

import slimfit_ds
from slimfit_ds.cli import main
from slimfit_ds.engine import checkpoint
from slimfit_ds.engine.checkpoint import CheckpointError, latest_tag
from slimfit_ds.engine.checkpoint_files import Shard, ShardReader, write_shards
from slimfit_ds.engine.export import load_states_of
from slimfit_ds.errors import ConfigError
from slimfit_ds.optim import low_bit

WORKER = Path(__file__).with_name("resume_worker.py")


def run(run_ranks, ranks: int, stage: int, first: int, last: int, **options) -> list[dict]:
    flags = [f"--{key}={value}" for key, value in options.items() if value is not None]
    return run_ranks(WORKER, f"--stage={stage}", f"--first={first}", f"--last={last}", *flags, ranks=ranks)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("dtype", "phases", "loss_tolerance", "weight_tolerance", "base"),
    [
        # (ranks, stage, residency) for four steps each. In bf16 a batch of 8 rounds its gradients
        # otherwise than two of 4, and Adam may turn that into two updates of lr = 1e-3.
        ("fp32", [(2, 1, "device"), (1, 2, "host"), (2, 0, "device")], 1e-5, 1e-6, None),
        ("bf16", [(2, 2, "host"), (1, 0, "device"), (2, 1, "device")], 2e-2, 2e-3, None),
        ("fp32", [(2, 3, "device"), (1, 3, "device"), (2, 1, "host")], 1e-5, 1e-6, None),
        # What trained, beside a base.
        ("fp32", [(2, 3, "device"), (1, 1, "host"), (2, 2, "device")], 1e-5, 1e-6, "base"),
    ],
)
def test_resume_anywhere_equals_the_uninterrupted_run(
    run_ranks, tmp_path, dtype, phases, loss_tolerance, weight_tolerance, base
):
    ranks, stage, _ = phases[0]
    base = base and tmp_path / base
    whole = run(run_ranks, ranks, stage, 0, 12, dtype=dtype, save=tmp_path / "whole")
    pieces: list[dict] = []
    for number, (ranks, stage, inactive) in enumerate(phases):
        pieces += run(
            run_ranks,
            ranks,
            stage,
            4 * number,
            4 * number + 4,
            dtype=dtype,
            inactive=inactive,
            base=base,
            load=tmp_path / "part" if number else None,
            save=tmp_path / "part",
        )
    assert [step["active"] for step in pieces] == [step["active"] for step in whole]
    assert [step["lr"] for step in pieces] == [step["lr"] for step in whole]
    for mine, theirs in zip(pieces, whole, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=loss_tolerance, abs=loss_tolerance)
    if base:
        assert next((tmp_path / "part").glob("*/delta.safetensors"))
        assert not list((tmp_path / "part").glob("*/model.safetensors"))
    mine, theirs = load_states_of(tmp_path / "part"), load_states_of(tmp_path / "whole")
    assert mine.keys() == theirs.keys()
    for name, weight in theirs.items():
        torch.testing.assert_close(mine[name].float(), weight.float(), rtol=0, atol=weight_tolerance)


def engine_of(model: nn.Module | None = None, stage: int = 1, **slimfit):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 4)) if model is None else model
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "zero_optimization": {"stage": stage},
        "slimfit": {"freeze": {"policy": "ils", "rate": 0.5}, **slimfit},
    }
    return slimfit_ds.initialize(model=model, config=config)[0]


def wide_engine(precision: str, stage: int = 1):
    """One whose moments of weights are kept in 8 bits, if that is the precision, and those of biases in float32."""
    return engine_of(
        nn.Sequential(nn.Linear(4, 1500), nn.Linear(1500, 4)),
        stage,
        freeze={"policy": "none"},
        optimizer_states={"precision": precision},
    )


def train(engine, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = engine(torch.randn(2, 4)).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


@pytest.mark.usefixtures("one_rank")
class TestOneRank:
    def test_random_states_and_client_state_come_back(self, tmp_path):
        engine = engine_of()
        train(engine, 3)
        engine.save_checkpoint(tmp_path, client_state={"epoch": 2, "best": [0.5, None]})
        expected = (train(engine, 4), random.random(), np.random.get_state()[2], torch.rand(1).item())
        other = engine_of()
        path, client = other.load_checkpoint(tmp_path)
        assert path == str(tmp_path / "global_step3")
        assert client == {"epoch": 2, "best": [0.5, None]}
        assert (train(other, 4), random.random(), np.random.get_state()[2], torch.rand(1).item()) == expected

    def test_an_empty_folder_is_no_error(self, tmp_path):
        assert engine_of().load_checkpoint(tmp_path) == (None, {})

    @pytest.mark.parametrize("stage", [1, 3])
    def test_8_bit_moments_are_saved_in_8_bits_and_come_back_bit_by_bit(self, tmp_path, stage):
        pytest.importorskip("torchao")
        engine = wide_engine("8bit", stage)
        train(engine, 3)
        engine.save_checkpoint(tmp_path)
        states = engine.optimizer.updater.states
        kept = {(i, key): t.clone() for i in states.units for key, t in states.peek(i).tensors.items()}
        assert sum(".codes" in key for _, key in kept) == 4
        expected = train(engine, 3)
        other = wide_engine("8bit", stage)
        other.load_checkpoint(tmp_path)
        states = other.optimizer.updater.states
        for (unit, key), tensor in kept.items():
            assert torch.equal(states.peek(unit).tensors[key], tensor), key
        assert train(other, 3) == expected
        weights = sum(p.numel() for p in engine.module.parameters() if p.numel() > 4096)
        small = sum(p.numel() for p in engine.module.parameters() if p.numel() <= 4096)
        assert next(tmp_path.glob("*/optimizer-*")).stat().st_size < 2.1 * weights + 8 * small + 4096

    @pytest.mark.parametrize(("saved", "resumed"), [("8bit", "fp32"), ("fp32", "8bit")])
    def test_moments_go_from_one_precision_to_the_other(self, tmp_path, saved, resumed):
        pytest.importorskip("torchao")
        engine = wide_engine(saved)
        train(engine, 3)
        engine.save_checkpoint(tmp_path)
        if saved == "fp32":  # As the first version wrote it.
            file = tmp_path / "global_step3" / "slimfit.json"
            file.write_text(json.dumps({**json.loads(file.read_text()), "format": 1}))
        other = wide_engine(resumed)
        other.load_checkpoint(tmp_path)
        for mine, theirs in zip(engine.module.parameters(), other.module.parameters(), strict=True):
            for moment in ("exp_avg", "exp_avg_sq"):
                was = safe_get_full_optimizer_state(mine, moment)
                now = safe_get_full_optimizer_state(theirs, moment)
                assert was.norm() > 0
                # Codes are read as what they stand for; to codes a moment is rounded once.
                assert (now - was).norm() <= (0 if saved == "8bit" else 0.02) * was.norm()

    def test_other_layers_are_refused_with_the_difference(self, tmp_path):
        engine_of().save_checkpoint(tmp_path)
        other = engine_of(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 4)))
        before = {name: p.detach().clone() for name, p in other.module.named_parameters()}
        with pytest.raises(ConfigError) as caught:
            other.load_checkpoint(tmp_path)
        assert "only in the model: 3.weight" in caught.value.problems
        assert all(torch.equal(p, before[name]) for name, p in other.module.named_parameters())

    def test_client_state_must_be_json(self, tmp_path):
        engine = engine_of()
        with pytest.raises(ConfigError, match="client_state must hold JSON types only"):
            engine.save_checkpoint(tmp_path, client_state={"x": torch.zeros(1)})
        assert list(tmp_path.iterdir()) == []

    def test_a_failed_write_leaves_the_last_checkpoint(self, tmp_path, monkeypatch):
        engine = engine_of()
        engine.save_checkpoint(tmp_path, tag="good")

        def full(*args, **kwargs):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(checkpoint, "save_file", full)
        with pytest.raises(CheckpointError, match="No space left on device"):
            engine.save_checkpoint(tmp_path, tag="bad")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["good", "latest", "zero_to_fp32.py"]
        assert latest_tag(tmp_path) == "good"
        assert engine_of().load_checkpoint(tmp_path)[0] == str(tmp_path / "good")

    def test_the_same_tag_again_replaces_the_old_one(self, tmp_path):
        engine = engine_of()
        engine.save_checkpoint(tmp_path, tag="x")
        train(engine, 2)
        engine.save_checkpoint(tmp_path, tag="x")
        assert json.loads((tmp_path / "x" / "slimfit.json").read_text())["counters"]["global_steps"] == 2
        assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "x", "zero_to_fp32.py"]

    def test_foreign_folders_and_formats_are_refused(self, tmp_path):
        (tmp_path / "old").mkdir()
        with pytest.raises(CheckpointError, match=r"is no SlimFit checkpoint: it has no slimfit\.json"):
            engine_of().load_checkpoint(tmp_path, tag="old")
        (tmp_path / "old" / "slimfit.json").write_text('{"format": 99}')
        with pytest.raises(CheckpointError, match="has checkpoint format 99"):
            engine_of().load_checkpoint(tmp_path, tag="old")

    def test_a_checkpoint_holds_no_pickles(self, tmp_path):
        engine = engine_of()
        train(engine, 1)
        engine.save_checkpoint(tmp_path)
        names = {path.suffix for path in (tmp_path / "global_step1").iterdir()}
        assert names == {".json", ".safetensors"}

    def test_export_gives_masters_where_there_are_any(self, tmp_path):
        model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "bf16": {"enabled": True},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-5}},
            "slimfit": {"freeze": {"policy": "ils", "rate": 0.5, "never_active": ["1"]}},
        }
        engine = slimfit_ds.initialize(model=model, config=config)[0]
        for _ in range(3):
            engine.backward(engine(torch.randn(2, 4, dtype=torch.bfloat16)).float().square().mean())
            engine.step()
        engine.save_checkpoint(tmp_path)
        exported = load_states_of(tmp_path)
        frozen, trained = exported["1.weight"], exported["0.weight"]
        assert torch.equal(frozen, engine.module[1].weight.float())
        # Three updates of 1e-5 are below bf16's resolution but not below the master's.
        assert not torch.equal(trained, engine.module[0].weight.float())
        assert torch.equal(trained.bfloat16(), engine.module[0].weight)

    def test_export_command(self, tmp_path, capsys):
        engine = engine_of()
        engine.save_checkpoint(tmp_path / "run")
        target = tmp_path / "out.safetensors"
        assert main(["export", str(tmp_path / "run"), str(target)]) == 0
        assert torch.equal(load_file(target)["0.weight"], engine.module[0].weight)
        assert main(["export", str(tmp_path / "run"), str(tmp_path / "folder")]) == 0
        assert load_file(tmp_path / "folder" / "model.safetensors").keys() == load_file(target).keys()
        assert main(["export", str(tmp_path / "run"), str(target)]) == 2
        assert "exists; choose another name" in capsys.readouterr().err
        assert main(["export", str(tmp_path), str(tmp_path / "new.safetensors")]) == 2
        assert "is no SlimFit checkpoint" in capsys.readouterr().err
        for output in ("/proc/none/out", target / "out"):
            assert main(["export", str(tmp_path / "run"), str(output)]) == 2
            assert f"slimfit-ds export: nothing can be written to {output}" in capsys.readouterr().err
        assert main(["export", str(tmp_path), str(tmp_path / "none")]) == 2
        assert not (tmp_path / "none").exists()

    def test_the_folder_brings_the_script_that_deepspeeds_users_call(self, tmp_path, monkeypatch):
        engine = engine_of()
        engine.save_checkpoint(tmp_path)
        monkeypatch.setattr(sys, "argv", ["zero_to_fp32.py", str(tmp_path), str(tmp_path / "out")])
        with pytest.raises(SystemExit, match="0"):
            runpy.run_path(str(tmp_path / "zero_to_fp32.py"))
        assert torch.equal(
            load_file(tmp_path / "out" / "model.safetensors")["0.weight"], engine.module[0].weight
        )

    def test_save_pretrained_loads_with_plain_transformers(self, tmp_path):
        config = BertConfig(
            vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
        )
        engine = engine_of(BertForMaskedLM(config))
        engine.save_pretrained(tmp_path)
        loaded = BertForMaskedLM.from_pretrained(tmp_path)
        inputs = torch.arange(6)[None]
        engine.module.eval()
        assert torch.equal(loaded(inputs).logits, engine.module(inputs).logits)
        assert loaded.cls.predictions.decoder.weight is loaded.bert.embeddings.word_embeddings.weight

    def test_save_pretrained_of_any_module(self, tmp_path):
        engine = engine_of()
        engine.save_pretrained(tmp_path)
        saved = load_file(tmp_path / "model.safetensors")
        assert torch.equal(saved["0.weight"], engine.module[0].weight)

    def test_a_checkpoint_may_be_moved(self, tmp_path):
        engine = engine_of()
        train(engine, 1)
        engine.save_checkpoint(tmp_path / "a")
        shutil.move(tmp_path / "a", tmp_path / "b")
        assert engine_of().load_checkpoint(tmp_path / "b")[0] is not None

    def test_weights_that_the_user_froze_may_be_left_out(self, tmp_path):
        model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 4))
        model[0].requires_grad_(False)
        engine = engine_of(model)
        train(engine, 3)
        engine.save_checkpoint(tmp_path, tag="x", exclude_frozen_parameters=True)
        saved = load_file(tmp_path / "x" / "model.safetensors")
        assert sorted(saved) == ["1.bias", "1.weight", "2.bias", "2.weight"]
        other = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 4))
        other[0].requires_grad_(False)
        own = other[0].weight.detach().clone()
        other = engine_of(other)
        other.load_checkpoint(tmp_path, tag="x")
        assert torch.equal(other.module[0].weight, own)
        assert torch.equal(other.module[1].weight, engine.module[1].weight)

    def test_weights_of_a_smaller_model_where_that_is_asked_for(self, tmp_path):
        engine = engine_of()
        train(engine, 2)
        engine.save_checkpoint(tmp_path)
        larger = engine_of(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 4), nn.Linear(4, 4)))
        added = larger.module[3].weight.detach().clone()
        with pytest.raises(ConfigError, match=r"only in the model: 3\.weight"):
            larger.load_checkpoint(tmp_path, load_module_only=True)
        larger.load_checkpoint(tmp_path, load_module_only=True, load_module_strict=False)
        assert torch.equal(larger.module[0].weight, engine.module[0].weight)
        assert torch.equal(larger.module[3].weight, added)
        with pytest.raises(ConfigError, match="has 3 freezable layers, the model 4"):
            larger.load_checkpoint(tmp_path, custom_load_fn=lambda src, dst: None)
        with pytest.warns(
            UserWarning, match="has 3 freezable layers, the model 4: the schedule of layers starts"
        ):
            larger.load_checkpoint(tmp_path, load_module_strict=False, load_optimizer_states=False)
        assert larger.global_steps == 2

    @pytest.mark.parametrize("stage", [1, 3])
    @pytest.mark.parametrize("policy", ["none", "static"])
    def test_a_function_of_the_user_sets_the_weights(self, tmp_path, stage, policy):
        def adapt(src, dst):
            assert set(src) == {"0.weight", "0.bias", "1.weight", "1.bias", "2.weight", "2.bias"}
            for name, parameter in dst.named_parameters():
                if name in src:
                    parameter.data.copy_(src[name] + (1.0 if name == "0.weight" else 0.0))

        engine = engine_of(stage=stage, freeze={"policy": policy, "rate": 0.5})
        train(engine, 3)
        engine.save_checkpoint(tmp_path)
        saved = load_states_of(tmp_path)
        other = engine_of(stage=stage, freeze={"policy": policy, "rate": 0.5})
        other.load_checkpoint(tmp_path, custom_load_fn=adapt)
        other.save_checkpoint(tmp_path, tag="adapted")
        adapted = load_states_of(tmp_path / "adapted")
        assert torch.equal(adapted["0.weight"], saved["0.weight"] + 1)
        for name in saved.keys() - {"0.weight"}:
            assert torch.equal(adapted[name], saved[name])
        assert other.global_steps == 3

    def test_masters_follow_what_a_function_of_the_user_has_changed_and_nothing_else(self, tmp_path):
        def adapt(src, dst):
            dst.load_state_dict(src)
            dst[0].weight[0].fill_(3.0)

        def engine_in_bf16():
            torch.manual_seed(0)
            config = {
                "train_micro_batch_size_per_gpu": 2,
                "bf16": {"enabled": True},
                "optimizer": {"type": "AdamW", "params": {"lr": 1e-5}},
                "slimfit": {"freeze": {"policy": "none"}},
            }
            return slimfit_ds.initialize(model=nn.Sequential(nn.Linear(4, 8)), config=config)[0]

        engine = engine_in_bf16()
        engine.backward(engine(torch.randn(2, 4, dtype=torch.bfloat16)).float().square().mean())
        engine.step()
        engine.save_checkpoint(tmp_path)
        before = load_states_of(tmp_path)["0.weight"]
        other = engine_in_bf16()
        other.load_checkpoint(tmp_path, custom_load_fn=adapt)
        master = safe_get_full_fp32_param(other.module[0].weight)
        assert torch.equal(master[0], torch.full((4,), 3.0))
        assert torch.equal(master[1:], before[1:])
        assert not torch.equal(master[1:], master[1:].bfloat16().float())

    def test_tags_that_differ_over_ranks_are_refused_before_anything_is_written(self, tmp_path, monkeypatch):
        def gather(found, tag):
            found[:] = [tag, "other"]

        engine = engine_of()
        monkeypatch.setattr(checkpoint.dist, "all_gather_object", gather)
        with pytest.raises(CheckpointError, match="different tags, mine, other: give the same"):
            engine.save_checkpoint(tmp_path, tag="mine")
        assert list(tmp_path.iterdir()) == []

    def test_an_empty_folder_name_is_refused(self):
        engine = engine_of()
        for nothing in ("", None):
            with pytest.raises(ValueError, match="save_dir must name a folder"):
                engine.save_checkpoint(nothing)


def test_a_stretch_of_8_bit_moments_is_read_from_files_of_any_cut(tmp_path):
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    # Two ranks with a unit each, of which the second is cut in two parameters inside a block.
    values = torch.randn(1000), torch.randn(700)
    packed = [low_bit.quantize(v, signed=True) for v in values]
    plain = [low_bit.dequantize(*p, len(v), signed=True) for p, v in zip(packed, values, strict=True)]

    def shard(number: int, name: str, start: int, low: int, high: int) -> Shard:
        codes, scale = packed[number]
        cut = {"m.codes": codes[low:high], "m.scale": scale[low // 256 : -(-high // 256)]}
        return Shard(name, start, cut, low % 256)

    write_shards([shard(0, "a", 0, 0, 1000)], tmp_path / "0.safetensors")
    write_shards([shard(1, "a", 1000, 0, 300), shard(1, "b", 0, 300, 700)], tmp_path / "1.safetensors")
    expected = {"a": torch.cat([plain[0], plain[1][:300]]), "b": plain[1][300:]}
    with ShardReader([tmp_path / "0.safetensors", tmp_path / "1.safetensors"]) as reader:
        for name, start, length in (("a", 0, 1300), ("a", 900, 333), ("b", 0, 400), ("b", 211, 2)):
            target = torch.full((length,), torch.nan)
            reader.read_into(target, name, "m", start)
            assert torch.equal(target, expected[name][start : start + length])
        assert reader.blocks("b", "m", 0, 400, 300 % 256) is not None
        assert reader.blocks("b", "m", 0, 400, 0) is None
        assert reader.blocks("a", "m", 0, 1300, 0) is None
