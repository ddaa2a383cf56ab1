"""`slimfit-ds plan --model NAME --gpu-memory 24GB`, also behind `launch/plan.py`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from slimfit_ds.errors import ConfigError, parse_bytes
from slimfit_ds.planner.estimator import Estimate, Simulator
from slimfit_ds.planner.plan_files import write_plan
from slimfit_ds.planner.planner import Choice, find_setting
from slimfit_ds.planner.strategy import STRATEGIES, Strategy
from slimfit_ds.planner.workload import DTYPES, TASKS, ModelNotFound, Workload, load_config
from slimfit_ds.planner.zero_tables import zero_states
from slimfit_ds.report.plan_report import PlanRow, plan_table
from slimfit_ds.report.units import human_bytes

__all__ = ["main"]

EXAMPLES = """examples:
  slimfit-ds plan --model meta-llama/Meta-Llama-3-8B --gpu-memory 24GB --gpus 1 --batch 1 --seq 2048
  slimfit-ds plan --model my_model/config.json --gpu-memory 16GiB --batch 32 --seq 128 --task sequence_classification
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Tell what fits, and write the recipe of the fastest setting that does.

    Args:
        argv: the arguments after the program's name; None: those of this process.

    Returns:
        the exit code: 0; 2 if the arguments are wrong or nothing fits.
    """
    arguments = _parser().parse_args(argv)
    try:
        memory, reserve, workload, folder = _read(arguments)
        return _plan(arguments, memory, reserve, workload, folder)
    except (ConfigError, ModelNotFound) as error:
        print(
            "\n".join(["slimfit-ds plan:", *(f"  {line}" for line in str(error).splitlines())]),
            file=sys.stderr,
        )
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="slimfit-ds plan",
        description="What a model needs for fine-tuning, what fits a GPU, and a recipe for it. Runs without a GPU.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="hub id, folder, or config.json")
    parser.add_argument("--gpu-memory", required=True, help="of one GPU: 24GB (10^9), 24GiB (2^30)")
    parser.add_argument("--gpus", type=int, default=1, help="number of GPUs (1)")
    parser.add_argument("--batch", type=int, default=1, help="samples per GPU and optimizer step (1)")
    parser.add_argument("--seq", type=int, default=512, help="tokens per sample (512)")
    parser.add_argument("--task", default="auto", help=f"auto or one of {', '.join(TASKS)}")
    parser.add_argument("--dtype", default="bf16", help="bf16, fp16 or fp32 (bf16)")
    parser.add_argument("--image-size", type=int, help="pixels per side, for image models")
    parser.add_argument("--stage", type=int, help="ZeRO stage of the SlimFit settings (1; 0 on one GPU)")
    parser.add_argument(
        "--reserve",
        default="600MB",
        help="kept free for what is not simulated: CUDA context, fragmentation, kernels' workspaces (600MB)",
    )
    parser.add_argument(
        "--slimfit-only", action="store_true", help="leave the rival methods out of the table"
    )
    parser.add_argument("--output", help="folder for recipe and JSON (outputs/plan-MODEL)")
    return parser


def _read(arguments: argparse.Namespace) -> tuple[int, int, Workload, Path]:
    """The checked arguments; all problems at once."""
    problems: list[str] = []

    def size(key: str, value: str) -> int:
        try:
            return parse_bytes(value)
        except ValueError as error:
            problems.append(f"{key} {error}")
            return 0

    memory, reserve = size("gpu-memory", arguments.gpu_memory), size("reserve", arguments.reserve)
    for key in ("gpus", "batch", "seq"):
        if getattr(arguments, key) < 1:
            problems.append(f"{key} must be at least 1, got {getattr(arguments, key)}")
    if arguments.stage not in (None, 0, 1, 2, 3):
        problems.append(f"stage must be 0, 1, 2 or 3, got {arguments.stage}")
    if arguments.task not in {*TASKS, "auto"}:
        problems.append(f"task must be auto or one of {', '.join(TASKS)}, got {arguments.task!r}")
    if arguments.dtype not in DTYPES or arguments.dtype == "bf16_autocast":
        problems.append(f"dtype must be bf16, fp16 or fp32, got {arguments.dtype!r}")
    try:
        load_config(arguments.model)
    except ModelNotFound as error:
        problems.append(str(error))
    name = (
        Path(arguments.model).stem
        if arguments.model.endswith(".json")
        else arguments.model.rstrip("/").split("/")[-1]
    )
    folder = Path(arguments.output) if arguments.output else Path("outputs") / f"plan-{name}"
    if problems:
        raise ConfigError(problems)
    workload = Workload(
        arguments.model,
        batch=arguments.batch,
        seq=arguments.seq,
        task=arguments.task,
        dtype=arguments.dtype,
        image_size=arguments.image_size,
    )
    return memory, reserve, workload, folder


def _plan(arguments: argparse.Namespace, memory: int, reserve: int, workload: Workload, folder: Path) -> int:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 180)
    budget = memory - reserve
    stage = arguments.stage if arguments.stage is not None else (1 if arguments.gpus > 1 else 0)
    strategy = Strategy("slimfit", stage=stage)
    with Simulator(arguments.gpus) as simulator:
        try:
            facts = simulator.inspect(workload)
        except ValueError as error:
            raise ConfigError([str(error)]) from None
        rows = (
            []
            if arguments.slimfit_only
            else _rivals(simulator, workload, arguments.gpus, facts["parameters"], budget)
        )

        def run(work: Workload, how: Strategy) -> Estimate:
            return simulator.run(work, how, "worst")

        choice = (
            find_setting(
                budget,
                workload,
                run,
                stage=stage,
                embeddings=tuple(facts["embeddings"]),
                strategy=strategy,
                language_model=facts["loss_in_chunks"],
            )
            if budget > 0
            else None
        )
        rows += _own_rows(choice, budget)
        title = f"{arguments.model}: batch {arguments.batch} x {arguments.seq} on {arguments.gpus} GPU(s) of {arguments.gpu_memory}"
        caption = (
            f"{facts['parameters']:,} parameters, {facts['layers']} layers, {arguments.dtype}; simulated on fake tensors, worst active set; "
            f"{human_bytes(reserve)} kept free for what is not simulated. Fastest first among the SlimFit rows."
        )
        console.print(plan_table(rows, title, caption))
        if choice is None or choice.setting is None:
            return _nothing_fits(simulator, workload, choice, budget, reserve, strategy)
    for path in write_plan(arguments, workload, strategy, choice, folder):
        console.print(f"written: {path}", highlight=False)
    console.print(
        f"{choice.reason(budget)}\nexpected gradient error: {choice.setting.error_class}", highlight=False
    )
    console.print(
        f"run: deepspeed --num_gpus {arguments.gpus} launch/train.py --config {folder / 'recipe.yaml'} data_dir=YOUR_DATA",
        highlight=False,
    )
    return 0


def _rivals(
    simulator: Simulator, workload: Workload, gpus: int, parameters: int, budget: int
) -> list[PlanRow]:
    """What one would do without this package."""
    stages = [0] if gpus == 1 else [1, 2, 3]
    own = [STRATEGIES[f"zero{stage}"].with_(note=f"full fine-tuning, ZeRO {stage}") for stage in stages]
    widest = stages[-1]
    own.append(
        STRATEGIES[f"zero{widest}"].with_(
            name="checkpointing",
            gradient_checkpointing=True,
            note=f"full, gradient checkpointing, ZeRO {widest}",
        )
    )
    own.append(STRATEGIES["lora"].with_(note="LoRA rank 8, all linear layers"))
    own.append(
        STRATEGIES["lora"].with_(
            name="lora_gc", gradient_checkpointing=True, note="LoRA rank 8, gradient checkpointing"
        )
    )
    rows = []
    for strategy in own:
        states = zero_states(parameters, strategy.stage or 0, gpus, workload.dtype)
        if strategy.lora is None and states.device > budget:
            # States alone are too much: no need to simulate.
            parts = {
                "parameters": states.weights,
                "gradients": states.gradients,
                "optimizer": states.optimizer,
            }
            whole = {kind: int(size) for kind, size in parts.items()}
            rows.append(PlanRow(strategy.note, int(states.device), False, whole, bound=True))
            continue
        rows.append(_row(strategy.note, simulator.run(workload, strategy), budget, "none"))
    return rows


def _row(label: str, estimate: Estimate, budget: int, error_class: str, chosen: bool = False) -> PlanRow:
    report = estimate.report
    if report is None:
        return PlanRow(label, None, False, {}, problem=estimate.error)
    return PlanRow(
        label,
        report.peak,
        report.peak <= budget,
        report.at_peak,
        report.optimizer_host,
        error_class,
        chosen=chosen,
    )


def _own_rows(choice: Choice | None, budget: int) -> list[PlanRow]:
    if choice is None:
        return []
    return [
        _row(f"SlimFit {s.label}", s.estimate, budget, s.error_class, s is choice.setting)
        for s in choice.tried
    ]


def _nothing_fits(
    simulator: Simulator,
    workload: Workload,
    choice: Choice | None,
    budget: int,
    reserve: int,
    strategy: Strategy,
) -> int:
    """Say what is missing and what would do."""
    lines = ["slimfit-ds plan: nothing fits"]
    if choice is None:
        lines.append(f"  the GPU is smaller than the {human_bytes(reserve)} that are kept free (--reserve)")
    else:
        least = choice.smallest
        needs = least.estimate.peak
        lines.append(
            f"  the leanest setting ({least.label}) needs {human_bytes(needs)}: {human_bytes(needs - budget)} are missing"
        )
        lines.append(f"  it fits a GPU of {(needs + reserve) / 1e9:.1f}GB")
        if workload.batch > 1 or workload.seq > 128:
            smaller = Workload(**{**workload.to_dict(), "batch": 1, "seq": min(workload.seq, 128)})
            trial = simulator.run(smaller, strategy.with_(slimfit=least.block), "worst")
            if trial.report is not None:
                verdict = "fits" if trial.peak <= budget else "does not fit either"
                lines.append(
                    f"  with batch 1 and {smaller.seq} tokens it needs {human_bytes(trial.peak)}, which {verdict}"
                )
    print("\n".join(lines), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
