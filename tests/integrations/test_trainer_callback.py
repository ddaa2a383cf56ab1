"""SlimFitCallback in one process, against a loop of plain PyTorch."""

from __future__ import annotations

import functools
import json

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from trainer_cases import Sentences, Watch, arguments, classifier
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM, Trainer

import slimfit_ds
from slimfit_ds.errors import ConfigError
from slimfit_ds.trainable.units import discover

CONFIG = {"freeze": {"policy": "ils", "rate": 0.8}}


@pytest.fixture(autouse=True)
def _one_process(monkeypatch):
    """Without the ranks that another test left in the environment, and without accelerate's memory of them."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def train(folder, config=CONFIG, model=None, resume=None, **more):
    """A finished run: trainer, callback, and what was watched."""
    callback = slimfit_ds.SlimFitCallback(config)
    watch = Watch(lambda: callback.active_layers)
    model = model or classifier()
    trainer = Trainer(
        model, arguments(folder, **more), train_dataset=Sentences(), callbacks=[callback, watch]
    )
    # Or transformers leaves the division by the number of micro-batches to BERT, which does not do it.
    trainer.model_accepts_loss_kwargs = False
    trainer.train(resume_from_checkpoint=resume)
    return trainer, callback, watch


def reference(sets, steps=12, lr=3e-3, decay=0.1, clip=1.0, accumulation=1, batch=8, decay_all=False):
    """Plain PyTorch with these sets: its weights, and for each step the share by which each active layer moved."""
    model, data = classifier(), Sentences()
    layers = {layer.name for layer in discover(model).units}
    norms = {n for n, _ in model.named_parameters() if "LayerNorm" in n or n.endswith("bias")}
    groups = [
        {"params": [p for n, p in model.named_parameters() if n not in norms], "weight_decay": decay},
        {
            "params": [p for n, p in model.named_parameters() if n in norms],
            "weight_decay": decay if decay_all else 0.0,
        },
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, foreach=False)
    model.train()
    shares, position = [], 0
    for step in range(steps):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in layers or name in sets[step])
        for _ in range(accumulation):
            indices = [i % len(data) for i in range(position, position + batch)]
            position += batch
            (model(**data.batch(indices)).loss / accumulation).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        before = {name: model.get_parameter(name).detach().double().clone() for name in sets[step]}
        optimizer.step()
        optimizer.zero_grad()
        share = {}
        for name, old in before.items():
            moved = (model.get_parameter(name).detach().double() - old).abs()
            share[name] = (moved / torch.maximum(moved, old.abs()).clamp_min(1e-300)).mean().item()
        shares.append(share)
    return model, shares


def assert_same_weights(model, expected, atol=1e-6):
    for (name, a), (_, b) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    "more", [{}, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}], ids=["1", "2"]
)
def test_only_the_active_layers_move_and_as_in_plain_pytorch(tmp_path, more):
    trainer, _, watch = train(tmp_path, **more)
    layers = {layer.name for layer in discover(classifier()).units}
    for active, moved in zip(watch.sets, watch.moved, strict=True):
        assert set(moved) & layers == set(active)
    accumulation = more.get("gradient_accumulation_steps", 1)
    expected, shares = reference(watch.sets, accumulation=accumulation, batch=8 // accumulation)
    assert_same_weights(trainer.model, expected)
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(12))
    for line, share, active in zip(lines, shares, watch.sets, strict=True):
        assert sorted(line["active_layers"]) == active
        assert line["statistics"] == pytest.approx(share, rel=1e-3)
        assert line["loss"] is not None
    # The choice itself: every layer once, then those that moved most when they last trained.
    count, latest = len(watch.sets[0]), {}
    for step, active in enumerate(watch.sets):
        unseen = layers - latest.keys()
        if len(unseen) >= count:
            assert set(active) <= unseen, step
        elif not unseen:
            assert set(active) == set(sorted(latest, key=latest.__getitem__)[-count:]), step
        latest.update(shares[step])
    assert latest.keys() == layers


def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 5, "lr_scheduler_type": "cosine", "max_grad_norm": 0.3}
    whole, _, watched = train(tmp_path / "whole", **options)
    resumed, _, rest = train(tmp_path / "rest", resume=str(tmp_path / "whole" / "checkpoint-5"), **options)
    assert rest.sets == watched.sets[5:]
    for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)
    state = json.loads((tmp_path / "whole" / "checkpoint-5" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["SlimFitCallback"]["attributes"]["saved_schedule"]["step"] == 5


def test_columns_train_and_resume_and_leave_a_plain_model(tmp_path):
    config = {"freeze": {"policy": "static", "rate": 0.8, "always_lr_scale": 2.0}}
    options = {"save_strategy": "steps", "save_steps": 5}
    start = {name: p.detach().clone() for name, p in classifier().named_parameters()}
    whole, _, _ = train(tmp_path / "whole", config, **options)
    resumed, _, _ = train(
        tmp_path / "rest", config, resume=str(tmp_path / "whole" / "checkpoint-5"), **options
    )
    trained = dict(whole.model.named_parameters())
    assert trained.keys() == start.keys()
    for name, parameter in resumed.model.named_parameters():
        assert torch.equal(parameter, trained[name]), name
        assert parameter.requires_grad
    for name in ("encoder.layer.0.attention.self.query", "embeddings.word_embeddings"):
        moved = (trained[f"bert.{name}.weight"] != start[f"bert.{name}.weight"]).any(0)
        assert 0 < moved.float().mean() <= 0.2
    positions = "bert.embeddings.position_embeddings.weight"
    assert torch.equal(trained[positions], start[positions])
    saved = load_file(tmp_path / "whole" / "checkpoint-10" / "model.safetensors")
    assert not any("columns" in name for name in saved)


def test_transformers_own_way_of_restoring_callbacks_works_too(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 5}
    whole, _, _ = train(tmp_path / "whole", **options)
    resumed, _, _ = train(
        tmp_path / "rest",
        resume=str(tmp_path / "whole" / "checkpoint-5"),
        restore_callback_states_from_checkpoint=True,
        **options,
    )
    for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_is_saved_loads_without_this_package(tmp_path):
    trainer, callback, _ = train(tmp_path / "run", config={**CONFIG, "activations": "minimal"})
    trainer.save_model(str(tmp_path / "model"))
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    assert set(load_file(tmp_path / "model" / "model.safetensors")) == set(classifier().state_dict())
    for a, b in zip(loaded.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(a, b)
    # Restored: everything trains again, and no more steps are counted.
    assert all(p.requires_grad for p in trainer.model.parameters())
    assert callback.active_layers == frozenset()


@pytest.mark.parametrize("config", [CONFIG, {"freeze": {"rate": 0.8}}], ids=["ils", "columns"])
def test_a_second_training_starts_from_a_restored_model(tmp_path, config):
    trainer, _, watch = train(tmp_path, config, max_steps=3)
    first = {name: p.clone() for name, p in trainer.model.state_dict().items()}
    trainer.train()
    assert len(watch.sets) == 6
    assert watch.sets[3:] == watch.sets[:3]
    moved = {name for name, p in trainer.model.state_dict().items() if not torch.equal(p, first[name])}
    assert any(name.endswith("query.weight") for name in moved)


def test_the_first_step_of_a_warm_up_counts_no_layer_as_still(tmp_path):
    """transformers starts a warm-up at a rate of zero: nothing moves, and nothing may be concluded from it."""
    _, _, watch = train(tmp_path, warmup_steps=4)
    assert watch.moved[0] == []
    assert watch.sets[1] == watch.sets[0]
    assert set(watch.moved[1]) >= set(watch.sets[1])
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert lines[0]["lr"] == 0.0
    assert all(value is None for value in lines[0]["statistics"].values())


def test_a_step_that_a_fused_optimizer_skipped_is_tried_again_with_the_same_layers():
    model, data = classifier(), Sentences()
    handle = slimfit_ds.slim(model, CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    handle.follow(optimizer)
    first = handle.active_layers
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    # What torch.amp.GradScaler hands to a fused optimizer after an overflow.
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(1.0)
    model(**data.batch([0, 1])).loss.backward()
    optimizer.step()
    assert handle.active_layers == first
    assert handle.schedule.step == 0
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    assert handle.schedule.step == 1
    assert handle.active_layers.isdisjoint(first)


def test_a_layer_that_no_step_uses_does_not_block_its_place():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    handle = slimfit_ds.slim(model, {"freeze": {"policy": "ils", "rate": 0.6}})
    handle.follow(optimizer := torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(4):
        if model[0].weight.requires_grad or model[1].weight.requires_grad or model[0].bias.requires_grad:
            model[1](model[0](torch.randn(2, 4))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert handle.schedule.statistics[2] == 0.0
    assert "2.weight" not in handle.active_layers


class Tokens(torch.utils.data.Dataset):
    """Random text for a language model."""

    def __len__(self):
        return 32

    def __getitem__(self, index):
        ids = torch.randint(0, 50, (12,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids.clone()}


def language_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def losses(folder, config, model=None, **more):
    """The loss of each of six steps."""
    Trainer(
        model or language_model(),
        arguments(folder, max_steps=6, per_device_train_batch_size=4, **more),
        train_dataset=Tokens(),
        callbacks=[slimfit_ds.SlimFitCallback({**CONFIG, **config})],
    ).train()
    lines = (folder / "history.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_a_language_model_with_its_loss_in_chunks_and_recomputed_blocks(tmp_path):
    """A model without biases; the losses are those of the same steps with everything kept."""
    exact = losses(tmp_path / "exact", {})
    chunks = losses(tmp_path / "chunks", {"activations": {"preset": "exact", "chunk_loss_tokens": 8}})
    assert chunks == pytest.approx(exact, rel=1e-4)
    minimal = losses(tmp_path / "minimal", {"activations": "minimal"}, bf16=True)
    assert minimal == pytest.approx(exact, rel=5e-3)
    checkpointed = losses(tmp_path / "checkpointed", {}, activation_checkpointing=True)
    assert checkpointed == pytest.approx(exact, rel=1e-4)


def test_adapters_of_peft_are_the_layers(tmp_path):
    peft = pytest.importorskip("peft")
    base = language_model()
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    losses(tmp_path, {"freeze": {"policy": "ils", "rate": 0.5}}, model=model)
    layers = {layer.name for layer in discover(model).units}
    assert layers
    assert all("lora_" in name for name in layers)
    for name, parameter in base.named_parameters():
        if "lora_" not in name:
            assert torch.equal(parameter, before[name.replace(".base_layer", "")]), name


def test_everything_that_cannot_work_is_listed_at_once(tmp_path):
    with pytest.raises(ConfigError, match=r"slimfit\.freeze\.rate must be in"):
        slimfit_ds.SlimFitCallback({"freeze": {"rate": 7}})
    block = {
        "freeze": {"always_active": ["*no_such_layer*"]},
        "optimizer_states": {"precision": "8bit", "bf16_weights": "stochastic_rounding"},
        "memory_budget": "24GB",
    }
    with pytest.raises(ConfigError) as caught:
        Trainer(
            classifier(),
            arguments(tmp_path, torch_compile_mode="max-autotune", optim="schedule_free_adamw"),
            train_dataset=Sentences(),
            callbacks=[slimfit_ds.SlimFitCallback(block)],
        )
    text = str(caught.value)
    for part in (
        "torch_compile_backend and torch_compile_mode are ('inductor', 'max-autotune')",
        "optim 'schedule_free_adamw'",
        "optimizer_states.bf16_weights is 'stochastic_rounding'",
        "optimizer_states.precision is '8bit'",
        "memory_budget is 24000000000",
        "'*no_such_layer*' matches no layer",
    ):
        assert part in text, text
    assert len(caught.value.problems) == 6


@pytest.mark.parametrize("by", ["torch_compile", "accelerate launch --dynamo_backend inductor"])
def test_torch_compile_compiles_the_blocks(tmp_path, monkeypatch, by):
    """Under `torch_compile` the same losses, through one graph of the blocks; a graph of the whole model would be slow."""
    from torch._dynamo.utils import counters

    from slimfit_ds.activations import compiled

    for name in ("ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_DYNAMO_MODE"):
        monkeypatch.setenv(name, "no")
        monkeypatch.delenv(name)
    torch._dynamo.reset()
    counters.clear()
    compiled._graph_of.cache_clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    config = {"freeze": {"policy": "static", "width": 0.25}, "activations": "minimal"}
    expected = losses(tmp_path / "plain", config)
    assert not counters["stats"]["unique_graphs"]
    if by == "torch_compile":
        found = losses(tmp_path / "compiled", config, torch_compile=True)
    else:
        AcceleratorState._reset_state(True)
        monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "inductor")
        found = losses(tmp_path / "compiled", config)
    assert counters["stats"]["unique_graphs"] == 1
    assert found == pytest.approx(expected, rel=1e-4)
    torch._dynamo.reset()
    compiled._graph_of.cache_clear()


def test_torch_compile_of_other_columns_at_each_step_is_refused(tmp_path, monkeypatch):
    for name in ("ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_DYNAMO_MODE"):
        monkeypatch.setenv(name, "no")
        monkeypatch.delenv(name)
    config = {"freeze": {"policy": "ils", "width": 0.5}, "activations": "minimal"}
    with pytest.raises(ConfigError, match=r"freeze\.policy 'ils' trains other columns"):
        losses(tmp_path, config, torch_compile=True)
