"""The console script `slimfit-ds`: sub-commands that share their code with `launch/`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from importlib import import_module

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "train": ("slimfit_ds.train:main", "fine-tune as a recipe says"),
    "compare": (
        "slimfit_ds.comparison.cli:main",
        "run one recipe by several strategies: memory, speed, traffic",
    ),
    "report": ("slimfit_ds.report.cli:main", "draw which layers of a run trained at which step"),
    "plan": ("slimfit_ds.planner.cli:main", "what a setting would need, without running it"),
    "doctor": ("slimfit_ds.doctor:main", "check this machine, or all ranks together, before a run"),
    "export": ("slimfit_ds.engine.export:main", "the weights of a checkpoint as one safetensors file"),
    "merge": ("slimfit_ds.deltas.merge:main", "a base and what trained, as plain transformers loads it"),
    "adapter": ("slimfit_ds.deltas.adapter:main", "what trained as a LoRA adapter that plain peft loads"),
}
"""Command -> its function and what it does; imported when it is called."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sub-command that the first argument names.

    Returns:
        Its exit code; 2 if there is no such command.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser("slimfit-ds", epilog="slimfit-ds COMMAND --help says more")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (_, purpose) in COMMANDS.items():
        commands.add_parser(name, help=purpose)
    for library in ("torchao", "torch.utils._pytree"):
        # They report kernels of other platforms when transformers merely looks whether torchao is there.
        logging.getLogger(library).setLevel(logging.ERROR)
    module, _, function = COMMANDS[parser.parse_args(arguments[:1]).command][0].partition(":")
    return getattr(import_module(module), function)(arguments[1:])


if __name__ == "__main__":
    sys.exit(main())
