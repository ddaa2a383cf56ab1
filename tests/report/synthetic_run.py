"""Folders as training runs leave them, of any size, with known numbers."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path


def layer_names(count: int) -> list[str]:
    """Names in the order of a model: an embedding, blocks of four weights, a head."""
    kinds = ("attention.query", "attention.output", "mlp.up", "mlp.down")
    blocks = [f"model.layers.{i // 4}.{kinds[i % 4]}.weight" for i in range(count - 2)]
    return ["model.embeddings.weight", *blocks, "classifier.weight"]


def write_run(
    folder: Path,
    steps: int = 200,
    layers: int = 18,
    seed: int = 0,
    finished: bool = True,
    freezes: bool = True,
    facts: bool = True,
    pace: float = 1.0,
    active: int | None = None,
) -> list[dict]:
    """Write `history.jsonl` and the files beside it.

    Args:
        folder: made here.
        steps, layers: size of the run.
        seed: of the noise.
        finished: write `metrics.json`.
        freezes: a tenth of the layers train at each step; else all of them.
        facts: write `run.json`.
        pace: factor of all times and of the memory.
        active: layers that train at a step; None: a tenth.

    Returns:
        the lines of the history.
    """
    rng = random.Random(seed)
    folder.mkdir(parents=True)
    names = layer_names(layers)
    sizes = {name: 64 * (1 + i % 5) for i, name in enumerate(names)}
    total = sum(sizes.values()) + 100
    lines = []
    for step in range(steps):
        picked = sorted(rng.sample(range(layers), active or max(1, layers // 10)))
        chosen = [names[i] for i in picked] if freezes else None
        share = 1 - (100 + sum(sizes[n] for n in chosen)) / total if chosen else 0.0
        times = {"data": 0.001, "forward": 0.02, "backward": 0.03, "step": 0.004, "schedule": 0.0005}
        line = {
            "step": step,
            "epoch": step / 50,
            "loss": 2.2 * math.exp(-step / (steps / 2)) + 0.1 + rng.gauss(0, 0.08),
            "lr": 1e-3 * (1 - step / steps),
            "gradient_norm": 1 + rng.random(),
            "active_layers": chosen,
            "statistics": {n: 10 ** rng.uniform(-5, -2) for n in chosen} if chosen else None,
            "frozen_parameters": share,
            "memory_bytes": int(pace * (2**29 + 2**20 * step)),
            "seconds": pace * 0.06 * rng.uniform(0.9, 1.2),
            "times": {name: pace * value * rng.uniform(0.9, 1.1) for name, value in times.items()},
            "tokens": 2048,
        }
        if (step + 1) % max(1, steps // 8) == 0:
            line["evaluation"] = {
                "accuracy": 0.9 - 0.6 * math.exp(-step / (steps / 3)) + rng.gauss(0, 0.01),
                "loss": 0.5 + 1 / (1 + step),
            }
        if step % 10 == 9:
            line["memory"] = {"parameters": 2**28, "optimizer": int(pace * 2**26), "gradients": 0}
        lines.append(line)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "history.jsonl").write_text(text, encoding="utf-8")
    (folder / "recipe.yaml").write_text("task:\n  name: image_classification\nlr: 0.001\n", encoding="utf-8")
    if facts:
        content = {"layers": sizes, "steps": steps, "seed": seed, "world_size": 2, "status": "running"}
        (folder / "run.json").write_text(json.dumps(content), encoding="utf-8")
    if finished:
        (folder / "metrics.json").write_text(
            json.dumps(
                {
                    "metrics": lines[-1].get("evaluation", {}),
                    "best": {"metric": "accuracy", "value": 0.9, "step": steps},
                    "steps": steps,
                    "peak_bytes": int(pace * 2**30),
                    "peak_bytes_are": "allocated on the GPU",
                    "memory": {
                        "parameters": 2**28,
                        "optimizer": int(pace * 2**26),
                        "optimizer_host": 2**29 if freezes else 0,
                        "gradients": 2**20,
                    },
                    "versions": {"torch": "2.13.0"},
                    "hardware": {"cpu": "a CPU", "memory_bytes": 2**34},
                }
            ),
            encoding="utf-8",
        )
    return lines
