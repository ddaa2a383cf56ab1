"""How the cost of a step grows with model size, batch, sequence and ranks: SlimFit, full fine-tuning, checkpointing.

    python benchmarks/scaling.py --parts memory,ranks,traffic    # simulated: minutes, no GPU
    python benchmarks/scaling.py --parts time,time_ranks         # measured on this CPU
    python benchmarks/scaling.py --parts ""                      # tables and picture from what is there

Memory: a real step on fake CUDA tensors (slimfit_ds.planner.estimator), of one rank or of pretended worlds. Traffic:
collectives counted in pretended worlds. Time: CPU time of real steps, methods in turns; wall time of 1, 2 and 4 gloo
ranks. Everything is kept in `benchmarks/results/scaling/`: `scaling.json` (a second run adds what is missing),
`scaling.md`, `scaling.png`.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

from peers_methods.tables import environment
from scaling_parts import measured, simulated
from scaling_parts.picture import draw, tables

RESULTS = Path(__file__).resolve().parent / "results" / "scaling"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default="memory,ranks,traffic,time,time_ranks")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each method at each point (5)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "scaling.json"

    def there() -> dict[str, Any]:
        return json.loads(path.read_text()) if path.is_file() else {}

    known = there()

    def save() -> None:
        # Parts may run at the same time.
        for key, value in there().items():
            known.setdefault(key, value)
        path.write_text(json.dumps(known, indent=1) + "\n")

    parts = {
        "memory": simulated.memory_sweep,
        "ranks": simulated.rank_sweep,
        "traffic": simulated.traffic,
        "time": partial(measured.time_sweep, rounds=arguments.rounds, threads=arguments.threads),
        "time_ranks": measured.rank_sweep,
    }
    chosen = [part for part in arguments.parts.split(",") if part]
    if unknown := [part for part in chosen if part not in parts]:
        raise SystemExit(f"--parts: {', '.join(unknown)} unknown; known: {', '.join(parts)}")
    for part in chosen:
        parts[part](known, save)
        # What each part was run on: parts may come from several runs.
        known.setdefault("environment", {})[part] = environment("cpu", arguments.threads)
        save()
    text = tables(known)
    (arguments.output / "scaling.md").write_text(text)
    draw(known, arguments.output / "scaling.png")
    print(text)


if __name__ == "__main__":
    main()
