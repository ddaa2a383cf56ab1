"""`slimfit-ds plan --model NAME --gpu 4090`: what settings need and how fast they could be, and a recipe for one that fits."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from slimfit_ds.errors import ConfigError, parse_bytes
from slimfit_ds.files import folder_for_writing, write_atomically
from slimfit_ds.planner.longest import longest_rows, longest_table
from slimfit_ds.planner.rivals import rivals_by_arithmetic
from slimfit_ds.planner.rows import PlanRow, page, table
from slimfit_ds.planner.search import Choice, Setting, find_setting, label_of
from slimfit_ds.planner.simulate import Estimate, Simulator
from slimfit_ds.planner.speed import CARDS, Card, Speed, card_for, card_here, card_named, speed
from slimfit_ds.planner.strategies import STRATEGIES, Strategy, zero_states
from slimfit_ds.planner.workload import DTYPES, TASKS, ModelNotFound, Workload, load_config
from slimfit_ds.report.units import human_bytes

__all__ = ["add_arguments", "main", "run"]

DESCRIPTION = "What a model needs for fine-tuning, what fits a GPU, and a recipe for it. Runs without a GPU."
EXAMPLES = """examples:
  slimfit-ds plan --model meta-llama/Meta-Llama-3-8B --gpu 4090 --batch 1 --seq 2048
  slimfit-ds plan --model my_model/config.json --gpu-memory 16GiB --batch 32 --seq 128 --task sequence_classification
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    add = parser.add_argument
    add("--model", required=True, help="hub id, folder, or config.json")
    add(
        "--gpu",
        "--card",
        help=f"{', '.join(CARDS).lower()}: its memory and assumed speed; default: the GPU that is here",
    )
    add("--gpu-memory", help="of one GPU, instead of the card's: 24GB (10^9), 24GiB (2^30)")
    add("--gpus", type=int, default=1, help="number of GPUs (1)")
    add("--batch", type=int, default=1, help="samples per GPU and optimizer step (1)")
    add("--seq", type=int, default=512, help="tokens per sample (512)")
    add("--task", default="auto", help=f"auto or one of {', '.join(TASKS)}")
    add("--dtype", default="bf16", help="bf16, fp16 or fp32 (bf16)")
    add("--image-size", type=int, help="pixels per side, for image models")
    add("--stage", type=int, help="ZeRO stage of the SlimFit settings (1; 0 on one GPU)")
    reserved = "kept free for what is not simulated: CUDA context, fragmentation, kernels' workspaces (600MB)"
    add("--reserve", default="600MB", help=reserved)
    add("--tflops", type=float, help="peak of dense bf16 products instead of the card's, 10^12 per second")
    add("--link", type=float, help="peak from host to device instead of the card's, 10^9 bytes per second")
    add("--efficiency", type=float, help="share of --tflops that a step reaches (0.5, assumed)")
    add("--link-efficiency", type=float, help="share of --link that copies reach (0.8, assumed)")
    longest = (
        "find the longest sequence that fits, for each method, instead of a setting for --seq; writes nothing"
    )
    add("--longest", action="store_true", help=longest)
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
        if arguments.longest:
            plan.longest()
            return 0
        with folder_for_writing(plan.folder):
            plan.go()
    except (ConfigError, OSError) as error:
        problems = error.problems if isinstance(error, ConfigError) else [str(error)]
        lines = [line for problem in problems for line in problem.splitlines()]
        print("\n".join(["slimfit-ds plan:", *(f"  {line}" for line in lines)]), file=sys.stderr)
        return 2
    return 0


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

        card = self._card(arguments, problems)
        self.memory = size("gpu-memory", arguments.gpu_memory) if arguments.gpu_memory else int(card.memory)
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
        self.files = tuple(
            self.folder / name for name in ("ds_config.json", "recipe.yaml", "plan.json", "plan.html")
        )
        if not arguments.overwrite:
            there = [] if arguments.longest else [path for path in self.files if path.exists()]
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
        self.started = time.monotonic()
        task = self.workload.resolved_task(load_config(arguments.model))
        self.images = task == "image_classification"
        stage = arguments.stage if arguments.stage is not None else (1 if arguments.gpus > 1 else 0)
        self.strategy = Strategy("slimfit", stage=stage)
        if not arguments.gpu and arguments.gpu_memory:
            card = card_for(self.memory)
        self.card = card.with_(
            flops=arguments.tflops and arguments.tflops * 1e12,
            link=arguments.link and arguments.link * 1e9,
            efficiency=arguments.efficiency,
            link_efficiency=arguments.link_efficiency,
        )

    @staticmethod
    def _card(arguments: argparse.Namespace, problems: list[str]) -> Card:
        """Return the card that is named or here; any card if the memory is given."""
        here = None if arguments.gpu else card_here()
        if arguments.gpu:
            found = card_named(arguments.gpu)
            if found is None:
                known = ", ".join(CARDS).lower()
                problems.append(
                    f"gpu must be one of {known}, got {arguments.gpu!r}; or give --gpu-memory 24GB"
                )
        elif here is None and not arguments.gpu_memory:
            problems.append("gpu: there is none here; name one, --gpu 4090, or its memory, --gpu-memory 24GB")
            found = None
        else:
            found = here
        return found or CARDS["4090"]

    def go(self) -> None:
        """Simulate, print the table, write the files.

        Raises:
            ConfigError: nothing fits: what is missing, and what would fit.
        """
        from rich.console import Console

        console = Console(width=None if sys.stdout.isatty() else 150)
        arguments = self.arguments
        if self.budget <= 0:
            kept = human_bytes(self.reserve)
            raise ConfigError([f"nothing fits: the GPU is smaller than the {kept} kept free (--reserve)"])
        gpus = arguments.gpus
        with Simulator(gpus, deep=True, processes=2) as self.simulator, ThreadPoolExecutor(2) as beside:
            self._say("reading the model")
            try:
                facts = self.simulator.inspect(self.workload)
            except ValueError as error:
                raise ConfigError([str(error)]) from None
            others = None if arguments.slimfit_only else beside.submit(self._others, facts)
            choice = find_setting(
                self.budget,
                self.workload,
                self._worst,
                embeddings=tuple(facts["embeddings"]),
                strategy=self.strategy,
                language_model=facts["loss_in_chunks"],
                beside=beside,
            )
            rows = others.result() if others is not None else []
            rows += [
                self._row(f"SlimFit {s.label}", s.estimate, s.gradient_error, s is choice.setting, ours=True)
                for s in choice.tried
            ]
            title, caption = self._title(), self._caption(facts)
            unit = "images/s" if self.images else "tokens/s"
            console.print(table(rows, title, caption, self.budget, unit))
            if choice.setting is None:
                raise ConfigError(self._what_is_missing(choice))
        texts = [*self._recipe(choice, choice.setting), self._json(facts, rows, choice.setting)]
        texts.append(page(rows, title, caption, self.budget, unit))
        for path, text in zip(self.files, texts, strict=True):
            write_atomically(path, text)
        recipe = self.files[1]
        console.print(
            f"written: {', '.join(str(path) for path in self.files)}\n"
            f"{choice.reason(self.budget)}\nexpected gradient error: {choice.setting.gradient_error}\n"
            f"{self._speed_text(choice.setting.estimate)} (assumed, not measured)\n"
            f"run: deepspeed --num_gpus {gpus} --module slimfit_ds.train --config {recipe} data_dir=YOUR_DATA",
            highlight=False,
        )

    def longest(self) -> None:
        """Print the longest sequence of each method.

        Raises:
            ConfigError: the model cannot be built, or has no sequence.
        """
        from rich.console import Console

        if self.images:
            raise ConfigError(["longest: images have no length to search for"])
        with Simulator(self.arguments.gpus, deep=True) as self.simulator:
            self._say("reading the model")
            try:
                facts = self.simulator.inspect(self.workload)
            except ValueError as error:
                raise ConfigError([str(error)]) from None
            stage, rivals = self.strategy.stage or 0, not self.arguments.slimfit_only
            found = list(longest_rows(self._worst, self.workload, facts, stage, self.budget, rivals))
        title = self._title().replace(f" x {self.arguments.seq}", ", longest sequence")
        Console(width=None if sys.stdout.isatty() else 150).print(longest_table(found, title))

    def _say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.started:3.0f} s] {text}", file=sys.stderr, flush=True)

    def _title(self) -> str:
        arguments = self.arguments
        memory = arguments.gpu_memory or f"{self.memory / 1e9:g}GB"
        name = f"{self.card.name}, {memory}" if arguments.gpu or not arguments.gpu_memory else memory
        seq = "" if self.images else f" x {arguments.seq}"
        return f"{arguments.model}: batch {arguments.batch}{seq} on {arguments.gpus} GPU(s) ({name})"

    def _caption(self, facts: dict[str, Any]) -> str:
        return (
            f"{facts['parameters']:,} parameters, {facts['layers']} layers, {self.arguments.dtype}. Memory: simulated on fake "
            f"tensors; {human_bytes(self.reserve)} kept free for what is not simulated. Settings of SlimFit in the order of "
            "the ladder, fastest first. Speed: no measurement, but the step's matrix "
            f"products at {self.card.flops / 1e12:g} TFLOP/s x {self.card.efficiency:g} ({self.card.name}) or its bytes over "
            f"a link of {self.card.link / 1e9:g} GB/s x {self.card.link_efficiency:g}, whichever takes longer."
        )

    def _worst(self, workload: Workload, strategy: Strategy) -> Estimate:
        return self._simulate(workload, strategy, "worst")

    def _simulate(self, workload: Workload, strategy: Strategy, active: str = "expected") -> Estimate:
        found = self.simulator.run(workload, strategy, active)
        needs = found.error if found.report is None else human_bytes(found.peak)
        name = f"SlimFit {label_of(strategy.slimfit)}" if strategy.slimfit is not None else strategy.note
        self._say(f"{name}: {needs}")
        return found

    def _row(
        self, label: str, estimate: Estimate, error: str = "none", chosen: bool = False, ours: bool = False
    ) -> PlanRow:
        report = estimate.report
        if report is None:
            return PlanRow(label, None, error=estimate.error, ours=ours)
        return PlanRow(
            label,
            report.peak,
            report.at_peak,
            report.host,
            error,
            ours=ours,
            chosen=chosen,
            speed=self._speed(estimate.flops, estimate.copied),
        )

    def _speed(self, flops: float, copied: float) -> Speed | None:
        """What a step of this rank could reach; of images a sample is one."""
        count = self.arguments.batch * (1 if self.images else self.arguments.seq)
        return speed(flops, copied, count, self.card) if flops else None

    def _speed_text(self, estimate: Estimate) -> str:
        text = str(self._speed(estimate.flops, estimate.copied))
        return text.replace("tokens/s", "images/s") if self.images else text

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
                estimate = self._simulate(self.workload, strategy)
                rows.append(self._row(strategy.note, estimate))
                if strategy.lora and strategy.gradient_checkpointing and estimate.report is not None:
                    rows += [
                        PlanRow(
                            rival.label,
                            rival.needs,
                            host=rival.host,
                            bound=rival.bound,
                            speed=self._speed(estimate.flops, rival.copied) if rival.as_lora else None,
                        )
                        for rival in rivals_by_arithmetic(facts, estimate.report, self.workload.dtype)
                    ]
        return rows

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

    def _json(self, facts: dict[str, Any], rows: Sequence[PlanRow], setting: Setting) -> str:
        content = {
            "title": self._title(),
            "budget": self.budget,
            "reserve": self.reserve,
            "card": asdict(self.card),
            "model": facts,
            "rows": [row.to_dict(self.budget) for row in rows],
            "slimfit": setting.block,
        }
        return json.dumps(content, indent=2) + "\n"

    def _recipe(self, choice: Choice, setting: Setting) -> tuple[str, str]:
        """Return the DeepSpeed JSON, and the recipe that names it."""
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
            f"# Written by slimfit-ds plan for {arguments.gpus} GPU(s) of {self.memory / 1e9:g}GB.\n"
            f"# {choice.reason(self.budget)}\n"
            "# Set data_dir (or data) and what else your task needs.\n"
        )
        return json.dumps(deepspeed, indent=2) + "\n", header + yaml.safe_dump(values, sort_keys=False)


if __name__ == "__main__":
    sys.exit(main())
