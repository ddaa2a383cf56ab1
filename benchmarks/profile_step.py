"""Where the time of one step goes: full fine-tuning against SlimFit, part by part, and the scheduler's own share.

    python benchmarks/profile_step.py --output after.json
    PYTHONPATH=/path/to/older/checkout python benchmarks/profile_step.py --output before.json
    python benchmarks/profile_step.py --compare before.json after.json

All methods are built in one process and take turns, step by step, so that a busy machine slows all of them: the
ratios are of neighbouring steps. Three kinds of numbers, each from steps of its own: plain time, time with
clocks around the schedule's functions, and torch.profiler's, sorted by part. The profiler itself costs time, most of
it where operations are small; the parts are shares of the step under the profiler.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from peers_methods.building import Request
from peers_methods.methods import METHODS
from peers_methods.tables import environment
from peers_methods.workloads import CASES, make_batches
from profiling.parts import PARTS, sort_events
from profiling.ranges import timed, wrapped
from torch.profiler import ProfilerActivity, profile


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", default="bert-base-b8", choices=list(CASES))
    parser.add_argument("--methods", default="full,balanced,minimal")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each method (5)")
    parser.add_argument("--profiled", type=int, default=2, help="profiled steps of each method (2)")
    parser.add_argument("--warm-up", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("BEFORE", "AFTER"))
    arguments = parser.parse_args()
    if arguments.compare:
        print(comparison(*(json.loads(path.read_text()) for path in arguments.compare)))
        return
    torch.set_num_threads(arguments.threads)
    result = run(arguments)
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """All three measurements of each method."""
    import slimfit_ds

    device, case = torch.device(arguments.device), CASES[arguments.case]
    names = arguments.methods.split(",")
    batches = make_batches(case, case.workload.batch, device)
    trainers = {name: METHODS[name].build(Request(case, case.workload.batch, device)) for name in names}

    def step(name: str, number: int) -> float:
        begin, cpu_begin = time.perf_counter(), time.process_time()
        trainers[name].step(batches[number % len(batches)])
        if device.type == "cuda":
            torch.cuda.synchronize()
        cpu[name].append(time.process_time() - cpu_begin)
        return time.perf_counter() - begin

    seconds: dict[str, list[float]] = {name: [] for name in names}
    cpu: dict[str, list[float]] = {name: [] for name in names}
    for number in range(arguments.warm_up + arguments.rounds):
        for name in names:
            took = step(name, number)
            if number >= arguments.warm_up:
                seconds[name].append(took)
    reference = seconds[names[0]]
    plain_cpu = {name: values[arguments.warm_up :] for name, values in cpu.items()}
    result: dict[str, Any] = {
        "case": arguments.case,
        "rounds": arguments.rounds,
        "profiled": arguments.profiled,
        "package": str(Path(slimfit_ds.__file__).parent),
        "environment": environment(arguments.device, arguments.threads),
        "methods": {},
    }
    for name in names:
        result["methods"][name] = {
            "seconds": statistics.median(seconds[name]),
            "seconds_all": seconds[name],
            "ratio": statistics.median(a / b for a, b in zip(seconds[name], reference, strict=True)),
            "ratio_cpu": statistics.median(
                a / b for a, b in zip(plain_cpu[name], plain_cpu[names[0]], strict=True)
            ),
            "schedule": _schedule_share(name, step, arguments.profiled),
            **_profiled(name, step, arguments.profiled),
        }
    return result


def _schedule_share(name: str, step: Any, steps: int) -> dict[str, float]:
    """Seconds per step inside of the schedule's functions, and the whole."""
    with timed() as clocks:
        total = sum(step(name, number) for number in range(steps))
    return {"step": total / steps, **{key: value / steps for key, value in clocks.items()}}


def _profiled(name: str, step: Any, steps: int) -> dict[str, Any]:
    activities = [ProfilerActivity.CPU]
    with wrapped(), profile(activities=activities) as profiler:
        total = sum(step(name, number) for number in range(steps))
    events = profiler.events()
    parts = sort_events(events, total)
    return {
        "profiled_seconds": total / steps,
        "operations": len(events) / steps,
        "parts": {part: value / steps for part, value in parts.items()},
    }


def own_share(schedule: dict[str, float]) -> tuple[float, float]:
    """Share of a step that deciding and applying takes, without moving states; and with the statistic."""
    moved = schedule.get("ShardUpdater.move_states", 0.0)
    deciding = sum(schedule.get(key, 0.0) for key in ("FreezeSchedule.advance", "SlimHandle._apply"))
    deciding += schedule.get("SlimFitEngine._apply_active_set", 0.0) - moved
    measuring = sum(value for key, value in schedule.items() if "Statistic." in key or "_before_step" in key)
    measuring += schedule.get("ShardUpdater.statistics", 0.0)
    return max(0.0, deciding) / schedule["step"], max(0.0, deciding + measuring) / schedule["step"]


def table(result: dict[str, Any]) -> str:
    """Milliseconds by part for each method, and the schedule's share."""
    methods = result["methods"]
    lines = [
        f"{CASES[result['case']].label}, {result['environment']['hardware']}, "
        f"{result['environment']['threads']} threads, commit {result['environment']['commit']}",
        "",
        "| ms per step | " + " | ".join(methods) + " |",
        "|---|" + "---:|" * len(methods),
        "| as it is, median | " + " | ".join(f"{1000 * m['seconds']:.0f}" for m in methods.values()) + " |",
        "| of the first, median of rounds | "
        + " | ".join(f"{m['ratio']:.3f}" for m in methods.values())
        + " |",
        "| of the first, CPU time | " + " | ".join(f"{m['ratio_cpu']:.3f}" for m in methods.values()) + " |",
        "| under the profiler | "
        + " | ".join(f"{1000 * m['profiled_seconds']:.0f}" for m in methods.values())
        + " |",
    ]
    for part in PARTS:
        values = [m["parts"][part] for m in methods.values()]
        if any(value > 5e-5 for value in values):
            lines.append(f"| {part} | " + " | ".join(f"{1000 * value:.1f}" for value in values) + " |")
    shares = [own_share(m["schedule"]) for m in methods.values()]
    lines.append("| schedule, share of a step | " + " | ".join(f"{a:.2%}" for a, _ in shares) + " |")
    lines.append("| with the statistic | " + " | ".join(f"{b:.2%}" for _, b in shares) + " |")
    return "\n".join(lines)


def comparison(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Both in one table, a pair of columns for each method, in per cent of a step of the first method of the same run.

    Each part is its share of its own step under the profiler times the step's CPU time against the first method's
    without it: so neither the load of the machine nor the cost of the profiler as a whole moves the columns.
    """
    names = [name for name in after["methods"] if name in before["methods"]]
    pairs = [(before["methods"][name], after["methods"][name]) for name in names]
    header = [f"{name}, {when}" for name in names for when in ("before", "after")]

    def row(label: str, text: Any) -> str:
        return f"| {label} | " + " | ".join(text(one) for pair in pairs for one in pair) + " |"

    def per_cent(one: dict[str, Any], part: str) -> float:
        return 100 * one["ratio_cpu"] * one["parts"].get(part, 0.0) / one["profiled_seconds"]

    facts = after["environment"]
    lines = [
        f"{CASES[after['case']].label}, {facts['threads']} thread(s), {facts['hardware']}; before: "
        f"{before['environment']['commit']}, after: {facts['commit']}.",
        "",
        "| % of a step of full | " + " | ".join(header) + " |",
        "|---|" + "---:|" * len(header),
        row("CPU time of a step, median of rounds", lambda m: f"**{100 * m['ratio_cpu']:.0f}**"),
    ]
    for part in PARTS:
        if any(per_cent(one, part) >= 0.1 for pair in pairs for one in pair):
            lines.append(row(part, lambda m, part=part: f"{per_cent(m, part):.1f}"))
    lines.append(row("operations per step", lambda m: f"{m['operations']:,.0f}"))
    lines.append(row("schedule, share of its own step", lambda m: f"{own_share(m['schedule'])[0]:.2%}"))
    lines.append(row("with the statistic", lambda m: f"{own_share(m['schedule'])[1]:.2%}"))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
