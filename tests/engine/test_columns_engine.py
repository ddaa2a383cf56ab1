"""Policy `columns` on the engine: against a plain model with masked gradients, over stages, world sizes and resumes."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from stage_matrix_worker import batch_of, tiny_bert

import slimfit_ds
from slimfit_ds.engine.export import load_states_of
from slimfit_ds.errors import ConfigError
from slimfit_ds.trainable.split import check_columns, column_places

WORKER = Path(__file__).with_name("resume_worker.py")


def run(run_ranks, ranks: int, stage: int, first: int, last: int, **options) -> list[dict]:
    flags = [f"--{key}={value}" for key, value in options.items() if value is not None]
    flags += ["--policy=static", f"--stage={stage}", f"--first={first}", f"--last={last}"]
    return run_ranks(WORKER, *flags, ranks=ranks)


def test_it_trains_as_a_plain_model_with_masked_gradients_does(one_rank):
    model = tiny_bert()
    plain = copy.deepcopy(model)
    config = {
        "train_batch_size": 8,
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.0, "torch_adam": True}},
        "slimfit": {"freeze": {"rate": 0.8, "policy": "static"}},
    }
    # Groups that were made before the split, as launch/train.py makes them.
    groups = [{"params": list(model.parameters()), "weight_decay": 0.0}]
    engine, *_ = slimfit_ds.initialize(model=model, model_parameters=groups, config=config)
    places = column_places(model)
    trained = {name.replace("weight_columns", "weight") for name in engine.active_layers}
    for name, parameter in plain.named_parameters():
        if name in places:
            start, stride, count, _, rows = places[name]
            mask = torch.zeros_like(parameter)
            mask[:rows, start : start + stride * count : stride] = 1
            parameter.register_hook(lambda grad, mask=mask: grad * mask)
        elif parameter.dim() > 1 and name not in trained:
            parameter.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in plain.named_parameters()}
    words = "bert.embeddings.word_embeddings.weight"
    # All trains at the rate of full fine-tuning times columns over trained ones, as most layers have them.
    query = "bert.encoder.layer.0.attention.self.query.weight"
    factor = before[query].shape[1] / places[query][2]
    assert factor > 2
    # A vector of which so few places train goes as far as a whole one.
    further = (before[words].shape[1] / places[words][2]) ** 0.5
    optimizer = torch.optim.AdamW(
        [
            {"params": [p], "lr": 1e-3 * factor * (further if name == words else 1.0)}
            for name, p in plain.named_parameters()
            if p.requires_grad
        ],
        weight_decay=0.0,
    )
    for step in range(4):
        batch = batch_of(step, 0, 0, size=8)
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        reference = plain(**batch).loss
        optimizer.zero_grad()
        reference.backward()
        optimizer.step()
        torch.testing.assert_close(loss.detach(), reference.detach(), rtol=1e-5, atol=1e-5)
    after = engine.module.state_dict()
    expected = plain.state_dict()
    assert after.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(after[name], weight, rtol=0, atol=2e-5, msg=name)
    assert 0 < places[words][4] < len(before[words])
    for name, (start, stride, count, _, rows) in places.items():
        rest = torch.ones(before[name].shape, dtype=torch.bool)
        rest[:rows, start : start + stride * count : stride] = False
        assert torch.equal(after[name][rest], before[name][rest]), name
        assert not torch.equal(after[name], before[name]), name
    # What frozen weights would have cost: states of no more than a fifth of the weights and of the vectors.
    numel = sum(p.numel() for p in plain.parameters())
    vectors = sum(p.numel() for p in plain.parameters() if p.dim() == 1)
    states = sum(unit.numel for unit in engine.optimizer.updater.units)
    assert 0 < states <= 0.2 * numel + vectors


def test_policies_choose_among_narrow_units_as_they_do_without_an_engine(one_rank):
    model = tiny_bert().eval()
    plain = copy.deepcopy(model)
    block = {"freeze": {"policy": "ils", "rate": 0.9, "width": 0.2, "lr_scale": 2.0}}
    config = {
        "train_batch_size": 8,
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.0, "torch_adam": True}},
        "slimfit": block,
    }
    engine, *_ = slimfit_ds.initialize(model=model, config=config)
    engine.eval()
    handle = slimfit_ds.slim(plain, block)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.0)
    handle.follow(optimizer)
    chosen = set()
    for step in range(6):
        assert engine.active_layers == handle.active_layers
        assert engine.active_layers < set(engine.layer_names)
        chosen.add(engine.active_layers)
        batch = batch_of(step, 0, 0, size=8)
        engine.backward(engine(**batch).loss)
        engine.step()
        plain(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(chosen) > 2
    for name, weight in plain.state_dict().items():
        torch.testing.assert_close(engine.module.state_dict()[name], weight, rtol=0, atol=2e-5, msg=name)


def test_places_of_a_checkpoint_that_knew_of_no_rows_are_understood():
    own = {"a.weight": (1, 2, 3, False, None), "words.weight": (1, 2, 3, False, 40)}
    check_columns({"a.weight": [1, 2, 3, False], "words.weight": [1, 2, 3, False, 40]}, own)
    for saved in ({"a.weight": [1, 2, 3, False]}, {name: [1, 2, 3, False] for name in own}):
        with pytest.raises(ConfigError, match=r"other columns of 1 layers.*words.weight"):
            check_columns(saved, own)


def test_a_checkpoint_of_other_columns_is_refused_before_anything_is_changed(one_rank, tmp_path):
    def engine_of(seed: int):
        freeze = {"rate": 0.8, "policy": "static", "seed": seed}
        config = {
            "train_batch_size": 8,
            "zero_optimization": {"stage": 1},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
            "slimfit": {"freeze": freeze},
        }
        return slimfit_ds.initialize(model=tiny_bert(), config=config)[0]

    first, other = engine_of(0), engine_of(1)
    assert column_places(first.module) != column_places(other.module)
    first.backward(first(**batch_of(0, 0, 0, size=8)).loss)
    first.step()
    first.save_checkpoint(tmp_path)
    before = {name: p.detach().clone() for name, p in other.module.named_parameters()}
    with pytest.raises(ConfigError, match="the rate, the width and the seed of that run"):
        other.load_checkpoint(tmp_path)
    assert all(torch.equal(p, before[name]) for name, p in other.module.named_parameters())
    again = engine_of(0)
    again.load_checkpoint(tmp_path)
    for name, weight in first.module.state_dict().items():
        assert torch.equal(again.module.state_dict()[name], weight), name


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("phases", [[(2, 1), (1, 2), (2, 0)], [(2, 3), (1, 3), (2, 1)]])
def test_resume_anywhere_equals_the_uninterrupted_run(run_ranks, tmp_path, phases):
    ranks, stage = phases[0]
    whole = run(run_ranks, ranks, stage, 0, 6, save=tmp_path / "whole", pretrained=tmp_path / "model")
    pieces: list[dict] = []
    for number, (ranks, stage) in enumerate(phases):
        load = tmp_path / "part" if number else None
        pieces += run(run_ranks, ranks, stage, 2 * number, 2 * number + 2, load=load, save=tmp_path / "part")
    assert [entry["active"] for entry in pieces] == [entry["active"] for entry in whole]
    for mine, expected in zip(pieces, whole, strict=True):
        assert mine["loss"] == pytest.approx(expected["loss"], abs=1e-5)
    resumed, uninterrupted = load_states_of(tmp_path / "part"), load_states_of(tmp_path / "whole")
    assert resumed.keys() == uninterrupted.keys() == tiny_bert().state_dict().keys()
    for name, weight in uninterrupted.items():
        torch.testing.assert_close(resumed[name], weight, rtol=0, atol=1e-6)
    # What transformers reads holds whole weights, and what was learned is in them.
    exported = load_file(tmp_path / "model" / "model.safetensors")
    assert not any("columns" in name for name in exported)
    for name, weight in exported.items():
        torch.testing.assert_close(weight, uninterrupted[name], rtol=0, atol=0)
    consolidated = tmp_path / "model" / "consolidated.pt"
    assert consolidated.exists() == (phases[0][1] == 3)
    if consolidated.exists():
        for name, weight in torch.load(consolidated).items():
            torch.testing.assert_close(weight, uninterrupted[name], rtol=0, atol=0)
    start = tiny_bert().state_dict()
    assert any(not torch.equal(uninterrupted[name], start[name]) for name in start if "query.weight" in name)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_resumed_run_takes_the_fronts_up_on_another_stage_and_number_of_ranks(run_ranks, tmp_path):
    front = {"front": "statistics"}
    whole = run(run_ranks, 2, 1, 0, 8, save=tmp_path / "whole", **front)
    part = tmp_path / "part"
    first = run(run_ranks, 2, 1, 0, 4, save=part, **front)
    rest = run(run_ranks, 1, 2, 4, 8, load=part, save=part, **front)
    assert [entry["active"] for entry in [*first, *rest]] == [entry["active"] for entry in whole]
    assert len({tuple(entry["active"]) for entry in whole}) > 1
    uninterrupted = load_states_of(tmp_path / "whole")
    for name, weight in load_states_of(part).items():
        torch.testing.assert_close(weight, uninterrupted[name], rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.distributed
def test_stages_agree(run_ranks, tmp_path):
    losses = {
        stage: [entry["loss"] for entry in run(run_ranks, 2, stage, 0, 3, save=tmp_path / str(stage))]
        for stage in (0, 3)
    }
    assert losses[3] == pytest.approx(losses[0], abs=1e-5)
    zero, three = load_states_of(tmp_path / "0"), load_states_of(tmp_path / "3")
    for name, weight in zero.items():
        torch.testing.assert_close(three[name], weight, rtol=0, atol=1e-5)
