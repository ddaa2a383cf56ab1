"""The training loop on one rank: against plain PyTorch, over a restart, for every task."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from slimfit_ds.training.history import read_history
from slimfit_ds.training.recipe import read_recipe
from slimfit_ds.training.run import Run, train

TINY_VIT = {
    "model_type": "vit",
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 1,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.fixture
def digits(tmp_path, monkeypatch):
    """Trains a tiny ViT on digits for a few steps; overrides change the recipe."""
    monkeypatch.chdir(tmp_path)

    def run(*overrides):
        settings = {
            "task": "image_classification",
            "model": {"config": TINY_VIT},
            "data": "embedded:digits",
            "max_train_examples": 80,
            "max_eval_examples": 20,
            "max_steps": 8,
            "train_batch_size": 16,
            "lr": 3e-3,
            "warmup_steps": 2,
            "deepspeed": {"zero_optimization": {"stage": 1}},
            "slimfit": {"freeze": {"policy": "ils", "rate": 0.7}},
        }
        path = tmp_path / "tiny.yaml"
        path.write_text(json.dumps(settings))
        return train(read_recipe(path, overrides))

    return run


def losses(folder):
    return [line["loss"] for line in read_history(folder / "history.jsonl")]


def test_what_a_run_leaves_behind(digits, tmp_path):
    result = digits("output_dir=out", "eval_steps=4", "save_steps=3", "keep_last=2")
    out = tmp_path / "out"
    assert json.loads((out / "metrics.json").read_text()) == result
    assert set(result["metrics"]) == {"accuracy", "f1", "matthews_correlation", "loss"}
    assert result["peak_bytes"] > 10**7
    assert result["seconds_per_step"] > 0
    assert {"torch", "deepspeed", "transformers"} <= set(result["versions"])
    assert result["hardware"]["cpu_cores"] >= 1
    assert (out / "schedule.png").stat().st_size > 1000
    assert sorted(path.name for path in (out / "checkpoints").glob("step_*")) == ["step_6", "step_8"]
    assert read_recipe(out / "recipe.yaml").problems == ()
    lines = read_history(out / "history.jsonl")
    assert [line["step"] for line in lines] == list(range(8))
    assert [line["step"] for line in lines if "evaluation" in line] == [3, 7]
    assert lines[0]["lr"] == pytest.approx(1e-3)
    frozen = int(0.7 * result["layers"])
    for line in lines:
        assert len(line["active_layers"]) == result["layers"] - frozen
        assert set(line["statistics"]) == set(line["active_layers"])
        assert all(value > 0 for value in line["statistics"].values())


def test_the_saved_model_is_one_of_transformers_and_predicts_the_same(digits, tmp_path):
    from transformers import AutoModelForImageClassification

    from slimfit_ds.training.data import open_splits

    result = digits("output_dir=out", "max_steps=3")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out" / "model").eval()
    rows = open_splits(read_recipe(tmp_path / "out" / "recipe.yaml").recipe).evaluation
    images = np.stack([(np.asarray(row["img"]) / 255 - 0.5) / 0.5 for row in rows])[:, None]
    labels = torch.tensor([row["label"] for row in rows])
    with torch.no_grad():
        outputs = model(torch.tensor(images, dtype=torch.float32), labels=labels)
    assert outputs.loss.item() == pytest.approx(result["metrics"]["loss"], rel=1e-5)
    assert (outputs.logits.argmax(-1) == labels).float().mean().item() == pytest.approx(
        result["metrics"]["accuracy"]
    )


@pytest.mark.parametrize("stage", [0, 2])
def test_full_fine_tuning_is_plain_pytorch(digits, tmp_path, stage):
    from torch.nn.utils import clip_grad_norm_
    from transformers import AutoConfig, AutoModelForImageClassification

    from slimfit_ds.training.data import open_splits

    overrides = (
        "output_dir=out", "slimfit=null", f"deepspeed.zero_optimization.stage={stage}", "micro_batch_size=4",
        "gradient_clipping=0.5", "weight_decay=0.1", "seed=3",
    )  # fmt: skip
    digits(*overrides)
    rows = open_splits(read_recipe(tmp_path / "out" / "recipe.yaml").recipe).train
    images = torch.tensor(np.stack([np.asarray(row["img"]) / 255 for row in rows]), dtype=torch.float32)
    labels = torch.tensor([row["label"] for row in rows])
    torch.manual_seed(3)
    names = {"id2label": {n: str(n) for n in range(10)}, "label2id": {str(n): n for n in range(10)}}
    model = AutoModelForImageClassification.from_config(AutoConfig.for_model(**TINY_VIT, **names)).train()
    weights = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": weights, "weight_decay": 0.1}, {"params": others, "weight_decay": 0}]
    )
    expected = []
    for step, rate in enumerate([1 / 3, 2 / 3, 6 / 6, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]):
        order = np.random.default_rng([3, step // 5]).permutation(80)[step % 5 * 16 :][:16]
        loss = model(((images[order] - 0.5) / 0.5)[:, None], labels=labels[order]).loss
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(model.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * rate
        optimizer.step()
        expected.append(loss.item())
    assert losses(tmp_path / "out") == pytest.approx(expected, rel=2e-4)


def test_a_restarted_run_goes_on_as_if_it_had_not_stopped(digits, tmp_path, monkeypatch):
    common = ("save_steps=4", "task.augmentation=crop_flip", "model.config.hidden_dropout_prob=0.2")
    whole = digits("output_dir=whole", *common)

    class PowerCut(Exception):
        pass

    step = Run._step

    def cut(self, number, loader):
        if number == 6:
            raise PowerCut
        return step(self, number, loader)

    monkeypatch.setattr(Run, "_step", cut)
    with pytest.raises(PowerCut):
        digits("output_dir=parts", *common)
    assert len(losses(tmp_path / "parts")) == 6
    monkeypatch.setattr(Run, "_step", step)
    resumed = digits("output_dir=parts", *common)
    lines = [read_history(tmp_path / name / "history.jsonl") for name in ("whole", "parts")]
    for key in ("step", "loss", "lr", "active_layers", "statistics"):
        assert [line[key] for line in lines[0]] == [line[key] for line in lines[1]]
    assert resumed["metrics"] == whole["metrics"]
    before = (tmp_path / "parts" / "metrics.json").read_bytes()
    assert digits("output_dir=parts", *common) == resumed  # finished: nothing is done again
    assert (tmp_path / "parts" / "metrics.json").read_bytes() == before


def test_adapters_train_under_plain_deepspeed(digits, tmp_path):
    digits("output_dir=out", "slimfit=null", "lora.r=2", "max_steps=3", "save_model=false")
    lines = read_history(tmp_path / "out" / "history.jsonl")
    assert all(line["active_layers"] is None for line in lines)
    assert all(np.isfinite(line["loss"]) for line in lines)


def jsonl(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)))


CONTEXT = "the small cat sat on the red mat in the big house ."


@pytest.mark.parametrize(
    ("task", "model_type", "row", "metrics"),
    [
        (
            "sequence_classification",
            "bert",
            {"sentence1": "cat", "sentence2": "dog", "label": 1},
            {"accuracy"},
        ),
        ("sequence_regression", "bert", {"sentence1": "cat", "sentence2": "dog", "label": 1.5}, {"pearson"}),
        (
            "question_answering",
            "bert",
            {"question": "who", "context": CONTEXT, "answers": {"text": ["red mat"], "answer_start": [25]}},
            {"exact_match", "f1"},
        ),
        ("causal_lm", "gpt2", {"prompt": "the cat", "completion": "sat on the mat"}, {"perplexity"}),
    ],
)
def test_every_task_runs_to_its_metric(
    task, model_type, row, metrics, tmp_path, tokenizer_folder, tiny_bert, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    sizes = {
        "bert": tiny_bert,
        "gpt2": {"model_type": "gpt2", "vocab_size": tiny_bert["vocab_size"], "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64},
    }  # fmt: skip
    for name, count in (("train", 8), ("validation", 5)):
        jsonl(tmp_path / "data" / f"{name}.jsonl", [row] * count)
    settings = {
        "task": {"name": task, "max_length": 48, **({"stride": 4} if task == "question_answering" else {})},
        "model": {"config": sizes[model_type]},
        "tokenizer": str(tokenizer_folder),
        "data_dir": "data",
        "max_steps": 3,
        "train_batch_size": 4,
        "micro_batch_size": 2,
        "output_dir": "out",
        "deepspeed": {"zero_optimization": {"stage": 1}},
        "slimfit": {"freeze": {"policy": "ils", "rate": 0.5}},
    }
    (tmp_path / "r.yaml").write_text(json.dumps(settings))
    result = train(read_recipe(tmp_path / "r.yaml"))
    assert metrics <= set(result["metrics"])
    assert all(np.isfinite(loss) for loss in losses(tmp_path / "out"))
    assert result["tokens_per_second"] > result["samples_per_second"]
    assert (tmp_path / "out" / "model" / "tokenizer.json").exists()
