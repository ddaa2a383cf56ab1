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
    "headline_memory",
    "engine_vs_stock",
    "ddp_freezing",
    "bytes",
    "held_out_loss",
    "decoder",
    "summary",
    "zoo",
)


PRINTED = {"fidelity-problems", "fidelity-adapters", "zoo-reasons"}
"""Too long for a page: the programs print them."""


def gradient_error() -> str:
    """Return whole and worst matrix of `gradient_error.csv`, a line for each model and setting."""
    lines, presets = [], ("paper", "balanced", "minimal", "ultra")
    rows = Study("gradient_error", ()).rows()
    settings = ("model", "batch", "steps", "frozen", "planted")
    for key in dict.fromkeys(tuple(row[name] for name in settings) for row in rows):
        of = {row["preset"]: row for row in rows if tuple(row[name] for name in settings) == key}
        cells = [f"{of[p]['whole']:.3f} ({of[p]['worst']:.2f})" if p in of else "" for p in presets]
        noise = f"{of['two batches']['whole']:.1f}" if "two batches" in of else ""
        model, batch, steps, frozen, planted = key
        how = [*([batch] if batch != "task" else []), *([f"after {steps} steps"] if steps else [])]
        how += [
            *([f"{frozen:.0%} frozen"] if frozen else []),
            *([f"planted {planted:,.0f}"] if planted else []),
        ]
        lines.append([model, ", ".join(how), *cells, noise])
    return markdown(["model", "setting", *presets, "two batches"], lines)


def all_tables() -> dict[str, str]:
    """Return Markdown by mark, of all programs."""
    found = {mark: text for name in PROGRAMS for mark, text in importlib.import_module(name).tables().items()}
    found = {mark: text for mark, text in found.items() if mark not in PRINTED}
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
