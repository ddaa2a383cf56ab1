"""ZeRO 3: what is held for frozen layers, models that are cut at birth, overflow, options, other stages."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from stage_matrix_worker import full_weights
from torch import nn

import slimfit_ds
from slimfit_ds.engine.export import load_states_of

SCENARIOS = [
    ["zero_init", {"dtype": "fp32"}],
    ["zero_init", {"dtype": "bf16"}],
    ["held_bytes", {"inactive": "device", "dtype": "bf16"}],
    ["held_bytes", {"inactive": "host", "dtype": "fp32"}],
    ["overflow_on_one_rank", {}],
    ["no_biases", {"checkpointing": False}],
    ["no_biases", {"checkpointing": True, "persist": 100}],
]


@pytest.fixture(scope="module")
def scenarios(run_ranks) -> dict[str, list[dict]]:
    """Each scenario's name and options -> what it returned on each of two ranks."""
    worker = Path(__file__).with_name("zero3_worker.py")
    ranks = run_ranks(worker, json.dumps(SCENARIOS))
    return {
        json.dumps(key): list(values) for key, values in zip(SCENARIOS, zip(*ranks, strict=True), strict=True)
    }


@pytest.mark.slow
@pytest.mark.distributed
class TestTwoRanks:
    @pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 2e-6), ("bf16", 2e-3)])
    def test_a_model_cut_while_it_is_built_trains_as_a_plain_one(self, scenarios, dtype, tolerance):
        for result in scenarios[json.dumps(["zero_init", {"dtype": dtype}])]:
            assert result["cut"]
            assert result["drift"] == 0.0
            assert result["difference"] < tolerance
            # Six steps of two of twelve layers: each has trained once.
            assert result["trained"] == result["layers"] == 12

    @pytest.mark.parametrize(("inactive", "dtype"), [("device", "bf16"), ("host", "fp32")])
    def test_nothing_is_held_for_frozen_layers(self, scenarios, inactive, dtype):
        ranks = scenarios[json.dumps(["held_bytes", {"inactive": inactive, "dtype": dtype}])]
        for result in ranks:
            assert result["problems"] == []
            # The weights of this rank, cut in two and padded; nothing is left gathered.
            bytes_each = {"fp32": 4, "bf16": 2}[dtype]
            assert 0 <= result["report"]["parameters"] - bytes_each * result["weights"] < 64 * bytes_each

    def test_an_overflow_on_one_rank_skips_the_step_on_all_and_is_forgotten(self, scenarios):
        for result in scenarios[json.dumps(["overflow_on_one_rank", {}])]:
            # Weights as they were, no statistics, the same layers again.
            assert result["skips"] == [[True, True, True]] * 2
            assert result["scales"] == [256, 128, 128, 128, 64, 64]
            assert result["skipped"] == 2
            assert result["difference"] < 2e-3

    @pytest.mark.parametrize(
        "options", [options for name, options in SCENARIOS if name == "no_biases"], ids=json.dumps
    )
    def test_backward_may_end_anywhere(self, scenarios, options):
        for result in scenarios[json.dumps(["no_biases", options])]:
            assert result["drift"] == 0.0
            assert result["difference"] < 2e-6
            assert result["trained"] == result["layers"]


@pytest.mark.slow
@pytest.mark.distributed
def test_options_that_must_not_change_the_result(run_ranks):
    from test_stage_matrix import WORKER, check

    offload = {"device": "cpu", "pin_memory": True}
    # Layers that sleep and come back within a few steps.
    rotate = {"policy": "random", "rate": 0.7}
    cells: list[dict] = [
        {"zero": {"stage3_param_persistence_threshold": 100}, "dtype": "bf16", "clip": 0.05},
        {"zero": {"reduce_bucket_size": 500, "stage3_prefetch_bucket_size": 400}, "accumulation": 2},
        {"zero": {"reduce_scatter": False, "overlap_comm": False}},
        {"zero": {"memory_efficient_linear": False}},
        {"zero": {"offload_optimizer": offload}, "dtype": "fp16", "accumulation": 2, "clip": 0.05},
        {"zero": {"offload_param": offload}, "dtype": "bf16"},
        {"zero": {"offload_optimizer": offload, "offload_param": offload}, "states": {"inactive": "host"}},
        {"states": {"inactive": "host"}, "freeze": rotate, "steps": 8},
        {"states": {"stale_moments": "decay"}, "freeze": rotate, "steps": 8},
        {"freeze": {"policy": "none"}},
        {"freeze": {"interval": 2}, "accumulation": 2},
    ]
    cells = [{"stage": 3, "steps": 5, **cell} for cell in cells]
    results = run_ranks(WORKER, json.dumps(cells))
    check(results, cells)
    for cell, result in zip(cells, results, strict=True):
        offloaded = "offload_optimizer" in cell.get("zero", {})
        assert (result["report"]["optimizer"] == 0) == offloaded
        on_host = offloaded or "inactive" in cell.get("states", {})
        assert (result["report"]["optimizer_host"] > 0) == on_host


@pytest.mark.slow
@pytest.mark.distributed
def test_states_move_into_stage_3_and_to_another_world_size(run_ranks, tmp_path):
    from test_checkpoint import run

    whole = run(run_ranks, 1, 1, 0, 8, save=tmp_path / "whole")
    parts: list[dict] = []
    for number, (ranks, stage, inactive) in enumerate([(1, 1, "device"), (2, 3, "host")]):
        load = tmp_path / "part" if number else None
        first = 4 * number
        parts += run(
            run_ranks,
            *(ranks, stage, first, first + 4),
            load=load,
            save=tmp_path / "part",
            inactive=inactive,
        )
    assert [step["active"] for step in parts] == [step["active"] for step in whole]
    for mine, theirs in zip(parts, whole, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    mine, theirs = load_states_of(tmp_path / "part"), load_states_of(tmp_path / "whole")
    for name, weight in theirs.items():
        torch.testing.assert_close(mine[name], weight, rtol=0, atol=1e-6)


class Net(nn.Module):
    """Linear layers and a norm; a side branch that some inputs do not take."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(8))
        self.norm = nn.LayerNorm(6)
        self.side = nn.Linear(6, 6)

    def forward(self, x, use_side=True):
        for layer in self.layers:
            x = layer(x) + 1
        x = self.norm(x)
        return (x + self.side(x) if use_side else x).square().mean()


def engine_of(model: nn.Module | None = None, optimizer=None, slimfit: dict | None = None, **settings):
    if model is None:
        torch.manual_seed(0)
        model = Net()
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "slimfit": slimfit if slimfit is not None else {"freeze": {"policy": "ils", "rate": 0.8}},
        **settings,
    }
    if optimizer is None:
        config["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1}}
    return slimfit_ds.initialize(model=model, optimizer=optimizer, config=config)[0]


def train(engine, steps: int = 1, **inputs) -> None:
    for _ in range(steps):
        engine.backward(engine(torch.randn(2, 6), **inputs))
        engine.step()


@pytest.mark.usefixtures("one_rank")
class TestOneRank:
    def test_groups_and_their_learning_rates_are_those_of_the_optimizer(self):
        torch.manual_seed(0)
        plain = Net()
        model = copy.deepcopy(plain)

        def groups(net: nn.Module) -> list[dict]:
            named = list(net.named_parameters())
            return [
                {"params": [p for n, p in named if n.endswith("weight") and "side" not in n]},
                {"params": [p for n, p in named if n.endswith("bias")], "weight_decay": 0.0, "lr": 2e-2},
                {"params": [p for n, p in named if n == "side.weight"], "lr": 0.0},
            ]

        engine = engine_of(
            model,
            torch.optim.AdamW(groups(model), lr=1e-2, weight_decay=0.3),
            {"freeze": {"policy": "ils", "rate": 0.0}},
        )
        reference = torch.optim.AdamW(groups(plain), lr=1e-2, weight_decay=0.3)
        for _ in range(4):
            x = torch.randn(2, 6)
            engine.backward(engine(x))
            engine.step()
            reference.zero_grad()
            plain(x).backward()
            reference.step()
        for name, weight in full_weights(engine).items():
            torch.testing.assert_close(weight, plain.get_parameter(name).detach(), rtol=0, atol=1e-6)
        # A layer that cannot move says nothing about its worth.
        model = Net()
        optimizer = torch.optim.AdamW(groups(model), lr=1e-2)
        engine = engine_of(model, optimizer, {"freeze": {"policy": "ils", "rate": 0.5}})
        for _ in range(4):
            train(engine)
        assert engine.update_statistics.keys() == set(engine.layer_names) - {"side.weight"}

    def test_the_statistic_is_the_relative_update_that_happened(self):
        engine = engine_of()
        for _ in range(3):
            active, before = engine.active_layers, full_weights(engine)
            train(engine)
            after = full_weights(engine)
            for name in active:
                old, new = before[name].double(), after[name].double()
                moved = (new - old).abs()
                expected = (moved / torch.maximum(moved, old.abs())).mean().item()
                assert engine.update_statistics[name] == pytest.approx(expected, rel=1e-3)

    def test_a_layer_unused_in_a_step_is_not_moved_by_old_momentum(self):
        engine = engine_of(slimfit={"freeze": {"policy": "ils", "rate": 0.8, "always_active": ["side"]}})
        train(engine, 3)
        before = full_weights(engine)
        train(engine, use_side=False)
        after = full_weights(engine)
        assert torch.equal(after["side.weight"], before["side.weight"])
        assert torch.equal(after["side.bias"], before["side.bias"])
        assert engine.update_statistics["side.weight"] == 0.0
        train(engine)
        assert not torch.equal(full_weights(engine)["side.weight"], before["side.weight"])

    def test_what_the_user_froze_stays_frozen_and_has_no_state(self):
        torch.manual_seed(0)
        model = Net()
        model.layers[3].weight.requires_grad_(False)
        model.side.bias.requires_grad_(False)
        frozen = ("layers.3.weight", "side.bias")
        kept = {name: model.get_parameter(name).detach().clone() for name in frozen}
        engine = engine_of(model)
        train(engine, 8)
        last = full_weights(engine)
        for name in frozen:
            assert torch.equal(last[name], kept[name])
            assert name not in engine.layer_names
            assert name not in engine.optimizer.shard_steps()
            assert not engine.module.get_parameter(name).requires_grad

    def test_biases_may_be_frozen_for_good(self):
        engine = engine_of(slimfit={"freeze": {"policy": "ils", "rate": 0.8, "train_biases": False}})
        before = full_weights(engine)
        train(engine, 6)
        for name, weight in full_weights(engine).items():
            assert torch.equal(weight, before[name]) == name.endswith("bias"), name
        assert not any(name.endswith("bias") for name in engine.optimizer.shard_steps())

    def test_a_frozen_linear_keeps_no_input(self):
        engine = engine_of()
        for _ in range(6):
            linear = [n for n in engine.active_layers if "norm" not in n]
            saved: list[torch.Tensor] = []

            def pack(tensor: torch.Tensor, saved: list[torch.Tensor] = saved) -> torch.Tensor:
                saved.append(tensor)
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                loss = engine(torch.randn(2, 6))
            parameters = [tensor for tensor in saved if isinstance(tensor, nn.Parameter)]
            others = [tuple(tensor.shape) for tensor in saved if not isinstance(tensor, nn.Parameter)]
            # The norm's input, the squared output, and the input of each active linear layer; two statistics.
            assert others.count((2, 6)) == 2 + len(linear)
            # Weights are kept as the parameters that ZeRO may empty, not as views that hold them whole.
            assert len(parameters) >= 8
            assert set(others) <= {(2, 6), (2, 1)}
            engine.backward(loss)
            engine.step()

    def test_autocast_trains_as_in_plain_torch(self):
        torch.manual_seed(0)
        plain = Net()
        engine = engine_of(
            copy.deepcopy(plain),
            slimfit={"freeze": {"policy": "none"}},
            torch_autocast={"enabled": True, "dtype": "bfloat16"},
        )
        reference = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.1)
        for _ in range(4):
            x = torch.randn(2, 6)
            engine.backward(engine(x))
            engine.step()
            reference.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = plain(x)
            loss.backward()
            reference.step()
        for name, weight in full_weights(engine).items():
            torch.testing.assert_close(weight, plain.get_parameter(name).detach(), rtol=0, atol=1e-5)

    def test_evaluation_between_steps_changes_nothing(self):
        weights = []
        for evaluates in (False, True):
            torch.manual_seed(1)
            engine = engine_of()
            for _ in range(4):
                x = torch.randn(2, 6)
                if evaluates:
                    engine.eval()
                    with torch.no_grad():
                        engine(torch.ones(2, 6))
                    engine.train()
                engine.backward(engine(x))
                engine.step()
            weights.append(full_weights(engine))
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])

    def test_gradients_dropped_by_the_user_are_gone(self):
        engine = engine_of(gradient_accumulation_steps=2)
        engine.backward(engine(torch.randn(2, 6)))
        assert engine.memory_report()["gradients"] > 0
        engine.optimizer.zero_grad()
        assert engine.memory_report()["gradients"] == 0

    def test_save_pretrained_holds_whole_weights(self, tmp_path):
        from safetensors.torch import load_file

        engine = engine_of()
        train(engine, 2)
        engine.save_pretrained(tmp_path)
        saved = load_file(tmp_path / "model.safetensors")
        for name, weight in full_weights(engine).items():
            assert torch.equal(saved[name], weight)
