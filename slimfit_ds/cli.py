"""The console script `slimfit-ds`: sub-commands that share their code with `launch/`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "train": ("slimfit_ds.training.cli:main", "fine-tune as a recipe says"),
    "compare": (
        "slimfit_ds.comparison.cli:main",
        "run one recipe by several methods and tabulate memory and speed",
    ),
    "report": ("slimfit_ds.report.cli:main", "draw which layers of a run trained at which step"),
    "plan": ("slimfit_ds.planner.cli:main", "what a setting would need, without running it"),
    "doctor": ("slimfit_ds.doctor:main", "check this machine, or all ranks together, before a run"),
    "export": ("slimfit_ds.engine.export:main", "the weights of a checkpoint as one safetensors file"),
}
"""Where each sub-command stands and what it does; imported when it is called."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sub-command that the first argument names.

    Returns:
        its exit code; 2 if there is no such command.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    listing = "\n".join(f"  {name:10} {purpose}" for name, (_, purpose) in COMMANDS.items())
    usage = f"usage: slimfit-ds COMMAND [arguments]\n\ncommands:\n{listing}\n\nslimfit-ds COMMAND --help says more"
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage)
        return 0 if arguments else 2
    if arguments[0] not in COMMANDS:
        print(f"slimfit-ds: unknown command {arguments[0]!r}\n{usage}", file=sys.stderr)
        return 2
    module, _, function = COMMANDS[arguments[0]][0].partition(":")
    return getattr(import_module(module), function)(arguments[1:])


if __name__ == "__main__":
    sys.exit(main())
