"""What freezing does to accuracy: fine-tuning runs at equal steps, each contender at the learning rate of its own search.

    python benchmarks/fidelity/study.py --stage pretrain                              # the ViT of cifar, once
    python benchmarks/fidelity/study.py --stage tune --problems cifar                 # the learning rates
    python benchmarks/fidelity/study.py --stage refine --problems cifar --names full ours-95
    python benchmarks/fidelity/study.py --stage compare --problems cifar --seeds 0 1 2
    python benchmarks/fidelity/study.py --stage transfer --problems sst2 --rates 1e-4 # full's best rate, and beside it
    python benchmarks/fidelity/summary.py                                             # the tables

`tune` looks for the best learning rate of every contender on seed 0: the two rates in the middle of the ladder, then
outwards for as long as the outermost rate that was tried is the best one, the same way for everybody. `refine` runs that
rate, the second best and the one halfway between them on seeds 0 to 2, of which the best mean counts from then on: one
seed of a short run tells rates apart that are far from each other, not these. `compare` runs each contender at its own
best rate on more seeds. Adds the runs that `benchmarks/results/fidelity.csv` (`--csv`) lacks; workers on different
problems may share it. Single-threaded; run it under `nice`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import Study, machine
from problems import PROBLEMS, pretrain_vit

KEYS = ("study", "problem", "contender", "lr", "seed", "steps")
LADDER = (2.5e-5, 5e-5, 1e-4, 2.5e-4, 6e-4, 1.5e-3, 4e-3, 1e-2)
# Halfway from one rate of the ladder to the next.
BETWEEN = (3.5e-5, 7e-5, 1.5e-4, 4e-4, 1e-3, 2.5e-3, 6e-3)
# Where the search begins: what full fine-tuning and a tenth of the layers liked best on the first problems.
START = (2.5e-4, 6e-4)
TUNING_SEED = 0
REFINING_SEEDS = (0, 1, 2)
EVALUATION_BATCH = 128
BATCHES_SORTED = 8
WARMUP_SHARE = 0.06
WEIGHT_DECAY = 0.01


def _frozen(policy: str, rate: float, states: dict | None = None, **freeze: Any) -> dict[str, Any]:
    # The rate of each contender is searched for, so none is multiplied by a factor.
    block = {"policy": policy, "rate": rate, "lr_scale": 1.0, **freeze}
    return {"freeze": block, "optimizer_states": states or {}}


def _contenders() -> dict[str, dict[str, Any]]:
    made: dict[str, dict[str, Any]] = {"full": {}}
    made |= {f"lora{rank}": {"lora": {"r": rank}} for rank in (4, 8, 16)}
    # All linear layers of one block of six: a sixth of the inputs, where ours keeps a tenth.
    last = r".*\.layers?\.5\..*(proj|fc1|fc2|query|key|value|dense)"
    made["lora8-sixth"] = {"lora": {"r": 8, "target_modules": last}}
    for percent in (90, 95):
        rate = percent / 100
        made |= {
            f"ils-{percent}": {"slimfit": _frozen("ils", rate)},
            f"ours-{percent}": {"slimfit": _frozen("auto", rate)},
            # What it gains by the word embedding.
            f"ours-nowords-{percent}": {"slimfit": _frozen("auto", rate, never_active=["*word_embeddings*"])},
            f"random-{percent}": {"slimfit": _frozen("random", rate)},
            f"lisa-{percent}": {"slimfit": _frozen("lisa", rate, interval=20)},
            f"badam-{percent}": {"slimfit": _frozen("badam", rate, {"stale_moments": "reset"}, interval=20)},
        }
    for front in ("half", "statistics"):
        made[f"ours-90-{front}"] = {"slimfit": _frozen("auto", 0.9, front=front)}
    for preset in ("balanced", "minimal"):
        made[f"ours-90-{preset}"] = {"slimfit": {**_frozen("auto", 0.9), "activations": preset}}
    return made


CONTENDERS = _contenders()
"""Name -> `slimfit` block, or options of PEFT's adapters."""
TRANSFERRED = {
    f"auto-{percent}": {"slimfit": {"freeze": {"rate": percent / 100}}} for percent in (80, 90, 95, 98)
}
"""The same, of the defaults: a factor of the rate by what is frozen."""


def train(problem: Any, lr: float, seed: int, steps: int, slimfit=None, lora=None) -> dict[str, Any]:
    """Fine-tune and score; the same arguments give the same numbers.

    Args:
        problem: of `PROBLEMS`.
        lr: highest learning rate.
        seed: of the data order, the new head, dropout and the schedule.
        steps: optimizer steps.
        slimfit: the `slimfit` block; None: everything trains.
        lora: options of PEFT's adapters.

    Returns:
        Columns of a row. `cpu_seconds`: CPU seconds of this process in training steps.
    """
    import slimfit_ds

    torch.manual_seed(seed)
    model = problem.model().train()
    pretrained = fingerprint(model)
    if lora is not None:
        from peft import LoraConfig, get_peft_model

        heads = [name for name, _ in model.named_children() if name == "classifier"]
        options = {"lora_alpha": 2 * lora["r"], "target_modules": "all-linear", **lora}
        model = get_peft_model(model, LoraConfig(modules_to_save=heads, **options))
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in trainable if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, fused=True)
    warm_up = round(WARMUP_SHARE * steps)
    # Never zero: a step without a rate would tell the schedule of layers that they do not change.
    factors = [(step + 1) / (warm_up + 1) for step in range(warm_up)]
    factors += [1 - (step - warm_up) / max(1, steps - warm_up) for step in range(warm_up, steps + 1)]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factors.__getitem__)
    handle = None
    if slimfit is not None:
        block = {**slimfit, "freeze": {"seed": seed, **slimfit["freeze"]}}
        handle = slimfit_ds.slim(model, block).follow(optimizer)
    order = batches_of_like_length(problem.lengths(), problem.batch_size, steps, seed)
    losses, seconds = [], 0.0
    for step in range(steps):
        start = time.process_time()
        batch = problem.batch(order[step], np.random.default_rng([seed, step]))
        torch.manual_seed(int(np.random.SeedSequence([seed, step]).generate_state(1)[0]))
        with torch.autocast("cpu", torch.bfloat16, enabled=problem.autocast):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        losses.append(loss.item())
        seconds += time.process_time() - start
    if handle is not None:
        handle.remove()
    metrics = score(model, problem)
    return {
        "batch": problem.batch_size,
        "metric": problem.metric,
        "value": metrics[problem.metric],
        **metrics,
        "train_loss": float(np.mean(losses[-50:])),
        "cpu_seconds": seconds,
        "trainable": sum(p.numel() for p in trainable),
        "weight_decay": WEIGHT_DECAY,
        "pretrained": pretrained,
        "slimfit": slimfit and json.dumps(slimfit, separators=(",", ":")),
        "lora": lora and json.dumps(lora, separators=(",", ":")),
    }


def fingerprint(model: nn.Module) -> str:
    """Return twelve hexadecimal digits that tell pretrained weights apart: of the model without its new head."""
    digest = hashlib.sha256()
    for name, weight in getattr(model, "base_model", model).named_parameters():
        if "pooler" not in name:
            digest.update(weight.detach().numpy().tobytes())
    return digest.hexdigest()[:12]


@torch.no_grad()
def score(model: nn.Module, problem: Any) -> dict[str, float]:
    """Return accuracy, F1, Matthews correlation and cross-entropy over the held-out examples."""
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    model.eval()
    outputs, labels = [], []
    for batch in problem.evaluation(EVALUATION_BATCH):
        with torch.autocast("cpu", torch.bfloat16, enabled=problem.autocast):
            outputs.append(model(**batch).logits.double())
        labels.append(batch["labels"])
    logits, wanted = torch.cat(outputs), torch.cat(labels)
    predicted = logits.argmax(-1)
    average = "binary" if logits.shape[-1] == 2 else "macro"
    return {
        "accuracy": float(accuracy_score(wanted, predicted)),
        "f1": float(f1_score(wanted, predicted, average=average, zero_division=0.0)),
        "matthews_correlation": float(matthews_corrcoef(wanted, predicted)),
        "loss": float(nn.functional.cross_entropy(logits, wanted)),
    }


def batches_of_like_length(lengths: np.ndarray, batch: int, steps: int, seed: int) -> list[np.ndarray]:
    """Return the examples of each step: a random order, in which each stretch of 8 batches is sorted by length.

    Saves two fifths of the padding; the batches of a stretch come in random order.
    """
    chance = np.random.default_rng([seed, 0xBA7C])
    found: list[np.ndarray] = []
    while len(found) < steps:
        order = chance.permutation(len(lengths))
        for start in range(0, len(order) - batch + 1, batch * BATCHES_SORTED):
            stretch = order[start : start + batch * BATCHES_SORTED]
            stretch = stretch[np.argsort(lengths[stretch], kind="stable")]
            cut = [stretch[at : at + batch] for at in range(0, len(stretch) - batch + 1, batch)]
            found += [cut[i] for i in chance.permutation(len(cut))]
    return found[:steps]


def merit(row: Mapping[str, Any]) -> tuple[float, float, float]:
    """What a learning rate is chosen by: the metric; of equals, the lower held-out loss; of equals, the lower rate."""
    return row["value"], -row["loss"], -row["lr"]


def merits(rows: Sequence[Mapping[str, Any]]) -> dict[float, dict[int, tuple[float, ...]]]:
    """Return rate -> seed -> merit of the rows of one contender on one problem."""
    rates: dict[float, dict[int, tuple[float, ...]]] = {}
    for row in rows:
        rates.setdefault(row["lr"], {})[row["seed"]] = merit(row)
    return rates


def best_rate(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the rate with the best metric on the tuning seed; where all of `contested` have been run on the refining
    seeds, the best mean of these."""
    rates = merits(rows)
    close = contested({lr: of[TUNING_SEED] for lr, of in rates.items() if TUNING_SEED in of})
    if close and all(seed in rates.get(lr, ()) for lr in close for seed in REFINING_SEEDS):
        means = {lr: np.mean([rates[lr][seed] for seed in REFINING_SEEDS], axis=0).tolist() for lr in close}
        return max(close, key=means.__getitem__)
    return close[0] if close else None


def contested(tried: Mapping[float, tuple[float, ...]]) -> list[float]:
    """Return the best rate of the ladder, the second best, and those of `BETWEEN` that lie between them.

    Args:
        tried: rate -> merit on the tuning seed.
    """
    best = sorted((lr for lr in tried if lr not in BETWEEN), key=tried.__getitem__, reverse=True)[:2]
    return best + [lr for lr in BETWEEN if best and min(best) < lr < max(best)]


def next_rate(tried: Mapping[float, tuple[float, ...]]) -> float | None:
    """Return the rate to try next, or None when the best one lies between two worse ones or at the end of the ladder.

    Where all have the same metric, none has learned anything: then rates on both sides are tried.

    Args:
        tried: rate of the ladder -> merit on the tuning seed.
    """
    for lr in START:
        if lr not in tried:
            return lr
    at = LADDER.index(max(tried, key=tried.__getitem__))
    places = [at - 1, at + 1]
    if len({tried[lr][0] for lr in tried}) == 1:
        places += [LADDER.index(min(tried)) - 1, LADDER.index(max(tried)) + 1]
    return next((LADDER[i] for i in places if 0 <= i < len(LADDER) and LADDER[i] not in tried), None)


def plan(
    stage: str, names: Sequence[str], seeds: Sequence[int], rows: Any
) -> Iterator[tuple[str, float, int]]:
    """Yield contender, rate and seed of the runs of a stage.

    Args:
        rows: contender -> its rows so far.
    """

    def on_ladder(name: str) -> dict[float, tuple[float, ...]]:
        found = merits(rows(name)).items()
        return {lr: of[TUNING_SEED] for lr, of in found if TUNING_SEED in of and lr in LADDER}

    if stage == "tune":
        for name in names:
            while (lr := next_rate(on_ladder(name))) is not None:
                yield name, lr, TUNING_SEED
        return
    for seed in REFINING_SEEDS if stage == "refine" else seeds:
        for name in names:
            rates = contested(on_ladder(name)) if stage == "refine" else [best_rate(rows(name))]
            yield from ((name, lr, seed) for lr in rates if lr is not None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--stage", choices=("pretrain", "tune", "refine", "compare", "transfer"), required=True
    )
    parser.add_argument("--problems", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS))
    parser.add_argument(
        "--names", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS), metavar="NAME"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of `compare`")
    parser.add_argument("--rates", nargs="+", type=float, help="of `transfer`")
    parser.add_argument("--steps", type=int, help="instead of each problem's own number")
    parser.add_argument("--lr", type=float, help="run this rate on `--seeds`, whatever the search has found")
    parser.add_argument(
        "--fp32", action="store_true", help="no autocast: many times faster without AVX-512; a CSV of its own"
    )
    parser.add_argument("--csv", default="fidelity", help="name of a study, or a path that ends in .csv")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    if options.stage == "pretrain":
        return pretrain_vit(options.steps or 6000)
    if options.fp32 and options.csv == "fidelity":
        raise SystemExit("--fp32: name a --csv of its own, rows of both kinds are not to be compared")
    study = Study(options.csv, KEYS)
    for problem in options.problems:
        steps = options.steps or PROBLEMS[problem].steps
        study_name = "transfer" if options.stage == "transfer" else "main"
        place = {"study": study_name, "problem": problem, "steps": steps}

        def rows(name: str, place: Mapping[str, Any] = place) -> list[dict[str, Any]]:
            return study.rows(**place, contender=name)

        runs: Iterable[tuple[str, float, int]]
        if options.stage == "transfer":
            runs = [(name, lr, TUNING_SEED) for name in TRANSFERRED for lr in options.rates]
        elif options.lr is not None:
            runs = [(name, options.lr, seed) for seed in options.seeds for name in options.names]
        else:
            runs = plan(options.stage, options.names, options.seeds, rows)
        task = replace(PROBLEMS[problem], autocast=False) if options.fp32 else PROBLEMS[problem]
        for name, lr, seed in runs:
            row = {**place, "contender": name, "lr": lr, "seed": seed}
            if study.has(row):
                continue
            row |= train(task, lr, seed, steps, **(CONTENDERS | TRANSFERRED)[name])
            study.add(row | machine())
            said = f"{100 * row['value']:6.2f}  loss {row['loss']:.4f}  {row['cpu_seconds']:.0f} s"
            print(f"{problem} {name} {lr:g} seed {seed}: {said}", flush=True)


if __name__ == "__main__":
    main()
