"""Streamed weights under the engine, the Trainer and the planner, against the same runs with resident weights."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import slimfit_ds
from slimfit_ds.activations import proof
from slimfit_ds.engine import weights
from slimfit_ds.errors import ConfigError
from slimfit_ds.planner.simulate import estimate, measure
from slimfit_ds.planner.strategies import Strategy
from slimfit_ds.planner.workload import Workload
from slimfit_ds.streaming import find
from slimfit_ds.streaming.streaming import streaming_of

SIZES = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
HOST = {"live": "host"}


def llama() -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=60, num_key_value_heads=2)).train()


def ids(seed: int) -> Tensor:
    return torch.randint(2, 60, (4, 10), generator=torch.Generator().manual_seed(seed))


def engine_of(
    stage: int,
    where: dict[str, Any],
    dtype: str = "bf16",
    preset: str = "minimal",
    states: dict[str, Any] | None = None,
    front: str = "none",
) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "zero_optimization": {"stage": stage},
        "steps_per_print": None,
        "slimfit": {
            "freeze": {"rate": 0.8, "front": front},
            "activations": preset,
            "frozen_weights": where,
            "optimizer_states": states or {},
        },
    }
    if dtype != "fp32":
        config[dtype] = {"enabled": True}
    return slimfit_ds.initialize(model=llama(), config=config)[0]


def weights_of(engine: Any) -> list[Tensor]:
    """All weights in order of their names, whole under ZeRO 3 too."""
    with weights.whole(*engine.module.parameters()):
        return [tensor.clone() for _, tensor in sorted(engine.module.state_dict().items())]


def steps(engine: Any, first: int, last: int) -> list[Tensor]:
    """Losses, and after each step all weights in one tensor."""
    seen = []
    for step in range(first, last):
        for part in range(2):
            loss = engine(input_ids=ids(2 * step + part), labels=ids(2 * step + part)).loss
            seen.append(loss.detach().clone())
            engine.backward(loss)
            engine.step()
        seen.append(torch.cat([t.flatten() for t in weights_of(engine)]))
    return seen


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("stage", "dtype", "preset"),
    [
        (0, "fp32", "exact"),
        (1, "bf16", "minimal"),
        (2, "bf16", "balanced"),
        (3, "bf16", "minimal"),
        (3, "fp32", "exact"),
    ],
)
def test_the_engine_trains_the_same_and_goes_on_from_checkpoints(one_rank, tmp_path, stage, dtype, preset):
    """A checkpoint of either is one of the other: both go on from that of the streamed run."""
    resident, streamed = engine_of(stage, {}, dtype, preset), engine_of(stage, HOST, dtype, preset)
    expected, found = steps(resident, 0, 3), steps(streamed, 0, 3)
    assert_same(found, expected)
    streaming = streaming_of(streamed.module)
    on_host = sum(t.nbytes for t in streaming.host_tensors)
    assert len(streaming.blocks) == 4
    held = [engine.memory_report()["parameters"] for engine in (resident, streamed)]
    assert held[0] - held[1] == pytest.approx(on_host / 2, rel=0.05)
    streamed.save_checkpoint(tmp_path / "checkpoint")
    streamed.save_pretrained(tmp_path / "model")
    saved = LlamaForCausalLM.from_pretrained(
        tmp_path / "model", dtype=next(resident.module.parameters()).dtype
    )
    assert_same([tensor for _, tensor in sorted(saved.state_dict().items())], weights_of(resident))
    expected = steps(resident, 3, 5)
    again = engine_of(stage, HOST, dtype, preset)
    steps(again, 7, 8)  # its buffers hold weights that the checkpoint replaces
    again.load_checkpoint(tmp_path / "checkpoint")
    assert_same(steps(again, 3, 5), expected)
    streaming_of(again.module).remove()
    assert all(p.dim() == 2 for n, p in again.module.named_parameters() if n.endswith("up_proj.weight"))
    assert not any(n.endswith("proj.weight") for n, _ in again.module.named_buffers())


@pytest.mark.parametrize(
    ("stage", "dtype", "preset", "states"),
    [
        (0, "fp32", "exact", {}),
        (1, "bf16", "minimal", {"active": "device"}),
        (2, "bf16", "balanced", {"precision": "8bit", "bf16_weights": "stochastic_rounding"}),
    ],
)
def test_trained_columns_and_their_gradients_on_the_host_are_exact(
    one_rank, tmp_path, monkeypatch, stage, dtype, preset, states
):
    """Also from a checkpoint, and between micro-batches; gradients are on the host as soon as they are made."""
    parts: list[str] = []
    compare = proof._Part._compare
    monkeypatch.setattr(proof._Part, "_compare", lambda part: parts.append(part._name) or compare(part))
    weights = {**HOST, "columns": "host"}
    resident = engine_of(stage, {}, dtype, preset, states)
    away = engine_of(stage, weights, dtype, preset, {"active": "host", **states})
    expected, found = steps(resident, 0, 3), steps(away, 0, 3)
    assert_same(found, expected)
    # The proof on the first batch saw the same parts of both.
    half = len(parts) // 2
    assert parts[:half] == parts[half:] != []
    layer = away.module.model.layers[1].mlp.up_proj
    block = streaming_of(away.module).blocks[1]
    own = {piece.untyped_storage().data_ptr() for piece in block.pieces[1:]}
    held, collect = [layer.weight_columns], away.optimizer.collect_gradients
    away.optimizer.collect_gradients = lambda last: held.append(layer.weight_columns.grad) or collect(last)
    away.backward(away(input_ids=ids(90), labels=ids(90)).loss)
    assert len(held) == 2
    assert {t.untyped_storage().data_ptr() for t in held} == own
    away.optimizer.zero_grad()
    away.save_checkpoint(tmp_path / "checkpoint")
    away.save_pretrained(tmp_path / "model")
    saved = LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype=layer.weight_columns.dtype)
    assert_same(list(saved.state_dict().values()), list(resident.module.state_dict().values()))
    again = engine_of(stage, weights, dtype, preset, {"active": "host", **states})
    steps(again, 7, 8)  # its buffers hold columns that the checkpoint replaces
    again.load_checkpoint(tmp_path / "checkpoint")
    assert_same(steps(again, 3, 5), steps(resident, 3, 5))
    streaming_of(again.module).remove()
    assert again.module.model.layers[1].mlp.up_proj.home is None


@pytest.mark.parametrize(
    ("stage", "preset", "columns"), [(1, "exact", "device"), (1, "minimal", "host"), (2, "exact", "host")]
)
def test_below_the_front_too(one_rank, stage, preset, columns):
    resident = engine_of(stage, {}, preset=preset, front="half")
    away = engine_of(stage, {**HOST, "columns": columns}, preset=preset, front="half")
    assert_same(steps(away, 0, 4), steps(resident, 0, 4))
    assert resident.schedule.step == 4


@pytest.mark.parametrize(
    ("stage", "states"),
    [
        (1, {}),
        (1, {"precision": "8bit", "bf16_weights": "stochastic_rounding", "stale_moments": "decay"}),
        (3, {}),
    ],
)
def test_states_of_what_trains_on_the_host_are_exact(one_rank, tmp_path, stage, states):
    """Also from a checkpoint; between steps the device holds none of them."""
    resident = engine_of(stage, {}, states=states)
    away = engine_of(stage, {}, states={**states, "active": "host", "inactive": "device"})
    assert_same(steps(away, 0, 3), steps(resident, 0, 3))
    held = away.memory_report()
    assert held["optimizer"] == 0
    assert held["optimizer_host"] == resident.memory_report()["optimizer"] > 0
    away.save_checkpoint(tmp_path)
    again = engine_of(stage, HOST, states={**states, "active": "host"})
    again.load_checkpoint(tmp_path)
    assert again.memory_report()["optimizer"] == 0
    assert_same(steps(again, 3, 5), steps(resident, 3, 5))


def test_a_host_too_small_for_weights_and_states_is_told_before_anything_is_made(one_rank, monkeypatch):
    model = llama()
    free = int(1.9 * sum(p.nbytes for p in model.parameters()))
    monkeypatch.setattr(find.psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    block = {"freeze": {"rate": 0.2}, "frozen_weights": HOST}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1}, "slimfit": block}
    before = {n: t.data_ptr() for n, t in model.state_dict().items()}
    with pytest.raises(
        ConfigError, match=r"optimizer states 0\.0 for each of 1 ranks on this host; 0\.0 GiB"
    ):
        slimfit_ds.initialize(
            model=model, config={**config, "slimfit": {**block, "optimizer_states": {"active": "host"}}}
        )
    assert before == {n: t.data_ptr() for n, t in model.state_dict().items()}
    assert streaming_of(model) is None


def test_what_is_refused_under_stage_3(one_rank):
    with pytest.raises(ConfigError, match=r"frozen_weights\.columns 'host' under ZeRO stage 3"):
        engine_of(3, {**HOST, "columns": "host"})
    model = llama()
    next(model.parameters()).ds_id = 0
    block = {"freeze": {"rate": 0.8}, "frozen_weights": HOST}
    zero = {"stage": 3, "offload_param": {"device": "cpu"}}
    config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": zero, "slimfit": block}
    with pytest.raises(ConfigError) as caught:
        slimfit_ds.initialize(model=model, config=config)
    assert "cut while it was made" in str(caught.value)
    assert "offload_param with slimfit.frozen_weights" in str(caught.value)


def test_the_trainer_trains_the_same_and_resumes(tmp_path):
    rows = [{"input_ids": ids(i)[0], "labels": ids(i)[0]} for i in range(32)]

    def run(
        folder: str, weights: dict[str, Any], steps: int, resume: str | None = None
    ) -> tuple[dict, Trainer]:
        arguments = TrainingArguments(
            str(tmp_path / folder), max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-2, save_steps=3,
            train_sampling_strategy="sequential", report_to="none", disable_tqdm=True, use_cpu=True, eval_strategy="steps",
            eval_steps=2, lr_scheduler_type="constant", dataloader_pin_memory=False,
        )  # fmt: skip
        block = {"freeze": {"rate": 0.8}, "activations": "minimal", "frozen_weights": weights}
        callback = slimfit_ds.SlimFitCallback(block)
        trainer = Trainer(llama(), arguments, train_dataset=rows, eval_dataset=rows[:8], callbacks=[callback])
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model.state_dict(), trainer

    expected, resident = run("resident", {}, 6)
    found, trainer = run("streamed", HOST, 6)
    assert found.keys() == expected.keys()
    assert_same(list(found.values()), list(expected.values()))
    losses = [[row.get("eval_loss") for row in t.state.log_history] for t in (trainer, resident)]
    assert losses[0] == losses[1]
    assert any(losses[0])
    assert streaming_of(trainer.model) is None
    again, _ = run("again", HOST, 6, resume=str(tmp_path / "streamed" / "checkpoint-3"))
    assert_same(list(again.values()), list(expected.values()))


def test_the_plan_is_what_is_measured():
    """The real step on fake tensors against the same step on real ones: device within 1 %, host to the byte."""
    model = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 1024,
        "hidden_size": 256,
    }
    model |= {"intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    block = {"activations": {"preset": "minimal", "chunk_loss_tokens": 64}, "frozen_weights": HOST}
    workload, strategy = Workload(model, 2, 64), Strategy("streamed", 1, slimfit=block)
    (planned,), (measured,) = estimate(workload, [strategy], target="cpu"), measure(workload, [strategy])
    assert planned.report is not None, planned.error
    assert measured.report is not None, measured.error
    assert planned.peak == pytest.approx(measured.peak, rel=0.01)
    assert (
        planned.report.parameters_host
        == measured.report.parameters_host
        == (4 * 655_360 + 2 * 1024 * 256) * 2
    )
