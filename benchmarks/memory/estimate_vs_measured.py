"""The estimator against tracked real steps on this machine's CPU: peak bytes of one rank.

    python benchmarks/memory/estimate_vs_measured.py                      # all models and strategies
    python benchmarks/memory/estimate_vs_measured.py --models bert --strategies full,minimal

The two sides share the tracker and the training code; what differs is that one has tensors with data, real kernels
and a real process group. The tracker itself is checked against torch's allocator in tests/memory/test_tracker.py.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from slimfit_ds.planner.estimator import estimate, measure
from slimfit_ds.planner.strategy import get_strategy, slimfit_block
from slimfit_ds.planner.workload import Workload
from slimfit_ds.report.units import human_bytes

MODELS = {
    "bert": ("BERT-base, 2 x 128", Workload("bert-base-uncased", batch=2, seq=128)),
    "vit": ("ViT-B/16-224, batch 2", Workload("google/vit-base-patch16-224", batch=2)),
    "gpt2": ("GPT-2, 2 x 128", Workload("gpt2", batch=2, seq=128)),
    "llama": (
        "Llama shape, 2 layers, h 1024, 2 x 128",
        Workload(
            {
                "model_type": "llama",
                "architectures": ["LlamaForCausalLM"],
                "num_hidden_layers": 2,
                "hidden_size": 1024,
                "intermediate_size": 2816,
                "num_attention_heads": 16,
                "num_key_value_heads": 4,
                "vocab_size": 32000,
            },
            batch=2,
            seq=128,
        ),
    ),
}
STRATEGIES = [
    get_strategy("zero0"),
    get_strategy("zero2"),
    get_strategy("gradient_checkpointing"),
    get_strategy("lora"),
    *(
        get_strategy(preset).with_(slimfit=slimfit_block(preset, 0.95, "host"))
        for preset in ("exact", "balanced", "lean", "minimal")
    ),
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--strategies", default=",".join(s.name for s in STRATEGIES))
    parser.add_argument("--output", type=Path, help="JSON of all rows")
    arguments = parser.parse_args()
    names = arguments.strategies.split(",")
    strategies = [strategy for strategy in STRATEGIES if strategy.name in names]
    print("| model | strategy | estimated | measured | difference | phase of the peak |")
    print("|---|---|---|---|---|---|")
    rows = []
    for model in arguments.models.split(","):
        label, workload = MODELS[model]
        # The slowest first and both sides one after the other: the machine has two cores.
        for guess, truth in zip(
            estimate(workload, strategies, target="cpu"), measure(workload, strategies), strict=True
        ):
            if guess.report is None or truth.report is None:
                print(f"| {label} | {guess.strategy.name} | {guess.error or truth.error} | | | |", flush=True)
                continue
            difference = guess.peak / truth.peak - 1
            rows.append([label, guess.strategy.name, guess.peak, truth.peak, difference])
            print(
                f"| {label} | {guess.strategy.name} | {human_bytes(guess.peak)} | {human_bytes(truth.peak)} "
                f"| {difference:+.3%} | {truth.report.peak_phase} |",
                flush=True,
            )
    if rows:
        print(f"\nlargest difference: {max(abs(row[-1]) for row in rows):.3%} over {len(rows)} rows")
    if arguments.output:
        arguments.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
