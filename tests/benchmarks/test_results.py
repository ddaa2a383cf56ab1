"""The tables of the documents are those of the CSVs, and what is recorded holds what was promised."""

from __future__ import annotations

import pytest


def test_the_documents_have_the_tables_of_the_csvs():
    import tables

    assert tables.differing(write=False) == []


def test_estimates_are_within_5_percent_of_measurement():
    from common import Study
    from estimate_vs_measured import MODELS, STRATEGIES

    rows = Study("estimate_vs_measured", ()).rows()
    labels = {label for name, (label, _) in MODELS.items() if name != "tiny"}
    assert {(row["model"], row["strategy"]) for row in rows} == {(m, s) for m in labels for s in STRATEGIES}
    assert max(abs(row["difference_percent"]) for row in rows) <= 5


def test_a_table_that_differs_is_told_and_written(tmp_path, monkeypatch):
    import tables

    (tmp_path / "docs").mkdir()
    page = tmp_path / "README.md"
    page.write_text("before\n\n<!-- a: begin -->\n\n| 1 |\n\n<!-- a: end -->\n\nafter\n")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "all_tables", lambda: {"a": "| 2 |", "b": "| 3 |"})
    wrong = ["README.md: a", "no document has the marks of b"]
    assert tables.differing(write=False) == wrong
    assert tables.differing(write=True) == wrong
    assert page.read_text() == "before\n\n<!-- a: begin -->\n\n| 2 |\n\n<!-- a: end -->\n\nafter\n"
    page.write_text("<!-- a: begin --> no end")
    with pytest.raises(ValueError, match="once each"):
        tables.differing(write=False)
