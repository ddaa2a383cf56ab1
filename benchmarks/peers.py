"""Every way to train the same model with less memory, side by side: memory, time, throughput, largest batch.

    python benchmarks/peers.py --device cuda --budget-minutes 9     # on a GPU: published shapes
    python benchmarks/peers.py --device cpu                         # small shapes of the same families
    python benchmarks/peers.py --device cpu --models bert-small --methods full,minimal

Each method trains the same model (random weights, the same seed) on the same random batches in a fresh process with a
time limit of its own. bf16 arithmetic everywhere: under autocast with fp32 weights, or with bf16 weights where the
method is made for that; the label or `weights` in the JSON says which. Peak: CUDA's own counter over all steps, on a
CPU the storages of a step (slimfit_ds.memory.tracker). FLOPs: torch's FlopCounterMode over a step, recomputation
included. Writes one folder (`--output`): a JSON per cell, `table.md`, `environment.json`. Run again with the same
folder to add what is missing; cells that the budget cuts off are the least telling ones, and the table says so.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from peers_methods.batch_fit import estimated_batches, measured_batches
from peers_methods.building import Unavailable
from peers_methods.cell import Effort, measure
from peers_methods.methods import METHODS, get_method
from peers_methods.running import Cell, Plan, plan_cells, read_cell, run_cells
from peers_methods.tables import environment, estimated_table, table
from peers_methods.workloads import CASES, cases_for

RESULTS = Path(__file__).resolve().parent / "results"
FORMAT = 2
"""Of a cell's JSON: older ones are measured again."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    made.add_argument("--models", help=f"comma-separated, of: {', '.join(CASES)}")
    made.add_argument("--methods", help=f"comma-separated, of: {', '.join(METHODS)}")
    made.add_argument("--budget-minutes", type=float, default=9.0)
    made.add_argument("--cell-seconds", type=float, help="limit of one process (cuda 90, cpu 240)")
    made.add_argument("--steps", type=int, default=10, help="timed steps at most (10)")
    made.add_argument("--warm-up", type=int, default=3)
    made.add_argument("--step-seconds", type=float, default=20.0, help="time for the timed steps (20)")
    made.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads of a process")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--no-fit", action="store_true", help="leave the largest batches out")
    made.add_argument(
        "--estimate",
        help="cpu: published shapes whose largest batches are estimated (bert-base,vit-384,llama-8b)",
    )
    made.add_argument("--output", type=Path, help="default: benchmarks/results/peers-DEVICE")
    made.add_argument("--cell", help=argparse.SUPPRESS)
    made.add_argument("--into", type=Path, help=argparse.SUPPRESS)
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
    """The worker: import, wait for the word, measure one cell, write it."""
    cell = read_cell(arguments.cell)
    method, case = get_method(cell.method), CASES[cell.case]
    torch.set_num_threads(arguments.threads)
    if arguments.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    method.import_ahead()
    sys.stdin.readline()
    try:
        result = {"status": "ok", **_measured(arguments, cell, method, case)}
    except Unavailable as error:
        result = {"status": "unavailable", "error": str(error)}
    except torch.OutOfMemoryError as error:
        result = {"status": "out of memory", "error": str(error).split(". ")[0]}
    except Exception as error:
        traceback.print_exc()
        first = next((line for line in str(error).splitlines() if line.strip()), "")
        result = {"status": "failed", "error": f"{type(error).__name__}: {first}"[:300]}
    arguments.into.write_text(json.dumps(result, indent=1) + "\n")
    # Engines and compiled kernels leave threads behind; everything has been written.
    sys.stdout.flush()
    os._exit(0)


def _measured(arguments: argparse.Namespace, cell: Cell, method: Any, case: Any) -> dict[str, Any]:
    device = torch.device(arguments.device)
    if cell.kind == "fit":
        return measured_batches(method, case, device, arguments.seed)
    effort = Effort(arguments.warm_up, arguments.steps, arguments.step_seconds)
    result = measure(method, case, device, effort, arguments.seed, progress=print)
    result["peak"] = result.get("cuda_peak_allocated") or result["tracked_peak"]
    return result


def estimate_fits(cases: list[str], methods: list[str], folder: Path) -> dict[str, Any]:
    """Peaks and largest batches by the estimator, for machines without a GPU; kept in `estimated.json`."""
    from slimfit_ds.memory.estimator import Simulator

    path = folder / "estimated.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    with Simulator() as simulator:
        for case in cases:
            for method in methods:
                name = f"{case}__{method}"
                if name in known or METHODS[method].strategy is None:
                    continue
                found = estimated_batches(METHODS[method], CASES[case], simulator.run)
                assert found is not None
                known[name] = found
                print(f"{name}: {found.get('largest', found.get('error'))}", flush=True)
                path.write_text(json.dumps(known, indent=1) + "\n")
    return known


def main() -> int:
    arguments = parser().parse_args()
    if arguments.cell:
        return work(arguments)
    cuda = arguments.device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no CUDA device")
    cases = choose(arguments.models, cases_for(arguments.device), CASES, "models")
    methods = choose(arguments.methods, list(METHODS), METHODS, "methods")
    output = arguments.output or RESULTS / f"peers-{arguments.device}"
    arguments.cell_seconds = arguments.cell_seconds or (90.0 if cuda else 240.0)
    settings = {key: getattr(arguments, key) for key in ("device", "seed", "threads")}
    settings["format"] = FORMAT
    passed = ("device", "steps", "warm_up", "step_seconds", "threads", "seed")
    program = [sys.executable, str(Path(__file__).resolve())]
    program += [f"--{key.replace('_', '-')}={getattr(arguments, key)}" for key in passed]
    output.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    results = run_cells(
        Plan(
            plan_cells(cases, methods, fit=cuda and not arguments.no_fit),
            output,
            program,
            settings,
            arguments.device,
            arguments.cell_seconds,
            60 * arguments.budget_minutes,
            prepare=cuda,
        ),
        progress=lambda text: print(text, flush=True),
    )
    estimated = {}
    if not cuda and not arguments.no_fit:
        shapes = choose(arguments.estimate, cases_for("cuda")[:3], CASES, "estimate")
        estimated = estimate_fits(shapes, methods, output)
    facts = environment(arguments.device, arguments.threads)
    facts |= {"command": " ".join(["python", "benchmarks/peers.py", *sys.argv[1:]])}
    facts |= {"minutes": round((time.monotonic() - started) / 60, 1)}
    (output / "environment.json").write_text(json.dumps(facts, indent=1) + "\n")
    text = heading(facts, results) + table(cases, methods, results) + "\n"
    text += estimated_table(methods, estimated)
    (output / "table.md").write_text(text)
    print(text)
    return 0 if any(result["status"] == "ok" for result in results.values()) else 1


def heading(facts: dict[str, Any], results: dict[str, Any]) -> str:
    """What the tables below were run on, and what the budget left out."""
    dropped = [name for name, result in results.items() if result["status"] == "dropped"]
    lines = [
        f"{facts['hardware']}, {facts['threads']} CPU threads, torch {facts['versions']['torch']}, commit "
        f"{facts['commit']}; bf16 arithmetic, seed 0; `{facts['command']}`",
        "",
    ]
    if dropped:
        lines += [f"Dropped, because the time budget was spent: {', '.join(dropped)}", ""]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
