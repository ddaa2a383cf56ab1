"""`slimfit-ds compare --config recipe.yaml`, also behind `launch/compare.py`."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["main"]

EXAMPLES = """examples:
  slimfit-ds compare --config recipes/digits_vit.yaml --ranks 2 --strategies full,slimfit
  slimfit-ds compare --config recipes/digits_vit.yaml --steps 40 --gpu-memory 24GB,80GB
  slimfit-ds compare --config recipes/minilm_sst2.yaml --strategies zero2,zero2_default,minimal train_batch_size=16
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Compare methods on one recipe.

    Args:
        argv: the arguments after the program's name; None: those of this process.

    Returns:
        the exit code: 0; 1 if no method ran; 2 if the arguments or the recipe are wrong.
    """
    arguments = _parser().parse_intermixed_args(argv)
    from rich.console import Console

    from slimfit_ds.comparison.runner import Comparison, compare
    from slimfit_ds.report.comparison_report import comparison_table, write_comparison

    what, problems = _read(arguments)
    if what is None:
        print("\n".join(["slimfit-ds compare:", *(f"  {line}" for line in problems)]), file=sys.stderr)
        return 2
    assert isinstance(what, Comparison)
    console = Console(width=None if sys.stdout.isatty() else 200)
    outcomes = compare(what, progress=lambda text: console.print(text, highlight=False, markup=False))
    title = f"{Path(what.config).stem}: {len(outcomes)} methods on {what.ranks} ranks"
    facts = {
        "recipe": str(what.config),
        "overrides": list(what.overrides),
        "ranks": what.ranks,
        "warm-up steps": what.warmup,
        "tracked steps": what.tracked,
        "command": " ".join(["slimfit-ds compare", *(argv if argv is not None else sys.argv[1:])]),
    }
    paths = write_comparison(outcomes, what.output, title, facts)
    console.print(comparison_table(outcomes, title))
    console.print(f"written: {', '.join(str(path) for path in paths.values())}", highlight=False)
    return 0 if any(outcome.ok for outcome in outcomes) else 1


def _parser() -> argparse.ArgumentParser:
    from slimfit_ds.comparison.methods import DEFAULT_METHODS, METHODS

    parser = argparse.ArgumentParser(
        prog="slimfit-ds compare",
        description="Run one recipe by several methods, each in its own processes, and compare memory and speed.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, help="the recipe, a YAML file")
    parser.add_argument("--ranks", type=int, default=2, help="processes of each run (2)")
    parser.add_argument(
        "--strategies", default=",".join(DEFAULT_METHODS), help=f"comma-separated, of: {', '.join(METHODS)}"
    )
    parser.add_argument("--steps", type=int, help="optimizer steps of each run; default: those of the recipe")
    parser.add_argument(
        "--warmup", type=int, default=2, help="first steps that do not count for the time (2)"
    )
    parser.add_argument("--tracked", type=int, default=3, help="last steps whose memory is tracked (3)")
    parser.add_argument("--gpu-memory", help="GPU sizes to count for, such as 24GB,80GB")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for each method (3600)")
    parser.add_argument(
        "--output", help="folder for everything; default: outputs/compare-RECIPE, emptied first"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="fields of the recipe, for every method"
    )
    return parser


def _read(arguments: argparse.Namespace):
    """The comparison, or None and all problems at once."""
    from slimfit_ds.comparison.methods import get_method
    from slimfit_ds.comparison.runner import Comparison
    from slimfit_ds.errors import ConfigError, parse_bytes
    from slimfit_ds.training.recipe import read_recipe

    problems: list[str] = []
    methods, sizes = [], []
    for name in dict.fromkeys(part.strip() for part in arguments.strategies.split(",") if part.strip()):
        try:
            methods.append(get_method(name))
        except ValueError as error:
            problems.append(str(error))
    if not methods and not problems:
        problems.append("strategies: name at least one")
    for label in (arguments.gpu_memory or "").split(","):
        if label.strip():
            try:
                sizes.append((label.strip(), parse_bytes(label)))
            except ValueError as error:
                problems.append(f"gpu-memory {error}")
    least = {"ranks": 1, "warmup": 0, "tracked": 1}
    for key, minimum in least.items():
        if getattr(arguments, key) < minimum:
            problems.append(f"{key} must be at least {minimum}, got {getattr(arguments, key)}")
    overrides = list(arguments.overrides)
    if arguments.steps is not None:
        if arguments.steps < 1:
            problems.append(f"steps must be at least 1, got {arguments.steps}")
        overrides.append(f"max_steps={arguments.steps}")
    try:
        problems += read_recipe(arguments.config, overrides).problems
    except ConfigError as error:
        problems += error.problems
    owned = Path("outputs") / f"compare-{Path(arguments.config).stem}"
    output = Path(arguments.output) if arguments.output else owned
    if arguments.output and output.exists() and any(output.iterdir() if output.is_dir() else [output]):
        problems.append(f"output: {str(output)!r} is not empty; name another folder, or remove it yourself")
    if problems:
        return None, problems
    if output == owned and output.exists():
        shutil.rmtree(output)
    output.mkdir(parents=True, exist_ok=True)
    comparison = Comparison(
        config=arguments.config,
        methods=methods,
        output=output,
        ranks=arguments.ranks,
        overrides=overrides,
        warmup=arguments.warmup,
        tracked=arguments.tracked,
        gpu_memory=tuple(sizes),
        timeout=arguments.timeout,
    )
    return comparison, problems


if __name__ == "__main__":
    sys.exit(main())
