"""The recorded table of estimates against measurements: complete, and within the promised 5 %."""

import re
from pathlib import Path

RESULTS = Path(__file__).parents[2] / "benchmarks" / "memory" / "results" / "estimate_vs_measured.md"
MODELS = ("BERT-base", "ViT-B/16-224", "GPT-2", "Llama shape, 2 layers")
STRATEGIES = {"zero0", "zero2", "gradient_checkpointing", "lora", "exact", "balanced", "lean", "minimal"}


def test_every_model_and_strategy_is_within_5_percent():
    rows = [
        line.split("|")[1:-1] for line in RESULTS.read_text().splitlines() if re.match(r"\| (\w|-)", line)
    ]
    found = {}
    for model, strategy, estimated, measured, difference, _ in (map(str.strip, row) for row in rows[1:]):
        assert estimated.split()[1] in ("MiB", "GiB")
        assert measured.split()[1] in ("MiB", "GiB")
        found.setdefault(model, {})[strategy] = float(difference.rstrip("%"))
    for name in MODELS:
        (model,) = [model for model in found if model.startswith(name)]
        assert set(found[model]) == STRATEGIES
        assert max(map(abs, found[model].values())) <= 5
