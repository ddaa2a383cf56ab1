"""The picture of the README: memory by method, from `results/headline_memory.csv` and `results/plan_llama3_8b.json`.

python benchmarks/memory_picture.py         # docs/images/memory_by_method.png
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PICTURE = ROOT / "docs" / "images" / "memory_by_method.png"

HEADLINE = [
    ("full fine-tuning", "full, bf16 autocast, fused attention"),
    ("full, gradient checkpointing", "same + gradient checkpointing"),
    ("LoRA, gradient checkpointing", "LoRA rank 8, bf16, gradient checkpointing"),
]
OURS = "95 % of each layer frozen (policy static), minimal"
PLANNED = {
    "QLoRA (NF4)": "QLoRA",
    "LoRA, base streamed": "LoRA rank 8, base streamed",
    "slimfit_ds": "SlimFit minimal, 95% frozen, chunks of 2048 tokens, loss in chunks",
    "slimfit_ds, weights on the host": "SlimFit minimal, 95% frozen, chunks of 2048 tokens, loss in chunks, frozen weights",
}
"""Label -> how the row of the plan begins."""
TITLES = {"bert": "BERT-base, batch 128 x 384", "llama": "Llama-3-8B, batch 1 x 2048"}


def bars(case: str) -> list[tuple[str, float]]:
    """Labels and GiB on the device, of the last row of each method in the files."""
    with (RESULTS / "headline_memory.csv").open() as file:
        peaks = {row["method"]: float(row["peak_gib"]) for row in csv.DictReader(file) if row["case"] == case}
    found = [(label, peaks[method]) for label, method in HEADLINE]
    if case == "bert":
        found.append(("slimfit_ds", peaks[OURS]))
    else:
        rows = json.loads((RESULTS / "plan_llama3_8b.json").read_text())["rows"]
        for label, start in PLANNED.items():
            row = next(row for row in rows if row["label"].startswith(start))
            found.append((label, row["needs"] / 2**30))
    return found


def main() -> int:
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    for axes, case in zip(figure.subplots(1, 2), ("llama", "bert"), strict=True):
        found = bars(case)
        colours = ["#2e7d46" if "slimfit" in label else "#9aa3ad" for label, _ in found]
        positions = range(len(found))[::-1]
        drawn = axes.barh(positions, [gib for _, gib in found], color=colours)
        axes.bar_label(drawn, labels=[f"{gib:.1f}" for _, gib in found], padding=4)
        axes.set_yticks(positions, [label for label, _ in found])
        axes.set_xlim(0, 1.15 * max(gib for _, gib in found))
        axes.set_title(TITLES[case], loc="left")
        axes.set_xlabel("GiB on the GPU, simulated")
        axes.spines[["top", "right"]].set_visible(False)
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=130)
    print(PICTURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
