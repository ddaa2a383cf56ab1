"""Held-out loss of SmolLM2-135M after fine-tuning on GSM8K with each preset, against exact activations with the same seed.

    python benchmarks/activations/held_out_loss.py [--frozen 0.9] [--lr 6e-4] [--seeds 0 1] [--presets exact balanced ...]
    python benchmarks/activations/held_out_loss.py --frozen 0.95 --lr 1e-4 --lr-scale auto --presets exact

AdamW, warm-up of 6 % and linear decay, a problem of at most 96 tokens a step, loss on the answers alone, fp32, CPU; the
recommended columns train, or everything (`--frozen 0`). The loss is the mean over the tokens of 32 held-out answers. A run is
one row of `benchmarks/results/held_out_loss.csv`; those that are there are not run again. Two to three CPU minutes a run.
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import DATA, Study, machine, markdown
from trained_models import pretrained_smollm2

import slimfit_ds
from slimfit_ds.activations.apply import compress
from slimfit_ds.activations.config import PRESETS, ActivationsConfig

SETTING = ("model", "frozen", "lr", "lr_scale", "steps", "batch", "seed", "preset")
LONGEST = 96
HELD_OUT = 32
FULL_RATE = 1e-4  # the best rate of full fine-tuning among those of the log

Problem = tuple[list[int], int]  # tokens of question and answer, how many of them are the question's


def problems(split: str, tokenizer: Any) -> list[Problem]:
    """Return the problems of GSM8K of at most `LONGEST` tokens."""
    import pyarrow.parquet as parquet

    found = []
    for row in parquet.read_table(DATA / "gsm8k" / f"{split}.parquet").to_pylist():
        question, answer = (tokenizer(text)["input_ids"] for text in (row["question"] + "\n", row["answer"]))
        tokens = [*question, *answer, tokenizer.eos_token_id]
        if len(tokens) <= LONGEST:
            found.append((tokens, len(question)))
    return found


def padded(some: Sequence[Problem]) -> dict[str, Tensor]:
    """Return a batch [problems, tokens] whose labels are the answers."""
    width = max(len(tokens) for tokens, _ in some)
    ids, mask = (
        torch.zeros(len(some), width, dtype=torch.long),
        torch.zeros(len(some), width, dtype=torch.long),
    )
    labels = torch.full_like(ids, -100)
    for row, (tokens, asked) in enumerate(some):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
        labels[row, asked : len(tokens)] = torch.tensor(tokens[asked:])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, held_out: Sequence[Problem]) -> float:
    """Return the mean cross-entropy over all answer tokens."""
    model.eval()
    total = count = 0.0
    for start in range(0, len(held_out), 8):
        batch = padded(held_out[start : start + 8])
        tokens = int((batch["labels"][:, 1:] != -100).sum())
        total += float(model(**batch).loss) * tokens
        count += tokens
    model.train()
    return total / count


def train(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    training: list[Problem],
    steps: int,
    batch: int,
    seed: int,
    clip: float = 0.0,
) -> tuple[list[float], float]:
    """Train with warm-up of 6 % and linear decay; return the loss of each step, and CPU seconds of all."""
    warm_up = round(0.06 * steps)
    factors = [
        min((step + 1) / (warm_up + 1), 1 - max(0, step - warm_up) / max(1, steps - warm_up))
        for step in range(steps + 1)
    ]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factors.__getitem__)
    order = random.Random(seed).sample(range(len(training)), steps * batch)
    losses, started = [], time.process_time()
    for step in range(steps):
        loss = model(**padded([training[i] for i in order[step * batch : (step + 1) * batch]])).loss
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    return losses, time.process_time() - started


def run(
    pretrained: torch.nn.Module,
    training: list[Problem],
    held_out: list[Problem],
    preset: str,
    frozen: float,
    lr: float,
    lr_scale: float | str,
    steps: int,
    batch: int,
    seed: int,
) -> dict[str, float]:
    """Fine-tune; return the held-out loss, mean training loss of the last half, CPU seconds of the steps."""
    model = copy.deepcopy(pretrained).train()
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=True)
    handle: Any
    if frozen:
        block = {"freeze": {"rate": frozen, "seed": seed, "lr_scale": lr_scale}, "activations": preset}
        handle = slimfit_ds.slim(model, block).follow(optimizer)
    else:
        handle = compress(model, ActivationsConfig(preset=preset))
    losses, seconds = train(model, optimizer, training, steps, batch, seed)
    handle.remove()
    return {
        "loss": round(held_out_loss(model, held_out), 5),
        "train_loss": round(sum(losses[steps // 2 :]) / (steps - steps // 2), 5),
        "cpu_seconds": round(seconds),
    }


def tables(csv: str = "held_out_loss") -> dict[str, str]:
    """Return the tables of the documents by their marks: each preset against exact activations, and full fine-tuning's rate."""
    rows = Study(csv, SETTING).rows()
    presets = [preset for preset in PRESETS if preset not in ("exact", "paper")]
    lines = []
    for key in dict.fromkeys((row["frozen"], row["seed"]) for row in rows if row["lr"] != FULL_RATE):
        of = {
            row["preset"]: row["loss"]
            for row in rows
            if (row["frozen"], row["seed"]) == key and row["lr"] != FULL_RATE
        }
        if "exact" in of:
            frozen, seed = key
            against = [f"{of[p] - of['exact']:+.4f}" if p in of else "" for p in presets]
            lines.append([f"{frozen:.0%}", seed, f"{of['exact']:.4f}", *against])
    at_full_rate = [row for row in rows if row["lr"] == FULL_RATE and row["preset"] == "exact"]
    seeds = sorted({row["seed"] for row in at_full_rate})
    transfer = []
    for frozen, factor in sorted({(row["frozen"], str(row["lr_scale"])) for row in at_full_rate}):
        of = {
            row["seed"]: row["loss"]
            for row in at_full_rate
            if (row["frozen"], str(row["lr_scale"])) == (frozen, factor)
        }
        name = f"{frozen:.0%} frozen, `lr_scale: {factor}`" if frozen else "full fine-tuning"
        transfer.append([name, *(f"{of[seed]:.4f}" if seed in of else "" for seed in seeds)])
    return {
        "held-out-loss": markdown(["frozen", "seed", "exact", *presets], lines),
        "held-out-rate": markdown(["", *(f"seed {seed}" for seed in seeds)], transfer),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--presets", nargs="*", default=[p for p in PRESETS if p != "paper"])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1])
    parser.add_argument("--frozen", type=float, default=0.9)
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument(
        "--lr-scale",
        type=lambda text: text if text == "auto" else float(text),
        default=1.0,
        help="freeze.lr_scale: a factor on the rate of what trains, or auto",
    )
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--csv", default="held_out_loss", help="name of a study, or a path that ends in .csv")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer, pretrained = pretrained_smollm2()
    training, held_out = problems("train", tokenizer), problems("test", tokenizer)[:HELD_OUT]
    print(
        f"{len(training)} problems, held-out loss before: {held_out_loss(pretrained, held_out):.4f}",
        flush=True,
    )
    study = Study(options.csv, SETTING)
    for seed in options.seeds:
        for preset in options.presets:
            setting = {
                "frozen": options.frozen,
                "lr": options.lr,
                "lr_scale": options.lr_scale,
                "steps": options.steps,
                "batch": options.batch,
            }
            row = {"model": "smollm2", **setting, "seed": seed, "preset": preset}
            if study.has(row):
                continue
            row |= run(pretrained, training, held_out, preset, seed=seed, **setting)
            print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            study.add({**row, **machine()})


if __name__ == "__main__":
    main()
