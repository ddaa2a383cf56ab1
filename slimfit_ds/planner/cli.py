"""`slimfit-ds plan --model NAME --gpu-memory 24GB`: what a setting would need, and a recipe for one that fits."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from slimfit_ds.errors import ConfigError, parse_bytes
from slimfit_ds.files import folder_for_writing, write_atomically
from slimfit_ds.planner.rivals import rivals_by_arithmetic
from slimfit_ds.planner.search import Choice, Setting, find_setting
from slimfit_ds.planner.simulate import Estimate, Simulator
from slimfit_ds.planner.speed import CARDS, Card, card_for, speed
from slimfit_ds.planner.strategies import STRATEGIES, Strategy, zero_states
from slimfit_ds.planner.workload import DTYPES, TASKS, ModelNotFound, Workload, load_config
from slimfit_ds.report.units import human_bytes

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["add_arguments", "main", "run"]

DESCRIPTION = "What a model needs for fine-tuning, what fits a GPU, and a recipe for it. Runs without a GPU."
EXAMPLES = """examples:
  slimfit-ds plan --model meta-llama/Meta-Llama-3-8B --gpu-memory 24GB --gpus 1 --batch 1 --seq 2048
  slimfit-ds plan --model my_model/config.json --gpu-memory 16GiB --batch 32 --seq 128 --task sequence_classification
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    add = parser.add_argument
    add("--model", required=True, help="hub id, folder, or config.json")
    add("--gpu-memory", required=True, help="of one GPU: 24GB (10^9), 24GiB (2^30)")
    add("--gpus", type=int, default=1, help="number of GPUs (1)")
    add("--batch", type=int, default=1, help="samples per GPU and optimizer step (1)")
    add("--seq", type=int, default=512, help="tokens per sample (512)")
    add("--task", default="auto", help=f"auto or one of {', '.join(TASKS)}")
    add("--dtype", default="bf16", help="bf16, fp16 or fp32 (bf16)")
    add("--image-size", type=int, help="pixels per side, for image models")
    add("--stage", type=int, help="ZeRO stage of the SlimFit settings (1; 0 on one GPU)")
    reserved = "kept free for what is not simulated: CUDA context, fragmentation, kernels' workspaces (600MB)"
    add("--reserve", default="600MB", help=reserved)
    add("--card", choices=sorted(CARDS), help="whose speed is assumed (the smallest with --gpu-memory)")
    add("--tflops", type=float, help="peak of dense bf16 products instead of the card's, 10^12 per second")
    add("--link", type=float, help="peak from host to device instead of the card's, 10^9 bytes per second")
    add("--efficiency", type=float, help="share of --tflops that a step reaches (0.5, assumed)")
    add("--link-efficiency", type=float, help="share of --link that copies reach (0.8, assumed)")
    add("--slimfit-only", action="store_true", help="leave other methods out of the table")
    add("--output", help="folder for recipe and JSON (outputs/plan-MODEL)")
    add("--overwrite", action="store_true", help="replace a recipe and JSON that are there")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command as a program of its own; see `run`."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "slimfit-ds plan", None, DESCRIPTION, EXAMPLES, formatter_class=formatter
    )
    add_arguments(parser)
    return run(parser.parse_args(argv))


def run(arguments: argparse.Namespace) -> int:
    """Print what fits, and write the recipe of the fastest setting that does.

    Returns:
        The exit code: 0; 2 if the arguments are wrong, nothing fits, or the output is there or cannot be written.
    """
    try:
        plan = _Plan(arguments)
        with folder_for_writing(plan.folder):
            plan.go()
    except (ConfigError, OSError) as error:
        problems = error.problems if isinstance(error, ConfigError) else [str(error)]
        lines = [line for problem in problems for line in problem.splitlines()]
        print("\n".join(["slimfit-ds plan:", *(f"  {line}" for line in lines)]), file=sys.stderr)
        return 2
    return 0


@dataclass(frozen=True)
class PlanRow:
    """One setting of a plan.

    Args:
        label: the setting.
        needs: bytes on the device; None: not known.
        parts: bytes by kind at the peak.
        host: bytes of weights and optimizer states on the host.
        error: expected relative error of the gradients; why there is no estimate, if `needs` is None.
        bound: `needs` is only a lower bound (model states by arithmetic).
        chosen: this is the recommendation.
        speed: what a step could reach, in words.
    """

    label: str
    needs: int | None
    parts: dict[str, int] = field(default_factory=dict)
    host: int = 0
    error: str = "none"
    bound: bool = False
    chosen: bool = False
    speed: str = ""


class _Plan:
    """One run of the command."""

    def __init__(self, arguments: argparse.Namespace):
        """Check the arguments.

        Raises:
            ConfigError: all problems at once.
        """
        problems: list[str] = []

        def size(key: str, value: str) -> int:
            try:
                return parse_bytes(value)
            except ValueError as error:
                problems.append(f"{key} {error}")
                return 0

        self.memory = size("gpu-memory", arguments.gpu_memory)
        self.reserve = size("reserve", arguments.reserve)
        self.budget = self.memory - self.reserve
        for key in ("gpus", "batch", "seq"):
            if getattr(arguments, key) < 1:
                problems.append(f"{key} must be at least 1, got {getattr(arguments, key)}")
        for key in ("tflops", "link", "efficiency", "link_efficiency"):
            value, share = getattr(arguments, key), key.endswith("efficiency")
            if value is not None and not (0 < value <= 1 if share else value > 0):
                rule = "in (0, 1]" if share else "above 0"
                problems.append(f"{key.replace('_', '-')} must be {rule}, got {value:g}")
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
        model = Path(arguments.model)
        name = model.stem if model.suffix == ".json" else model.name
        self.folder = Path(arguments.output) if arguments.output else Path("outputs") / f"plan-{name}"
        self.files = (self.folder / "ds_config.json", self.folder / "recipe.yaml")
        if not arguments.overwrite:
            there = [path for path in self.files if path.exists()]
            problems += [f"{path} exists: choose another --output, or add --overwrite" for path in there]
        if problems:
            raise ConfigError(problems)
        self.arguments = arguments
        self.workload = Workload(
            arguments.model,
            batch=arguments.batch,
            seq=arguments.seq,
            task=arguments.task,
            dtype=arguments.dtype,
            image_size=arguments.image_size,
        )
        stage = arguments.stage if arguments.stage is not None else (1 if arguments.gpus > 1 else 0)
        self.strategy = Strategy("slimfit", stage=stage)
        card: Card = CARDS[arguments.card] if arguments.card else card_for(self.memory)
        self.card = card.with_(
            flops=arguments.tflops and arguments.tflops * 1e12,
            link=arguments.link and arguments.link * 1e9,
            efficiency=arguments.efficiency,
            link_efficiency=arguments.link_efficiency,
        )

    def go(self) -> None:
        """Simulate, print the table, write the files.

        Raises:
            ConfigError: nothing fits: what is missing, and what would fit.
        """
        from rich.console import Console

        console = Console(width=None if sys.stdout.isatty() else 180)
        arguments = self.arguments
        if self.budget <= 0:
            kept = human_bytes(self.reserve)
            raise ConfigError([f"nothing fits: the GPU is smaller than the {kept} kept free (--reserve)"])
        with Simulator(arguments.gpus) as self.simulator:
            try:
                facts = self.simulator.inspect(self.workload)
            except ValueError as error:
                raise ConfigError([str(error)]) from None
            rows = [] if arguments.slimfit_only else self._others(facts)
            choice = find_setting(
                self.budget,
                self.workload,
                self._worst,
                embeddings=tuple(facts["embeddings"]),
                strategy=self.strategy,
                language_model=facts["loss_in_chunks"],
            )
            rows += [
                self._row(f"SlimFit {s.label}", s.estimate, s.gradient_error, s is choice.setting)
                for s in choice.tried
            ]
            if not arguments.slimfit_only:
                rows.append(self._papers_schedule(choice.setting or choice.smallest))
            title = (
                f"{arguments.model}: batch {arguments.batch} x {arguments.seq} on {arguments.gpus} GPU(s) of "
                f"{arguments.gpu_memory}"
            )
            caption = (
                f"{facts['parameters']:,} parameters, {facts['layers']} layers, {arguments.dtype}; simulated on fake "
                f"tensors; {human_bytes(self.reserve)} kept free for what is not simulated. In the order of the "
                "ladder; the paper's schedule with its worst active set. Speed: no measurement, but the step's matrix "
                f"products at {self.card.flops / 1e12:g} TFLOP/s x {self.card.efficiency:g} ({self.card.name}) or its bytes over "
                f"a link of {self.card.link / 1e9:g} GB/s x {self.card.link_efficiency:g}, whichever takes longer."
            )
            console.print(_table(rows, title, caption, self.budget))
            if choice.setting is None:
                raise ConfigError(self._what_is_missing(choice))
        for path in self._write(choice, choice.setting):
            console.print(f"written: {path}", highlight=False)
        recipe = self.files[1]
        console.print(
            f"{choice.reason(self.budget)}\nexpected gradient error: {choice.setting.gradient_error}\n"
            f"{self._speed(choice.setting.estimate)} (simulated, not measured)\n"
            f"run: deepspeed --num_gpus {arguments.gpus} launch/train.py --config {recipe} data_dir=YOUR_DATA",
            highlight=False,
        )

    def _worst(self, workload: Workload, strategy: Strategy) -> Estimate:
        return self.simulator.run(workload, strategy, "worst")

    def _row(self, label: str, estimate: Estimate, error: str = "none", chosen: bool = False) -> PlanRow:
        report = estimate.report
        if report is None:
            return PlanRow(label, None, error=estimate.error)
        return PlanRow(
            label,
            report.peak,
            report.at_peak,
            report.optimizer_host + report.parameters_host,
            error,
            chosen=chosen,
            speed=self._speed(estimate),
        )

    def _speed(self, estimate: Estimate) -> str:
        """What a step of this rank could reach, in words; of images a sample is one."""
        if not estimate.flops:
            return ""
        images = self.workload.resolved_task(load_config(self.arguments.model)) == "image_classification"
        count = self.arguments.batch * (1 if images else self.arguments.seq)
        text = str(speed(estimate.flops, estimate.copied, count, self.card))
        return text.replace("tokens/s", "images/s") if images else text

    def _others(self, facts: dict[str, Any]) -> list[PlanRow]:
        """Return rows of full fine-tuning, gradient checkpointing and LoRA, and of what streams or packs its base."""
        parameters = facts["parameters"]
        gpus = self.arguments.gpus
        stages = [0] if gpus == 1 else [1, 2, 3]
        strategies = [
            STRATEGIES[f"zero{stage}"].with_(note=f"full fine-tuning, ZeRO {stage}") for stage in stages
        ]
        note = f"full, gradient checkpointing, ZeRO {stages[-1]}"
        strategies.append(strategies[-1].with_(gradient_checkpointing=True, note=note))
        lora = STRATEGIES["lora"].with_(note="LoRA rank 8, all linear layers")
        strategies += [
            lora,
            lora.with_(gradient_checkpointing=True, note="LoRA rank 8, gradient checkpointing"),
        ]
        rows = []
        for strategy in strategies:
            states = zero_states(parameters, strategy.stage or 0, gpus, self.workload.dtype)
            if strategy.lora is None and states.device > self.budget:
                # States alone are too much: no need to simulate.
                parts = {
                    "parameters": int(states.weights),
                    "gradients": int(states.gradients),
                    "optimizer": int(states.optimizer),
                }
                rows.append(PlanRow(strategy.note, int(states.device), parts, bound=True))
            else:
                estimate = self.simulator.run(self.workload, strategy)
                rows.append(self._row(strategy.note, estimate))
                if strategy.lora and strategy.gradient_checkpointing and estimate.report is not None:
                    rows += [
                        PlanRow(label, needs, {}, host, bound=bound)
                        for label, needs, host, bound in rivals_by_arithmetic(
                            facts, estimate.report, self.workload.dtype
                        )
                    ]
        return rows

    def _papers_schedule(self, setting: Setting) -> PlanRow:
        """Return the row of `setting` with the paper's schedule instead, which streams no weights; states of frozen layers on
        the host."""
        block = {key: value for key, value in setting.block.items() if key != "frozen_weights"}
        block["freeze"] = {**block["freeze"], "policy": "ils"}
        block["optimizer_states"] = {**block.get("optimizer_states", {}), "inactive": "host"}
        estimate = self._worst(self.workload, self.strategy.with_(slimfit=block))
        label = f"the paper's schedule (policy ils), {setting.label.partition(', frozen weights and states on host')[0]}"
        return self._row(label, estimate, setting.gradient_error)

    def _what_is_missing(self, choice: Choice) -> list[str]:
        least, workload = choice.smallest, self.workload
        needs = least.estimate.peak
        missing = human_bytes(needs - self.budget)
        lines = [
            f"nothing fits: the leanest setting ({least.label}) needs {human_bytes(needs)}: {missing} are missing",
            f"it fits a GPU of {(needs + self.reserve) / 1e9:.1f}GB",
        ]
        if workload.batch > 1 or workload.seq > 128:
            smaller = Workload(**{**workload.to_dict(), "batch": 1, "seq": min(workload.seq, 128)})
            trial = self._worst(smaller, self.strategy.with_(slimfit=least.block))
            if trial.report is not None:
                verdict = "fits" if trial.peak <= self.budget else "does not fit either"
                needs_then = human_bytes(trial.peak)
                lines.append(f"with batch 1 and {smaller.seq} tokens it needs {needs_then}, which {verdict}")
        return lines

    def _write(self, choice: Choice, setting: Setting) -> tuple[Path, ...]:
        """Write the recipe and the DeepSpeed JSON that it names."""
        arguments = self.arguments
        task = self.workload.resolved_task(load_config(arguments.model))
        file = Path(arguments.model).expanduser()
        deepspeed = {"zero_optimization": self.strategy.zero_block(), "slimfit": setting.block}
        values: dict[str, Any] = {
            # The Trainer of language models has a max_length of its own.
            "task": {
                "name": task,
                **({} if task in ("image_classification", "causal_lm") else {"max_length": arguments.seq}),
            },
            **({"max_length": arguments.seq} if task == "causal_lm" else {}),
            # A hub id or folder as it is; a single file becomes a model to initialise.
            "model": {"config": json.loads(file.read_text())} if file.is_file() else arguments.model,
            "data_dir": None,
            "max_steps": 1000,
            "per_device_train_batch_size": arguments.batch,
            "learning_rate": 5e-5,
            **{name: arguments.dtype == name for name in ("bf16", "fp16")},
            "deepspeed": "ds_config.json",
        }
        header = (
            f"# Written by slimfit-ds plan for {arguments.gpus} GPU(s) of {arguments.gpu_memory}.\n"
            f"# {choice.reason(self.budget)}\n"
            "# Set data_dir (or data) and what else your task needs.\n"
        )
        write_atomically(self.files[0], json.dumps(deepspeed, indent=2) + "\n")
        write_atomically(self.files[1], header + yaml.safe_dump(values, sort_keys=False))
        return self.files


def _table(rows: Sequence[PlanRow], title: str, caption: str, budget: int) -> Table:
    """Return a rich table of settings; the chosen one is marked."""
    from rich.table import Table

    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    left = ("setting", "gradient error")
    numbers = ("needs", "weights", "gradients", "optimizer", "saved", "rest", "on host")
    for name in ("setting", *numbers, "gradient error", "fits", "speed"):
        table.add_column(name, justify="left" if name in left else "right", overflow="fold")
    for row in rows:
        if row.needs is None:
            table.add_row(row.label, "?", *[""] * 6, row.error, "", "", style="red")
            continue
        fits = row.needs <= budget
        saved = sum(size for kind, size in row.parts.items() if kind.startswith("saved_activations"))
        parts = [*(row.parts.get(kind, 0) for kind in ("parameters", "gradients", "optimizer")), saved]
        table.add_row(
            ("-> " if row.chosen else "") + row.label,
            (">= " if row.bound else "") + human_bytes(row.needs),
            *("" if (row.bound or not row.parts) and not part else human_bytes(part) for part in parts),
            "" if row.bound or not row.parts else human_bytes(row.needs - sum(parts)),
            human_bytes(row.host) if row.host else "",
            row.error,
            "yes" if fits else "no",
            row.speed.removeprefix("about "),
            style="bold green" if row.chosen else ("" if fits else "dim"),
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
