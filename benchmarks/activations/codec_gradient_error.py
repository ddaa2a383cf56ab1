"""What each codec and preset does to the gradients of the active layers of a trained model.

    python benchmarks/activations/codec_gradient_error.py recipes/minilm_sst2.yaml data_dir=../shared/data/sst2
    python benchmarks/activations/codec_gradient_error.py recipes/digits_vit.yaml

The model of the recipe is trained in full for `--steps` steps first: random weights flatter codecs. Then, for several
batches, each with a random active set of 5 % of the layers, the gradient of the active weights is compared with the
exact one of the same batch, dropout included:

    relative error = |g - g_exact| / |g_exact|   over all active weights together; its mean over the batches.

For unbiased codecs the error of the mean of several draws is shown too: it falls as one over the root of their number.
Adds a section to `codec_gradient_error.json` and rewrites `.md`.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimfit_ds.activations.apply import compress
from slimfit_ds.activations.config import PRESETS, ActivationsConfig
from slimfit_ds.freezing.layers import discover
from slimfit_ds.freezing.schedule import active_count
from slimfit_ds.training.batches import BatchPlan, training_loader
from slimfit_ds.training.checks import inspect
from slimfit_ds.training.distributed import read_ranks
from slimfit_ds.training.models import build_model
from slimfit_ds.training.recipe import read_recipe
from slimfit_ds.training.surroundings import hardware, versions

Batch = dict[str, Tensor]
Gradients = dict[str, Tensor]

# One operation compressed, the others exact.
SINGLE = {
    "norm": ("topk10", "lm1", "lm2", "lm4", "int4", "int8"),
    "activation": ("fixed4", "step1", "step2", "step4", "int8"),
    "attention": ("fixed8", "int4", "int8"),
    "linear": ("fixed8", "int4", "int8"),
    "block": ("int4", "int8"),
}
UNBIASED = {"linear": ({"name": "int2", "rounding": "nearest"}, {"name": "int2", "rounding": "stochastic"})}


def trained_model(
    recipe_path: str, overrides: list[str], steps: int, batches: int
) -> tuple[nn.Module, list[Batch]]:
    """The recipe's model after `steps` steps of full fine-tuning, and `batches` batches it has not seen."""
    draft = read_recipe(recipe_path, overrides)
    found = inspect(draft, read_ranks())
    recipe = found.recipe
    torch.manual_seed(recipe.seed)
    model = build_model(recipe, found.source, found.model_config, found.task)
    prepared = found.task.prepare(found.splits.train, training=True)
    size = recipe.train_batch_size
    plan = BatchPlan(len(prepared), size, size, seed=recipe.seed)
    loader = iter(
        training_loader(
            prepared, found.task, plan, start=0, stop=steps + batches, seed=recipe.seed, workers=0
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    model.train()
    for step, batch in enumerate(islice(loader, steps)):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * min(1.0, (step + 1) / (0.1 * steps)) * (1 - step / steps)
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss.item():.4f}", file=sys.stderr)
    return model, list(loader)


def gradients(model: nn.Module, batch: Batch, seed: int) -> tuple[Gradients, float]:
    """Gradients of the weights that require one, and the loss; dropout is drawn from `seed`."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    loss = model(**batch).loss
    loss.backward()
    found = {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}
    return found, loss.item()


def relative_error(approximate: Gradients, exact: Gradients, names: frozenset[str]) -> float:
    """|g - g_exact| / |g_exact| over the named weights."""
    difference = sum((approximate[n] - exact[n]).double().square().sum() for n in names)
    norm = sum(exact[n].double().square().sum() for n in names)
    return float(difference / norm) ** 0.5


class Measurement:
    """Batches with their active sets and exact gradients."""

    def __init__(self, model: nn.Module, batches: list[Batch], rate: float, seed: int):
        self.model = model
        roles = discover(model)
        self.layers = roles.names
        chance = random.Random(seed)
        count = active_count(len(roles.names), rate)
        self.cases = []
        for number, batch in enumerate(batches):
            active = frozenset(chance.sample(roles.names, count))
            self._activate(active)
            self.cases.append((number, batch, active, *gradients(model, batch, number)))

    def _activate(self, active: frozenset[str]) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name not in self.layers or name in active)

    def errors(self, draws: int = 1, **config: Any) -> dict[str, float]:
        """Mean and largest relative error over the batches; with `draws`, also of the mean gradient of that many."""
        single, averaged, shift = [], [], []
        for number, batch, active, exact, exact_loss in self.cases:
            self._activate(active)
            handle = compress(self.model, ActivationsConfig(**config))
            try:
                total: Gradients = {}
                for draw in range(draws):
                    found, loss = gradients(self.model, batch, number)
                    if draw == 0:
                        single.append(relative_error(found, exact, active))
                    for name in active:
                        total[name] = total.get(name, torch.zeros(())) + found[name] / draws
                averaged.append(relative_error(total, exact, active))
                shift.append(abs(loss - exact_loss))
            finally:
                handle.remove()
        result = {"mean": sum(single) / len(single), "max": max(single), "loss_shift": max(shift)}
        if draws > 1:
            result["of_mean"] = sum(averaged) / len(averaged)
        return result


def noise_floor(measurement: Measurement) -> float:
    """Relative distance between the exact gradients of two batches for the same active set."""
    (number, _, active, exact, _), (_, other, *_) = measurement.cases[:2]
    measurement._activate(active)
    found, _ = gradients(measurement.model, other, number)
    return relative_error(found, exact, active)


def measure(measurement: Measurement, draws: int) -> list[dict[str, Any]]:
    """One row for each preset, each single codec, and each unbiased codec."""
    rows: list[dict[str, Any]] = []

    def add(what: str, codec: str, **arguments: Any) -> None:
        try:
            row = {"what": what, "codec": codec, **measurement.errors(**arguments)}
        except Exception as error:  # one broken preset must not hide the others
            row = {"what": what, "codec": codec, "failed": f"{type(error).__name__}: {error}"[:300]}
        print(row, file=sys.stderr)
        rows.append(row)

    for preset in PRESETS:
        add("preset", preset, preset=preset)
    for operation, names in SINGLE.items():
        for name in names:
            add(operation, name, operations={operation: name})
    for operation, specs in UNBIASED.items():
        for spec in specs:
            add(operation, f"{spec['name']} {spec['rounding']}", operations={operation: spec}, draws=draws)
    return rows


def markdown(sections: dict[str, dict[str, Any]]) -> str:
    """All sections as tables."""
    lines = []
    for title, section in sections.items():
        lines += [
            f"## {title}",
            "",
            f"{section['steps']} steps of full fine-tuning (last loss {section['loss']:.3f}), then {section['batches']} "
            f"batches of {section['batch_size']}, {section['active']} of {section['layers']} layers active, fp32, seed "
            f"{section['seed']}, {section['hardware']['cpu']}. Distance between the exact gradients of two batches: "
            f"{section['noise_floor']:.2f}. `{section['command']}`",
            "",
            "| what | codec | relative error, mean | largest | of the mean of draws | loss shift |",
            "|---|---|---:|---:|---:|---:|",
        ]
        for r in section["rows"]:
            if "failed" in r:
                lines.append(f"| {r['what']} | {r['codec']} | failed: {r['failed']} | | | |")
                continue
            of_mean = f"{r['of_mean']:.4f} ({section['draws']})" if "of_mean" in r else ""
            lines.append(
                f"| {r['what']} | {r['codec']} | {r['mean']:.4f} | {r['max']:.4f} | {of_mean} | {r['loss_shift']:.1e} |"
            )
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", help="key=value over the recipe")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batches", type=int, default=6)
    parser.add_argument("--rate", type=float, default=0.95, help="share of frozen layers")
    parser.add_argument("--draws", type=int, default=16, help="draws of unbiased codecs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    model, batches = trained_model(args.recipe, args.overrides, args.steps, args.batches)
    measurement = Measurement(model, batches, args.rate, args.seed)
    section = {
        "command": shlex.join(["python", *sys.argv]),
        "steps": args.steps,
        "batches": len(batches),
        "batch_size": len(next(iter(batches[0].values()))),
        "layers": len(measurement.layers),
        "active": len(measurement.cases[0][2]),
        "draws": args.draws,
        "seed": args.seed,
        "loss": measurement.cases[0][4],
        "noise_floor": noise_floor(measurement),
        "hardware": hardware(torch.device("cpu")),
        "versions": versions(),
        "rows": measure(measurement, args.draws),
    }
    args.output.mkdir(parents=True, exist_ok=True)
    target = args.output / "codec_gradient_error.json"
    sections = json.loads(target.read_text()) if target.exists() else {}
    sections[Path(args.recipe).stem] = section
    target.write_text(json.dumps(sections, indent=1) + "\n")
    target.with_suffix(".md").write_text(markdown(sections))
    print(markdown({Path(args.recipe).stem: section}))


if __name__ == "__main__":
    main()
