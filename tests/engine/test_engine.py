"""The public engine in one process: what freezes, what is saved, what is refused."""

from __future__ import annotations

import base64
import copy
import json
from types import SimpleNamespace

import deepspeed
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import slimfit_ds
from slimfit_ds.engine import engine as engine_module
from slimfit_ds.engine.memory_roots import engine_roots
from slimfit_ds.errors import ConfigError
from slimfit_ds.integrations import enable_deepspeed

pytestmark = pytest.mark.usefixtures("one_rank")


class Net(nn.Module):
    """Four linear layers, a norm, and a branch that some inputs do not take."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.norm = nn.LayerNorm(8)
        self.hidden = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))
        self.side = nn.Linear(8, 8)
        self.head = nn.Linear(8, 1)

    def forward(self, x, use_side=True):
        x = self.norm(self.embed(x))
        for layer in self.hidden:
            x = torch.tanh(layer(x))
        if use_side:
            x = x + self.side(x)
        return self.head(x).square().mean()


def make(slimfit: dict | None = None, model: nn.Module | None = None, **settings):
    torch.manual_seed(0)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "zero_optimization": {"stage": settings.pop("stage", 1)},
        "steps_per_print": None,
        "slimfit": slimfit if slimfit is not None else {"freeze": {"policy": "ils", "rate": 0.7}},
    }
    arguments = {key: settings.pop(key) for key in list(settings) if key in ARGUMENTS}
    model = Net() if model is None else model
    return slimfit_ds.initialize(model=model, config={**config, **settings}, **arguments)


ARGUMENTS = {"optimizer", "lr_scheduler", "model_parameters"}


def train(engine, steps: int = 1, **inputs) -> None:
    for _ in range(steps):
        engine.backward(engine(torch.randn(2, 4), **inputs))
        engine.step()


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_frozen_layers_do_not_move_and_have_no_gradient(stage):
    engine, *_ = make(stage=stage)
    for _ in range(10):
        before = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
        active = engine.active_layers
        engine.backward(engine(torch.randn(2, 4)))
        frozen = set(engine.layer_names) - active
        assert all(engine.module.get_parameter(name).grad is None for name in frozen)
        engine.step()
        for name, parameter in engine.module.named_parameters():
            assert torch.equal(parameter, before[name]) == (name in frozen), name


class TokensFirst(nn.Module):
    """Hidden states of [tokens, batch, width]: rows of their first dimension attend to each other."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x):
        return self.encoder(x).square().mean()


@pytest.mark.parametrize("strict", [False, True])
def test_the_proof_on_the_first_batch_comes_before_the_first_step(strict):
    activations = {"preset": "minimal", "chunk_tokens": 8, "strict": strict}
    engine, *_ = make({"freeze": {"policy": "none"}, "activations": activations}, TokensFirst())
    before = [p.detach().clone() for p in engine.module.parameters()]
    plain = copy.deepcopy(engine.module.encoder.layers)
    x = torch.randn(12, 2, 16)
    loss = engine(x)
    engine.backward(loss)
    assert {(f.check, f.remedy) for f in engine.proof.failures} == {("rows", "not cut into chunks")}
    if strict:
        with pytest.raises(ConfigError, match=r"encoder\.layers\.1: rows"):
            engine.step()
        assert all(torch.equal(a, b) for a, b in zip(engine.module.parameters(), before, strict=True))
        return
    engine.step()
    assert engine.proof.settled
    engine.proof.remove()
    engine.compression.remove()
    for layer in plain.eval():
        x = layer(x)
    torch.testing.assert_close(loss, x.square().mean())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_memory_trackers_roots_hold_every_gradient_byte_of_the_engine(stage):
    engine, *_ = make({"freeze": {"policy": "ils", "rate": 0.5}}, stage=stage)
    train(engine)
    engine.backward(engine(torch.randn(2, 4)))
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    tensors = {id(t): t for t in (*gradients, *engine_roots(engine)["gradients"]())}.values()
    held = sum({t.untyped_storage().data_ptr(): t.numel() * t.element_size() for t in tensors}.values())
    assert held == engine.optimizer.state_bytes()["gradients"] > 0


def test_layer_names_and_active_layers_are_public():
    engine, *_ = make()
    assert engine.layer_names == (
        "embed.weight",
        "norm.weight",
        *(f"hidden.{i}.weight" for i in range(6)),
        "side.weight",
        "head.weight",
    )
    # 10 layers at rate 0.7.
    assert len(engine.active_layers) == 3
    assert engine.active_layers <= set(engine.layer_names)
    assert engine.update_statistics == {}
    active = engine.active_layers
    train(engine)
    assert engine.update_statistics.keys() == active
    assert all(0 < value <= 1 for value in engine.update_statistics.values())


def test_statistic_is_the_relative_update_that_happened():
    engine, *_ = make()
    active = engine.active_layers
    before = {name: engine.module.get_parameter(name).detach().clone() for name in active}
    train(engine)
    for name in active:
        old, new = before[name].double(), engine.module.get_parameter(name).detach().double()
        moved = (new - old).abs()
        expected = (moved / torch.maximum(moved, old.abs())).mean().item()
        assert engine.update_statistics[name] == pytest.approx(expected, rel=1e-3)


class Chain(nn.Module):
    """Linear layers with nothing between them that keeps a tensor for its own backward."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(10))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x) + 1
        return x.sum()


def test_autograd_saves_nothing_for_a_frozen_linear():
    engine, *_ = make({"freeze": {"policy": "ils", "rate": 0.8}}, model=Chain())
    for _ in range(5):
        saved: list[torch.Size] = []

        def pack(tensor, saved=saved):
            if not isinstance(tensor, nn.Parameter) and not tensor._is_view():
                saved.append(tensor.shape)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = engine(torch.randn(3, 6))
        # The inputs of the two active layers and nothing for the eight frozen ones.
        assert len(engine.active_layers) == 2
        assert saved == [torch.Size([3, 6])] * 2
        engine.backward(loss)
        engine.step()


def test_small_parameters_train_unless_told_otherwise():
    engine, *_ = make()
    bias = engine.module.hidden[0].bias.detach().clone()
    train(engine)
    assert not torch.equal(engine.module.hidden[0].bias, bias)
    engine, *_ = make({"freeze": {"policy": "ils", "rate": 0.7, "train_biases": False}})
    bias = engine.module.hidden[0].bias.detach().clone()
    train(engine, 3)
    assert torch.equal(engine.module.hidden[0].bias, bias)


def test_parameters_frozen_by_the_user_stay_frozen():
    model = Net()
    model.hidden[2].weight.requires_grad_(False)
    model.head.bias.requires_grad_(False)
    kept = [model.hidden[2].weight.detach().clone(), model.head.bias.detach().clone()]
    engine, *_ = make(model=model)
    assert "hidden.2.weight" not in engine.layer_names
    train(engine, 12)
    assert torch.equal(engine.module.hidden[2].weight, kept[0])
    assert torch.equal(engine.module.head.bias, kept[1])
    assert not engine.module.hidden[2].weight.requires_grad


@pytest.mark.parametrize(("stage", "policy"), [(1, "ils"), (2, "none")])
def test_freezing_after_the_engine_was_made_is_refused_not_undone(stage, policy):
    engine, *_ = make({"freeze": {"policy": policy, "rate": 0.7 if policy == "ils" else 0.0}}, stage=stage)
    train(engine, 2)
    engine.module.requires_grad_(False)
    engine.module.head.requires_grad_(True)
    with pytest.raises(ConfigError, match=r"was changed after the engine was made.*freeze before"):
        train(engine)


def test_a_layer_unused_in_a_step_is_not_moved_by_old_momentum():
    engine, *_ = make({"freeze": {"policy": "ils", "rate": 0.7, "always_active": ["side"]}})
    train(engine, 3)
    before = engine.module.side.weight.detach().clone()
    train(engine, 1, use_side=False)
    assert torch.equal(engine.module.side.weight, before)
    assert engine.update_statistics["side.weight"] == 0.0
    train(engine, 1)
    assert not torch.equal(engine.module.side.weight, before)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_gradient_that_is_not_finite_skips_the_step(stage):
    engine, *_ = make(stage=stage)
    train(engine, 2)
    active, skipped = engine.active_layers, engine.skipped_steps
    before = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
    engine.backward(engine(torch.full((2, 4), float("nan"))))
    engine.step()
    assert all(torch.equal(p, before[name]) for name, p in engine.module.named_parameters())
    assert engine.skipped_steps == skipped + 1
    assert engine.active_layers == active
    train(engine)
    assert engine.active_layers != active


def test_without_a_block_it_is_plain_deepspeed():
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
    }
    engine, *_ = slimfit_ds.initialize(model=Net(), config=config)
    assert type(engine) is deepspeed.DeepSpeedEngine
    assert deepspeed.DeepSpeedEngine.__name__ == "DeepSpeedEngine"


def test_config_in_the_forms_that_deepspeed_takes(tmp_path):
    text = json.dumps(
        {
            "train_micro_batch_size_per_gpu": 2,
            "optimizer": {"type": "AdamW", "params": {"lr": 0.1}},
            "slimfit": {"freeze": {"policy": "ils", "rate": 0.5}},
        }
    )
    path, commented = tmp_path / "ds.json", tmp_path / "ds.hjson"
    path.write_text(text)
    commented.write_text("{\n  # hjson\n" + text[1:-1] + ",\n}")
    encoded = base64.urlsafe_b64encode(text.encode()).decode()
    for arguments in (
        *({"config": value} for value in (str(path), path, str(commented), encoded)),
        {"config_params": json.loads(text)},
        {"args": SimpleNamespace(deepspeed_config=str(path))},
        {"args": SimpleNamespace(deepscale_config=str(path))},
    ):
        engine, *_ = slimfit_ds.initialize(model=Net(), **arguments)
        assert len(engine.active_layers) == 5


def test_configs_that_are_refused(tmp_path):
    twice = SimpleNamespace(deepspeed_config="ds.json")
    with pytest.raises(ConfigError, match="given more than once, as config and deepspeed_config"):
        slimfit_ds.initialize(args=twice, model=Net(), config={})
    double = tmp_path / "double.json"
    double.write_text('{"train_batch_size": 2, "train_batch_size": 4}')
    with pytest.raises(ConfigError, match="Duplicate keys"):
        slimfit_ds.initialize(model=Net(), config=double)
    with pytest.raises(ConfigError, match=r"no such file: .*nowhere\.json"):
        slimfit_ds.initialize(model=Net(), config="nowhere.json")
    with pytest.raises(ConfigError, match="pass a DeepSpeed configuration"):
        slimfit_ds.initialize(model=Net())


@pytest.mark.parametrize(("stage", "enabled"), [(0, False), (3, False), (0, True)])
def test_an_engine_without_an_optimizer_evaluates(stage, enabled):
    if enabled:  # a script that calls slimfit_ds.initialize itself beside a Trainer; undone by a fixture
        enable_deepspeed()
    torch.manual_seed(0)
    model = Net()
    x = torch.randn(2, 4)
    expected = model(x).item()
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage},
        "slimfit": {"freeze": {"rate": 0.5}},
    }
    engine, *_ = slimfit_ds.initialize(model=model, config=config)
    assert engine(x).item() == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ConfigError, match="this engine has none"):
        engine.load_checkpoint("anywhere")


def test_client_optimizer_groups_and_scheduler():
    torch.manual_seed(0)
    model = Net()
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    client = torch.optim.SGD(groups, lr=0.5, momentum=0.9)
    engine, optimizer, _, scheduler = make(
        model=model,
        optimizer=client,
        lr_scheduler=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    )
    rates = []
    for _ in range(3):
        rates.append(engine.get_lr()[0])
        train(engine)
    assert rates == [0.5, 0.25, 0.5 / 3]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert scheduler.get_last_lr()[0] == 0.125


def run_with_client(kind, stage, steps, states=None, start=0):
    """A client's own optimizer after some steps on an engine, or (`stage` None) on its own."""
    torch.manual_seed(0)
    model = Net()
    client = kind(model.parameters(), lr=0.01)
    if stage is not None:
        engine, *_ = make({"freeze": {"policy": "none"}}, model, stage=stage, optimizer=client)
    if states is not None:
        model.load_state_dict(states[0])
        client.load_state_dict(states[1])
    for step in range(start, start + steps):
        x = torch.randn(2, 4, generator=torch.Generator().manual_seed(step))
        if stage is None:
            client.zero_grad()
            model(x).backward()
            client.step()
        else:
            engine.backward(engine(x))
            engine.step()
    return model, client


@pytest.mark.parametrize("kind", [torch.optim.AdamW, lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9)])
def test_a_clients_own_optimizer_shows_saves_and_loads_its_states(kind):
    model, client = run_with_client(kind, 0, 3)
    _, plain = run_with_client(kind, None, 3)
    ours, theirs = client.state_dict(), plain.state_dict()
    assert ours["state"].keys() == theirs["state"].keys()
    for index, state in theirs["state"].items():
        assert ours["state"][index].keys() == state.keys()
        for name, value in state.items():
            torch.testing.assert_close(ours["state"][index][name], value)
    saved = copy.deepcopy((model.state_dict(), ours))
    whole, _ = run_with_client(kind, 0, 6)
    resumed, again = run_with_client(kind, 0, 3, saved, start=3)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=0, atol=0)
    assert {*map(id, again.state)} == {*map(id, resumed.parameters())}
    with pytest.raises(RuntimeError, match=r"call engine\.step"):
        again.step()


def test_states_that_are_cut_over_ranks_are_not_loaded_by_a_clients_optimizer():
    model, client = run_with_client(torch.optim.AdamW, 3, 2)
    assert {int(client.state[p]["step"]) for p in model.parameters()} == {2}
    before = {name: value.clone() for name, value in client.state[model.head.weight].items()}
    with pytest.raises(ConfigError, match=r"use engine\.load_checkpoint"):
        client.load_state_dict(client.state_dict())
    assert client.state[nn.Parameter(torch.ones(1))] == {}
    assert all(torch.equal(client.state[model.head.weight][name], value) for name, value in before.items())


def test_deepspeeds_own_scheduler():
    engine, *_ = make(
        scheduler={
            "type": "WarmupLR",
            "params": {
                "warmup_min_lr": 0,
                "warmup_max_lr": 0.01,
                "warmup_num_steps": 4,
                "warmup_type": "linear",
            },
        }
    )
    rates = []
    for _ in range(5):
        train(engine)
        rates.append(engine.get_lr()[0])
    assert rates == pytest.approx([0.0, 0.0025, 0.005, 0.0075, 0.01], abs=1e-9)


def test_a_learning_rate_of_zero_is_no_observation():
    engine, *_ = make(
        lr_scheduler=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: float(step > 0))
    )
    first = engine.active_layers
    train(engine)
    assert engine.update_statistics == {}
    assert engine.active_layers == first


def test_no_state_is_made_for_layers_that_never_trained():
    engine, *_ = make(
        {"freeze": {"policy": "ils", "rate": 0.9, "train_biases": False, "always_active": ["hidden.0"]}}
    )
    train(engine, 3)
    # Two float32 moments of an 8 x 8 weight.
    assert engine.memory_report()["optimizer"] == 2 * 4 * 64
    assert engine.memory_report()["gradients"] == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"slimfit": {"freeze": {"rate": 2}}}, "slimfit.freeze.rate must be in [0, 1), got 2"),
        (
            {"slimfit": {"freeze": {"always_active": ["hed"]}}},
            "'hed' matches no layer; near names: head.weight",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            'set "slimfit": {"optimizer_states": {"inactive": "host"}}',
        ),
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel.autotp_size is 2"),
        (
            {"slimfit": {"optimizer_states": {"bf16_weights": "stochastic_rounding"}}},
            "'stochastic_rounding' needs bf16.enabled true",
        ),
    ],
)
def test_what_cannot_work_is_refused(settings, message):
    with pytest.raises(ConfigError) as caught:
        make(**settings)
    assert message in str(caught.value)


def test_an_optimizer_without_a_rule_is_refused():
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "Lamb", "params": {"lr": 0.1}},
        "slimfit": {"freeze": {"policy": "ils"}},
    }
    with pytest.raises(ConfigError, match=r"optimizer.type 'lamb' cannot step single layers; use AdamW"):
        slimfit_ds.initialize(model=Net(), config=config)
    model = Net()
    with pytest.raises(ValueError, match="RMSprop cannot step single layers"):
        make(model=model, optimizer=torch.optim.RMSprop(model.parameters()))


def test_several_problems_are_named_together():
    with pytest.raises(ConfigError) as caught:
        make({"freeze": {"policy": "isl"}}, tensor_parallel={"autotp_size": 4}, sparse_gradients=True)
    assert len(caught.value.problems) == 3


def test_activation_settings_are_checked_with_the_rest():
    with pytest.raises(ConfigError) as caught:
        make(
            {
                "freeze": {"policy": "ils", "rate": 0.5, "always_active": ["nothing"]},
                "activations": {"layers": {"*.none": {"norm": "int8"}}},
            }
        )
    assert any("'nothing' matches no layer" in line for line in caught.value.problems)
    assert any(line.startswith("slimfit.activations.layers '*.none'") for line in caught.value.problems)


def test_the_loss_of_a_language_model_in_chunks_by_configuration():
    config = GPT2Config(vocab_size=50, n_positions=16, n_embd=8, n_layer=1, n_head=2)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config)
    ids = torch.randint(0, 50, (2, 16))
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    expected = model(input_ids=ids, labels=ids).loss.item()
    engine, *_ = make({"freeze": {"policy": "ils"}, "activations": {"chunk_loss_tokens": 4}}, model=model)
    output = engine(input_ids=ids, labels=ids)
    assert output.loss.item() == pytest.approx(expected, rel=1e-5)
    assert output.logits.numel() == 0
    with pytest.raises(
        ConfigError, match=r"activations\.chunk_loss_tokens: Net has no linear language-model head"
    ):
        make({"freeze": {"policy": "ils"}, "activations": {"chunk_loss_tokens": 4}})


def test_a_compiled_model_is_refused():
    with pytest.raises(ConfigError, match=r"compiled by torch\.compile"):
        make(model=torch.compile(Net()))


@pytest.mark.parametrize("option", [{"bf16_weights": "stochastic_rounding"}, {"precision": "8bit"}])
def test_small_state_options_learn(option):
    if option.get("precision") == "8bit":
        pytest.importorskip("torchao")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 512), nn.ReLU(), nn.Linear(512, 16))
    goal = torch.randn(16, 16) / 4
    bf16 = {"bf16": {"enabled": True}} if "bf16_weights" in option else {}
    engine, *_ = make(
        {"freeze": {"policy": "ils", "rate": 0.5}, "optimizer_states": option},
        model=model,
        **bf16,
        optimizer=torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0),
    )
    losses = []
    for _ in range(60):
        x = torch.randn(64, 16).to(engine.module[0].weight.dtype)
        loss = (engine(x) - x @ goal.to(x.dtype)).float().square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    assert losses[-1] < 0.25 * losses[0]
    if "bf16_weights" in option:
        assert all(
            "master" not in engine.optimizer.updater.states.peek(i).tensors
            for i in engine.optimizer.updater.states.units
        )


@pytest.mark.parametrize(
    ("freeze", "compared"),
    [
        ({"policy": "ils", "rate": 0.7}, 4),
        ({"policy": "none"}, 1),
        ({"policy": "static", "rate": 0.7}, 1),
    ],
)
def test_a_static_active_set_is_compared_and_applied_once(monkeypatch, freeze, compared):
    calls: list[int] = []
    monkeypatch.setattr(engine_module, "check_active_set", lambda schedule, *_: calls.append(schedule.step))
    engine, *_ = make({"freeze": freeze})
    train(engine, 3)
    assert calls == list(range(compared))
    assert bool(engine.update_statistics) == (compared > 1)
