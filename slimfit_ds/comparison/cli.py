"""`slimfit-ds compare --config recipe.yaml`: one recipe by several strategies, side by side."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from slimfit_ds.comparison.runner import Comparison, compare, overrides_of
from slimfit_ds.errors import ConfigError, parse_bytes
from slimfit_ds.planner.strategies import STRATEGIES, get_strategy

__all__ = ["add_arguments", "main", "run"]

DEFAULT_STRATEGIES = ("full", "gradient_checkpointing", "lora", "balanced", "minimal", "balanced_ils")
DESCRIPTION = "Run one recipe by several strategies, each in processes of its own, and compare memory, speed and traffic."
EXAMPLES = """examples:
  slimfit-ds compare --config recipes/digits_vit.yaml --ranks 2 --strategies full,slimfit
  slimfit-ds compare --config recipes/digits_vit.yaml --steps 40 --gpu-memory 24GB,80GB
  slimfit-ds compare --config recipes/minilm_sst2.yaml --strategies zero2,zero2_default,minimal learning_rate=1e-4
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    add = parser.add_argument
    add("--config", required=True, help="the recipe, a YAML file")
    add("--ranks", type=int, default=2, help="processes of each run (2)")
    add("--strategies", default=",".join(DEFAULT_STRATEGIES), help=f"with commas: {', '.join(STRATEGIES)}")
    add("--steps", type=int, help="optimizer steps of each run; default: those of the recipe")
    add("--warmup", type=int, default=2, help="first steps that do not count for the time (2)")
    add("--tracked", type=int, default=3, help="last steps whose memory is tracked (3)")
    add("--gpu-memory", default="", help="GPU sizes to count for, such as 24GB,80GB")
    add("--timeout", type=float, default=3600, help="seconds for each strategy (3600)")
    add("--output", help="folder for everything; default: outputs/compare-RECIPE, emptied first")
    add("overrides", nargs="*", metavar="key=value", help="fields of the recipe, for every strategy")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command as a program of its own; see `run`."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "slimfit-ds compare", None, DESCRIPTION, EXAMPLES, formatter_class=formatter
    )
    add_arguments(parser)
    return run(parser.parse_intermixed_args(argv))


def run(arguments: argparse.Namespace) -> int:
    """Compare strategies on one recipe.

    Returns:
        The exit code: 0; 1 if no strategy ran; 2 if the arguments or the recipe are wrong.
    """
    from rich.console import Console

    from slimfit_ds.comparison.report import comparison_table, write_comparison

    try:
        what = _read(arguments)
    except ConfigError as error:
        print("\n".join(["slimfit-ds compare:", *(f"  {line}" for line in error.problems)]), file=sys.stderr)
        return 2
    console = Console(width=None if sys.stdout.isatty() else 200)
    outcomes = compare(what, progress=lambda text: console.print(text, highlight=False, markup=False))
    title = f"{Path(what.config).stem}: {len(outcomes)} strategies on {what.ranks} ranks"
    facts = {
        "recipe": str(what.config),
        "overrides": " ".join(what.overrides),
        "ranks": what.ranks,
        "warm-up steps": what.warmup,
        "tracked steps": what.tracked,
    }
    paths = write_comparison(outcomes, what.output, title, facts)
    console.print(comparison_table(outcomes, title))
    console.print(f"written: {', '.join(str(path) for path in paths.values())}", highlight=False)
    return 0 if any(outcome.ok for outcome in outcomes) else 1


def _read(arguments: argparse.Namespace) -> Comparison:
    """Check the arguments and clear the output folder.

    Raises:
        ConfigError: all problems at once.
    """
    problems: list[str] = []
    strategies, sizes = [], []
    for name in dict.fromkeys(part.strip() for part in arguments.strategies.split(",") if part.strip()):
        try:
            strategies.append(get_strategy(name))
        except ValueError as error:
            problems.append(f"strategies: {error}")
    if not strategies and not problems:
        problems.append("strategies: name at least one")
    for label in filter(None, (part.strip() for part in arguments.gpu_memory.split(","))):
        try:
            sizes.append((label, parse_bytes(label)))
        except ValueError as error:
            problems.append(f"gpu-memory {error}")
    overrides = list(arguments.overrides)
    if arguments.steps is not None:
        overrides.append(f"max_steps={arguments.steps}")
    for key, minimum in {"ranks": 1, "steps": 1, "warmup": 0, "tracked": 1}.items():
        value = getattr(arguments, key)
        if value is not None and value < minimum:
            problems.append(f"{key} must be at least {minimum}, got {value}")
    try:
        overrides_of(STRATEGIES["full"], arguments.config, overrides)
    except ConfigError as error:
        problems += error.problems
    owned = Path("outputs") / f"compare-{Path(arguments.config).stem}"
    output = Path(arguments.output) if arguments.output else owned
    if arguments.output and output.exists() and any(output.iterdir() if output.is_dir() else [output]):
        problems.append(f"output: {str(output)!r} is not empty; name another folder, or remove it yourself")
    if problems:
        raise ConfigError(problems)
    if output == owned and output.exists():
        shutil.rmtree(output)
    output.mkdir(parents=True, exist_ok=True)
    return Comparison(
        config=arguments.config,
        strategies=strategies,
        output=output,
        ranks=arguments.ranks,
        overrides=overrides,
        warmup=arguments.warmup,
        tracked=arguments.tracked,
        gpu_memory=tuple(sizes),
        timeout=arguments.timeout,
    )


if __name__ == "__main__":
    sys.exit(main())
