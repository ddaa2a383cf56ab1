"""The paper's headline cases, estimated: peak GiB of one device, full batch, and how many 32 GB devices that takes.

    python benchmarks/memory/headline.py --cases bert,vit
    python benchmarks/memory/headline.py --cases llama

Simulated on fake tensors (slimfit_ds.planner.estimator, target cuda): kernels' inner workspaces, the CUDA context and
fragmentation are not in the numbers, and nothing here was measured on a GPU.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from slimfit_ds.comparison.result import gpus_needed
from slimfit_ds.planner.estimator import Simulator
from slimfit_ds.planner.strategy import Strategy, get_strategy, slimfit_block
from slimfit_ds.planner.workload import Workload

CASES = {
    "bert": (
        "BERT-base QA, batch 128, seq 384",
        Workload("bert-base-uncased", 128, 384, "question_answering"),
    ),
    "bert_glue": ("BERT-base GLUE, batch 32, seq 128", Workload("bert-base-uncased", 32, 128)),
    "vit": ("ViT-B/16-384, batch 128", Workload("google/vit-base-patch16-384", 128, labels=1000)),
    "llama": ("Llama-3-8B, batch 1, seq 2048", Workload("meta-llama/Meta-Llama-3-8B", 1, 2048)),
    "llama8": ("Llama-3-8B, batch 8, seq 2048", Workload("meta-llama/Meta-Llama-3-8B", 8, 2048)),
}


def ours(preset: str, rate: float = 0.95, **activations) -> Strategy:
    return Strategy(preset, stage=0, slimfit=slimfit_block(preset, rate, "host", **activations))


def columns(preset: str, rate: float = 0.95) -> Strategy:
    block = ours(preset, rate).slimfit or {}
    freeze = {**block["freeze"], "policy": "columns", "always_lr_scale": 3.0}
    return ours(preset, rate).with_(slimfit={**block, "freeze": freeze})


PLAIN = Strategy("plain", stage=None)
ROWS: list[tuple[str, Strategy]] = [
    ("full, fp32, eager attention (the paper's baseline)", PLAIN.with_(dtype="fp32", attention="eager")),
    ("full, bf16 autocast, fused attention", PLAIN.with_(dtype="bf16_autocast")),
    ("same + gradient checkpointing", PLAIN.with_(dtype="bf16_autocast", gradient_checkpointing=True)),
    ("same + accumulation, micro-batch 8", PLAIN.with_(dtype="bf16_autocast", accumulation=16)),
    ("LoRA rank 8, bf16", get_strategy("lora").with_(stage=None, dtype="bf16")),
    (
        "LoRA rank 8, bf16, gradient checkpointing",
        get_strategy("lora").with_(stage=None, dtype="bf16", gradient_checkpointing=True),
    ),
    ("95 % frozen, paper's codecs, bf16", ours("paper")),
    ("95 % frozen, no compression, bf16", ours("exact")),
    ("95 % frozen, balanced", ours("balanced")),
    ("95 % frozen, lean", ours("lean")),
    ("95 % frozen, minimal", ours("minimal")),
    ("95 % frozen, minimal, chunks of 2048 tokens", ours("minimal", chunk_tokens=2048)),
    ("95 % frozen, minimal, not in chunks", ours("minimal", chunk_tokens=None)),
    ("95 % frozen, ultra", ours("ultra")),
    ("95 % of each layer frozen (policy columns), no compression, bf16", columns("exact")),
    ("95 % of each layer frozen (policy columns), minimal", columns("minimal")),
    (
        "LoRA rank 8, bf16, gradient checkpointing, loss in chunks",
        get_strategy("lora").with_(stage=None, dtype="bf16", gradient_checkpointing=True, loss_chunk=1024),
    ),
    ("95 % frozen, balanced, loss in chunks", ours("balanced", chunk_loss_tokens=1024)),
    ("95 % frozen, minimal, loss in chunks", ours("minimal", chunk_loss_tokens=1024)),
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", default="bert,bert_glue,vit")
    parser.add_argument("--active", default="expected", help="expected or worst")
    parser.add_argument("--rows", default="", help="only rows whose label contains one of these (comma)")
    parser.add_argument("--output", type=Path, help="JSON of all rows")
    arguments = parser.parse_args()
    rows = []
    with Simulator() as simulator:
        for case in arguments.cases.split(","):
            label, workload = CASES[case]
            print(f"\n{label} ({arguments.active} active set)\n")
            print(
                "| method | peak GiB | baseline / this | weights | states | saved | 32 GB devices | peak in |"
            )
            print("|---|---|---|---|---|---|---|---|", flush=True)
            baseline = None
            for name, strategy in ROWS:
                if not any(part in name for part in arguments.rows.split(",")) or (
                    "loss in chunks" in name and "llama" not in case
                ):
                    continue
                if strategy.accumulation > 1:
                    strategy = strategy.with_(accumulation=max(1, workload.batch // 8))
                result = simulator.run(workload, strategy, arguments.active)
                if result.report is None:
                    print(f"| {name} | {result.error} | | | | | | |", flush=True)
                    continue
                r, at = result.report, result.report.at_peak
                baseline = baseline or r.peak
                devices = gpus_needed(at, 1, 0, 32 * 10**9)
                states = at.get("optimizer", 0) + at.get("gradients", 0)
                rows.append({"case": case, "method": name, **r.to_dict()})
                print(
                    f"| {name} | {r.peak / 2**30:.2f} | {baseline / r.peak:.1f}x "
                    f"| {at.get('parameters', 0) / 2**30:.2f} | {states / 2**30:.2f} "
                    f"| {r.saved_activations / 2**30:.2f} | {devices or 'does not fit'} "
                    f"| {r.peak_phase} {r.peak_module} |",
                    flush=True,
                )
    if arguments.output:
        arguments.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
