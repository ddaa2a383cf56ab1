"""What models need and which cards they fit, by the planner's simulation; `benchmarks/results/models_and_cards.csv`.

    python benchmarks/models_and_cards.py       # two CPU minutes

One step on fake CUDA tensors, bf16, one GPU, batch 1; of ours the rows are `minimal`, 95 % frozen, loss in chunks of 1024 tokens
(256 where frozen weights and states live on the host).
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

from slimfit_ds.memory.tracker import MemoryReport
from slimfit_ds.planner.rivals import rivals_by_arithmetic
from slimfit_ds.planner.simulate import Simulator
from slimfit_ds.planner.strategies import STRATEGIES, Strategy, zero_states
from slimfit_ds.planner.workload import Workload

RESULTS = Path(__file__).parent / "results" / "models_and_cards.csv"
CASES = [
    ("Qwen/Qwen3-1.7B", 2048),
    ("meta-llama/Meta-Llama-3-8B", 2048),
    ("meta-llama/Meta-Llama-3-8B", 8192),
    ("meta-llama/Meta-Llama-3-8B", 32768),
    ("meta-llama/Meta-Llama-3-70B", 2048),
]
LORA = STRATEGIES["lora"].with_(gradient_checkpointing=True, loss_chunk=1024)
RESIDENT: dict[str, Any] = {
    "freeze": {"rate": 0.95},
    "activations": {"preset": "minimal", "chunk_tokens": 2048, "chunk_loss_tokens": 1024},
    "optimizer_states": {"inactive": "host"},
}
STREAMED = {
    **RESIDENT,
    "activations": {**RESIDENT["activations"], "chunk_loss_tokens": 256},
    "optimizer_states": {"active": "host"},
    "frozen_weights": {"live": "host"},
}


def rows(simulator: Simulator, model: str, seq: int) -> list[tuple[str, int, int, str]]:
    """Method, bytes on the device, bytes on the host, how it is known."""
    workload = Workload(model, batch=1, seq=seq)
    facts = simulator.inspect(workload)
    full = zero_states(facts["parameters"], 0, 1)
    found = [("full fine-tuning, states alone", int(full.device), 0, "arithmetic")]

    def simulated(name: str, strategy: Strategy) -> MemoryReport:
        report = simulator.run(workload, strategy, "worst").report
        assert report is not None, name
        found.append((name, report.peak, report.optimizer_host + report.parameters_host, "simulated"))
        return report

    lora = simulated("LoRA rank 8, checkpointing, loss in chunks", LORA)
    qlora = next(rival for rival in rivals_by_arithmetic(facts, lora, "bf16") if "QLoRA" in rival.label)
    found.append(("QLoRA (NF4), the same", qlora.needs, 0, "simulated, weights by arithmetic"))
    simulated("ours", Strategy("resident", 0, slimfit=RESIDENT))
    simulated("ours, frozen weights and states on the host", Strategy("streamed", 0, slimfit=STREAMED))
    return found


def main() -> int:
    with Simulator(deep=True) as simulator, RESULTS.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["model", "seq", "method", "peak_gib", "host_gib", "how"])
        for model, seq in CASES:
            for method, peak, host, how in rows(simulator, model, seq):
                writer.writerow([model, seq, method, f"{peak / 2**30:.2f}", f"{host / 2**30:.2f}", how])
                print(f"{model} {seq} {method}: {peak / 2**30:.2f} GiB", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
