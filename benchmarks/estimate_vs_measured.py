"""The memory estimator against tracked real steps on this machine's CPU: peak bytes of one rank.

    python benchmarks/estimate_vs_measured.py                      # all models and strategies
    python benchmarks/estimate_vs_measured.py --models bert --strategies zero0,minimal

The two sides share the tracker and the training code; what differs is that one has tensors with data, real kernels
and a real process group. The tracker itself is checked against torch's allocator in tests/memory. Adds what
`benchmarks/results/estimate_vs_measured.csv` (`--csv`) lacks.
"""

from __future__ import annotations

import argparse

from common import Study, machine, markdown

from slimfit_ds.planner.simulate import estimate, measure
from slimfit_ds.planner.strategies import get_strategy, slimfit_block
from slimfit_ds.planner.workload import Workload
from slimfit_ds.report.units import human_bytes

_LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}
_TINY = {"model_type": "bert", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
MODELS = {
    "bert": ("BERT-base, 2 x 128", Workload("bert-base-uncased", batch=2, seq=128)),
    "vit": ("ViT-B/16-224, batch 2", Workload("google/vit-base-patch16-224", batch=2)),
    "gpt2": ("GPT-2, 2 x 128", Workload("gpt2", batch=2, seq=128)),
    "llama": ("Llama shape, 2 layers, h 1024, 2 x 128", Workload(_LLAMA, batch=2, seq=128)),
    # For tests.
    "tiny": ("BERT 2 x h64, 2 x 16", Workload(_TINY | {"intermediate_size": 128}, batch=2, seq=16)),
}
STRATEGIES = {name: get_strategy(name) for name in ("zero0", "zero2", "gradient_checkpointing", "lora")} | {
    preset: get_strategy(preset).with_(slimfit=slimfit_block(preset, 0.95, "host", "ils"))
    for preset in ("exact", "balanced", "minimal")
}


def tables(csv: str = "estimate_vs_measured") -> dict[str, str]:
    """Return the table of the documents by its mark."""
    rows = Study(csv, ()).rows()
    keys = ("model", "strategy", "estimated", "measured", "difference_percent", "phase")
    lines = [[f"{row[k]:+.3f}%" if k == "difference_percent" else row[k] for k in keys] for row in rows]
    titles = ["model", "strategy", "estimated", "measured", "difference", "phase of the peak"]
    largest = max((abs(row["difference_percent"]) for row in rows), default=0.0)
    said = f"largest difference: {largest:.3f}% over {len(rows)} rows"
    return {"estimate-vs-measured": f"{markdown(titles, lines, left=6)}\n\n{said}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", default="bert,vit,gpt2,llama", help=f"of: {', '.join(MODELS)}")
    parser.add_argument("--strategies", default=",".join(STRATEGIES))
    parser.add_argument(
        "--csv", default="estimate_vs_measured", help="name of a study, or a path that ends in .csv"
    )
    arguments = parser.parse_args()
    study = Study(arguments.csv, ("model", "strategy"))
    for model in arguments.models.split(","):
        label, workload = MODELS[model]
        names = [
            name
            for name in arguments.strategies.split(",")
            if not study.has({"model": label, "strategy": name})
        ]
        chosen = [STRATEGIES[name] for name in names]
        # One side after the other: the machine has two cores.
        pairs = zip(names, estimate(workload, chosen, target="cpu"), measure(workload, chosen), strict=True)
        for name, guess, truth in pairs:
            if guess.report is None or truth.report is None:
                print(f"{label}, {name}: {guess.error or truth.error}", flush=True)
                continue
            row = {
                "model": label,
                "strategy": name,
                "estimated": human_bytes(guess.peak),
                "measured": human_bytes(truth.peak),
                "difference_percent": 100 * (guess.peak / truth.peak - 1),
                "phase": truth.report.peak_phase,
                "dtype": "bf16",
            }
            study.add(row | machine())
    print(tables(arguments.csv)["estimate-vs-measured"])


if __name__ == "__main__":
    main()
