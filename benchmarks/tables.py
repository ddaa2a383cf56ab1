"""Write the tables of the documents from the CSVs of `benchmarks/results/`, so that no number there is typed by hand.

python benchmarks/tables.py            # into README.md and docs/*.md, between `<!-- NAME: begin -->` and `end`
python benchmarks/tables.py --check    # say which differ, change nothing; exit code 1 if one does
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from common import ROOT, Study, between_marks, markdown

sys.path += [str(Path(__file__).with_name(folder)) for folder in ("activations", "fidelity")]
PROGRAMS = (
    "peers",
    "largest_batch",
    "headline_memory",
    "estimate_vs_measured",
    "engine_vs_stock",
    "ddp_freezing",
    "scaling",
    "step_time_vs_full",
    "step_time",
    "bytes",
    "summary",
)


def gradient_error() -> str:
    """Return the mean (worst) relative error of `gradient_error.csv`."""
    lines, presets = [], ("paper", "balanced", "lean", "minimal", "ultra")
    rows = Study("gradient_error", ()).rows()
    for model in dict.fromkeys(row["model"] for row in rows):
        of = {
            p: [r["relative_error"] for r in rows if (r["model"], r["preset"]) == (model, p)] for p in presets
        }
        cells = [f"{sum(errors) / len(errors):.3f} ({max(errors):.3f})" for errors in of.values()]
        (noise,) = [r["relative_error"] for r in rows if (r["model"], r["preset"]) == (model, "two batches")]
        lines.append([model, *cells, f"{noise:.2f}"])
    return markdown(["model", *presets, "two batches"], lines)


def all_tables() -> dict[str, str]:
    """Return Markdown by mark, of all programs."""
    found = {mark: text for name in PROGRAMS for mark, text in importlib.import_module(name).tables().items()}
    return found | {"gradient-error": gradient_error()}


def differing(write: bool) -> list[str]:
    """Return `FILE: MARK` of the tables that differ from the CSVs, after writing them if asked for."""
    found, used = [], set()
    tables = all_tables()
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = path.read_text()
        for mark, table in tables.items():
            if f"<!-- {mark}: begin -->" not in text:
                continue
            used.add(mark)
            if between_marks(text, mark) != table.strip():
                found.append(f"{path.relative_to(ROOT)}: {mark}")
                text = between_marks(text, mark, table)
        if write:
            path.write_text(text)
    return found + [f"no document has the marks of {mark}" for mark in tables.keys() - used]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    found = differing(write=not arguments.check)
    print("\n".join(found) or "all tables are those of the CSVs")
    return int(bool(found) and arguments.check)


if __name__ == "__main__":
    sys.exit(main())
