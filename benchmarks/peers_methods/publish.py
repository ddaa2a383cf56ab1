"""Writes the tables into documents, between marks, so that no number there is typed by hand."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peers_methods.methods import METHODS
from peers_methods.tables import BRIEF, Row, estimated_table, ground, heading, rows_of, table
from peers_methods.workloads import CASES

__all__ = ["between_marks", "publish", "summary"]


def between_marks(text: str, name: str, block: str) -> str:
    """`text` with what stands between `<!-- NAME: begin -->` and `<!-- NAME: end -->` replaced.

    Raises:
        ValueError: the marks are not there, once each and in this order.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"wants {begin} and {end} once each, in this order")
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    return pattern.sub(lambda _: f"{begin}\n\n{block.strip()}\n\n{end}", text)


def summary(cases: Sequence[str], methods: Sequence[str], results: Mapping[str, Mapping[str, Any]]) -> str:
    """One row per method, one column per model: peak and time as shares of full fine-tuning's; the least is bold."""
    columns = {
        case: {row.method: _shares(row) for row in rows_of(case, methods, results, {})} for case in cases
    }
    columns = {case: column for case, column in columns.items() if any(column.values())}
    labels = [CASES[case].label for case in columns]
    lines = [_line(["peak / time, of full", *labels]), _line(["---", *["---:"] * len(labels)])]
    least = {
        case: [min(shares[place] for shares in column.values() if shares) for place in range(2)]
        for case, column in columns.items()
    }
    for method in methods:
        cells = []
        for case, column in columns.items():
            shares = column.get(method)
            texts = [f"{share:.2f}" for share in shares] if shares else []
            for place, text in enumerate(texts):
                # By what is printed: nobody is ahead by less than that.
                if text == f"{least[case][place]:.2f}":
                    texts[place] = f"**{text}**"
            cells.append(" / ".join(texts) if texts else "")
        if any(cells):
            lines.append(_line([METHODS[method].label, *cells]))
    return "\n".join(lines)


def _shares(row: Row) -> tuple[float, float] | None:
    if not row.ok or row.full is None:
        return None
    peak, time = row.ratio("peak"), row.time_ratio(row.clock)
    return (peak, time[0]) if peak is not None and time is not None else None


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def publish(
    document: Path,
    cases: Sequence[str],
    methods: Sequence[str],
    results: Mapping[str, Mapping[str, Any]],
    estimated: Mapping[str, Mapping[str, Any]],
    facts: Mapping[str, Any],
) -> None:
    """Fill those of the marks `peers-summary`, `peers-tables` and `peers-estimated` that the document has.

    Raises:
        ValueError: it has none.
    """
    blocks = {
        "peers-summary": lambda: ground(facts, results) + "\n\n" + summary(cases, methods, results),
        "peers-tables": lambda: heading(facts, results) + table(cases, methods, results, estimated, BRIEF),
        "peers-estimated": lambda: estimated_table(methods, estimated),
    }
    text = document.read_text()
    present = [name for name in blocks if f"<!-- {name}: begin -->" in text]
    if not present:
        raise ValueError(f"{document} has none of the marks {', '.join(blocks)}")
    for name in present:
        text = between_marks(text, name, blocks[name]())
    document.write_text(text)
