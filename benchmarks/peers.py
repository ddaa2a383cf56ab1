"""Every way to train the same model with less memory, side by side: memory, time, throughput, largest batch.

    python benchmarks/peers.py --device cuda --budget-minutes 9     # on a GPU: published shapes
    python benchmarks/peers.py --device cpu --threads 1             # small shapes of the same families
    python benchmarks/peers.py --device cpu --models bert-small --methods full,minimal
    python benchmarks/peers.py --device cuda --plan                 # what would run, and about how long; runs nothing

Each method trains the same model (random weights, the same seed) on the same random batches in a fresh process with a
time limit of its own. bf16 arithmetic everywhere: under autocast with fp32 weights, or with bf16 weights where the
method is made for that; the label or `weights` in the JSON says which. Time: a second process trains the same model in
full, and both take turns, a few steps each; the ratio is that of the medians of these steps, so that neither a busy
machine nor a warm card moves it. `full` itself takes turns with its twin: what its ratio differs from 1 is noise.
Peak: CUDA's own counter over all steps, on a CPU the storages of a step (slimfit_ds.memory.tracker). FLOPs: torch's
FlopCounterMode over a step, recomputation included. Writes one folder (`--output`): a JSON per cell, `table.md`,
`environment.json`. Run again with the same folder to add what is missing, after an interruption too; cells that the
budget cuts off are the least telling ones, and the table says so. `--publish FILE,...` writes the tables into documents,
between the marks `<!-- peers-...: begin -->` and `end`.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peers_methods.batch_fit import measured_batches
from peers_methods.budget import planned
from peers_methods.cell import Bench
from peers_methods.methods import METHODS, get_method
from peers_methods.publish import publish
from peers_methods.running import Plan, plan_cells, read_cell, run_cells
from peers_methods.simulated import simulate
from peers_methods.simulations import Simulations
from peers_methods.tables import environment, estimated_table, heading, table
from peers_methods.turns import Turns
from peers_methods.worker import serve
from peers_methods.workloads import CASES, cases_for

RESULTS = Path(__file__).resolve().parent / "results"
FORMAT = 3
"""Of a cell's JSON: older ones are measured again."""
ESTIMATE_FORMAT = 2
"""Of an entry of `estimated.json`: older ones are simulated again."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    made.add_argument("--models", help=f"comma-separated, of: {', '.join(CASES)}")
    made.add_argument("--methods", help=f"comma-separated, of: {', '.join(METHODS)}")
    made.add_argument(
        "--budget-minutes", type=float, help="of all cells (cuda 9, cpu 240; 0: tables of what is there)"
    )
    made.add_argument("--cell-seconds", type=float, help="limit of one cell (cuda 90, cpu 900)")
    made.add_argument("--rounds", type=int, help="turns of a method and of full fine-tuning (cuda 3, cpu 5)")
    made.add_argument("--steps", type=int, default=2, help="timed steps of a turn (2)")
    made.add_argument("--warm-up", type=int, default=3)
    made.add_argument("--turn-seconds", type=float, default=20.0, help="no further round after this (20)")
    made.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads of a process")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument(
        "--no-fit", action="store_true", help="look for no largest batches (cpu: show known ones)"
    )
    made.add_argument(
        "--estimate",
        help="cpu: models whose largest batches are simulated (those measured, bert-base, vit-384, llama-8b)",
    )
    made.add_argument("--output", type=Path, help="default: benchmarks/results/peers-DEVICE")
    made.add_argument("--publish", help="comma-separated documents that the tables are written into")
    made.add_argument("--plan", action="store_true", help="print the cells and their estimated seconds only")
    made.add_argument("--cell", help=argparse.SUPPRESS)
    made.add_argument("--simulate", action="store_true", help=argparse.SUPPRESS)
    made.add_argument("--answers", type=int, help=argparse.SUPPRESS)
    return made


def choose(text: str | None, default: list[str], known: dict[str, Any], what: str) -> list[str]:
    """The names of a comma-separated list.

    Raises:
        SystemExit: names all that are unknown.
    """
    names = [part.strip() for part in text.split(",") if part.strip()] if text else default
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(f"--{what}: {', '.join(unknown)} unknown; known: {', '.join(known)}")
    return list(dict.fromkeys(names))


def work(arguments: argparse.Namespace) -> int:
    """The worker: import, wait for orders about one cell, carry them out."""
    cell = read_cell(arguments.cell)
    method, case = get_method(cell.method), CASES[cell.case]
    torch.set_num_threads(arguments.threads)
    if arguments.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    device = torch.device(arguments.device)
    method.import_ahead()
    bench = Bench(method, case, device, arguments.warm_up, arguments.seed, progress=print)
    serve(
        arguments.answers,
        {
            "build": bench.build,
            "turn": bench.turn,
            "finish": bench.finish,
            "fit": lambda: measured_batches(method, case, device, arguments.seed),
        },
    )
    # Engines and compiled kernels leave threads behind; everything has been answered.
    sys.stdout.flush()
    os._exit(0)


def simulate_for(answers: int) -> int:
    """The worker that simulates: import, wait for orders, carry them out."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    calls = itertools.count()

    def one(**options: Any) -> dict[str, Any]:
        if next(calls) == 1:
            # Each step collects garbage first, which need not go through all that the first one imported.
            gc.collect()
            gc.freeze()
        return simulate(**options)

    serve(answers, {"simulate": one})
    sys.stdout.flush()
    os._exit(0)


def estimate_fits(
    cases: list[str], methods: list[str], folder: Path, commit: str, program: list[str]
) -> dict[str, Any]:
    """Peaks and largest batches by simulated steps, for machines without a GPU; kept in `estimated.json`."""
    path = folder / "estimated.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    with Simulations([*program, "--simulate"], folder / "simulations.log") as simulations:
        for case in cases:
            for method in methods:
                name = f"{case}__{method}"
                if known.get(name, {}).get("format") == ESTIMATE_FORMAT or not METHODS[method].simulated:
                    continue
                started = time.monotonic()
                found = simulations.largest(CASES[case], METHODS[method])
                known[name] = found | {"commit": commit, "format": ESTIMATE_FORMAT}
                text = found.get("largest", found.get("error"))
                print(f"{name}: {text} ({time.monotonic() - started:.0f} s)", flush=True)
                path.write_text(json.dumps(known, indent=1) + "\n")
    return known


def main() -> int:
    arguments = parser().parse_args()
    if arguments.cell:
        return work(arguments)
    if arguments.simulate:
        return simulate_for(arguments.answers)
    cuda = arguments.device == "cuda"
    cases = choose(arguments.models, cases_for(arguments.device), CASES, "models")
    methods = choose(arguments.methods, list(METHODS), METHODS, "methods")
    output = arguments.output or RESULTS / f"peers-{arguments.device}"
    arguments.cell_seconds = arguments.cell_seconds or (90.0 if cuda else 900.0)
    minutes = arguments.budget_minutes
    if minutes is None:
        minutes = 9.0 if cuda else 240.0
    cells = plan_cells(cases, methods, fit=cuda and not arguments.no_fit, by_case=not cuda)
    turns = Turns(arguments.rounds or (3 if cuda else 5), arguments.steps, arguments.turn_seconds)
    if arguments.plan:
        print(planned(cells, turns, arguments.warm_up, minutes))
        return 0
    if cuda and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no CUDA device")
    settings = {key: getattr(arguments, key) for key in ("device", "seed", "threads")}
    settings["format"] = FORMAT
    passed = ("device", "warm_up", "threads", "seed")
    program = [sys.executable, str(Path(__file__).resolve())]
    program += [f"--{key.replace('_', '-')}={getattr(arguments, key)}" for key in passed]
    output.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    facts = environment(arguments.device, arguments.threads)
    facts |= {"command": " ".join(["python", "benchmarks/peers.py", *sys.argv[1:]])}
    results = run_cells(
        Plan(
            cells,
            output,
            program,
            settings,
            arguments.device,
            turns,
            arguments.cell_seconds,
            60 * minutes,
            prepare=cuda,
            folder=Path(__file__).resolve().parent.parent,
            circumstances={"commit": facts["commit"], "command": facts["command"]},
        ),
        progress=lambda text: print(text, flush=True),
    )
    estimated = {}
    if not cuda:
        shapes = choose(arguments.estimate, [*cases, *cases_for("cuda")[:3]], CASES, "estimate")
        shapes = [] if arguments.no_fit else shapes
        estimated = estimate_fits(shapes, methods, output, facts["commit"], program)
    facts |= {"minutes": round((time.monotonic() - started) / 60, 1)}
    (output / "environment.json").write_text(json.dumps(facts, indent=1) + "\n")
    text = heading(facts, results) + table(cases, methods, results, estimated) + "\n"
    text += estimated_table(methods, estimated)
    (output / "table.md").write_text(text)
    print(text)
    for document in filter(None, (arguments.publish or "").split(",")):
        publish(Path(document.strip()), cases, methods, results, estimated, facts)
    return 0 if any(result["status"] == "ok" for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
