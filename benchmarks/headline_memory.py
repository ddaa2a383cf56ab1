"""Peak memory of one device in the paper's cases and Llama-3-8B, and how many 32 GB devices that takes: simulated.

    python benchmarks/headline_memory.py --cases bert,vit,llama,llama8
    python benchmarks/headline_memory.py --cases bert --rows "minimal,no compression" --csv /tmp/rows.csv

Steps on fake tensors (slimfit_ds.planner.simulate, target cuda), one device holds the whole batch: kernels' inner
workspaces, the CUDA context and fragmentation are not in the numbers, and nothing here was measured on a GPU. Adds what
`benchmarks/results/headline_memory.csv` (`--csv`) lacks.
"""

from __future__ import annotations

import argparse

from common import Study, machine, markdown

from slimfit_ds.comparison.result import gpus_needed
from slimfit_ds.planner.simulate import Simulator
from slimfit_ds.planner.strategies import Strategy, get_strategy, slimfit_block
from slimfit_ds.planner.workload import Workload

CASES = {
    "bert": (
        "BERT-base QA, batch 128, seq 384",
        Workload("bert-base-uncased", 128, 384, "question_answering"),
    ),
    "vit": ("ViT-B/16-384, batch 128", Workload("google/vit-base-patch16-384", 128, labels=1000)),
    "llama": ("Llama-3-8B, batch 1, seq 2048", Workload("meta-llama/Meta-Llama-3-8B", 1, 2048)),
    "llama8": ("Llama-3-8B, batch 8, seq 2048", Workload("meta-llama/Meta-Llama-3-8B", 8, 2048)),
    # For tests.
    "tiny": ("BERT-base GLUE, batch 1, seq 16", Workload("bert-base-uncased", 1, 16)),
}
BASELINE = "full, fp32, eager attention (the paper's baseline)"


def ours(preset: str, policy: str = "ils", **activations: object) -> Strategy:
    return Strategy(preset, stage=0, slimfit=slimfit_block(preset, 0.95, "host", policy, **activations))


_PLAIN = Strategy("plain", stage=None, dtype="bf16_autocast")
_LORA = get_strategy("lora").with_(stage=None, dtype="bf16")
_LORA_CHECKPOINTING = _LORA.with_(gradient_checkpointing=True)
ROWS: dict[str, Strategy] = {
    BASELINE: _PLAIN.with_(dtype="fp32", attention="eager"),
    "full, bf16 autocast, fused attention": _PLAIN,
    "same + gradient checkpointing": _PLAIN.with_(gradient_checkpointing=True),
    "same + accumulation, micro-batch 8": _PLAIN.with_(accumulation=16),
    "LoRA rank 8, bf16": _LORA,
    "LoRA rank 8, bf16, gradient checkpointing": _LORA_CHECKPOINTING,
    "LoRA rank 8, bf16, gradient checkpointing, loss in chunks": _LORA_CHECKPOINTING.with_(loss_chunk=1024),
    "95 % frozen, paper's codecs, bf16": ours("paper"),
    "95 % frozen, no compression, bf16": ours("exact"),
    "95 % frozen, balanced": ours("balanced"),
    "95 % frozen, minimal": ours("minimal"),
    "95 % frozen, ultra": ours("ultra"),
    "95 % frozen, balanced, loss in chunks": ours("balanced", chunk_loss_tokens=1024),
    "95 % frozen, minimal, loss in chunks": ours("minimal", chunk_loss_tokens=1024),
    "95 % of each layer frozen (policy static), no compression, bf16": ours("exact", "auto"),
    "95 % of each layer frozen (policy static), minimal": ours("minimal", "auto"),
}


def measure(simulator: Simulator, case: str, name: str, active: str, baseline: float | None) -> dict:
    """Return the results of a row; `error` where the step cannot be simulated."""
    workload, strategy = CASES[case][1], ROWS[name]
    if strategy.accumulation > 1:
        strategy = strategy.with_(accumulation=max(1, workload.batch // 8))
    report = simulator.run(workload, strategy, active)
    if report.report is None:
        return {"error": report.error}
    found, at = report.report, report.report.at_peak
    states = at.get("optimizer", 0) + at.get("gradients", 0)
    return {
        "peak_gib": found.peak / 2**30,
        "baseline_of_this": (baseline or found.peak / 2**30) / (found.peak / 2**30),
        "weights_gib": at.get("parameters", 0) / 2**30,
        "states_gib": states / 2**30,
        "saved_gib": found.saved_activations / 2**30,
        # 0: not even the states fit, however many there are.
        "devices_32gb": gpus_needed(at, 1, 0, 32 * 10**9) or 0,
        "peak_in": f"{found.peak_phase} {found.peak_module}".strip(),
        "target": "cuda, simulated",
    }


def tables(csv: str = "headline_memory") -> dict[str, str]:
    """Return the table of peaks by its mark: methods by cases."""
    rows = {(row["method"], row["case"]): row for row in Study(csv, ()).rows(active="expected")}
    cases = [case for case in CASES if any(known == case for _, known in rows)]
    lines = [
        [name, *(f"{rows[name, case]['peak_gib']:.2f}" if (name, case) in rows else "" for case in cases)]
        for name in ROWS
        if any((name, case) in rows for case in cases)
    ]
    return {"headline-memory": markdown(["peak, GiB", *(CASES[case][0] for case in cases)], lines)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cases", default="bert,vit", help=f"comma-separated, of: {', '.join(CASES)}")
    parser.add_argument("--active", default="expected", help="expected or worst")
    parser.add_argument("--rows", default="", help="only rows whose label contains one of these (comma)")
    parser.add_argument(
        "--csv", default="headline_memory", help="name of a study, or a path that ends in .csv"
    )
    arguments = parser.parse_args()
    study = Study(arguments.csv, ("case", "method", "active"))
    with Simulator() as simulator:
        for case in arguments.cases.split(","):
            for name in ROWS:
                wanted = any(part in name for part in arguments.rows.split(","))
                row = {"case": case, "method": name, "active": arguments.active}
                if not wanted or ("loss in chunks" in name and "llama" not in case) or study.has(row):
                    continue
                known = study.rows(case=case, method=BASELINE, active=arguments.active)
                baseline = known[0]["peak_gib"] if known else None
                row |= measure(simulator, case, name, arguments.active, baseline)
                if "error" in row:
                    print(f"{case}, {name}: {row['error']}", flush=True)
                else:
                    print(f"{case}, {name}: {row['peak_gib']:.2f} GiB", flush=True)
                    study.add(row | machine())
    print(tables(arguments.csv)["headline-memory"])


if __name__ == "__main__":
    main()
