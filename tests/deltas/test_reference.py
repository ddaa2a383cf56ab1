"""A reference that is the policy with its base: TRL's losses are those with an explicit reference model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny_bases import IDS, logits, start
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer

import slimfit_ds
from slimfit_ds import SlimFitCallback
from slimfit_ds.deltas.reference import ReferenceModel, share_reference
from slimfit_ds.errors import ConfigError

WORDS = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(29))]


def tokenizer() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def base_of(folder: Path, kind: str) -> Path:
    start(folder, kind)
    return folder / "base"


OPTIONS: dict[str, Any] = {
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "save_strategy": "no",
    "gradient_checkpointing": False,
    "bf16": False,
}


def callback(**freeze: Any) -> SlimFitCallback:
    return SlimFitCallback({"freeze": {"rate": 0.7, **freeze}, "activations": "balanced"}, history=False)


def preferences(count: int = 16) -> Dataset:
    return Dataset.from_list(
        [
            {"prompt": f"w{i} w{i + 1}", "chosen": f"w{i + 2} w{i + 3} w{i}", "rejected": f"w{i + 5} w{i}"}
            for i in range(count)
        ]
    )


def judged(count: int = 16) -> Dataset:
    return Dataset.from_list(
        [
            {"prompt": f"w{i} w{i + 1}", "completion": f"w{i + 2} w{i + 3}", "label": i % 3 > 0}
            for i in range(count)
        ]
    )


def losses(trainer: Any) -> list[float]:
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("kind", ["llama", "llama_tied", "gpt2"])
@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_losses_are_those_with_a_reference_model(tmp_path, method, kind):
    base = base_of(tmp_path, kind)
    trainer_class, config = {"dpo": (DPOTrainer, DPOConfig), "kto": (KTOTrainer, KTOConfig)}[method]
    data = preferences() if method == "dpo" else judged()

    def run(shared: bool) -> tuple[list[float], Any]:
        policy = AutoModelForCausalLM.from_pretrained(base)
        other = ReferenceModel(policy) if shared else AutoModelForCausalLM.from_pretrained(base)
        trainer = trainer_class(
            policy,
            ref_model=other,
            args=config(str(tmp_path / "out"), **OPTIONS),
            train_dataset=data,
            processing_class=tokenizer(),
            callbacks=[callback()],
        )
        found = losses(trainer)
        return found, trainer

    expected, explicit = run(shared=False)
    found, trainer = run(shared=True)
    assert found == pytest.approx(expected, abs=1e-5)
    assert len({round(loss, 4) for loss in expected}) > 2
    for mine, theirs in zip(trainer.model.parameters(), explicit.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
    # After training too, when layers are whole again.
    start_logits = logits(AutoModelForCausalLM.from_pretrained(base))
    trained_logits = logits(trainer.model)
    torch.testing.assert_close(trainer.ref_model(input_ids=IDS).logits, start_logits, rtol=0, atol=1e-6)
    assert torch.equal(logits(trainer.model), trained_logits)
    assert (trained_logits - start_logits).abs().max() > 1e-2


def test_grpo_has_no_second_model_and_its_divergence_is_that_from_the_base(tmp_path):
    base = base_of(tmp_path, "llama")

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(len(set(text.split()))) for text in completions]

    def run(shared: bool) -> list[dict[str, float]]:
        policy = AutoModelForCausalLM.from_pretrained(base)
        args = GRPOConfig(
            str(tmp_path / "out"),
            **{**OPTIONS, "max_steps": 3, "per_device_train_batch_size": 4},
            num_generations=4,
            max_completion_length=6,
            beta=0.0 if shared else 0.2,
        )
        trainer = GRPOTrainer(
            policy,
            reward_funcs=reward,
            args=args,
            train_dataset=Dataset.from_list([{"prompt": f"w{i}"} for i in range(8)]),
            processing_class=tokenizer(),
            callbacks=[callback()],
        )
        if shared:
            share_reference(trainer, 0.2)
        trainer.train()
        assert isinstance(trainer.ref_model, ReferenceModel) == shared
        return [line for line in trainer.state.log_history if "loss" in line]

    expected, found = run(shared=False), run(shared=True)
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected], abs=1e-4)
    assert [line["kl"] for line in found] == pytest.approx([line["kl"] for line in expected], abs=1e-4)
    assert expected[-1]["kl"] > 1e-3


def test_a_resumed_run_has_the_reference_of_its_start(tmp_path):
    base = base_of(tmp_path, "llama")

    def trainer_of(**more: Any) -> DPOTrainer:
        policy = AutoModelForCausalLM.from_pretrained(base)
        options = {**OPTIONS, "save_strategy": "steps", "save_steps": 2, **more}
        return DPOTrainer(
            policy,
            ref_model=ReferenceModel(policy),
            args=DPOConfig(str(tmp_path / "out"), **options),
            train_dataset=preferences(),
            processing_class=tokenizer(),
            callbacks=[callback()],
        )

    expected = losses(trainer_of())
    resumed = trainer_of()
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    found = [line["loss"] for line in resumed.state.log_history if "loss" in line]
    assert found == pytest.approx(expected, abs=1e-5)


def test_it_holds_what_trains_only(tmp_path):
    policy = AutoModelForCausalLM.from_pretrained(base_of(tmp_path, "llama"))
    reference = ReferenceModel(policy)
    assert sum(1 for _ in reference.parameters()) == 0
    handle = slimfit_ds.slim(policy, {"freeze": {"rate": 0.7}})
    assert reference._overlay.nbytes == sum(p.nbytes for p in handle.trainable.values())


def test_a_graph_survives_the_reference(tmp_path):
    """The forward pass of the policy, then that of the reference, then the backward pass of the policy."""
    gradients = []
    for between in (False, True):
        policy = AutoModelForCausalLM.from_pretrained(base_of(tmp_path, "llama"))
        reference = ReferenceModel(policy)
        handle = slimfit_ds.slim(policy, {"freeze": {"rate": 0.7}, "activations": "exact"})
        with torch.no_grad():
            for p in handle.trainable.values():
                p.add_(0.1)
        # A model that reads the weight of its head itself.
        hidden = policy.model(input_ids=IDS).last_hidden_state

        class Head(torch.nn.Module):
            def forward(self, x):
                return x @ policy.lm_head.weight.T  # noqa: B023

        loss = Head()(hidden).square().mean()
        if between:
            reference(input_ids=IDS)
        loss.backward()
        gradients.append({n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert any("lm_head" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_a_model_that_changed_unseen_is_refused(tmp_path):
    policy = AutoModelForCausalLM.from_pretrained(base_of(tmp_path, "llama"))
    reference = ReferenceModel(policy)
    reference(input_ids=IDS)
    with torch.no_grad():
        policy.lm_head.weight.add_(1)
    with pytest.raises(RuntimeError, match="nothing was kept: give the trainer a SlimFitCallback"):
        reference(input_ids=IDS)


def test_only_a_trainer_without_a_reference_takes_a_shared_one():
    class Trainer:
        beta = 0.1
        ref_model = None

    with pytest.raises(ValueError, match=r"made with beta=0\.0"):
        share_reference(Trainer(), 0.1)


def test_a_reference_is_not_taken_over_to_other_columns(tmp_path):
    """It holds those of the run before; others would be compared with what they have learned."""
    model = AutoModelForCausalLM.from_pretrained(base_of(tmp_path, "llama"))
    reference, before = ReferenceModel(model), logits(model)
    for seed in (0, 0):
        handle = slimfit_ds.slim(model, {"freeze": {"rate": 0.7, "seed": seed}})
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1)
        handle.remove()
        assert torch.equal(reference(IDS).logits, before)
        assert not torch.equal(logits(model), before)
    with pytest.raises(ConfigError, match="other parts train now"):
        slimfit_ds.slim(model, {"freeze": {"rate": 0.7, "seed": 1}})
