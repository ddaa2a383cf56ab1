"""The scripts of examples/, run as a user would: adapted by a few lines, and the same steps on one rank and on two."""

from __future__ import annotations

import difflib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, load_dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from slimfit_ds.integrations.ranks import free_port

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
BIN = Path(sys.executable).parent
STEPS, BATCH, SEED = 24, 8, 5
WORDS = [
    "good",
    "fine",
    "nice",
    "great",
    "bad",
    "poor",
    "dull",
    "awful",
    "the",
    "a",
    "film",
    "plot",
    "cast",
    "scene",
    "story",
    "was",
    "is",
    "very",
    "rather",
    "quite",
]

pytestmark = pytest.mark.timeout(280)


@pytest.mark.parametrize(
    ("plain", "adapted"),
    [
        ("run_glue.py", "run_glue_slimfit.py"),
        ("run_glue.py", "run_glue_deepspeed.py"),
        ("run_sft.py", "run_sft_slimfit.py"),
    ],
)
def test_a_script_is_adapted_by_at_most_five_lines(plain, adapted):
    texts = [(EXAMPLES / name).read_text().splitlines() for name in (plain, adapted)]
    changed = [line for line in difflib.ndiff(*texts) if line.startswith(("+ ", "- "))]
    assert 0 < len(changed) <= 5, changed
    assert all(line.startswith("+ ") for line in changed), "lines of the plain script stay"


def environment(**more: str) -> dict[str, str]:
    keep = {
        key: value for key, value in os.environ.items() if key not in {"RANK", "LOCAL_RANK", "WORLD_SIZE"}
    }
    keep = {key: value for key, value in keep.items() if not key.startswith(("MASTER_", "ACCELERATE_"))}
    keep |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    keep["PATH"] = f"{BIN}{os.pathsep}{keep.get('PATH', '')}"
    return keep | more


def run(*command: str, **more: str) -> None:
    done = subprocess.run(
        command, cwd=ROOT, env=environment(**more), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"


def tokenizer() -> PreTrainedTokenizerFast:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(special + WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", eos_token="[SEP]"
    )


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A tiny model without dropout, and sentences of several lengths."""
    folder = tmp_path_factory.mktemp("examples")
    chance = np.random.default_rng(0)
    rows = []
    for _ in range(STEPS * BATCH + 5):
        label = int(chance.integers(2))
        mood = WORDS[4 * label : 4 * label + 4]
        words = [*chance.choice(WORDS[8:], int(chance.integers(2, 9))), chance.choice(mood)]
        rows.append({"sentence": " ".join(words), "label": label})
    (folder / "data").mkdir()
    Dataset.from_list(rows).to_parquet(folder / "data" / "train.parquet")
    Dataset.from_list(rows[:20]).to_parquet(folder / "data" / "validation.parquet")
    config = BertConfig(
        vocab_size=4 + len(WORDS), hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    return folder


def read_history(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_same_run(ours: list[dict], theirs: list[dict], statistics: float) -> None:
    """Layers, losses, rates and statistics (to this relative error) of every step."""
    assert len(theirs) == STEPS
    assert [line["active_layers"] for line in ours] == [line["active_layers"] for line in theirs]
    for mine, line in zip(ours, theirs, strict=True):
        assert mine["statistics"] == pytest.approx(line["statistics"], rel=statistics)
        assert mine["loss"] == pytest.approx(line["loss"], rel=1e-5)
        assert mine["lr"] == pytest.approx(line["lr"])


def options(work: Path, name: str, batch: int = BATCH) -> list[str]:
    values = {
        "model_name_or_path": work / "model", "data_dir": work / "data", "max_seq_length": 32,
        "output_dir": work / name, "max_steps": STEPS, "per_device_train_batch_size": batch, "learning_rate": 3e-3,
        "weight_decay": 0.01, "seed": SEED, "train_sampling_strategy": "sequential", "logging_steps": 1,
        "report_to": "none",
        # Or the loss is multiplied by the number of processes, for a division that BERT does not do.
        "average_tokens_across_devices": "false",
    }  # fmt: skip
    return [text for key, value in values.items() for text in (f"--{key}", str(value))]


def check_outcome(folder: Path) -> None:
    AutoModelForSequenceClassification.from_pretrained(folder)
    result = json.loads((folder / "eval_results.json").read_text())
    # 24 steps from scratch teach nothing yet; these are real numbers, though.
    assert 0 < result["eval_loss"] < 0.75, result
    assert result["eval_accuracy"] in [n / 20 for n in range(21)], result


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_under_accelerate_launch_train_as_one(work):
    """With activations as they are: a codec rounds the part of the batch that a rank has."""
    text = (EXAMPLES / "run_glue_slimfit.py").read_text()
    block = '{"freeze": {"rate": 0.9}, "activations": "balanced"}'
    assert block in text
    (work / "exact.py").write_text(text.replace(block, '{"freeze": {"rate": 0.9, "policy": "ils"}}'))
    run(sys.executable, str(work / "exact.py"), *options(work, "alone"), *NO_SAVE)
    launcher = [str(BIN / "accelerate"), "launch", "--config_file", "examples/accelerate_ddp.yaml"]
    # Not --cpu, with which accelerate starts one process whatever the file says; the script's --use_cpu is enough.
    launcher += ["--mixed_precision", "no", "--main_process_port", str(free_port())]
    run(*launcher, str(work / "exact.py"), *options(work, "ddp", BATCH // 2), *NO_SAVE)
    check_outcome(work / "alone")
    check_outcome(work / "ddp")
    # The loss is the mean over both ranks: one of them alone would have seen half of each batch.
    one, two = (read_history(work / name / "history.jsonl") for name in ("alone", "ddp"))
    assert_same_run(two, one, statistics=1e-3)


def check_engine(folder: Path) -> None:
    """The SlimFit engine wrote the checkpoint of a run on two ranks."""
    (file,) = (folder / "checkpoint-12").glob("global_step*/slimfit.json")
    saved = json.loads(file.read_text())
    assert saved["world_size"] == 2
    assert saved["zero_stage"] == 2
    assert saved["schedule"]["step"] == 12
    # The recommended setting: some columns of every layer, at every step.
    assert saved["schedule"]["policy"] == "static"
    assert len(saved["schedule"]["active"]) == len(saved["schedule"]["layers"])
    assert any(name.endswith("query.weight") for name in saved["columns"])


NO_SAVE = ("--save_strategy", "no", "--use_cpu", "true")
SAVE = ("--save_strategy", "steps", "--save_steps", "12", "--use_cpu", "true")


@pytest.mark.slow
@pytest.mark.distributed
def test_the_deepspeed_variant_under_accelerate_launch(work):
    launcher = [str(BIN / "accelerate"), "launch", "--config_file", "examples/accelerate_deepspeed.yaml"]
    launcher += ["--main_process_port", str(free_port())]
    run(*launcher, "examples/run_glue_deepspeed.py", *options(work, "ds_accelerate", BATCH // 2), *SAVE)
    check_outcome(work / "ds_accelerate")
    check_engine(work / "ds_accelerate")


@pytest.mark.slow
def test_supervised_fine_tuning(work):
    pytest.importorskip("trl")
    config = GPT2Config(
        vocab_size=4 + len(WORDS), n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=2, eos_token_id=3
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(work / "gpt")
    tokenizer().save_pretrained(work / "gpt")
    rows = load_dataset("parquet", data_files=str(work / "data" / "train.parquet"), split="train")
    pairs = [{"prompt": text, "completion": f" {text}"} for text in rows["sentence"]]
    (work / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    values = {
        "model_name_or_path": work / "gpt", "train_file": work / "pairs.jsonl", "output_dir": work / "sft",
        "max_steps": 8, "per_device_train_batch_size": 4, "logging_steps": 1, "report_to": "none", "bf16": "false",
        "use_cpu": "true", "learning_rate": "1e-2",
    }  # fmt: skip
    run(
        sys.executable,
        "examples/run_sft_slimfit.py",
        *(w for k, v in values.items() for w in (f"--{k}", str(v))),
    )
    AutoModelForCausalLM.from_pretrained(work / "sft")
    lines = read_history(work / "sft" / "history.jsonl")
    assert len(lines) == 8
    assert lines[-1]["loss"] < lines[0]["loss"]
