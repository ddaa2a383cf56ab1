"""`slimfit-ds train --config recipe.yaml key=value ...`, also behind `launch/train.py`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slimfit_ds.training.distributed import Ranks
    from slimfit_ds.training.endings import RunEnding

__all__ = ["main"]

EXAMPLES = """examples:
  python launch/train.py --config recipes/digits_vit.yaml
  python launch/train.py --config recipes/minilm_cola.yaml data_dir=../shared/data/cola max_steps=60
  deepspeed --num_accelerators 2 launch/train.py --config recipes/digits_vit.yaml slimfit.freeze.rate=0.95
  torchrun --nproc_per_node 2 launch/train.py --config recipes/digits_vit.yaml slimfit=null
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Train one recipe.

    Args:
        argv: the arguments after the program's name; None: those of this process.

    Returns:
        the exit code: 0, 2 if the recipe is wrong, or that of one of `training.endings`.
    """
    parser = argparse.ArgumentParser(
        prog="slimfit-ds train",
        description="Fine-tune a model as a recipe says, with most layers frozen at each step.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", help="the recipe, a YAML file", required=True)
    # The deepspeed launcher hands this to every script; the environment says the same.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="fields of the recipe, dots for inner ones"
    )
    arguments = parser.parse_intermixed_args(argv)

    from slimfit_ds.errors import ConfigError
    from slimfit_ds.training.distributed import Ranks
    from slimfit_ds.training.endings import RunEnding
    from slimfit_ds.training.recipe import read_recipe
    from slimfit_ds.training.run import train

    ranks = Ranks()
    try:
        ranks = _ranks()
        result = train(read_recipe(arguments.config, arguments.overrides), ranks)
    except ConfigError as error:
        if ranks.is_main:
            print(describe(error.problems, arguments.config), file=sys.stderr)
        return 2
    except RunEnding as ending:
        return _end(ending, ranks)
    _leave()
    if ranks.is_main:
        print(summary(result))
    return 0


def _ranks() -> Ranks:
    from slimfit_ds.errors import ConfigError
    from slimfit_ds.training.distributed import read_ranks

    try:
        return read_ranks()
    except ValueError as error:
        raise ConfigError([str(error)]) from None


def _end(ending: RunEnding, ranks: Ranks) -> int:
    """Tell why a run ended early; the exit code."""
    if ranks.is_main or not ending.everywhere:
        print(ending, file=sys.stderr, flush=True)
    if not ending.everywhere:
        # Leaving the process group would wait for the rank that is gone.
        sys.stdout.flush()
        os._exit(ending.exit_code)
    _leave()
    return ending.exit_code


def _leave() -> None:
    """Leave the process group, where one was made: torch complains of processes that just end."""
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def describe(problems: list[str], place: str | None) -> str:
    """The problems as the command line prints them."""
    count = f"{len(problems)} problem" + ("s" if len(problems) != 1 else "")
    where = f" in {place}" if place else ""
    return "\n".join([f"{count}{where}:", *(f"  - {problem}" for problem in problems)])


def summary(result: dict[str, Any]) -> str:
    """The numbers of a run in a few lines."""
    metrics = "  ".join(
        f"{name} {value:.4f}" for name, value in result["metrics"].items() if value is not None
    )
    speed = result["seconds_per_step"]
    return "\n".join(
        [
            metrics,
            f"{result['steps']} steps on {result['world_size']} ranks ({result['launcher']}), "
            f"{speed:.3f} s per step, peak {result['peak_bytes'] / 2**30:.2f} GiB ({result['peak_bytes_are']})",
            f"results in {result['output_dir']}",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
