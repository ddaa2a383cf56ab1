"""SmolLM2-135M on GSM8K: full fine-tuning, LoRA, ours and the paper's schedule, each at rates searched alike.

    python benchmarks/fidelity/decoder.py [--contenders full lora8 ...] [--rates 1e-4 ...] [--seeds 0 1] [--answers 100]

AdamW, warm-up of 6 % and linear decay, gradients clipped to a norm of 1, 60 steps of four problems of at most 96 tokens, loss on the
answers alone, exact activations, fp32, CPU. Scored on the 51 held-out problems of at most 96 tokens: cross-entropy and accuracy over the
answers' tokens, and, if asked for, the number after `####` of greedily decoded answers. A run is one row of
`benchmarks/results/decoder.csv`; those that are there are not run again.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "activations"))

from common import Study, machine, markdown
from held_out_loss import Problem, padded, problems, train
from trained_models import pretrained_smollm2

import slimfit_ds

SETTING = ("contender", "lr", "steps", "batch", "clip", "seed")
SHOWN = {"steps": 60, "batch": 4}
NEW_TOKENS = 100


def _ours(rate: float, **more: Any) -> dict[str, Any]:
    return {"slimfit": {"freeze": {"rate": rate, **more}}}


CONTENDERS: dict[str, dict[str, Any]] = {
    "before": {},
    "full": {},
    "lora8": {"lora": 8},
    "lora64": {"lora": 64},
    "ours-90": _ours(0.9),
    "ours-95": _ours(0.95),
    "ils-90": _ours(0.9, policy="ils"),
}
NAMES = {
    "before": "no fine-tuning (`--steps 0`)",
    "full": "full fine-tuning",
    "lora8": "LoRA rank 8, all linear layers",
    "lora64": "LoRA rank 64, all linear layers",
    "ours-90": "**ours**, 90 % frozen",
    "ours-95": "**ours**, 95 % frozen",
    "ils-90": "the paper's schedule, 90 % frozen",
}


@torch.no_grad()
def score(model: nn.Module, held_out: list[Problem]) -> dict[str, float]:
    """Return mean cross-entropy and accuracy of the next token over all answer tokens."""
    model.eval()
    total = right = count = 0.0
    for start in range(0, len(held_out), 10):
        batch = padded(held_out[start : start + 10])
        wanted = batch.pop("labels")[:, 1:]
        logits = model(**batch).logits[:, :-1]
        told = wanted != -100
        total += float(nn.functional.cross_entropy(logits[told], wanted[told], reduction="sum"))
        right += float((logits.argmax(-1) == wanted)[told].sum())
        count += float(told.sum())
    model.train()
    return {"loss": round(total / count, 5), "token_accuracy": round(right / count, 5)}


def final_number(text: str) -> str:
    """Return what stands after `####`, without commas and spaces; empty if nothing does."""
    return text.partition("####")[2].strip().split("\n")[0].replace(",", "").strip()


@torch.no_grad()
def exact_answers(model: Any, held_out: list[Problem], tokenizer: Any) -> int:
    """Return how many greedily decoded answers end in the right number."""
    model.eval()
    right = 0
    end = tokenizer.eos_token_id
    for start in range(0, len(held_out), 25):
        some = held_out[start : start + 25]
        width = max(asked for _, asked in some)
        ids = torch.tensor([[end] * (width - asked) + tokens[:asked] for tokens, asked in some])
        mask = torch.tensor([[0] * (width - asked) + [1] * asked for _, asked in some])
        made = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            use_cache=True,
            pad_token_id=end,
            eos_token_id=end,
        )
        for (tokens, asked), row in zip(some, made[:, width:], strict=True):
            wanted = final_number(tokenizer.decode(tokens[asked:], skip_special_tokens=True))
            right += final_number(tokenizer.decode(row, skip_special_tokens=True)) == wanted
    return right


def run(
    pretrained: nn.Module,
    training: list[Problem],
    held_out: list[Problem],
    contender: str,
    lr: float,
    steps: int,
    batch: int,
    clip: float,
    seed: int,
) -> tuple[nn.Module, dict[str, Any]]:
    """Fine-tune; return the model, and scores, mean training loss of the last half, CPU seconds of the steps."""
    options = CONTENDERS[contender]
    model = copy.deepcopy(pretrained).train()
    torch.manual_seed(seed)
    if rank := options.get("lora"):
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=lr, weight_decay=0.0, fused=True)
    handle = None
    if block := options.get("slimfit"):
        block = {"freeze": {**block["freeze"], "seed": seed}, "activations": "exact"}
        handle = slimfit_ds.slim(model, block).follow(optimizer)
    losses, seconds = train(model, optimizer, training, steps, batch, seed, clip)
    if handle is not None:
        handle.remove()
    row = {
        **score(model, held_out),
        "train_loss": round(statistics.mean(losses[steps // 2 :]), 5) if losses else None,
        "cpu_seconds": round(seconds),
        "trainable": sum(p.numel() for p in trainable),
        "options": json.dumps(options, separators=(",", ":")),
    }
    return model, row


def tables(csv: str = "decoder") -> dict[str, str]:
    """Return the table by its mark: each contender at its best rate of seed 0, its seeds against full fine-tuning's."""
    rows = Study(csv, SETTING).rows(**SHOWN)
    best: dict[str, list[dict[str, Any]]] = {}
    for contender in CONTENDERS:
        if seed_0 := [row for row in rows if row["contender"] == contender and row["seed"] == 0]:
            lr = min(seed_0, key=lambda row: row["loss"])["lr"]
            best[contender] = [row for row in rows if row["contender"] == contender and row["lr"] == lr]
    full = {row["seed"]: row["loss"] for row in best.get("full", [])}
    lines = []
    for contender, runs in best.items():
        tried = sorted(row["lr"] for row in rows if row["contender"] == contender and row["seed"] == 0)
        against = [row["loss"] - full[row["seed"]] for row in runs if row["seed"] in full]
        error = statistics.stdev(against) / math.sqrt(len(against)) if len(against) > 1 else None
        answers = [row["exact"] for row in runs if row.get("exact") is not None]
        lines.append(
            [
                NAMES[contender],
                f"{runs[0]['lr']:g}",
                ", ".join(f"{lr:g}" for lr in tried if lr != runs[0]["lr"]),
                len(runs),
                f"{statistics.mean(row['loss'] for row in runs):.4f}",
                f"{statistics.mean(against):+.4f}" + (f" ± {error:.4f}" if error is not None else ""),
                f"{statistics.mean(row['token_accuracy'] for row in runs):.1%}",
                f"{statistics.mean(answers):.1f}" if answers else "",
            ]
        )
    head = ["", "best rate", "also tried", "seeds", "held-out loss", "against full", "tokens right"]
    if any(line[-1] for line in lines):
        head.append("exact answers")
    return {"decoder": markdown(head, [line[: len(head)] for line in lines])}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--contenders", nargs="*", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--rates", nargs="*", type=float, default=[1e-4])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=SHOWN["steps"])
    parser.add_argument("--batch", type=int, default=SHOWN["batch"])
    parser.add_argument(
        "--clip", type=float, default=1.0, help="largest norm of the gradients; 0: as they are"
    )
    parser.add_argument("--answers", type=int, default=0, help="decode the answers of so many problems")
    parser.add_argument("--csv", default="decoder", help="name of a study, or a path that ends in .csv")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer, pretrained = pretrained_smollm2()
    training, held_out = problems("train", tokenizer), problems("test", tokenizer)
    study = Study(options.csv, SETTING)
    for seed in options.seeds:
        for contender in options.contenders:
            for lr in options.rates:
                made = {"steps": options.steps, "batch": options.batch, "clip": options.clip}
                setting = {"lr": lr, **made, "seed": seed}
                row = {"contender": contender, **setting}
                if study.has(row):
                    continue
                model, measured = run(pretrained, training, held_out, contender, **setting)
                row |= measured
                if options.answers:
                    row["exact"] = exact_answers(model, held_out[: options.answers], tokenizer)
                print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
                study.add({**row, **machine()})


if __name__ == "__main__":
    main()
