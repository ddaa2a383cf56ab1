"""`slimfit-ds report RUN_DIR`: one page about a run that is finished or still going on."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

__all__ = ["main"]

EXAMPLES = """examples:
  slimfit-ds report outputs/digits_vit
  slimfit-ds report outputs/digits_vit --baseline outputs/digits_full --output page.html
  slimfit-ds report outputs/digits_vit --watch 10
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page.

    Args:
        argv: the arguments after the program's name; None: those of this process.

    Returns:
        the exit code: 0; 2 if a folder holds no run or the page cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog="slimfit-ds report",
        description="One self-contained HTML page about a run: curves, schedule, memory, time, a baseline beside it.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN_DIR", type=Path, help="output folder of a run, finished or not")
    parser.add_argument("--baseline", type=Path, help="output folder of a run to compare with")
    parser.add_argument("--output", type=Path, help="the HTML file; default: RUN_DIR/report.html")
    parser.add_argument(
        "--watch", type=int, metavar="SECONDS", help="write again every so often until the run has ended"
    )
    arguments = parser.parse_args(argv)

    from slimfit_ds.report.run_page import folder_problem, write_run_page

    problems = [
        f"{name}: {problem}"
        for name, folder in (("RUN_DIR", arguments.run), ("--baseline", arguments.baseline))
        if folder is not None and (problem := folder_problem(folder))
    ]
    if arguments.watch is not None and arguments.watch < 1:
        problems.append(f"--watch must be at least 1 second, got {arguments.watch}")
    output = arguments.output or arguments.run / "report.html"
    if output.is_dir():
        problems.append(
            f"--output: {str(output)!r} is a folder; name a file such as {output / 'report.html'}"
        )
    if problems:
        print("\n".join(["slimfit-ds report:", *(f"  - {problem}" for problem in problems)]), file=sys.stderr)
        return 2
    try:
        while True:
            status = write_run_page(arguments.run, output, arguments.baseline, arguments.watch)
            print(f"{status.text}; written: {output} ({output.stat().st_size / 1024:.0f} KiB)", flush=True)
            if arguments.watch is None or not status.live:
                return 0
            time.sleep(arguments.watch)
    except OSError as error:
        print(
            f"slimfit-ds report: cannot write {str(output)!r} ({error}); name another --output",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())
